"""Attention over packed documents, forward and backward, by every kernel that is there."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import Place, seconds

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(place: Place) -> None:
    """Documents of 2k and of 16k tokens in 32k, with the heads of the 1.5B shape."""
    heads, shared, width = (4, 2, 16) if place.dry else (12, 2, 128)
    cases = ([24, 40],) if place.dry else ([2048] * 16, [16384] * 2)
    half = torch.bfloat16
    for lengths in cases:
        total = sum(lengths)
        shapes = ((1, heads, total, width), (1, shared, total, width), (1, shared, total, width))
        inputs = [
            torch.randn(s, device=place.device, dtype=half, requires_grad=True) for s in shapes
        ]
        flops = 3 * sum(2 * n * n * heads * width for n in lengths)
        for name in KERNELS:
            what = f"{name}, {len(lengths)} x {lengths[0]}"
            try:
                kernel = KERNELS[name](lengths, place.device)
                took = seconds(lambda k=kernel, i=inputs: _both(k, i), device=place.device)
            except Exception as error:  # a kernel that is missing here is a figure that is missing
                place.failed("attention", what, error)
                continue
            place.write("attention", what, took * 1e3, "ms", f"{flops / took / 1e12:.1f} TFLOP/s")


def _both(kernel: Kernel, inputs: list[Tensor]) -> None:
    out = kernel(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def _ours(name: str) -> Callable[[list[int], torch.device], Kernel]:
    def make(lengths: list[int], device: torch.device) -> Kernel:
        from verl_sft.model import attention

        function: Any = getattr(attention, f"{name}_attention")
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        kwargs = attention.document_kwargs(bounds, max_seqlen=max(lengths))

        def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = function(torch.nn.Identity(), query, key, value, None, **kwargs)[0]
            return out

        return kernel

    return make


def _flash(lengths: list[int], device: torch.device) -> Kernel:
    from flash_attn import flash_attn_varlen_func

    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        flat = (x[0].transpose(0, 1) for x in (query, key, value))
        out: Tensor = flash_attn_varlen_func(
            *flat, bounds, bounds, max(lengths), max(lengths), causal=True
        )
        return out

    return kernel


def _masked(lengths: list[int], device: torch.device) -> Kernel:
    documents = torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
    )
    mask = (documents[:, None] == documents).tril_()

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=True
        )

    return kernel


def _flex(lengths: list[int], device: torch.device) -> Kernel:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    documents = torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
    )

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents[q] == documents[k])

    total = sum(lengths)
    block = create_block_mask(visible, None, None, total, total, device=str(device))
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = compiled(query, key, value, block_mask=block, enable_gqa=True)
        return out

    return kernel


KERNELS: dict[str, Callable[[list[int], torch.device], Kernel]] = {
    "split": _ours("split"),
    "varlen": _ours("varlen"),
    "flash": _flash,
    "sdpa with a block mask": _masked,
    "flex": _flex,
}
