"""How many shapes oneDNN remembers: few, since packs have new ones in every step."""

from __future__ import annotations

from collections.abc import MutableMapping

# A kernel is made for one shape and kept for the next time, 1,024 of them by default and twice (by
# oneDNN and by what torch puts in front of it): 200 to 400 MiB that grow over the first hundred
# steps, small pieces that keep the heap around them from being given back. Layers of one
# micro-batch share shapes, so 64 are as fast; with none a small model is 1.8 times as slow.
CAPACITIES = {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


def bound_shape_caches(environment: MutableMapping[str, str]) -> None:
    """Set what is not set by the user; call it before the first matrix product of the process."""
    for name, capacity in CAPACITIES.items():
        environment.setdefault(name, capacity)
