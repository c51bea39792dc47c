"""Several stores as one: validation sets that are read by name and judged one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from verl_sft.data.kinds import SOURCE
from verl_sft.data.sample import TokenizedSample
from verl_sft.data.store import SampleStore


class JoinedStore:
    """The samples of named stores behind one another; sources are told apart across them."""

    def __init__(self, stores: Mapping[str, SampleStore]) -> None:
        self.stores = dict(stores)
        bounds = np.cumsum([0, *(len(store) for store in stores.values())])
        self._bounds = bounds
        self.ranges = {
            name: range(int(a), int(b))
            for name, a, b in zip(stores, bounds[:-1], bounds[1:], strict=True)
        }
        self.lengths: npt.NDArray[np.int64] = np.concatenate([s.lengths for s in stores.values()])
        self.groups = tuple(dict.fromkeys(g for s in stores.values() for g in s.groups))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        store, within = self._place(index)
        return self._renumbered(store[within], store)

    def input_ids(self, index: int) -> npt.NDArray[np.int32]:
        """As `SampleStore.input_ids`."""
        store, within = self._place(index)
        return store.input_ids(within)

    def _place(self, index: int) -> tuple[SampleStore, int]:
        place = int(np.searchsorted(self._bounds, index, side="right")) - 1
        return list(self.stores.values())[place], index - int(self._bounds[place])

    def units(self) -> npt.NDArray[np.int64]:
        """As `SampleStore.units`, counted through all stores."""
        found, first = [], 0
        for store in self.stores.values():
            units = store.units()
            found.append(units + first)
            first += int(units[-1]) + 1 if len(units) else 0
        return np.concatenate(found)

    def _renumbered(self, sample: TokenizedSample, store: SampleStore) -> TokenizedSample:
        """The sample with the number that its source has among the sources of all stores."""
        if sample.labels is None or store.groups == self.groups[: len(store.groups)]:
            return sample
        own = int(sample.labels[0]) // SOURCE
        moved = (self.groups.index(store.groups[own]) - own) * SOURCE
        return replace(sample, labels=sample.labels + np.int32(moved))
