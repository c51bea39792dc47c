"""The same three AdamW steps as a plain torch loop and as TRL's SFTTrainer, full and LoRA.

Same model, adapters, ids, labels and batches in float32; losses within 1e-5, gradient norms within
1e-4, weights within 1e-5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.train_ranks import VOCAB, ToyStore, run_ranks, steps_of, toy_config, toy_model
from verl_sft.data.plan import plan_epoch
from verl_sft.data.sample import make_sample

STEPS, BATCH, LR = 3, 4, 1e-3
LORA = {"model__lora_rank": 4, "model__lora_alpha": 8}
SETTINGS: dict[str, Any] = {
    "trainer__total_epochs": 1,
    "optim__lr": LR,
    "optim__lr_scheduler": "constant",
    "optim__lr_warmup_steps": 0,
    "data__train_batch_size": BATCH,
}

Result = tuple[np.ndarray[Any, Any], dict[str, torch.Tensor]]  # (loss, norm) [STEPS, 2]; weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def store() -> ToyStore:
    """Weights of 0 and 1 only: TRL's labels know no others."""
    rng = np.random.default_rng(3)
    samples = []
    for index in range(STEPS * BATCH):
        ids = rng.integers(3, VOCAB, size=int(rng.integers(5, 25)))
        weights = (rng.random(len(ids)) < 0.4).astype(np.float32)
        weights[-1] = 1.0
        samples.append(make_sample(ids, weights=weights, record_id=str(index)))
    return ToyStore(samples)


def batches() -> list[list[int]]:
    """The samples of each optimizer step."""
    plan = plan_epoch(
        store().lengths, seed=1, epoch=0, token_budget=64, train_batch_size=BATCH, dp_size=1
    )
    return [step.sample_indices() for step in plan.steps]


def start(model: Path, changes: dict[str, Any]) -> Any:
    """The model that a run of ours starts from, adapters included."""
    from verl_sft.model.build import build_model

    config = toy_config(model, Path("unused"), **changes)
    return build_model(config.model, dtype=torch.float32, attention="eager", seed=1)


def ours(model: Path, out: Path, changes: dict[str, Any], *, size: int = 1) -> Result:
    config = toy_config(model, out, **SETTINGS, **changes)

    def keep(trainer: Any) -> None:
        save = trainer.save

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            named = dict(trainer.model.causal.named_parameters())
            whole = {
                n: p.full_tensor().detach().clone() for n, p in named.items() if p.requires_grad
            }
            save_file(whole, out / "weights.safetensors")
            return save(*args, **kwargs)

        trainer.save = wrapped

    reports = run_ranks(config, size=size, train=store(), hook=keep)
    assert [r["code"] for r in reports] == [0] * size, reports
    steps = np.array(steps_of(config, "train/loss", "train/grad_norm"))
    return steps, load_file(out / "weights.safetensors")


def plain_loop(model: Path, changes: dict[str, Any]) -> Result:
    """One sample at a time, the mean over the labels of the whole batch."""
    causal = start(model, changes).causal
    named = {n: p for n, p in causal.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=(0.9, 0.95),
    )
    rows = []
    for batch in batches():
        samples = [store()[i] for i in batch]
        count = sum(float(s.weights.sum()) for s in samples)
        total = 0.0
        for sample in samples:
            logits = causal(input_ids=torch.tensor(sample.input_ids)[None].long()).logits[0]
            losses = torch.nn.functional.cross_entropy(
                logits, torch.tensor(sample.target_ids).long(), reduction="none"
            )
            loss = (losses * torch.tensor(sample.weights)).sum() / count
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rows.append((total, float(norm)))
    return np.array(rows), {n: p.detach() for n, p in named.items()}


def trl_trainer(model: Path, out: Path, changes: dict[str, Any]) -> Result:
    """TRL's SFTTrainer on the same ids and labels, padded, two micro-batches per step."""
    trl = pytest.importorskip("trl", reason="compares with trl")
    datasets = pytest.importorskip("datasets", reason="trl reads datasets")
    datasets.disable_progress_bars()
    rows = []
    for sample in (store()[i] for batch in batches() for i in batch):
        targets = np.where(sample.weights > 0, sample.target_ids, -100).tolist()
        ids = [*sample.input_ids.tolist(), int(sample.target_ids[-1])]
        rows.append({"input_ids": ids, "labels": [-100, *targets]})
    built = start(model, changes)
    args = trl.SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        adam_beta2=0.95,
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=built.peft or built.causal,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(str(model)),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    history = [h for h in trainer.state.log_history if "loss" in h]
    named = {n: p.detach() for n, p in built.causal.named_parameters() if p.requires_grad}
    return np.array([(h["loss"], h["grad_norm"]) for h in history]), named


def assert_parity(found: Result, expected: Result) -> None:
    assert found[0].shape == expected[0].shape == (STEPS, 2)
    assert np.abs(found[0][:, 0] - expected[0][:, 0]).max() < 1e-5
    assert np.abs(found[0][:, 1] - expected[0][:, 1]).max() < 1e-4
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, tensor in expected[1].items():
        # Where a gradient is as small as Adam's eps its rounding decides: 2 % of a step.
        assert float((found[1][name] - tensor).abs().max()) < 0.02 * LR, name


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_parity_with_a_plain_loop(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """A plain torch loop over single samples gives the same numbers."""
    assert_parity(ours(model, tmp_path / "run", changes), plain_loop(model, changes))


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_parity_with_trl(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """TRL's SFTTrainer over padded batches and two accumulation steps gives the same numbers."""
    assert_parity(
        ours(model, tmp_path / "run", changes), trl_trainer(model, tmp_path / "trl", changes)
    )


def test_the_comparison_can_fail(model: Path, tmp_path: Path) -> None:
    """Negative control: decaying norms and biases too, as verl does, is seen in the weights."""
    found = ours(model, tmp_path / "run", {"optim__decay_norms_and_biases": True})
    with pytest.raises(AssertionError):
        assert_parity(found, plain_loop(model, {}))
