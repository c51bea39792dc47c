"""The loop: take a step of the plan, normalise over the whole global batch, update, save."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from verl_sft.config.train import TrainConfig
from verl_sft.data.collate import PackedBatch, collate
from verl_sft.data.plan import EpochPlan, Lengths, MicroBatch, StepPlan
from verl_sft.data.sample import TokenizedSample
from verl_sft.data.slice import slice_batch
from verl_sft.distributed.reduce import gather_json, sum_over_ranks
from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import compute_dtype
from verl_sft.errors import NonFiniteError, Preempted
from verl_sft.trainer import checkpoint
from verl_sft.trainer.best import judged, must_save, stops_early
from verl_sft.trainer.breakdown import LossParts
from verl_sft.trainer.checkpoint import TrainProgress
from verl_sft.trainer.flops import peak_flops
from verl_sft.trainer.meter import Meter, model_size
from verl_sft.trainer.optim import gradient_norm, lr_factor, scale_gradients, warmup_steps
from verl_sft.trainer.state import TrainState
from verl_sft.trainer.tracking import Tracker
from verl_sft.trainer.validation import validate

_NAMED_IDS = 20  # samples named in a message
_MODEL_INPUTS = (
    "input_ids",
    "target_ids",
    "weights",
    "position_ids",
    "cu_seqlens",
    "max_seqlen",
    "subtree_end",
    "parts",
)


class Samples(Protocol):
    """Tokenised samples by index, with their lengths and the names of their sources."""

    @property
    def lengths(self) -> Lengths:
        """Tokens of each sample, int64 [N]."""
        ...

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the sources, in the order of their numbers in the labels."""
        ...

    def __getitem__(self, index: int) -> TokenizedSample: ...


@dataclass(frozen=True)
class RunPlan:
    """Which samples each step reads: `train(epoch)`, the same number of steps in every epoch.

    `validation` holds one plan for each set by name; the name of an only set may be empty.
    """

    train: Callable[[int], EpochPlan]
    steps_per_epoch: int
    total_steps: int
    validation: Mapping[str, StepPlan] = field(default_factory=dict)
    share: bool = False  # whether samples of a row are merged into token trees


@dataclass(frozen=True)
class StepOutcome:
    """Sums over all ranks of one optimizer step."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    learned_tokens: int
    stop_asked: bool
    parts: Mapping[str, float] = field(default_factory=dict)  # the loss, broken down


class SFTTrainer:
    """The parts of a run, in the order in which they depend on one another.

    Args:
        config: the resolved config.
        world: the ranks.
        model: a sharded `LossModel`; its gradients are sums over ranks.
        optimizer: over its trainable parameters.
        plan: what is read when.
        train_data: samples that `plan.train` indexes.
        val_data: samples that `plan.validation` indexes.
        pad_id: id for padding.
        fingerprint: what must not change between a run and its resumption.
        directory: of the run.
        tracker: rank 0's loggers; None elsewhere.
        play: measures the current weights in an environment, on all ranks; None: nothing does.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        world: World,
        model: Any,
        optimizer: torch.optim.Optimizer,
        plan: RunPlan,
        train_data: Samples,
        val_data: Samples | None,
        pad_id: int,
        fingerprint: Mapping[str, Any],
        directory: Path,
        tracker: Tracker | None = None,
        play: Callable[[int], Mapping[str, float]] | None = None,
    ) -> None:
        self.config, self.world, self.model = config, world, model
        self.optimizer, self.plan, self.pad_id = optimizer, plan, pad_id
        self.train_data, self.val_data = train_data, val_data
        self.fingerprint, self.directory = fingerprint, directory
        self.progress, self.tracker, self.play = TrainProgress(), tracker, play
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.stop_asked = False
        self._saved_step = -1
        self._lengths = train_data.lengths
        model.keep_losses = config.trainer.loss_breakdown
        dtype = str(compute_dtype(config.engine.dtype, device=world.device)).removeprefix("torch.")
        self.meter = Meter(
            world=world,
            size=model_size(model),
            peak=peak_flops(config.trainer.peak_flops, device=world.device, dtype=dtype),
            budget=config.data.token_budget,
        )

    def resume(self, progress: TrainProgress) -> None:
        """Go on from a loaded checkpoint."""
        self.progress, self._saved_step = progress, progress.step

    def fit(self) -> TrainProgress:
        """Train from `progress` to the end of the plan, validating and saving on the way.

        Raises:
            NonFiniteError: NaN or inf appeared; the weights are those before that step.
            Preempted: a signal asked to stop; a checkpoint of the last step is there.
        """
        total, config = self.plan.total_steps, self.config.trainer
        while self.progress.step < total and not stops_early(self.progress, config=config):
            steps = self.plan.train(self.progress.epoch).steps
            for step_plan in steps[self.progress.epoch_step :]:
                started = time.perf_counter()
                outcome = self.train_step(step_plan)
                self._advance(outcome.tokens)
                seconds = time.perf_counter() - started
                metrics = self._metrics(outcome, step_plan=step_plan, seconds=seconds)
                metrics.update(self._evaluate(leaving=outcome.stop_asked))
                self.progress = judged(self.progress, metrics=metrics, config=config)
                step = self.progress.step
                last = step == total or stops_early(self.progress, config=config)
                if self.tracker:
                    self.tracker.log_step(metrics)
                if outcome.stop_asked or last or self._save_due():
                    self.save()
                if outcome.stop_asked and not last:
                    raise Preempted(
                        f"stopped by a signal at step {step} of {total}",
                        fix="Run the same command again to go on from there",
                    )
                if last:
                    break
        return self.progress

    def train_step(self, step_plan: StepPlan) -> StepOutcome:
        """One optimizer step over one global batch; exact whatever the micro-batches and ranks.

        The loss is sum(weight * cross-entropy) / sum(weight) over all ranks and micro-batches, so
        the denominator is known before the first backward pass.
        """
        step = self.progress.step
        torch.manual_seed(dropout_seed(self.config.trainer.seed, self.world.rank, step))
        micros = step_plan.ranks[self.world.dp_rank]
        batches = [self._batch(micro, self.train_data) for micro in micros]
        weight, tokens, learned, stop = sum_over_ranks(
            [*_counts(batches), float(self.stop_asked)], world=self.world
        )
        losses, parts = [], self._loss_parts(self.train_data)
        for index, batch in enumerate(batches):
            self.model.set_requires_gradient_sync(index == len(batches) - 1)
            loss = self.model(**_inputs(batch, self.world.device), denominator=weight)
            loss.backward()
            losses.append(loss.detach())
            parts.add(batch, self.model.row_losses)
        values = torch.stack(losses).tolist()
        total_loss, *sums = sum_over_ranks([sum(values), *parts.values()], world=self.world)
        norm = gradient_norm(self.parameters, world=self.world)
        if not (abs(total_loss) < float("inf") and norm < float("inf")):
            self._refuse(step_plan, values)
        clip = self.config.optim.clip_grad
        if clip > 0 and norm > clip:
            scale_gradients(self.parameters, factor=clip / norm)
        lr = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        named = parts.named(sums, prefix="train/")
        return StepOutcome(total_loss, norm, lr, int(tokens), int(learned), bool(stop), named)

    def validate(self) -> dict[str, float]:
        """Mean losses per learned token over every validation row, on all ranks."""
        data = self.val_data
        assert data is not None

        def forward(micro: MicroBatch) -> tuple[PackedBatch, torch.Tensor]:
            batch = self._batch(micro, data)
            return batch, self.model(**_inputs(batch, self.world.device))

        return validate(
            self.model,
            sets=self.plan.validation,
            forward=forward,
            parts=self._loss_parts(data) if self.config.trainer.loss_breakdown else None,
            world=self.world,
        )

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self._saved_step == self.progress.step:
            return
        if self.tracker:
            self.tracker.sync()
        checkpoint.save(
            self.directory,
            state=TrainState(self.model, self.optimizer),
            progress=self.progress,
            fingerprint=self.fingerprint,
            world=self.world,
            keep=self.config.trainer.max_ckpt_to_keep,
        )
        self._saved_step = self.progress.step

    def learning_rate(self, step: int) -> float:
        """The learning rate of update number `step`, counted from 0."""
        optim, total = self.config.optim, self.plan.total_steps
        return optim.lr * lr_factor(
            step,
            total_steps=total,
            warmup=warmup_steps(optim, total_steps=total),
            kind=optim.lr_scheduler,
            min_ratio=optim.min_lr_ratio,
        )

    def stop_on_signals(self) -> None:
        """Let SIGTERM end the run behind the current step.

        A second one changes nothing: one sent to the whole process group arrives twice, from the
        sender and from torchrun, which itself kills ranks that take too long.
        """

        def ask(number: int, frame: Any) -> None:
            self.stop_asked = True

        signal.signal(signal.SIGTERM, ask)

    def _evaluate(self, *, leaving: bool) -> dict[str, float]:
        """What is due behind this step: validation, and games unless the run is to stop now."""
        config, step = self.config.trainer, self.progress.step
        ended, last = self.progress.epoch_step == 0, step == self.plan.total_steps
        found: dict[str, float] = {}
        if self.plan.validation and (last or is_due(config.test_freq, step, epoch_end=ended)):
            found.update(self.validate())
        if self.play and not leaving and is_due(config.env_eval_freq, step, epoch_end=ended):
            found.update(self.play(step))
        return found

    def _loss_parts(self, data: Samples) -> LossParts:
        return LossParts(data.groups, device=self.world.device)

    def _batch(self, micro: MicroBatch, data: Samples) -> PackedBatch:
        rows = [[data[i] for i in row] for row in micro]
        batch = collate(rows, pad_id=self.pad_id, share=self.plan.share)
        return slice_batch(batch, part=self.world.sp_rank, parts=self.world.sp_size)

    def _advance(self, tokens: int) -> None:
        now, done = self.progress, self.progress.epoch_step + 1
        ended = done == self.plan.steps_per_epoch
        self.progress = replace(
            now,
            step=now.step + 1,
            epoch=now.epoch + ended,
            epoch_step=0 if ended else done,
            tokens=now.tokens + tokens,
        )

    def _save_due(self) -> bool:
        config, step = self.config.trainer, self.progress.step
        due = is_due(config.save_freq, step, epoch_end=self.progress.epoch_step == 0)
        return due or must_save(self.progress, config=config)

    def _metrics(
        self, outcome: StepOutcome, *, step_plan: StepPlan, seconds: float
    ) -> dict[str, float | int]:
        progress = self.progress
        return {
            "step": progress.step,
            "epoch": progress.epoch + progress.epoch_step / self.plan.steps_per_epoch,
            "train/loss": outcome.loss,
            "train/grad_norm": outcome.grad_norm,
            "train/lr": outcome.lr,
            "train/global_tokens": outcome.tokens,
            "train/learned_tokens": outcome.learned_tokens,
            "train/total_tokens": progress.tokens,
            "train/total_tokens(B)": progress.tokens / 1e9,
            **outcome.parts,
            **self.meter.measure(
                step_plan,
                lengths=self._lengths,
                tokens=outcome.tokens,
                learned=outcome.learned_tokens,
                seconds=seconds,
                remaining=self.plan.total_steps - progress.step,
            ),
        }

    def _refuse(self, step_plan: StepPlan, losses: Sequence[float]) -> None:
        """All ranks saw the same sums, so all come here, before any weight has changed."""
        micros = step_plan.ranks[self.world.dp_rank]
        bad = [m for m, v in zip(micros, losses, strict=True) if not abs(v) < float("inf")]
        mine = [self.train_data[i].record_id for micro in bad for row in micro for i in row]
        named = [name for part in gather_json(mine, world=self.world) for name in part]
        if not named:
            named = [self.train_data[i].record_id for i in step_plan.sample_indices()]
        shown = ", ".join(named[:_NAMED_IDS]) + (" ..." if len(named) > _NAMED_IDS else "")
        raise NonFiniteError(
            f"loss or gradient is not finite at step {self.progress.step + 1}",
            where=str(self.directory),
            why=f"It comes from these samples: {shown}. The update was not made",
            fix="Look at them, lower optim.lr, or use engine.dtype=fp32",
        )


def is_due(frequency: Any, step: int, *, epoch_end: bool) -> bool:
    """Whether `save_freq` or `test_freq` (steps, `after_each_epoch`, -1: never) falls on `step`."""
    if frequency == "after_each_epoch":
        return epoch_end
    return frequency is not None and int(frequency) > 0 and step % int(frequency) == 0


def dropout_seed(seed: int, rank: int, step: int) -> int:
    """A seed of its own for every (run, rank, step)."""
    return (seed * 1_000_003 + rank) * 1_000_003 + step


def _counts(batches: Sequence[PackedBatch]) -> tuple[float, float, float]:
    """Sum of weights, number of document tokens, number of learned tokens."""
    return (
        sum(float(b.weights.sum(dtype=torch.float64)) for b in batches),
        float(sum(int((b.document_ids >= 0).sum()) for b in batches)),
        float(sum(int(b.weights.count_nonzero()) for b in batches)),
    )


def _inputs(batch: PackedBatch, device: torch.device) -> dict[str, Any]:
    moved = batch.to(device, non_blocking=True) if device.type == "cuda" else batch
    return {name: getattr(moved, name) for name in _MODEL_INPUTS}
