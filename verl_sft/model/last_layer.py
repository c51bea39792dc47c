"""The last decoder layer computes behind its attention only the rows whose loss is wanted.

No other row reaches the loss: above the last attention every row is on its own. Exact, for layers
of the Llama family, whose forward pass is the one written here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

FAMILY = ("Llama", "Mistral", "Qwen2", "Qwen3")


def take_learned_rows(layer: nn.Module) -> bool:
    """Let `layer` take `learned_rows` and return only those; False if it is of no known family.

    Its class becomes a subclass of the same name, so that what wraps forward passes by class
    (recomputation, sharding) finds it as before.
    """
    cls = type(layer)
    if cls.__name__ not in {f"{name}DecoderLayer" for name in FAMILY}:
        return False
    layer.__class__ = type(cls.__name__, (cls,), {"forward": _forward})
    o_proj: nn.Module = layer.self_attn.o_proj  # type: ignore[union-attr, assignment]
    o_proj.register_forward_pre_hook(_Narrow(layer))
    return True


class _Narrow:
    """Keeps the rows that the layer asks for out of what attention returns [1, T, H]."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        rows = self.layer.__dict__.get("_rows")
        return None if rows is None else (inputs[0][:, rows], *inputs[1:])


def _forward(
    self: Any, hidden_states: Tensor, *, learned_rows: Tensor | None = None, **kwargs: Any
) -> Tensor:
    self.__dict__["_rows"] = learned_rows
    try:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    finally:
        self.__dict__["_rows"] = None
    residual = hidden_states if learned_rows is None else hidden_states[:, learned_rows]
    hidden = residual + attended
    out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
    return out
