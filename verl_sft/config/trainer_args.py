"""Arguments that all trainers on top of transformers share: batches, and when to save."""

from __future__ import annotations

from typing import Any

from verl_sft.config.checks import one_of, whole


def batch_keys(micro: Any, rounds: Any, *, world_size: int) -> tuple[dict[str, Any], str]:
    """Our batch sizes, in samples, and a line that says how they came about.

    Args:
        micro: `per_device_train_batch_size`.
        rounds: `gradient_accumulation_steps`.
        world_size: number of processes.

    Raises:
        UsageError: one of them is no whole number.
    """
    per_step = whole("per_device_train_batch_size", micro)
    steps = whole("gradient_accumulation_steps", rounds)
    total = per_step * steps * world_size
    sizes = {"data.micro_batch_size_per_gpu": per_step, "data.train_batch_size": total}
    note = f"batch: {per_step} x {steps} x {world_size} processes = data.train_batch_size={total}"
    return sizes, note


def save_keys(strategy: Any, steps: Any) -> dict[str, Any]:
    """Our keys for `save_strategy` and `save_steps`.

    Raises:
        UsageError: an unknown strategy, or no number of steps.
    """
    values = {"trainer.save_freq": -1 if strategy == "best" else when("save", strategy, steps)}
    return {**values, "trainer.save_best": True} if strategy == "best" else values


def when(what: str, strategy: Any, steps: Any) -> Any:
    """The value of our `save_freq` or `test_freq`; YAML reads `no` as false.

    Raises:
        UsageError: as `save_keys`.
    """
    named = "no" if strategy is False else str(strategy)
    known = ("epoch", "no", "steps", *(["best"] if what == "save" else []))
    one_of(f"{what}_strategy", named, known)
    plans = {"epoch": "after_each_epoch", "no": -1}
    return plans[named] if named in plans else whole(f"{what}_steps", steps)
