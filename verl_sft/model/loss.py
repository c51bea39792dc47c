"""Weighted cross-entropy on the learned positions only, in chunks, and the module that computes it.

The sum, not the mean: the trainer divides by the weight of the whole global batch, so the result
does not depend on how samples are spread over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from verl_sft.model.attention import document_kwargs
from verl_sft.model.noise import add_noise
from verl_sft.model.tree_attention import tree_kwargs

# Learned positions whose logits exist at one time: as many as a GPU's products need, or as few as
# stay in a CPU's caches (V = 32,000: 256 rows are 1.2 times as fast as 1024).
CHUNK_ROWS = {"cuda": 1024, "cpu": 256}

# A head that is not one matrix product; the full forward of the model knows what to do.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def loss_sum(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    chunk: int = 0,
    each: Tensor | None = None,
) -> Tensor:
    """Sum of `weights * cross_entropy(hidden @ head_weight.T, targets)`, as float64 scalar.

    Rows are added up in float64, so that the order in which they come (packing, chunks, ranks) does
    not show in the sum. At most `chunk` rows of logits exist at one time, forward and backward:
    where gradients are wanted they are computed in the forward pass, next to the logits they come
    from.

    Args:
        hidden: [N, D], learned positions only.
        head_weight: [V, D], in the dtype of `hidden`.
        targets: int64 [N].
        weights: float32 [N].
        chunk: rows of logits at one time; 0: what the device is fastest with.
        each: float32 [N], is filled with the unweighted loss of each row where it is given.
    """
    chunk = chunk_rows(chunk, device=hidden.device)
    if torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad):
        total: Tensor = _ChunkedLoss.apply(hidden, head_weight, targets, weights, chunk, each)  # type: ignore[no-untyped-call]
        return total
    total = hidden.new_zeros((), dtype=torch.float64)
    for part in chunks(len(hidden), chunk):
        logits = (hidden[part] @ head_weight.T).float()
        losses = cross_entropy(logits, targets[part], reduction="none")
        total = total + dot(weights[part], losses)
        if each is not None:
            each[part] = losses
    return total


class _ChunkedLoss(torch.autograd.Function):
    """`loss_sum` with the gradients of both matrices formed chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        chunk: int,
        each: Tensor | None,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float64)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        # One pair of buffers for all chunks: new ones would be page faults or fragments each time.
        shape = (min(chunk, len(hidden)), len(head))
        products = hidden.new_empty(shape)
        exact = (
            products
            if products.dtype is torch.float32
            else products.new_empty(shape, dtype=torch.float32)
        )
        for part in chunks(len(hidden), chunk):
            rows, wanted = hidden[part], targets[part, None]
            product = torch.mm(rows, head.T, out=products[: len(rows)])
            logits = product if exact is products else exact[: len(rows)].copy_(product)
            top = logits.amax(dim=-1, keepdim=True)
            picked = logits.gather(1, wanted)
            grad = logits.sub_(top).exp_()
            norm = grad.sum(dim=-1, keepdim=True)
            losses = (norm.log() + top - picked).squeeze(1)
            total += dot(weights[part], losses)
            if each is not None:
                each[part] = losses
            # d loss / d logits = weight * (softmax - onehot)
            grad.mul_(weights[part, None] / norm).scatter_add_(1, wanted, -weights[part, None])
            if exact is not products:
                grad = product.copy_(grad)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[part])
            if grad_head is not None and exact is products:
                grad_head.addmm_(grad.T, rows)
            elif grad_head is not None:
                grad_head += grad.T @ rows
        ctx.grads = grad_hidden, grad_head  # scaled in place below: no second copy of the head's
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_grads(ctx, scale=upstream[0]), None, None, None, None


def scaled_grads(ctx: Any, *, scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Those of both matrices that the forward pass left in `ctx.grads`, times `scale`, in place."""
    grad_hidden, grad_head = ctx.grads
    ctx.grads = None
    if grad_hidden is not None:
        grad_hidden.mul_(scale)
    if grad_head is not None:
        grad_head = grad_head.mul_(scale).to(ctx.head_dtype)
    return grad_hidden, grad_head


def dot(weights: Tensor, losses: Tensor) -> Tensor:
    """Their weighted sum as float64 scalar."""
    return weights.double() @ losses.double()


def chunk_rows(wanted: int, *, device: torch.device) -> int:
    """Rows of logits at one time: as wanted, or what the device is fastest with."""
    return wanted or CHUNK_ROWS.get(device.type, max(CHUNK_ROWS.values()))


def chunks(rows: int, chunk: int) -> list[slice]:
    """All rows, `chunk` at a time."""
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


class LossModel(nn.Module):
    """A causal language model whose forward pass is the loss; the root that FSDP wraps.

    Everything that touches parameters runs inside `forward`, so that the hooks of a sharded model
    have gathered them, tied or not.
    """

    def __init__(self, causal: nn.Module, *, chunk: int = 0) -> None:
        super().__init__()
        self.causal = causal
        self.chunk = chunk
        self.split_head = has_plain_head(causal)
        self.head_loss: Callable[..., Tensor] = loss_sum  # another one where the head is divided
        self.compiled = False  # the layers: nothing that differs in every batch may be guarded on
        self.noise_alpha: float | None = None  # of NEFTune
        self.last_rows_only = False  # the last layer was prepared by `take_learned_rows`
        self.keep_losses = False  # of each learned row, in `row_losses`, float32 [N]
        self.row_losses: Tensor | None = None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        target_ids: Tensor | None = None,
        weights: Tensor | None = None,
        denominator: float = 1.0,
        subtree_end: Tensor | None = None,
        mode: Literal["loss", "logits", "reference"] = "loss",
        parts: int = 1,
    ) -> Tensor:
        """The weighted loss sum of a batch (float64 scalar), or logits for checks.

        Args:
            input_ids: int64 [B, T].
            position_ids: int64 [B, T], from 0 in every document.
            cu_seqlens: int32 [S+1], document boundaries in the batch flattened to B*T.
            max_seqlen: tokens of the longest document.
            target_ids: int64 [B, T].
            weights: float32 [B, T].
            denominator: what the sum is divided by. Here and not behind it: a gradient that is
                scaled in bf16 later on is off by up to 0.4 %, all of it in one direction.
            subtree_end: int64 [B, T] of `PackedBatch`, where documents are token trees.
            mode: `logits` [B*T, V] of this forward; `reference`: of the model's own forward with
                the attention of transformers, for one document.
            parts: in how many slices the batch was cut, of which the tensors are one.
        """
        if mode == "reference":
            return self._reference(input_ids)
        ids, positions = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        kwargs = document_kwargs(cu_seqlens, max_seqlen=max_seqlen, parts=parts)
        kwargs |= tree_kwargs(subtree_end)
        if self.compiled:
            del kwargs["document_lengths"]
        common: dict[str, Any] = dict(position_ids=positions, use_cache=False, **kwargs)
        if self.training and self.noise_alpha and torch.is_grad_enabled():
            embed = self.causal.get_input_embeddings()  # type: ignore[operator]
            common["inputs_embeds"] = add_noise(
                embed(ids), alpha=self.noise_alpha, cu_seqlens=cu_seqlens
            )
        else:
            common["input_ids"] = ids
        if mode == "logits":
            hidden = self._hidden(common)
            return self._head(hidden) if self.split_head else hidden
        assert target_ids is not None and weights is not None
        flat_weights = weights.reshape(-1)
        rows = flat_weights.nonzero().squeeze(1)
        if not len(rows):  # every rank must reach every parameter, or the collectives do not match
            rows = torch.zeros(1, dtype=torch.int64, device=flat_weights.device)
        if self.last_rows_only:
            common["learned_rows"] = rows
        hidden = self._hidden(common)
        picked, wanted = target_ids.reshape(-1)[rows], flat_weights[rows] / denominator
        if not self.split_head:
            losses = cross_entropy(hidden[rows].float(), picked, reduction="none")
            self.row_losses = losses.detach() if self.keep_losses else None
            return dot(wanted, losses)
        head = self.causal.get_output_embeddings().weight  # type: ignore[operator]
        each = hidden.new_empty(len(rows), dtype=torch.float32) if self.keep_losses else None
        self.row_losses = each
        kept = hidden if self.last_rows_only else hidden[rows]
        return self.head_loss(kept, head, picked, wanted, self.chunk, each)

    def _hidden(self, inputs: dict[str, Any]) -> Tensor:
        """Behind the last norm [T, D], or logits [T, V] of a model whose head is not plain."""
        if self.split_head:
            last: Tensor = self.causal.get_decoder()(**inputs).last_hidden_state[0]  # type: ignore[operator]
            return last
        logits: Tensor = self.causal(**inputs).logits[0]
        return logits

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
