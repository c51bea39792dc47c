"""Weighted cross-entropy on the learned positions only, in chunks, and the module that computes it.

The sum, not the mean: the trainer divides by the weight of the whole global batch, so the result
does not depend on how samples are spread over micro-batches and ranks.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from verl_sft.model.attention import document_kwargs

CHUNK_ROWS = 1024  # learned positions whose logits exist at one time

# A head that is not one matrix product; the full forward of the model knows what to do.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def loss_sum(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor, chunk: int = CHUNK_ROWS
) -> Tensor:
    """Sum of `weights * cross_entropy(hidden @ head_weight.T, targets)`, as float32 scalar.

    At most `chunk` rows of logits exist at one time, forward and backward: where gradients are
    wanted they are computed in the forward pass, next to the logits they come from.

    Args:
        hidden: [N, D], learned positions only.
        head_weight: [V, D], in the dtype of `hidden`.
        targets: int64 [N].
        weights: float32 [N].
        chunk: rows of logits at one time.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad):
        total: Tensor = _ChunkedLoss.apply(hidden, head_weight, targets, weights, chunk)  # type: ignore[no-untyped-call]
        return total
    total = hidden.new_zeros((), dtype=torch.float32)
    for part in _chunks(len(hidden), chunk):
        logits = (hidden[part] @ head_weight.T).float()
        total = total + weights[part] @ cross_entropy(logits, targets[part], reduction="none")
    return total


class _ChunkedLoss(torch.autograd.Function):
    """`loss_sum` with the gradients of both matrices formed chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(hidden), chunk):
            logits = (hidden[part] @ head.T).float()
            norm = logits.logsumexp(dim=-1, keepdim=True)
            picked = logits.gather(1, targets[part, None])
            total += weights[part] @ (norm - picked).squeeze(1)
            # d loss / d logits = weight * (softmax - onehot)
            grad = logits.sub_(norm).exp_().mul_(weights[part, None])
            grad.scatter_add_(1, targets[part, None], -weights[part, None])
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[part])
            if grad_head is not None:
                grad_head += grad.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = upstream[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        if grad_head is not None:
            grad_head = (grad_head * scale).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None, None


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


class LossModel(nn.Module):
    """A causal language model whose forward pass is the loss; the root that FSDP wraps.

    Everything that touches parameters runs inside `forward`, so that the hooks of a sharded model
    have gathered them, tied or not.
    """

    def __init__(self, causal: nn.Module, *, chunk: int = CHUNK_ROWS) -> None:
        super().__init__()
        self.causal = causal
        self.chunk = chunk
        self.split_head = has_plain_head(causal)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        target_ids: Tensor | None = None,
        weights: Tensor | None = None,
        mode: Literal["loss", "logits", "reference"] = "loss",
    ) -> Tensor:
        """The weighted loss sum of a batch (float32 scalar), or logits for checks.

        Args:
            input_ids: int64 [B, T].
            position_ids: int64 [B, T], from 0 in every document.
            cu_seqlens: int32 [S+1], document boundaries in the batch flattened to B*T.
            max_seqlen: tokens of the longest document.
            target_ids: int64 [B, T].
            weights: float32 [B, T].
            mode: `logits` [B*T, V] of this forward; `reference`: of the model's own forward with
                the attention of transformers, for one document.
        """
        if mode == "reference":
            return self._reference(input_ids)
        ids, positions = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        kwargs = document_kwargs(cu_seqlens, max_seqlen=max_seqlen)
        common = dict(input_ids=ids, position_ids=positions, use_cache=False, **kwargs)
        if self.split_head:
            hidden = self.causal.get_decoder()(**common).last_hidden_state[0]  # type: ignore[operator]
        else:
            hidden = self.causal(**common).logits[0]
        if mode == "logits":
            return self._head(hidden) if self.split_head else hidden
        assert target_ids is not None and weights is not None
        flat_weights = weights.reshape(-1)
        rows = flat_weights.nonzero().squeeze(1)
        if not len(rows):  # every rank must reach every parameter, or the collectives do not match
            rows = torch.zeros(1, dtype=torch.int64, device=hidden.device)
        picked, wanted = target_ids.reshape(-1)[rows], flat_weights[rows]
        if not self.split_head:
            losses = cross_entropy(hidden[rows].float(), picked, reduction="none")
            return wanted @ losses
        head = self.causal.get_output_embeddings().weight  # type: ignore[operator]
        return loss_sum(hidden[rows], head, picked, wanted, self.chunk)

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.causal.get_output_embeddings()(hidden)  # type: ignore[operator]
        return logits

    def _reference(self, input_ids: Tensor) -> Tensor:
        config: Any = self.causal.config
        ours = config._attn_implementation
        try:
            config._attn_implementation = "eager"
            logits: Tensor = self.causal(input_ids=input_ids, use_cache=False).logits
        finally:
            config._attn_implementation = ours
        return logits[0]


def has_plain_head(causal: nn.Module) -> bool:
    """Whether the logits are `decoder(x) @ weight.T` and nothing more."""
    config = getattr(causal, "config", None)
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _LOGIT_TRANSFORMS):
        return False
    head = getattr(causal, "get_output_embeddings", lambda: None)()
    decoder = getattr(causal, "get_decoder", lambda: None)()
    return type(head) is nn.Linear and head.bias is None and decoder not in (None, causal)
