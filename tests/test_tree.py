"""Prefix-shared training: trees hold exactly their samples, and train exactly as they do."""

from __future__ import annotations

import doctest
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train_ranks import VOCAB, ToyStore, run_ranks, steps_of, toy_config, toy_model
from verl_sft.config.train import DataConfig, MultiturnConfig, TrainConfig
from verl_sft.data import tree as tree_module
from verl_sft.data.audit import audit_lines
from verl_sft.data.collate import collate
from verl_sft.data.load import load_samples
from verl_sft.data.plan import EpochPlan, plan_epoch, validation_plan
from verl_sft.data.sample import TokenizedSample, make_sample
from verl_sft.data.tokenizer import tokenizer_spec
from verl_sft.data.tree import build_trees, neighbour_units, shared_lengths
from verl_sft.errors import UsageError
from verl_sft.model import tree_attention as attention_module
from verl_sft.model.build import build_model
from verl_sft.model.tree_attention import (
    Tree,
    depths,
    find_branches,
    probe_trees,
    register_tree_attention,
    tree_attention,
)
from verl_sft.records.io import write_parquet
from verl_sft.records.schema import SFTRecord
from verl_sft.trainer.option_checks import check_options
from verl_sft.trainer.sharing import missed_sharing
from verl_sft.types import Message

CPU = torch.device("cpu")
# Few ids, so that samples share, part and meet in every way; weights are 0 for context.
token = st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.0, 1.0, 2.0]))
sample_lists = st.lists(st.lists(token, min_size=2, max_size=9), min_size=1, max_size=7)


def make(rows: list[list[tuple[int, float]]]) -> list[TokenizedSample]:
    return [make_sample([i for i, _ in row], weights=[w for _, w in row]) for row in rows]


def learned(paths: Any) -> Counter[tuple[tuple[int, ...], int]]:
    """(context, target) -> weight, from (input ids so far, target, weight)."""
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for context, target, weight in paths:
        if weight:
            found[tuple(map(int, context)), int(target)] += weight
    return found


def conversations(count: int, turns: int, *, seed: int = 0) -> ToyStore:
    """Views as a template makes them that drops old thoughts: history, then a learned turn."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        history = rng.integers(3, VOCAB, 24)
        for _ in range(int(rng.integers(1, turns + 1))):
            thought, rest = rng.integers(3, VOCAB, 6), rng.integers(3, VOCAB, 9)
            ids = np.concatenate((history, thought, rest[:4])).astype(np.int32)
            weights = np.r_[np.zeros(len(history)), rng.choice([0.5, 1.0], 10)]
            samples.append(make_sample(ids, weights=weights, record_id=f"conversation-{number}"))
            history = np.concatenate((history, rest))
    return ToyStore(samples)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def test_docstring_examples_hold() -> None:
    """The worked examples are what the functions return."""
    for module in (tree_module, attention_module):
        result = doctest.testmod(module, extraglobs={"np": np, "torch": torch})
        assert result.attempted and not result.failed


def test_the_documented_tree() -> None:
    """Two samples that part behind a learned token, and that token once more."""
    trees = build_trees(make([[(i, 1) for i in row] for row in ([1, 2, 3, 9], [1, 2, 4, 5, 9])]),
                        min_shared=1)  # fmt: skip
    assert trees.input_ids.tolist() == [1, 2, 4, 5, 2, 3]
    assert trees.target_ids.tolist() == [2, 4, 5, 9, 3, 9]
    assert trees.weights.tolist() == [2, 1, 1, 1, 1, 1]
    assert trees.positions.tolist() == [0, 1, 2, 3, 1, 2]
    assert trees.subtree_end.tolist() == [6, 4, 4, 4, 6, 6]


@settings(max_examples=300, deadline=None)
@given(rows=sample_lists, min_shared=st.integers(1, 4))
def test_a_tree_holds_exactly_its_samples(
    rows: list[list[tuple[int, float]]], min_shared: int
) -> None:
    """Every learned (context, target) keeps its weight, none is invented; positions are depths."""
    samples = make(rows)
    trees = build_trees(samples, min_shared=min_shared)
    found = []
    for row in range(len(trees)):
        seen = [k for k in range(row + 1) if row < trees.subtree_end[k]]
        assert trees.positions[row] == len(seen) - 1
        assert len(set(trees.trees[seen])) == 1
        found.append((trees.input_ids[seen], trees.target_ids[row], float(trees.weights[row])))
    wanted = (
        (s.input_ids[: t + 1], s.target_ids[t], float(s.weights[t]))
        for s in samples
        for t in range(len(s))
    )
    assert learned(found) == learned(wanted)


@settings(max_examples=100, deadline=None)
@given(rows=sample_lists, min_shared=st.integers(1, 3), ranks=st.integers(1, 3))
def test_a_row_of_the_plan_keeps_the_budget(
    rows: list[list[tuple[int, float]]], min_shared: int, ranks: int
) -> None:
    """The planned tokens of a row are never fewer than those of the trees made of it."""
    samples = make(rows)
    lengths = np.array([len(s) for s in samples])
    shared = shared_lengths(
        ToyStore(samples), units=np.zeros(len(samples), int), min_shared=min_shared
    )
    plan = validation_plan(lengths, token_budget=12, dp_size=ranks, shared=shared)
    assert plan.sample_indices() == list(range(len(samples)))
    for row in (row for rank in plan.ranks for micro in rank for row in micro):
        assert len(build_trees([samples[i] for i in row], min_shared=min_shared)) <= 12


def test_batches_do_not_depend_on_sharing() -> None:
    """Conversations are shuffled whole and batches hold the same samples, shared or not."""
    store = conversations(12, 6)
    options: dict[str, Any] = {
        "seed": 3, "epoch": 1, "token_budget": 400, "train_batch_size": 7, "dp_size": 2,
        "units": store.units(),
    }  # fmt: skip
    shared = shared_lengths(store, units=store.units())
    apart, together = (plan_epoch(store.lengths, shared=s, **options) for s in (None, shared))

    def batches(plan: EpochPlan) -> list[list[int]]:
        return [step.sample_indices() for step in plan.steps]

    assert batches(apart) == batches(together) and apart != together
    order = [store[i].record_id for batch in batches(apart) for i in batch]
    cuts = sum(a != b for a, b in pairwise(order))
    assert cuts < 12 + len(apart.steps) * 3 < len(order)


def test_neighbours_that_share_half_are_one_unit() -> None:
    """Rollouts that repeat a long prompt join; others stay apart."""
    prompt, other = list(range(100, 130)), list(range(200, 230))
    samples = [make_sample([*p, *range(n)], weights=[1] * (30 + n))
               for p, n in ((prompt, 9), (prompt, 8), (other, 9), (other, 70))]  # fmt: skip
    store = ToyStore(samples)
    assert neighbour_units(store, np.arange(4)).tolist() == [0, 0, 1, 1]
    assert neighbour_units(store, np.array([0, 1, 1, 2])).tolist() == [0, 0, 0, 0]


# Old answers are shortened, as templates do that drop old thoughts.
FORGETFUL = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{{- m.content if m.role == 'user' or loop.last else m.content[-8:] }}{{ '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def test_views_in_the_token_cache_are_units(model: Path, tmp_path: Path) -> None:
    """Each conversation of the cache is one unit, and the audit says how much its views repeat."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.chat_template = FORGETFUL
    rows = []
    for name in ("one", "two"):
        turns = [(Message("user", f"{name} sees shelf {n} " * 5), Message("assistant", "go " * 9))
                 for n in range(3)]  # fmt: skip
        rows.append(SFTRecord(messages=tuple(m for turn in turns for m in turn), record_id=name))
    write_parquet(tmp_path / "train.parquet", rows)
    store = load_samples(
        [tmp_path / "train.parquet"],
        tokenizer=tokenizer_spec(tokenizer, name=str(model)),
        config=DataConfig(multiturn=MultiturnConfig(enable=True)),
        cache_dir=tmp_path / "cache",
    )
    assert store.units().tolist() == [0, 0, 0, 1, 1, 1]
    shared = shared_lengths(store, units=store.units())
    assert shared[0] == shared[3] == 0 and (shared[[1, 2, 4, 5]] > 0).all()
    share = shared.sum() / store.report.tokens
    assert f"{share:.1%} of all tokens repeat" in audit_lines(store)[0]
    config = TrainConfig()
    assert not missed_sharing(config, store, on_gpu=False)
    assert "CUDA" in missed_sharing(config, store, on_gpu=True)
    config.use_remove_padding = False
    assert "use_remove_padding" in missed_sharing(config, store, on_gpu=False)


def dense(subtree_end: torch.Tensor) -> torch.Tensor:
    row = torch.arange(len(subtree_end))
    return (row[None] <= row[:, None]) & (row[:, None] < subtree_end[None])


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_along_the_tree(
    window: int | None, heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Branch by branch, blocks of queries included, it is attention under the explicit mask."""
    monkeypatch.setattr(attention_module, "_QUERY_BLOCK", 4)
    batch = collate([conversations(4, 5).samples], pad_id=0, share=True)
    assert batch.subtree_end is not None
    ends, positions = batch.subtree_end.reshape(-1), batch.position_ids.reshape(-1)
    torch.manual_seed(0)
    made = tuple(torch.randn(1, n, len(ends), 8, requires_grad=True) for n in (4, heads, heads))
    q, k, v = (x.to(dtype) for x in made)
    out, _ = tree_attention(
        torch.nn.Identity(), q, k, v, None, sliding_window=window, tree=Tree(ends)
    )
    mask = dense(ends)
    if window:
        mask &= positions[:, None] - positions[None] < window
    wanted = torch.nn.functional.scaled_dot_product_attention(
        made[0], made[1], made[2], attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    bound = 1e-5 if dtype is torch.float32 else 0.05
    assert (out - wanted).abs().max() < bound
    weight = torch.randn_like(wanted)
    found = torch.autograd.grad((out.float() * weight).sum(), made)
    for one, other in zip(found, torch.autograd.grad((wanted * weight).sum(), made), strict=True):
        assert (one - other).abs().max() < 4 * bound


@pytest.mark.parametrize("window", [None, 200])
def test_the_block_mask_of_the_gpu(window: int | None) -> None:
    """flex_attention's blocks are exactly those with a visible pair, whole ones marked whole."""
    rng = np.random.default_rng(1)
    trunk = rng.integers(0, 99, 700)
    samples = [make_sample([*trunk[:n], *rng.integers(100, 199, 90)], weights=[1] * (n + 90))
               for n in (100, 300, 420, 700)]  # fmt: skip
    trees = build_trees(samples)
    ends, positions = torch.tensor(trees.subtree_end), torch.tensor(trees.positions)
    mask, block = dense(ends), 128
    count = -(-len(ends) // block)
    padded = torch.zeros(count * block, count * block, dtype=torch.bool)
    padded[: len(ends), : len(ends)] = mask
    blocks = padded.view(count, block, count, block).transpose(1, 2).flatten(2)
    found = Tree(ends).block_mask(window)
    assert torch.equal(found.to_dense()[0, 0].bool(), blocks.any(-1))
    whole = int(blocks.all(-1).sum()) if window is None else 0
    assert int(found.full_kv_num_blocks.sum()) == whole
    rows = torch.arange(len(ends))
    expected = mask if window is None else mask & (positions[:, None] - positions < window)
    assert torch.equal(found.mask_mod(0, 0, rows[:, None], rows), expected)


def test_packed_trees_do_not_see_each_other() -> None:
    """Documents, trees and padding are branches of their own; rows of a batch too."""
    one, other = conversations(1, 4).samples, conversations(1, 4, seed=5).samples
    batch = collate([one, [*other, *one]], pad_id=0, share=True)
    assert batch.subtree_end is not None
    ends = batch.subtree_end.reshape(-1)
    documents = batch.document_ids.reshape(-1)
    assert batch.num_documents == 3
    visible = dense(ends)
    assert not visible[documents[:, None] != documents[None]].any()
    assert sum(find_branches(ends.numpy()).rows) == len(ends)
    assert torch.equal(depths(ends), batch.position_ids.reshape(-1))


def test_the_probe_accepts_attention_and_refuses_the_rest(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trees give the logits of samples; a model that ignores them (or is recurrent) is refused."""
    config = toy_config(model, Path("unused"))
    options: dict[str, Any] = {"device": CPU, "half": False, "vocab_size": VOCAB}
    built = build_model(
        config.model, dtype=torch.float32, attention=register_tree_attention(), seed=0
    )
    assert probe_trees(built.loss_model, **options) < 1e-4
    from verl_sft.model import loss

    monkeypatch.setattr(loss, "tree_kwargs", lambda *args, **kwargs: {})
    with pytest.raises(UsageError, match="token trees"):
        probe_trees(built.loss_model, **options)


@pytest.fixture(scope="module")
def apart(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Losses and gradient norms without sharing, full and LoRA."""
    folder = tmp_path_factory.mktemp("apart")
    return {rank: train(model, folder / f"{rank}", lora=rank, sharing="false") for rank in (0, 4)}


def train(model: Path, out: Path, *, lora: int, sharing: str, size: int = 1, **changes: Any) -> Any:
    config = toy_config(
        model, out, model__lora_rank=lora, data__prefix_sharing=sharing, data__max_length=128,
        data__max_token_len_per_gpu=256, data__train_batch_size=8, trainer__total_epochs=1,
        optim__lr=3e-4, optim__lr_scheduler="constant", **changes,
    )  # fmt: skip
    store, val = conversations(6, 6), conversations(3, 4, seed=7)
    reports = run_ranks(config, size=size, train=store, val=val)
    assert [r["code"] for r in reports] == [0] * size, reports
    return np.array(steps_of(config, "train/loss", "train/grad_norm", "train/global_tokens"))


@pytest.mark.parametrize(("lora", "size"), [(0, 1), (0, 2), (4, 1), (4, 2)])
def test_sharing_is_the_same_trajectory(
    model: Path, apart: dict[int, Any], tmp_path: Path, lora: int, size: int
) -> None:
    """On or off, on 1 or 2 ranks, full or LoRA: equal losses and gradients, fewer tokens."""
    found = train(model, tmp_path / "run", lora=lora, sharing="true", size=size)
    expected = apart[lora]
    assert found.shape == expected.shape and len(found) >= 2
    assert np.abs(found[:, 0] - expected[:, 0]).max() < 1e-6
    assert np.abs(found[:, 1] - expected[:, 1]).max() < 1e-5
    assert found[:, 2].sum() < 0.7 * expected[:, 2].sum()


def test_slices_of_a_tree(model: Path, apart: dict[int, Any], tmp_path: Path) -> None:
    """Two ranks that share each sequence (Ulysses) compute trees as one rank does samples."""
    slices = {"ulysses_sequence_parallel_size": 2}
    found = train(model, tmp_path / "run", lora=0, sharing="true", size=2, **slices)
    assert np.abs(found[:, 0] - apart[0][:, 0]).max() < 1e-6
    assert np.abs(found[:, 1] - apart[0][:, 1]).max() < 1e-5
    assert found[:, 2].sum() < 0.7 * apart[0][:, 2].sum()


def test_a_run_goes_on_without_sharing(model: Path, apart: dict[int, Any], tmp_path: Path) -> None:
    """Batches are the same, so a run that began with sharing is continued without it."""
    train(model, tmp_path / "run", lora=0, sharing="auto", trainer__total_training_steps=2)
    found = train(model, tmp_path / "run", lora=0, sharing="false")
    assert np.abs(found[:, 0] - apart[0][:, 0]).max() < 1e-6
    assert found[1, 2] < apart[0][1, 2] and found[2, 2] == apart[0][2, 2]


@pytest.mark.parametrize(
    "changes",
    [{"use_remove_padding": False}, {"model__attn_implementation": "eager"}],
)
def test_what_cannot_share_is_refused_only_on_request(model: Path, changes: dict[str, Any]) -> None:
    """`true` names the other key; `auto` gives way."""
    wanted = toy_config(model, Path("unused"), data__prefix_sharing="true", **changes)
    with pytest.raises(UsageError, match="prefix_sharing=true"):
        check_options(wanted, world_size=1)
    check_options(toy_config(model, Path("unused"), **changes), world_size=1)
