"""The key-value cache of a batch of chats that grow, end and are joined by others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

_ROOM = 128  # columns allocated ahead, so that a new token does not copy all the old ones


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values `[B, heads, T, D]` in a buffer with room to grow."""

    def __init__(
        self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self._buffers: list[torch.Tensor] = []
        if keys is not None and values is not None:
            self.update(keys, values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, heads, new, D]`; returns all keys and values so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = int(self.get_seq_length())
        end = start + key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < end:
            self._buffers = [_with_room(new, old, end) for new, old in (
                (key_states, self._buffers[:1]), (value_states, self._buffers[1:]))]  # fmt: skip
        keys, values = self._buffers
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys: torch.Tensor = keys[:, :, :end]
        self.values: torch.Tensor = values[:, :, :end]
        return self.keys, self.values


def _with_room(like: torch.Tensor, old: list[torch.Tensor], columns: int) -> torch.Tensor:
    """A buffer for `columns` and some more, with what the old buffer held."""
    batch, heads, _, size = like.shape
    buffer = like.new_empty(batch, heads, columns + _ROOM, size)
    for held in old:
        buffer[:, :, : held.shape[2]] = held
    return buffer


class KVRows:
    """The key-value cache of a batch of chats of different lengths.

    A column of the cache is real for some rows and a hole for others; holes are masked, so every
    row sees exactly its own tokens at its own positions.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._names: list[str] = []
        self._ids: list[list[int]] = []
        self._cache = DynamicCache()  # of each layer keys and values [B, heads, T, D]
        self._real = torch.zeros((0, 0), dtype=torch.bool)  # [B, T]

    def select(self, names: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[int]:
        """Make the cache hold these chats, in order, cut back to what their prompts start with.

        Returns how many leading tokens of each prompt are held (at least one is always left).
        """
        old = {name: row for row, name in enumerate(self._names)}
        kept = []
        for name, prompt in zip(names, prompts, strict=True):
            held = self._ids[old[name]] if name in old else []
            kept.append(min(_common_prefix(held, prompt), len(prompt) - 1))
        width = max(kept)
        if width:
            pick = torch.zeros((len(names), width), dtype=torch.long)
            for row, (name, count) in enumerate(zip(names, kept, strict=True)):
                if count:
                    columns = self._real[old[name]].nonzero()[:count, 0]
                    pick[row, width - count :] = columns.cpu()
            rows = torch.tensor([old.get(name, 0) for name in names])[:, None]
            layers = [
                GrowingLayer(
                    layer.keys[rows, :, pick].transpose(1, 2),
                    layer.values[rows, :, pick].transpose(1, 2),
                )
                for layer in self._cache.layers
            ]
        else:
            layers = [GrowingLayer() for _ in range(self._model.config.num_hidden_layers)]
        self._cache = Cache(layers=layers)
        columns_left = torch.arange(width)[None, :]
        self._real = columns_left >= width - torch.tensor(kept)[:, None]
        self._names = list(names)
        self._ids = [list(p[:count]) for p, count in zip(prompts, kept, strict=True)]
        return kept

    def forward(self, feed: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read the next tokens of every chat (none for a finished one); logits `[B, V]`."""
        import torch

        width = max(1, max(len(tokens) for tokens in feed))
        ids = torch.zeros((len(feed), width), dtype=torch.long)
        real = torch.zeros((len(feed), width), dtype=torch.bool)
        position = torch.zeros((len(feed), width), dtype=torch.long)
        for row, tokens in enumerate(feed):
            if tokens:
                start = len(self._ids[row])
                ids[row, -len(tokens) :] = torch.tensor(tokens)
                real[row, -len(tokens) :] = True
                position[row, -len(tokens) :] = torch.arange(start, start + len(tokens))
                self._ids[row].extend(tokens)
        past = self._real.shape[1]
        self._real = torch.cat([self._real, real], dim=1)
        causal = torch.ones((width, past + width), dtype=torch.bool).tril(past)
        # A hole attends to itself: a query that sees nothing would be NaN and spread.
        itself = torch.eye(width, past + width, dtype=torch.bool).roll(past, dims=1)
        mask = (self._real[:, None, None, :] & causal) | itself
        device = self._model.device
        output = self._model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=position.to(device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits


def _common_prefix(held: Sequence[int], prompt: Sequence[int]) -> int:
    count = 0
    for a, b in zip(held, prompt, strict=False):
        if a != b:
            break
        count += 1
    return count
