"""What ranks tell each other beside gradients: sums, and whether something went wrong.

Messages are JSON in byte tensors; torch's own object collectives unpickle what peers send.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from verl_sft import errors
from verl_sft.distributed.setup import World
from verl_sft.errors import VerlSftError


def sum_over_ranks(values: list[float], *, world: World) -> list[float]:
    """Element-wise float64 sum over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(tensor)
    return list(tensor.tolist())


def gather_json(value: Any, *, world: World) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    data = data.to(world.device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=world.device) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=world.device))
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=world.device)
    padded[: len(data)] = data
    parts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded)
    pairs = zip(parts, sizes, strict=True)
    return [json.loads(bytes(p[: int(s)].cpu().tolist()).decode()) for p, s in pairs]


def from_main(value: Any, *, world: World) -> Any:
    """Rank 0's `value` on every rank."""
    return gather_json(value if world.is_main else None, world=world)[0]


@contextmanager
def together(world: World) -> Iterator[None]:
    """Run the body on every rank; if it failed on any, every rank raises that error.

    The first failing rank's error is the one raised, so only a user's mistake is shown, not the
    broken connections that follow from it. Collectives inside the body must not come after a point
    where a single rank can fail.
    """
    problem: dict[str, Any] | None = None
    caught: VerlSftError | None = None
    try:
        yield
    except VerlSftError as error:
        caught = error
        parts = {name: getattr(error, name) for name in ("what", "where", "why", "fix")}
        problem = {"kind": type(error).__name__, **parts}
    outcomes = gather_json(problem, world=world)
    first = next((o for o in outcomes if o is not None), None)
    if first is None:
        return
    if caught is not None and first == problem:
        caught.agreed = True
        raise caught
    kind = getattr(errors, first.pop("kind"), VerlSftError)
    if kind is errors.MissingExtraError:
        kind = errors.UsageError
    told = kind(first.pop("what"), **first)
    told.agreed = True
    raise told
