"""What a run proves about itself before its first step, printed as a list.

A check that fails ends the run with its name: training on would cost hours and mean something else
than was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from verl_sft.config.train import TrainConfig
from verl_sft.data.collate import collate
from verl_sft.data.sample import TokenizedSample, make_sample
from verl_sft.data.slice import slice_batch
from verl_sft.data.store import LoadReport
from verl_sft.distributed.reduce import sum_over_ranks, together
from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import reshard
from verl_sft.errors import UsageError
from verl_sft.model.build import DTYPES, decoder_layers
from verl_sft.model.lora import wants_lora
from verl_sft.model.loss import dot
from verl_sft.trainer.batches import model_inputs

_ADAPTER_MARK = "lora_"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the list; `fix` is there where `passed` is not."""

    name: str
    passed: bool
    told: str
    fix: str = ""

    def __str__(self) -> str:
        return f"[{'ok' if self.passed else 'FAILED'}] {self.name}: {self.told}"


def self_checks(
    config: TrainConfig,
    *,
    world: World,
    model: Any,
    optimizer: torch.optim.Optimizer,
    report: LoadReport | None,
    attention: str,
    dtype: torch.dtype,
    apart: float,
) -> list[Check]:
    """All checks, in the order in which they are printed; every rank must call.

    Args:
        config: of the run.
        world: the ranks.
        model: the sharded `LossModel`.
        optimizer: over its parameters.
        report: of the training split; None where nothing is known of its turns.
        attention: the name in transformers' table.
        dtype: of compute, as it was asked for.
        apart: what `probe_packing` measured.
    """
    together, alone, whole, seen = _both_ways(model, world=world)
    half = dtype is not torch.float32
    checks = [check_isolation(apart, attention=attention)]
    if report is not None:
        checks.append(check_stop_tokens(report))
    return [
        *checks,
        check_precision(config, model=model, wanted=dtype, seen=seen),
        check_trained(config, model=model, optimizer=optimizer),
        check_accumulation(together, alone=alone, half=half),
        *([check_division(together, whole=whole, half=half)] if model.divided else []),
    ]


def require_checks(config: TrainConfig, *, world: World, **facts: Any) -> None:
    """Make, print and require all checks; `facts` are those of `self_checks`.

    Raises:
        UsageError: on every rank, if a check failed on any.
    """
    checks = self_checks(config, world=world, **facts)
    if world.is_main:
        print("\n".join(map(str, checks)), flush=True)
    with together(world):
        require(checks)


def require(checks: Sequence[Check]) -> None:
    """Raise for the first check that did not pass.

    Raises:
        UsageError: naming the check.
    """
    for check in checks:
        if not check.passed:
            raise UsageError(
                f"a check before the first step failed: {check.name}: {check.told}", fix=check.fix
            )


def check_isolation(apart: float, *, attention: str) -> Check:
    """Whether packed documents see only themselves; the probe itself refuses what does not."""
    told = f"packed logits equal each document's alone within {apart:.1e} (attention {attention})"
    return Check("packing isolation", True, told)


def check_stop_tokens(report: LoadReport) -> Check:
    """Whether the model is told where its turns end."""
    learned = report.turns - report.lost_stops - report.without_stop
    told = f"in {learned:,} of {report.turns:,} turns"
    if report.without_stop:
        told += f"; the template prints none in {report.without_stop:,}"
    return Check(
        "stop token learned",
        learned > 0 or report.lost_stops == 0,
        told,
        "Every turn was cut before its end: raise data.max_length or use "
        "data.truncation=oldest_turns",
    )


def check_precision(
    config: TrainConfig, *, model: Any, wanted: torch.dtype, seen: torch.dtype
) -> Check:
    """Whether trained parameters and layers have the precision that was configured."""
    at_rest = DTYPES[config.engine.model_dtype]
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    told = (
        f"trained parameters and optimizer {_names(trained)}, layers compute in {_names({seen})}, "
        f"float32 products {torch.get_float32_matmul_precision()}"
    )
    return Check(
        "precision",
        trained <= {at_rest} and seen is wanted,
        told,
        f"Configured are {_names({at_rest})} and {_names({wanted})}; set engine.model_dtype and "
        "engine.dtype to what the model can do",
    )


def check_trained(config: TrainConfig, *, model: Any, optimizer: torch.optim.Optimizer) -> Check:
    """Whether what learns is what was asked for, and the optimizer has each of it once."""
    total = trained = 0
    names, frozen = [], 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trained += parameter.numel()
            names.append(name)
        else:
            frozen += 1
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    same = sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    lora = wants_lora(config.model)
    odd = [n for n in names if _ADAPTER_MARK not in n] if lora else []
    told = f"{trained:,} of {total:,} ({trained / max(total, 1):.2%})"
    told += ", the base is frozen" if lora and not odd else ""
    if odd:
        told += f"; not of an adapter: {odd[0]}"
    if not same:
        told += "; the optimizer holds others"
    whole = bool(names) and not odd if lora else bool(names) and not frozen
    return Check(
        "trained parameters",
        whole and same,
        told,
        "Check model.lora_rank and model.target_modules",
    )


def check_accumulation(together: float, *, alone: float, half: bool) -> Check:
    """Whether two micro-batches add up to what one with both samples gives."""
    apart = abs(together - alone) / max(abs(alone), 1e-12)
    return Check(
        "gradient accumulation",
        apart < _limit(half),
        f"two micro-batches add up to one within {apart:.1e}",
        "This model's loss depends on what shares a micro-batch; use another "
        "model.attn_implementation",
    )


def check_division(divided: float, *, whole: float, half: bool) -> Check:
    """Whether ranks that know some columns of the logits each find the loss of whole logits."""
    apart = abs(divided - whole) / max(abs(whole), 1e-12)
    return Check(
        "divided vocabulary",
        apart < _limit(half),
        f"the loss is that of whole logits within {apart:.1e}",
        "Use model.vocab_parallel=false",
    )


def _limit(half: bool) -> float:
    """How far losses may be apart, relatively."""
    return 0.02 if half else 1e-5


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "none"


def _both_ways(model: Any, *, world: World) -> tuple[float, float, float, torch.dtype]:
    """Loss sums of two documents: in one micro-batch, in two, from logits; and the dtype inside."""
    vocabulary = int(model.causal.config.get_text_config().vocab_size)
    seen: list[torch.dtype] = []

    def look(module: Any, inputs: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).dtype)

    samples = [_document(length, vocabulary) for length in (11, 6)]
    training = model.training
    handle = decoder_layers(model.causal)[-1].register_forward_hook(look)
    model.eval()
    try:
        with torch.no_grad():
            sums = [_loss(model, part, world=world) for part in (samples, samples[:1], samples[1:])]
            sums.append(_of_logits(model, samples, world=world) if model.divided else sums[0])
    finally:
        handle.remove()
        model.train(training)
        reshard(model)
    sums = [total / world.dp_size for total in sum_over_ranks(sums, world=world)]
    return sums[0], sums[1] + sums[2], sums[3], seen[0]


def _loss(model: Any, samples: Sequence[TokenizedSample], *, world: World) -> float:
    return float(model(**_inputs(samples, world=world)))


def _of_logits(model: Any, samples: Sequence[TokenizedSample], *, world: World) -> float:
    inputs = _inputs(samples, world=world)
    logits = model(**inputs, mode="logits").float()
    losses = cross_entropy(logits, inputs["target_ids"].reshape(-1), reduction="none")
    return float(dot(inputs["weights"].reshape(-1), losses))


def _inputs(samples: Sequence[TokenizedSample], *, world: World) -> dict[str, Any]:
    """Arguments of the `LossModel`: this rank's slice of one row."""
    batch = slice_batch(collate([samples], pad_id=0), part=world.sp_rank, parts=world.sp_size)
    return model_inputs(batch, world.device)


def _document(length: int, vocabulary: int) -> TokenizedSample:
    ids = [(place * 2654435761 + length) % vocabulary for place in range(length + 1)]
    weights = np.ones(length + 1, dtype=np.float32)
    weights[: length // 3] = 0
    return make_sample(ids, weights=weights, record_id="check")
