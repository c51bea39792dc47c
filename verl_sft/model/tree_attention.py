"""Attention in token trees (`data/tree.py`): every row sees its ancestors and itself.

On the CPU, branch by branch: a branch is a run of rows of which each is the child of the row before
it, so all its rows share the ancestors of the first, and what is left is causal attention with more
keys than queries. On CUDA, flex_attention with a block mask made from `subtree_end`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from verl_sft.errors import UsageError
from verl_sft.model.attention import blocked_attention, split_attention, varlen_attention

TREE = "verl_sft_tree"
_QUERY_BLOCK = 256
_MASK_BLOCK = 128  # of flex_attention


@dataclass(frozen=True)
class Branches:
    """How to cut the T rows of a batch for attention.

    Attributes:
        pieces: lengths of runs of rows with the same descendants; keys are cut so.
        rows: lengths of the branches; queries are cut so.
        seen: for each branch the numbers of the pieces of its keys: ancestors, then its own.
    """

    pieces: list[int]
    rows: list[int]
    seen: list[list[int]]


def find_branches(subtree_end: np.ndarray[Any, np.dtype[np.int64]]) -> Branches:
    """Cut trees (int64 [T], see `TokenTrees`) into branches.

    Example (rows 0 1 are the trunk of the branches 2 and 3 4):
        >>> find_branches(np.array([5, 5, 3, 5, 5]))
        Branches(pieces=[2, 1, 2], rows=[3, 2], seen=[[0, 1], [0, 2]])
    """
    starts = np.flatnonzero(np.diff(subtree_end, prepend=-1))
    pieces = np.diff(starts, append=len(subtree_end)).tolist()
    ends = subtree_end[starts].tolist()
    seen: list[list[int]] = []
    rows: list[int] = []
    path: list[int] = []
    for piece, start in enumerate(starts.tolist()):
        while path and ends[path[-1]] <= start:
            path.pop()
        if path and path[-1] == piece - 1:
            seen[-1].append(piece)
            rows[-1] += pieces[piece]
        else:
            seen.append([*path, piece])
            rows.append(pieces[piece])
        path.append(piece)
    return Branches(pieces, rows, seen)


@dataclass(frozen=True, eq=False)
class Tree:
    """`subtree_end` (int64 [T]) of a batch, and what attention makes of it, once for all layers."""

    subtree_end: Tensor
    _masks: dict[int | None, Any] = field(default_factory=dict)

    @cached_property
    def branches(self) -> Branches:
        """For attention branch by branch."""
        return find_branches(self.subtree_end.cpu().numpy())

    def block_mask(self, window: int | None) -> Any:
        """For flex_attention, with keys at most `window` positions back."""
        if window not in self._masks:
            self._masks[window] = _block_mask(self.subtree_end, window)
        return self._masks[window]


def tree_kwargs(subtree_end: Tensor | None) -> dict[str, Any]:
    """What takes `PackedBatch.subtree_end` (int64 [B, T]) to `tree_attention`, if there is one."""
    return {} if subtree_end is None else {"tree": Tree(subtree_end.reshape(-1))}


def register_tree_attention() -> str:
    """Make `TREE` known to transformers and return it; harmless when repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(TREE, tree_attention)
    return TREE


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` [1, H, T, D] to `key` and `value` [1, K, T, D] along the tree.

    Without a `tree` among the keyword arguments, documents are attended to as they are packed.
    """
    tree: Tree | None = kwargs.get("tree")
    options: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window}
    if tree is None:
        fused = query.device.type == "cuda" and query.dtype is torch.bfloat16 and not dropout
        plain = varlen_attention if fused else split_attention
        return plain(module, query, key, value, None, dropout=dropout, **options, **kwargs)
    if query.device.type == "cuda" and not dropout:
        return _flex(query, key, value, tree.block_mask(sliding_window), scaling), None
    cut = tree.branches
    keys, values = (torch.split(x, cut.pieces, dim=2) for x in (key, value))
    out = []
    for q, seen in zip(torch.split(query, cut.rows, dim=2), cut.seen, strict=True):
        k, v = (torch.cat([x[p] for p in seen], dim=2) for x in (keys, values))
        out.append(_branch(q, k, v, dropout=dropout, **options))
    return torch.cat(out, dim=1), None


# A tree (trunk 0-5; branches 6-10 and 11-14, the latter with branches 15-17 and 18-19) and a
# document: descendants' ends, and the paths from the roots to the leaves.
_PROBE_ENDS = [20] * 6 + [11] * 5 + [20] * 4 + [18] * 3 + [20] * 2 + [25] * 5
_PROBE_PATHS = (
    [*range(11)],
    [*range(6), *range(11, 18)],
    [*range(6), *range(11, 15), 18, 19],
    [*range(20, 25)],
)


def probe_trees(model: nn.Module, *, device: torch.device, half: bool, vocab_size: int) -> float:
    """Prove on the real model that a row of a tree is computed as in its sample alone.

    Returns:
        The largest difference between logits of the tree and of each path computed by the model's
        own forward, in units of the logits' standard deviation.

    Raises:
        UsageError: they differ by more than rounding explains.
    """
    total = len(_PROBE_ENDS)
    ids = torch.arange(total, device=device).mul(2654435761).remainder(vocab_size)
    positions = torch.zeros_like(ids)
    for path in _PROBE_PATHS:
        positions[path] = torch.arange(len(path), device=device)
    bounds = torch.tensor([0, 20, total], dtype=torch.int32, device=device)
    ends = torch.tensor(_PROBE_ENDS, device=device)
    training, apart, spread = model.training, 0.0, 0.0
    model.eval()
    with torch.no_grad():
        rows = (ids[None], positions[None], bounds, 20)
        tree = model(*rows, subtree_end=ends[None], mode="logits").float()
        for path in _PROBE_PATHS:
            alone = model(ids[None, path], positions[None, path], bounds, 0, mode="reference")
            apart = max(apart, float((tree[path] - alone.float()).abs().max()))
            spread = max(spread, float(alone.float().std()))
    model.train(training)
    if not apart / spread < (0.2 if half else 1e-3):
        raise UsageError(
            f"token trees do not give the logits of separate samples ({apart / spread:.3g} "
            "standard deviations apart)",
            why="This model mixes tokens in other ways than attention by position",
            fix="Use data.prefix_sharing=false",
        )
    return apart / spread


def _branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention of the last rows of a document: [1, H, Q, D] to [1, K, N, D], Q <= N."""
    rows, length = query.shape[2], key.shape[2]
    plain = not (dropout or sliding_window)
    if query.device.type == "cpu" and query.dtype is torch.bfloat16 and plain:
        scale = scaling or query.shape[-1] ** -0.5
        return blocked_attention(query[0], key[0], value[0], scale=scale)
    shared = query.shape[1] != key.shape[1]
    whole = rows == length and not sliding_window  # the kernel leaves out what is hidden itself
    block = rows if whole else _QUERY_BLOCK
    out = []
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        seen = length - rows + stop
        mask = None
        if not whole:
            first = length - rows + start
            mask = torch.ones(stop - start, seen, dtype=torch.bool, device=query.device)
            mask = mask.tril_(first).triu_(first + 1 - (sliding_window or seen))
        mixed = scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, :seen],
            value[:, :, :seen],
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=whole,
            scale=scaling,
            enable_gqa=shared,
        )
        out.append(mixed.transpose(1, 2))
    return torch.cat(out, dim=1) if len(out) > 1 else out[0]


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None) -> Tensor:
    shared = query.shape[1] != key.shape[1]
    out: Tensor = _compiled_flex()(
        query, key, value, block_mask=mask, scale=scaling, enable_gqa=shared
    )
    return out.transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def depths(subtree_end: Tensor) -> Tensor:
    """Position of each row in its samples: the rows before it, less those that have ended.

    Example:
        >>> depths(torch.tensor([5, 5, 3, 5, 5])).tolist()
        [0, 1, 2, 2, 3]
    """
    total = len(subtree_end)
    ended = torch.bincount(subtree_end, minlength=total + 1)[:total].cumsum(0)
    return torch.arange(total, device=subtree_end.device) - ended


def _block_mask(subtree_end: Tensor, window: int | None) -> Any:
    """Which blocks of keys each block of queries sees, wholly or in part.

    Made from the ends alone: transforming the mask function, as `create_block_mask` does, forms
    all T * T pairs.
    """
    from torch.nn.attention.flex_attention import BlockMask

    positions = depths(subtree_end)

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= q) & (q < subtree_end[k])
        return seen if window is None else seen & (positions[q] - positions[k] < window)

    total = len(subtree_end)
    count = -(-total // _MASK_BLOCK)
    padded = subtree_end.new_zeros(count * _MASK_BLOCK)
    padded[:total] = subtree_end
    ends = padded.view(count, _MASK_BLOCK)
    number = torch.arange(count, device=subtree_end.device)
    first = number[:, None] * _MASK_BLOCK
    before = number[:, None] > number
    some = (before & (ends.amax(1) > first)) | (number[:, None] == number)
    full = before & (ends.amin(1) >= first + _MASK_BLOCK)
    if window is not None:
        full = torch.zeros_like(full)
    lists = (*_numbered(some & ~full), *_numbered(full))
    from_blocks: Any = BlockMask.from_kv_blocks
    return from_blocks(*lists, BLOCK_SIZE=_MASK_BLOCK, mask_mod=visible, seq_lengths=(total, total))


def _numbered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which: int32 [1, 1, N] and [.., N]."""
    order = blocks.to(torch.int32).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
