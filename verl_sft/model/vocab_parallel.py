"""The output head and the embedding, each rank with its own rows of the vocabulary.

Nobody gathers a [V, D] matrix: a row of the embedding comes from the rank that holds it, and
learned rows of the hidden states go to all ranks, which form their columns of the logits. All ranks
of the group must call together; each may have another number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import embedding

from verl_sft.model.loss import LossModel, chunk_rows, chunks, dot, scaled_grads


@dataclass(frozen=True)
class VocabPart:
    """Which rows of a vocabulary are this rank's: `torch.chunk`'s rule, the last may have none.

    Attributes:
        vocab: all rows.
        rank: in the group.
        parts: ranks of the group.
        group: them.
        dtype: of compute.
    """

    vocab: int
    rank: int
    parts: int
    group: dist.ProcessGroup | None
    dtype: torch.dtype

    @property
    def step(self) -> int:
        """Rows of each rank but the last ones."""
        return -(-self.vocab // self.parts)

    @property
    def start(self) -> int:
        """The first of this rank's rows."""
        return min(self.vocab, self.rank * self.step)


def vocab_tables(model: LossModel) -> list[nn.Module] | str:
    """The modules whose weight can stay divided, the head first; or why that cannot be."""
    if not model.split_head:
        return "the model's head is more than one matrix, or has an adapter"
    head: nn.Module = model.causal.get_output_embeddings()  # type: ignore[operator]
    embed: nn.Module = model.causal.get_input_embeddings()  # type: ignore[operator]
    plain = type(embed) is nn.Embedding and embed.max_norm is None
    if plain and not (embed.sparse or embed.scale_grad_by_freq):
        return [head, embed]
    if embed.weight is head.weight:
        return "the embedding, which is also the head, is more than a table or has an adapter"
    return [head]


def divide_tables(model: LossModel, tables: Sequence[nn.Module], *, part: VocabPart) -> None:
    """Let modules compute whose `weight` is (from the first forward on) a DTensor of rows."""
    head, *embeddings = tables
    model.head_loss = partial(vocab_loss, part=part)
    head.forward = partial(_logits, head, part=part)
    for embed in embeddings:
        embed.forward = partial(_look_up, embed, part=part)


def vocab_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    chunk: int = 0,
    each: Tensor | None = None,
    *,
    part: VocabPart,
) -> Tensor:
    """`loss_sum` of this rank's rows, where `head_weight` is a DTensor [V, D] of rows.

    The gradient of the weight is the sum over the group, for which every rank must call `backward`
    with the same factor, as a sum of losses has it.
    """
    total: Tensor = _VocabLoss.apply(  # type: ignore[no-untyped-call]
        hidden,
        _own(head_weight),
        targets,
        weights,
        chunk_rows(chunk, device=hidden.device),
        each,
        part,
        torch.is_grad_enabled(),
    )
    return total


class _VocabLoss(torch.autograd.Function):
    """Each chunk of rows of all ranks against this rank's columns, gradients next to the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        own: Tensor,
        targets: Tensor,
        weights: Tensor,
        chunk: int,
        each: Tensor | None,
        part: VocabPart,
        wants_grad: bool,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float64)
        head = own.to(hidden.dtype)
        learns, trained = (needed and wants_grad for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if learns else None
        grad_head = torch.zeros_like(own, dtype=torch.float32) if trained else None
        sizes = _sizes(len(hidden), part=part, device=hidden.device)
        mine = chunks(len(hidden), chunk)
        # Once for all chunks, as in the loss of whole matrices; the first chunk is the largest.
        shape = (sum(min(size, chunk) for size in sizes), len(head))
        products = hidden.new_empty(shape)
        exact = products
        if products.dtype is not torch.float32:
            exact = products.new_empty(shape, dtype=torch.float32)
        for start in range(0, max(sizes), chunk):
            counts = [min(max(size - start, 0), chunk) for size in sizes]
            here = mine[start // chunk] if start < len(hidden) else slice(0, 0)
            rows = _to_all(hidden[here], sizes=counts, part=part)
            facts = torch.stack((targets[here].double(), weights[here].double()), dim=1)
            facts = _to_all(facts, sizes=counts, part=part)
            product = torch.mm(rows, head.T, out=products[: len(rows)])
            logits = product if exact is products else exact[: len(rows)].copy_(product)
            columns = _Columns(logits, wanted=facts[:, 0].long() - part.start)
            others = _from_all(columns.stats, part=part)
            norm, losses = combine(others)
            first = sum(counts[: part.rank])
            losses = losses[first : first + counts[part.rank]]
            total += dot(weights[here], losses)
            if each is not None:
                each[here] = losses
            if not (learns or trained):
                continue
            grad = columns.gradient(facts[:, 1].float(), norm=norm)
            if exact is not products:
                grad = product.copy_(grad)
            if grad_hidden is not None:
                back = [counts[part.rank]] * part.parts
                sums = _trade(torch.mm(grad, head), sent=counts, received=back, part=part)
                grad_hidden[here] = _summed(sums, part=part).to(hidden.dtype)
            if grad_head is not None and exact is products:
                grad_head.addmm_(grad.T, rows)
            elif grad_head is not None:
                grad_head += grad.T @ rows
        ctx.grads, ctx.head_dtype = (grad_hidden, grad_head), own.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_grads(ctx, scale=upstream[0]), None, None, None, None, None, None


class _Columns:
    """Some columns of a softmax; `logits` [N, v] are overwritten.

    `stats` [3, N] is what other ranks must know: the largest logit, the sum of exponentials below
    it, and the wanted logit where it is here.
    """

    def __init__(self, logits: Tensor, *, wanted: Tensor) -> None:
        width = logits.shape[1]
        self.here = (wanted >= 0) & (wanted < width)
        self.place = wanted.clamp(0, max(width - 1, 0))[:, None]
        picked = self.top = logits.new_full((len(logits),), -torch.inf)
        if width:
            picked, self.top = logits.gather(1, self.place).squeeze(1), logits.amax(dim=1)
        self.terms = logits.sub_(self.top[:, None]).exp_()
        self.stats = torch.stack((self.top, self.terms.sum(dim=1), picked.where(self.here, 0)))

    def gradient(self, weights: Tensor, *, norm: Tensor) -> Tensor:
        """Of the loss by the logits, weight * (softmax - onehot) [N, v], in their place."""
        grad = self.terms.mul_((weights * (self.top - norm).exp())[:, None])
        if grad.shape[1]:
            grad.scatter_add_(1, self.place, torch.where(self.here, -weights, 0)[:, None])
        return grad


def combine(stats: Tensor) -> tuple[Tensor, Tensor]:
    """From the columns of all ranks [P, 3, N]: log of the norm, and loss of each row, both [N]."""
    tops, sums, picked = stats.unbind(1)
    top = tops.amax(dim=0)
    norm = (sums * (tops - top).exp()).sum(dim=0).log() + top
    return norm, norm - picked.sum(dim=0)


def _look_up(module: Any, ids: Tensor, *, part: VocabPart) -> Tensor:
    """What `nn.Embedding` gives for `ids`; each row travels once, however often it is used."""
    found, place = torch.unique(ids, return_inverse=True)
    padding = -1 if module.padding_idx is None else module.padding_idx
    rows = _FetchedRows.apply(_own(module.weight), found, part, padding)  # type: ignore[no-untyped-call]
    return embedding(place, rows)


class _FetchedRows(torch.autograd.Function):
    """Rows [U, D] of ascending ids from the ranks that hold them; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ids: Tensor, part: VocabPart, padding: int) -> Tensor:
        owners = torch.bincount(ids // part.step, minlength=part.parts)
        assert len(owners) == part.parts, "an id is outside of the vocabulary"
        ones = [1] * part.parts
        asking = _trade(owners, sent=ones, received=ones, part=part)
        sent, received = torch.stack((owners, asking)).tolist()
        asked = _trade(ids, sent=sent, received=received, part=part)
        ctx.part, ctx.sent, ctx.received = part, sent, received
        ctx.rows, ctx.padding, ctx.own = asked - part.start, asked == padding, own.shape
        ctx.own_dtype = own.dtype
        rows = own[ctx.rows].to(part.dtype)
        return _trade(rows, sent=received, received=sent, part=part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = _trade(grads[0], sent=ctx.sent, received=ctx.received, part=ctx.part)
        back = back.float().masked_fill_(ctx.padding[:, None], 0)
        total = back.new_zeros(ctx.own)
        # Rank by rank, each with different rows: an order of addition that is always the same.
        first = 0
        for count in ctx.received:
            there = slice(first, first + count)
            total.index_add_(0, ctx.rows[there], back[there])
            first += count
        return total.to(ctx.own_dtype), None, None, None


def _logits(module: Any, hidden: Tensor, *, part: VocabPart) -> Tensor:
    """Whole logits [..., V] of a few rows, for checks; nothing learns from them."""
    assert not torch.is_grad_enabled()
    flat = hidden.reshape(-1, hidden.shape[-1])
    sizes = _sizes(len(flat), part=part, device=flat.device)
    rows = _to_all(flat, sizes=sizes, part=part)
    head = _own(module.weight).to(flat.dtype)
    columns = nn.functional.pad(rows @ head.T, (0, part.step - len(head)))
    back = [len(flat)] * part.parts
    found = _trade(columns, sent=sizes, received=back, part=part)
    whole = found.view(part.parts, len(flat), part.step).transpose(0, 1).flatten(1)
    return whole[:, : part.vocab].reshape(*hidden.shape[:-1], part.vocab)


def _own(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local()


def _sizes(count: int, *, part: VocabPart, device: torch.device) -> list[int]:
    """What `count` is on each rank."""
    own = torch.tensor([count], device=device)
    found: list[int] = _from_all(own, part=part).flatten().tolist()
    return found


def _from_all(x: Tensor, *, part: VocabPart) -> Tensor:
    """Tensors of one shape from each rank: [...] -> [P, ...]."""
    return _to_all(x[None], sizes=[1] * part.parts, part=part)


def _to_all(x: Tensor, *, sizes: Sequence[int], part: VocabPart) -> Tensor:
    """Rows of all ranks behind one another: [sizes[rank], ...] -> [sum(sizes), ...]."""
    copies = x.expand(part.parts, *x.shape).flatten(0, 1)
    return _trade(copies, sent=[len(x)] * part.parts, received=sizes, part=part)


def _summed(x: Tensor, *, part: VocabPart) -> Tensor:
    """What each rank added to the same rows: [P * N, D] -> float32 [N, D]."""
    return x.view(part.parts, -1, x.shape[-1]).sum(dim=0, dtype=torch.float32)


def _trade(x: Tensor, *, sent: Sequence[int], received: Sequence[int], part: VocabPart) -> Tensor:
    """Send `sent[r]` rows of `x` to each rank r in turn; what came, by rank as well."""
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=part.group)
    return out
