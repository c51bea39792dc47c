"""Sequence parallelism: attention over whole documents while each rank holds a slice of the tokens.

Before attention the ranks of a group trade tokens for heads (all tokens, a part of the heads each),
after it they trade back, so any attention function serves unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from verl_sft.errors import UsageError

ULYSSES = "verl_sft_ulysses"

Attention = Callable[..., tuple[Tensor, Any]]


def check_heads(model_config: Any, *, parts: int) -> None:
    """Raise if the attention heads cannot be dealt evenly to `parts` ranks.

    Raises:
        UsageError: with the sizes that fit.
    """
    heads = int(model_config.get_text_config().num_attention_heads)
    if heads % parts:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UsageError(
            f"ulysses_sequence_parallel_size={parts} does not divide the model's {heads} attention "
            "heads",
            fix=f"Use one of: {fitting}",
        )


def check_kernel(inner: str) -> None:
    """Raise if an attention function needs a mask, which only the whole sequence has.

    Raises:
        UsageError: naming it.
    """
    if inner in ("sdpa", "eager"):
        raise UsageError(
            f"model.attn_implementation={inner} does not work with sequence parallelism",
            why="It needs a mask over the whole sequence",
            fix="Use auto",
        )


def register_ulysses(inner: str, *, group: dist.ProcessGroup) -> str:
    """Put the exchange around an attention function that sees documents by `cu_seqlens`.

    Args:
        inner: its name in transformers' table.
        group: the ranks that hold neighbouring slices, in order.

    Returns:
        The name of the wrapped function in the same table.

    Raises:
        UsageError: `inner` needs a mask, which only the whole sequence has.
    """
    from transformers import AttentionInterface

    check_kernel(inner)
    AttentionInterface.register(ULYSSES, ulysses(AttentionInterface()[inner], group=group))
    return ULYSSES


def ulysses(inner: Attention, *, group: dist.ProcessGroup) -> Attention:
    """`inner` for slices: `query` [1, H, T/P, D] and `key`, `value` [1, K, T/P, D] of P ranks.

    Where `sequence_parts` (a keyword of the model's forward) is 1 each rank has whole documents and
    nothing is exchanged.
    """
    parts = dist.get_world_size(group)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        sequence_parts: int = 1,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if sequence_parts == 1:
            return inner(module, query, key, value, attention_mask, **kwargs)
        copies = parts // math.gcd(key.shape[1], parts)
        if copies > 1:  # fewer key heads than ranks: neighbours get the same one
            key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        query, key, value = (tokens_for_heads(x, group=group) for x in (query, key, value))
        out, _ = inner(module, query, key, value, None, **kwargs)
        return heads_for_tokens(out.transpose(1, 2), group=group).transpose(1, 2), None

    return attention


def probe_slices(
    model: nn.Module, *, group: dist.ProcessGroup, device: torch.device, half: bool, vocab_size: int
) -> float:
    """Prove on the real model that slices give the logits of the whole sequence.

    Returns:
        The largest difference on any rank, in units of the logits' standard deviation.

    Raises:
        UsageError: on every rank, if they differ by more than rounding explains.
    """
    part, parts = dist.get_rank(group), dist.get_world_size(group)
    lengths = [7, 5, 9 + -21 % parts]
    size = sum(lengths) // parts
    own = slice(part * size, (part + 1) * size)
    ids = torch.arange(sum(lengths), device=device).mul(2654435761).remainder(vocab_size)[None]
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    training = model.training
    model.eval()
    with torch.no_grad():
        whole = model(ids, positions, bounds, max(lengths), mode="logits").float()
        cut = (ids[:, own], positions[:, own], bounds, max(lengths))
        sliced = model(*cut, mode="logits", parts=parts).float()
    model.train(training)
    difference = (whole[own] - sliced).abs().max() / whole.std()
    dist.all_reduce(difference, dist.ReduceOp.MAX, group=group)
    if not float(difference) < (0.2 if half else 1e-3):
        raise UsageError(
            f"slices of a sequence do not give its logits ({float(difference):.3g} standard "
            "deviations apart)",
            why="This model mixes tokens in other ways than by its attention function",
            fix="Leave ulysses_sequence_parallel_size at 1",
        )
    return float(difference)


def tokens_for_heads(x: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """[1, H, T/P, D] with this rank's tokens -> [1, H/P, T, D] with this rank's heads."""
    out: Tensor = _Exchange.apply(x, True, group)  # type: ignore[no-untyped-call]
    return out


def heads_for_tokens(x: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """[1, H/P, T, D] with this rank's heads -> [1, H, T/P, D] with this rank's tokens."""
    out: Tensor = _Exchange.apply(x, False, group)  # type: ignore[no-untyped-call]
    return out


class _Exchange(torch.autograd.Function):
    """One all-to-all; its gradient is the exchange in the other direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather_tokens: bool, group: dist.ProcessGroup) -> Tensor:
        ctx.back, ctx.group = not gather_tokens, group
        return _exchange(x, gather_tokens=gather_tokens, group=group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grads[0], gather_tokens=ctx.back, group=ctx.group), None, None


def _exchange(x: Tensor, *, gather_tokens: bool, group: dist.ProcessGroup) -> Tensor:
    parts = dist.get_world_size(group)
    _, heads, tokens, width = x.shape
    if gather_tokens:
        sent = x.reshape(parts, heads // parts, tokens, width)
    else:
        sent = x.reshape(heads, parts, tokens // parts, width).transpose(0, 1)
    sent = sent.contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    if gather_tokens:  # [P, H/P, T/P, D], the first axis now being that of the tokens
        return got.transpose(0, 1).reshape(1, heads // parts, parts * tokens, width)
    return got.reshape(1, parts * heads, tokens // parts, width)
