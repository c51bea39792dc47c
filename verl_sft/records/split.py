"""Train and validation groups: by task, never by row, so that no game is on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Split:
    """Which groups go where; `note` explains a side that is empty."""

    train: frozenset[str]
    val: frozenset[str]
    note: str = ""

    @property
    def overlap(self) -> int:
        """The number of groups on both sides: 0."""
        return len(self.train & self.val)


def split_groups(groups: Mapping[str, str], *, val_fraction: float, seed: int) -> Split:
    """Divide groups into train and validation, stratified by task type.

    The number of validation groups is `val_fraction` of all, rounded; with two or more groups
    neither side is empty (unless the fraction is 0 or 1). Each task type gives its share (largest
    remainders), and within a type a hash of seed and group decides, so that the order in which
    groups come plays no part.

    Args:
        groups: group id -> task type.
        val_fraction: share of the groups to hold out, 0..1.
        seed: another seed holds out other groups.
    """
    total = len(groups)
    if val_fraction == 1:
        note = "val_fraction=1: all rows are for validation"
        return Split(frozenset(), frozenset(groups), note)
    if val_fraction == 0:
        return Split(frozenset(groups), frozenset(), "val_fraction=0: no validation rows")
    if total < 2:
        note = (
            f"{total} task was kept, and a task is never split: there are no validation rows. "
            "Two tasks are the least, or set val_fraction=0"
        )
        return Split(frozenset(groups), frozenset(), note)
    wanted = min(max(round(val_fraction * total), 1), total - 1)
    strata: dict[str, list[str]] = {}
    for group, kind in groups.items():
        strata.setdefault(kind, []).append(group)
    val: set[str] = set()
    for kind, count in _quotas({k: len(v) for k, v in strata.items()}, wanted, seed).items():
        val.update(sorted(strata[kind], key=lambda g: _rank(seed, g))[:count])
    return Split(frozenset(groups) - val, frozenset(val))


def _quotas(sizes: Mapping[str, int], wanted: int, seed: int) -> dict[str, int]:
    """`wanted` places dealt over strata in proportion to their sizes; the sum is exact.

    `{"a": 7, "b": 3}` with 3 places: shares 2.1 and 0.9, floors 2 and 0, the place left over goes
    to the larger remainder: `{"a": 2, "b": 1}`.
    """
    total = sum(sizes.values())
    quotas = {kind: wanted * size // total for kind, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda k: (-(wanted * sizes[k] % total), _rank(seed, k)))
    for kind in by_remainder[: wanted - sum(quotas.values())]:
        quotas[kind] += 1
    return quotas


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\x00{name}".encode("utf-8", "surrogatepass")).digest()
