"""Attention inside each document, never across: one function per device, behind one table.

transformers looks attention functions up by name; a name it does not know gets no mask, and the
keyword arguments of the model's forward reach the function, so documents travel as `cu_seqlens`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from verl_sft.errors import MissingExtraError, UsageError

SPLIT = "verl_sft_split"
VARLEN = "verl_sft_varlen"
_QUERY_BLOCK = 256
_CHOICES = ("auto", "sdpa", "eager", "flash_attention_2", "varlen", "split")


def pick_attention(wanted: str, *, device: torch.device, half: bool) -> str:
    """The name for transformers' attention table.

    Args:
        wanted: `model.attn_implementation`.
        device: where the model computes.
        half: whether it computes in bf16 (the fused CUDA kernels know nothing else).

    Raises:
        UsageError: an unknown name, or a kernel that this device or dtype does not have.
    """
    if wanted not in _CHOICES:
        raise UsageError(
            f"model.attn_implementation={wanted}: unknown", fix=f"Known: {', '.join(_CHOICES)}"
        )
    on_cuda = device.type == "cuda"
    if wanted == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise MissingExtraError("flash-attn", "flash")
    if wanted in ("flash_attention_2", "varlen") and not (on_cuda and half):
        raise UsageError(
            f"model.attn_implementation={wanted} needs CUDA and bf16", fix="Use auto or sdpa"
        )
    if wanted == "auto":
        if on_cuda and half:
            flash = importlib.util.find_spec("flash_attn") is not None
            wanted = "flash_attention_2" if flash else "varlen"
        else:
            wanted = "split"
    register_attention()
    return {"split": SPLIT, "varlen": VARLEN}.get(wanted, wanted)


def register_attention() -> None:
    """Make `SPLIT` and `VARLEN` known to transformers; harmless when repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(SPLIT, split_attention)
    AttentionInterface.register(VARLEN, varlen_attention)


def document_kwargs(cu_seqlens: Tensor, *, max_seqlen: int, parts: int = 1) -> dict[str, Any]:
    """Keyword arguments that tell every attention function where documents begin and end.

    The `cu_seq_lens_*` names are those that transformers' own flash attention reads.
    """
    lengths: tuple[int, ...] = ()
    if cu_seqlens.device.type == "cpu":
        lengths = tuple(cu_seqlens.diff().tolist())
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
        "document_lengths": lengths,
        "sequence_parts": parts,
    }


def split_attention(
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
    """Causal SDPA per document: `query` [1, H, T, D], `key` and `value` [1, K, T, D].

    `split`, unlike slicing, has a backward that does not touch the whole tensor per document.
    """
    lengths = kwargs.get("document_lengths") or _lengths(kwargs, query)
    shared = query.shape[1] != key.shape[1]
    parts = zip(
        torch.split(query, lengths, dim=2),
        torch.split(key, lengths, dim=2),
        torch.split(value, lengths, dim=2),
        strict=True,
    )
    out = []
    for q, k, v in parts:
        if q.device.type == "cpu" and q.dtype is torch.bfloat16 and not (dropout or sliding_window):
            out.append(blocked_attention(q[0], k[0], v[0], scale=scaling or q.shape[-1] ** -0.5))
            continue
        window = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            window = _window_mask(q.shape[2], sliding_window, device=q.device)
        out.append(
            scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=window,
                dropout_p=dropout,
                is_causal=window is None,
                scale=scaling,
                enable_gqa=shared,
            ).transpose(1, 2)
        )
    return torch.cat(out, dim=1), None


def varlen_attention(
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
    """Torch's own variable-length kernel (CUDA, bf16), with the shapes of `split_attention`."""
    import inspect

    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn  # its signature differs between versions
    if dropout:
        raise UsageError("varlen attention has no dropout", fix="model.attn_implementation=sdpa")
    names = inspect.signature(varlen_attn).parameters
    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"scale": scaling}
    if groups > 1 and "enable_gqa" in names:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if "window_size" in names:  # older versions say is_causal and know no window
        options["window_size"] = (sliding_window - 1 if sliding_window else -1, 0)
    else:
        options["is_causal"] = True
    bounds, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    flat = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out: Tensor = varlen_attn(*flat, bounds, bounds, longest, longest, **options)
    return out.unsqueeze(0), None


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Causal attention of the last T of N rows, [H, T, D] to [K, N, D], block of queries by block.

    Returns [1, T, H, D]. torch's fused CPU kernel does not use the bf16 instructions: 1.6x to 2.3x
    slower than this.
    """
    heads, length, width = query.shape
    earlier = key.shape[1] - length
    shared = key.shape[0]  # heads that share one key head are one taller matrix
    grouped = query.view(shared, heads // shared, length, width)
    keys, out = key.transpose(1, 2), []
    for start in range(0, length, _QUERY_BLOCK):
        block = grouped[:, :, start : start + _QUERY_BLOCK]
        rows = block.shape[2]
        own, stop = earlier + start, earlier + start + rows
        hidden = torch.full((rows, stop), float("-inf"), dtype=query.dtype).triu_(own + 1)
        scores = torch.baddbmm(
            hidden.repeat(heads // shared, 1).expand(shared, -1, -1),
            block.reshape(shared, -1, width),
            keys[:, :, :stop],
            alpha=scale,
        )
        mixed = torch.bmm(scores.softmax(-1), value[:, :stop])
        out.append(mixed.view(shared, -1, rows, width))
    joined = torch.cat(out, dim=2) if len(out) > 1 else out[0]
    return joined.reshape(1, heads, length, width).transpose(1, 2)


def _lengths(kwargs: dict[str, Any], query: Tensor) -> list[int]:
    bounds = kwargs.get("cu_seq_lens_q")
    return [query.shape[2]] if bounds is None else bounds.diff().tolist()


def _window_mask(length: int, window: int, *, device: torch.device) -> Tensor:
    """Bool [length, length]: causal, at most `window` keys back (the query itself included)."""
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (back >= 0) & (back < window)
