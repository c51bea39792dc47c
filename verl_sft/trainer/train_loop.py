"""The loop: take a step of the plan, normalise over the whole global batch, update, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from verl_sft.config.train import TrainConfig
from verl_sft.data.collate import PackedBatch, collate
from verl_sft.data.plan import EpochPlan, Lengths, MicroBatch, StepPlan
from verl_sft.data.sample import TokenizedSample
from verl_sft.data.slice import slice_batch
from verl_sft.distributed.reduce import sum_over_ranks
from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import begin_micro_batch, compute_dtype
from verl_sft.errors import NonFiniteError
from verl_sft.trainer.batches import counts, model_inputs
from verl_sft.trainer.best import judged, must_save, stops_early
from verl_sft.trainer.breakdown import LossParts
from verl_sft.trainer.checkpoint import TrainProgress
from verl_sft.trainer.failures import explain_memory
from verl_sft.trainer.flops import peak_flops
from verl_sft.trainer.gradients import gradient_norm, scale_gradients
from verl_sft.trainer.learning_rate import lr_factor, set_learning_rate, warmup_steps
from verl_sft.trainer.meter import Meter, model_flops
from verl_sft.trainer.pace import Pace
from verl_sft.trainer.saving import Saver
from verl_sft.trainer.skipping import bad_samples, check_skip, flagged, is_finite
from verl_sft.trainer.state import TrainState
from verl_sft.trainer.stopping import stop_on_signals, stopped_at
from verl_sft.trainer.tracking import Tracker
from verl_sft.trainer.validation import validate
from verl_sft.trainer.watchdog import Watchdog


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
    skipped: Sequence[str] = ()  # samples of a step that made no update


class TrainLoop:
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
        watchdog: bounds the time of a step; None: nothing does.
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
        watchdog: Watchdog | None = None,
        play: Callable[[int], Mapping[str, float]] | None = None,
    ) -> None:
        self.config, self.world, self.model = config, world, model
        self.optimizer, self.plan, self.pad_id = optimizer, plan, pad_id
        self.train_data, self.val_data = train_data, val_data
        self.fingerprint, self.directory = fingerprint, directory
        self.progress, self.tracker, self.play = TrainProgress(), tracker, play
        self.watchdog, self.pace = watchdog, Pace(world, say=self._say)
        self.saver = Saver(
            directory,
            fingerprint=fingerprint,
            world=world,
            keep=config.trainer.max_ckpt_to_keep,
            beside=config.trainer.async_save,
            warn=config.trainer.on_save_error == "warn",
            say=self._say,
        )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.stop_asked = 0  # the signal that asks
        self._lengths = train_data.lengths
        model.keep_losses = config.trainer.loss_breakdown
        dtype = str(compute_dtype(config.engine.dtype, device=world.device)).removeprefix("torch.")
        self.meter = Meter(
            world=world,
            flops=model_flops(model),
            peak=peak_flops(config.trainer.peak_flops, device=world.device, dtype=dtype),
            budget=config.data.token_budget,
        )

    def resume(self, progress: TrainProgress, *, path: Path | None = None) -> None:
        """Go on from a loaded checkpoint, verified if its `path` is given."""
        self.progress = progress
        self.saver.start_from(progress.step, path=path)

    def fit(self) -> TrainProgress:
        """Train from `progress` to the end of the plan, validating and saving on the way.

        Raises:
            NonFiniteError: NaN or inf appeared and the step may not be skipped; no weight changed.
            Preempted: a signal asked to stop; a checkpoint of the last step is there.
        """
        total, config = self.plan.total_steps, self.config.trainer
        while self.progress.step < total and not stops_early(self.progress, config=config):
            steps = self.plan.train(self.progress.epoch).steps
            for step_plan in steps[self.progress.epoch_step :]:
                started = time.perf_counter()
                with self._watch("step"):
                    outcome = self.train_step(step_plan)
                self._advance(outcome)
                seconds = time.perf_counter() - started
                metrics = self._metrics(outcome, step_plan=step_plan, seconds=seconds)
                metrics.update(self._evaluate(leaving=outcome.stop_asked))
                self.progress = judged(self.progress, metrics=metrics, config=config)
                step = self.progress.step
                last = step == total or stops_early(self.progress, config=config)
                if self.tracker:
                    self.tracker.log_step(metrics)
                if outcome.stop_asked or last or self._save_due():
                    self.save(wait=outcome.stop_asked or last)
                if outcome.stop_asked and not last:
                    raise stopped_at(step, total=total, number=self.stop_asked)
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
        self.pace.begin()
        batches = [self._batch(micro, self.train_data) for micro in micros]
        self.pace.loaded()
        flags = (float(self.stop_asked > 0), float(self.saver.busy))
        weight, tokens, learned, stop, busy, *own = sum_over_ranks(
            [*counts(batches), *flags, *self.pace.share()], world=self.world
        )
        self.pace.judge(own, step=step)
        if self.saver.pending and not busy:
            self.saver.finish()
        losses, parts = [], self._loss_parts(self.train_data)
        for index, batch in enumerate(batches):
            begin_micro_batch(self.model, last=index == len(batches) - 1)
            with self._explain_memory(micros[index]):
                loss = self.model(**model_inputs(batch, self.world.device), denominator=weight)
                loss.backward()
            losses.append(loss.detach())
            parts.add(batch, self.model.row_losses)
        values = torch.stack(losses).tolist()
        total_loss, *sums = sum_over_ranks([sum(values), *parts.values()], world=self.world)
        norm = gradient_norm(self.parameters, world=self.world)
        lr, skipped = self.learning_rate(step), list[str]()
        if is_finite(total_loss, norm):
            self._update(lr, norm=norm)
        else:
            skipped = self._skip(step_plan, values)
        self.optimizer.zero_grad(set_to_none=True)
        self.pace.end()
        named, known = parts.named(sums, prefix="train/"), (int(tokens), int(learned), bool(stop))
        return StepOutcome(total_loss, norm, lr, *known, named, skipped)

    def validate(self) -> dict[str, float]:
        """Mean losses per learned token over every validation row, on all ranks."""
        data = self.val_data
        assert data is not None

        def forward(micro: MicroBatch) -> tuple[PackedBatch, torch.Tensor]:
            batch = self._batch(micro, data)
            return batch, self.model(**model_inputs(batch, self.world.device))

        return validate(
            self.model,
            sets=self.plan.validation,
            forward=forward,
            parts=self._loss_parts(data) if self.config.trainer.loss_breakdown else None,
            world=self.world,
        )

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint of this step, unless there is one; with `wait` it must succeed."""
        with self._watch("the save of step"):
            state = TrainState(self.model, self.optimizer)
            sync = self.tracker.sync if self.tracker else None
            self.saver.save(state, progress=self.progress, last=wait, before=sync)

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
        """Let SIGTERM or Ctrl-C end the run behind the current step, and a later one at once."""

        def ask(number: int) -> None:
            self.stop_asked = number

        stop_on_signals(ask)

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

    def _update(self, lr: float, *, norm: float) -> None:
        clip = self.config.optim.clip_grad
        if clip > 0 and norm > clip:
            scale_gradients(self.parameters, factor=clip / norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()

    def _skip(self, step_plan: StepPlan, losses: Sequence[float]) -> list[str]:
        names = bad_samples(step_plan, losses=losses, name=self._name, world=self.world)
        try:
            check_skip(
                names, progress=self.progress, config=self.config.trainer, where=self.directory
            )
        except NonFiniteError:
            self.saver.finish()
            raise
        self._say(f"step {self.progress.step + 1} SKIPPED, not finite: {', '.join(names)}")
        return names

    def _watch(self, phase: str) -> AbstractContextManager[None]:
        step = self.progress.step + (phase == "step")
        return self.watchdog.watch(f"{phase} {step}") if self.watchdog else nullcontext()

    def _explain_memory(self, micro: MicroBatch) -> AbstractContextManager[None]:
        step, lengths = self.progress.step + 1, self._lengths
        return explain_memory(step, micro=micro, lengths=lengths, name=self._name)

    def _name(self, index: int) -> str:
        return self.train_data[index].record_id

    def _say(self, text: str) -> None:
        if self.tracker:
            self.tracker.say(text)

    def _advance(self, outcome: StepOutcome) -> None:
        now, done = self.progress, self.progress.epoch_step + 1
        ended = done == self.plan.steps_per_epoch
        self.progress = replace(
            now,
            step=now.step + 1,
            epoch=now.epoch + ended,
            epoch_step=0 if ended else done,
            tokens=now.tokens + outcome.tokens,
            skipped=now.skipped + bool(outcome.skipped),
        )

    def _save_due(self) -> bool:
        config, step = self.config.trainer, self.progress.step
        due = is_due(config.save_freq, step, epoch_end=self.progress.epoch_step == 0)
        return due or must_save(self.progress, config=config)

    def _metrics(
        self, outcome: StepOutcome, *, step_plan: StepPlan, seconds: float
    ) -> dict[str, float | int]:
        progress = self.progress
        metrics = {
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
        if self.saver.failed:
            metrics["train/saves_failed"] = self.saver.failed
        if outcome.skipped:
            return flagged(metrics, names=outcome.skipped, total=progress.skipped)
        return metrics


def is_due(frequency: Any, step: int, *, epoch_end: bool) -> bool:
    """Whether `save_freq` or `test_freq` (steps, `after_each_epoch`, -1: never) falls on `step`."""
    if frequency == "after_each_epoch":
        return epoch_end
    return frequency is not None and int(frequency) > 0 and step % int(frequency) == 0


def dropout_seed(seed: int, rank: int, step: int) -> int:
    """A seed of its own for every (run, rank, step)."""
    return (seed * 1_000_003 + rank) * 1_000_003 + step
