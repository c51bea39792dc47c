"""Whether the head and the embedding stay divided over the ranks (`model/vocab_parallel.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from verl_sft.config.train import TrainConfig
from verl_sft.data.plan import EpochPlan
from verl_sft.distributed.divided import DividedGradients, divide
from verl_sft.distributed.setup import World
from verl_sft.errors import UsageError
from verl_sft.model.loss import LossModel
from verl_sft.model.shape import ModelShape
from verl_sft.model.vocab_parallel import VocabPart, divide_tables, vocab_tables
from verl_sft.trainer.memory import MemorySettings, format_bytes

WORTH = 4 << 20  # bytes for each micro-batch; a smaller saving is lost in waiting for one another
_FP32 = 4
_OFF = "the vocabulary is not divided over ranks"


@dataclass(frozen=True, slots=True)
class VocabWork:
    """What decides how much the ranks tell each other for one micro-batch, on the average.

    Attributes:
        tokens: of a rank.
        learned: of them, those with a weight.
        rounds: micro-batches of a rank in one step.
    """

    tokens: float
    learned: float
    rounds: float


@dataclass(frozen=True, slots=True)
class VocabTraffic:
    """Bytes that a rank receives for one micro-batch.

    Attributes:
        whole: where matrices are gathered, and their gradients summed.
        divided: where rows are traded.
    """

    whole: float
    divided: float


def vocab_work(epoch: EpochPlan, *, samples: Any, ranks: int) -> VocabWork:
    """The average micro-batch of one rank.

    Args:
        epoch: a plan.
        samples: that it reads; where they have no report, all their tokens count as learned.
        ranks: all of them.
    """
    rounds = sum(step.num_micro_batches for step in epoch.steps)
    tokens = int(samples.lengths.sum())
    report = getattr(samples, "report", None)
    learned, shares = tokens if report is None else report.learned_tokens, rounds * ranks
    return VocabWork(tokens / shares, learned / shares, rounds / len(epoch.steps))


def vocab_traffic(
    work: VocabWork,
    *,
    vocab: int,
    hidden: int,
    matrices: int,
    trained: bool,
    shards: int,
    half: bool,
    reshard: bool = True,
) -> VocabTraffic:
    """What both ways cost.

    Args:
        work: of a micro-batch.
        vocab: rows of a matrix.
        hidden: columns of a matrix.
        matrices: 1 where the head is the embedding, else 2.
        trained: whether they learn.
        shards: ranks that hold one copy of the parameters together.
        half: whether numbers travel in bf16; sums of gradients never do.
        reshard: whether parameters are gathered for each micro-batch, not once for a step.
    """
    size, others = 2 if half else _FP32, hidden * (shards - 1) / shards
    per_row = size / (1 if reshard else work.rounds) + trained * _FP32 / work.rounds
    # Learned rows go to all ranks and gradients come back; so do the rows that tokens look up.
    rows = 2 * work.learned * shards + (1 + trained) * min(work.tokens, vocab)
    return VocabTraffic(matrices * vocab * per_row * others, rows * size * others)


def obstacle(config: TrainConfig, *, shards: int, on_gpu: bool) -> str:
    """Why the matrices cannot stay divided, as far as settings tell; empty if they can."""
    if shards == 1:
        return "each rank holds a whole copy of the parameters"
    if config.model.quantization != "none":
        return f"model.quantization={config.model.quantization} keeps the base whole on each rank"
    if config.engine.offload and on_gpu:
        return "engine.offload keeps the matrices in host memory"
    return ""


def chosen(wanted: str, *, why: str, traffic: VocabTraffic) -> tuple[bool, str]:
    """Whether `model.vocab_parallel` divides, and a line that says so.

    Args:
        wanted: the key.
        why: what stands in the way, if anything.
        traffic: decides for `auto`, which saves at least `WORTH`.
    """
    if wanted == "false":
        return False, ""
    if why:
        return False, f"{_OFF}: {why}"
    fewer, more = format_bytes(traffic.divided), format_bytes(traffic.whole)
    if wanted == "auto" and traffic.whole - traffic.divided < WORTH:
        return False, f"{_OFF}: {fewer} would travel for each micro-batch, not {more}"
    return True, f"the vocabulary is divided over ranks: {fewer} for each micro-batch, not {more}"


def plan_divided(
    config: TrainConfig,
    *,
    shape: ModelShape,
    settings: MemorySettings,
    work: VocabWork,
    on_gpu: bool,
) -> tuple[bool, str]:
    """What `divide_vocabulary` will choose, as far as a model's dimensions tell.

    Args:
        config: of the run.
        shape: of its model.
        settings: what they mean for memory.
        work: of a micro-batch.
        on_gpu: whether a GPU will be used.
    """
    traffic = vocab_traffic(
        work,
        vocab=shape.vocab,
        hidden=shape.hidden,
        matrices=1 if shape.tied else 2,
        trained=settings.adapters is None,
        shards=settings.shard_size,
        half=settings.compute_bytes == 2,
        reshard=settings.reshard,
    )
    why = obstacle(config, shards=settings.shard_size, on_gpu=on_gpu)
    return chosen(config.model.vocab_parallel, why=why, traffic=traffic)


def divide_vocabulary(
    model: LossModel,
    *,
    config: TrainConfig,
    world: World,
    dtype: torch.dtype,
    work: VocabWork,
    say: Callable[[str], None],
) -> DividedGradients | None:
    """Divide the head and the embedding before the model is sharded, where that is to be.

    Args:
        model: with its adapters, if any.
        config: of the run.
        world: the ranks; all must call.
        dtype: of compute.
        work: of a micro-batch.
        say: hears what was chosen.

    Returns:
        What adds up the gradients, to be given to `shard`; None where nothing is divided.

    Raises:
        UsageError: `model.vocab_parallel=true` and this model cannot be divided.
    """
    wanted, shards = config.model.vocab_parallel, world.shard_size
    if wanted == "false":
        return None
    why = obstacle(config, shards=shards, on_gpu=world.device.type == "cuda")
    tables = vocab_tables(model)
    if not isinstance(tables, str):
        divided, line = chosen(
            wanted,
            why=why,
            traffic=_traffic(tables, config=config, shards=shards, dtype=dtype, work=work),
        )
    elif wanted == "true" and not why:
        raise UsageError(
            "model.vocab_parallel=true is not possible here", why=tables, fix="Use auto or false"
        )
    else:
        divided, line = False, f"{_OFF}: {why or tables}"
    if shards > 1 or wanted == "true":
        say(line)
    if isinstance(tables, str) or not divided:
        return None
    part = VocabPart(
        vocab=len(tables[0].weight),  # type: ignore[arg-type]
        rank=world.shard_rank,
        parts=shards,
        group=world.mesh.get_group("shard"),
        dtype=dtype,
    )
    divide(tables, world=world)
    divide_tables(model, tables, part=part)
    return DividedGradients(tables, world=world)


def _traffic(
    tables: Sequence[nn.Module],
    *,
    config: TrainConfig,
    shards: int,
    dtype: torch.dtype,
    work: VocabWork,
) -> VocabTraffic:
    head: Any = tables[0].weight
    return vocab_traffic(
        work,
        vocab=head.shape[0],
        hidden=head.shape[1],
        matrices=len({id(table.weight) for table in tables}),
        trained=head.requires_grad,
        shards=shards,
        half=dtype is torch.bfloat16,
        reshard=config.engine.reshard_after_forward,
    )
