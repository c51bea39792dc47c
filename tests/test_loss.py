"""The loss: a sum over learned positions, the same in any chunks, with exact gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from verl_sft.model.attention import split_attention
from verl_sft.model.loss import has_plain_head, loss_sum


def naive(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return (cross_entropy(hidden @ head.T, targets, reduction="none") * weights).double().sum()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 1000),
    frozen_head=st.booleans(),
)
def test_any_chunk_gives_the_naive_loss_and_gradients(
    rows: int, chunk: int, seed: int, frozen_head: bool
) -> None:
    """Value and both gradients equal those of full logits, for any chunk size."""
    torch.manual_seed(seed)
    hidden = torch.randn(rows, 8, requires_grad=True)
    head = torch.randn(17, 8, requires_grad=not frozen_head)
    targets, weights = torch.randint(17, (rows,)), torch.rand(rows)
    expected = naive(hidden, head, targets, weights)
    expected.mul(0.5).backward()
    wanted = [hidden.grad, head.grad]
    hidden.grad = head.grad = None
    found = loss_sum(hidden, head, targets, weights, chunk)
    found.mul(0.5).backward()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    for one, other in zip((hidden.grad, head.grad), wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            loss_sum(hidden, head, targets, weights, chunk), expected, atol=1e-4, rtol=1e-5
        )


def test_weights_count() -> None:
    """Negative control: another weight is another loss; weight 0 is no loss and no gradient."""
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    targets = torch.tensor([1, 2, 3])
    one = loss_sum(hidden, head, targets, torch.tensor([1.0, 1.0, 0.0]))
    other = loss_sum(hidden, head, targets, torch.tensor([1.0, 0.5, 0.0]))
    assert float((one - other).detach().abs()) > 1e-3
    one.backward()
    assert hidden.grad is not None
    assert not hidden.grad[2].any() and hidden.grad[:2].any()


def test_huge_logits_stay_finite() -> None:
    """Logits of 1e4 overflow neither value nor gradient."""
    hidden = torch.full((2, 4), 100.0, requires_grad=True)
    head = torch.eye(4) * 100
    loss = loss_sum(hidden, head, torch.tensor([0, 1]), torch.ones(2))
    loss.backward()
    assert loss.isfinite() and hidden.grad is not None and hidden.grad.isfinite().all()


def test_heads_with_a_twist_are_left_to_the_model() -> None:
    """Soft-capped or scaled logits are not `hidden @ weight.T`, so the short cut is not taken."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from verl_sft.model.tiny import random_model

    plain = random_model("nano", vocab_size=50, max_positions=64, seed=0)
    assert has_plain_head(plain)
    small = dict(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    assert not has_plain_head(Gemma2ForCausalLM(Gemma2Config(**small)))


@pytest.mark.parametrize("lengths", [(5,), (3, 1, 9), (300, 280)])
def test_bf16_attention_blocks(lengths: tuple[int, ...]) -> None:
    """The bf16 path on CPU equals fp32 attention within bf16 rounding, gradients too."""
    torch.manual_seed(0)
    total = sum(lengths)
    query, key, value = (torch.randn(1, n, total, 16) for n in (4, 2, 2))
    outs = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype).clone().requires_grad_() for x in (query, key, value)]
        out, _ = split_attention(torch.nn.Identity(), *inputs, None, document_lengths=lengths)
        out.float().square().sum().backward()
        outs.append([out.float(), *(x.grad.float() for x in inputs if x.grad is not None)])
    for one, other in zip(*outs, strict=True):
        worst = (one - other).abs().max() / one.abs().max()
        assert float(worst.detach()) < 0.05
