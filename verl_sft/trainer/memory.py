"""How much memory a rank needs, from dimensions and settings alone: no weights, no device.

What is counted is what the training step allocates. The process itself (interpreter, libraries,
mapped data; 0.5 GB on a CPU, a CUDA context on a GPU) comes on top, and so does what the allocator
keeps without using it.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl_sft.config.train import ModelConfig, TrainConfig
from verl_sft.model.lora import wants_lora
from verl_sft.model.shape import ModelShape

_FP32 = 4
_LOGIT_ROWS = (1024, 256)  # GPU, CPU: `model.loss.CHUNK_ROWS`, which needs torch to be imported
_QUERY_BLOCK = 256  # rows of probabilities at one time, in bf16 on a CPU: as in `model.attention`
# Of the moments of an optimizer: bytes per trained parameter, as multiples of the parameter's.
_MOMENTS = {"sgd": 1.0, "adafactor": 0.1, "lion": 1.0, "muon": 1.0}


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """What memory depends on beside the model.

    Attributes:
        shard_size: ranks that hold one copy of the parameters together.
        sp_size: ranks that share a micro-batch.
        parameter_bytes: of a parameter at rest.
        compute_bytes: of a number in the forward pass.
        adapters: their parameters; None where the whole model is trained.
        matrix_bytes: of a number in the frozen matrices of the layers, where they are quantised.
        checkpointing: `none`, `selective` (matrix products are kept) or `full`.
        offload: parameters, gradients and optimizer states are in host memory.
        offload_activations: what the layers keep for backward is in host memory.
        reshard: parameters of a layer are given back after its forward pass.
        divided: each rank computes with its own rows of the head and the embedding.
        scores: attention keeps its probabilities (in bf16 on a CPU), not only its output.
        logit_rows: learned positions whose logits exist at one time.
        moments: bytes of optimizer state per trained parameter.
    """

    shard_size: int = 1
    sp_size: int = 1
    parameter_bytes: int = _FP32
    compute_bytes: int = _FP32
    adapters: int | None = None
    matrix_bytes: float | None = None
    checkpointing: str = "none"
    offload: bool = False
    offload_activations: bool = False
    reshard: bool = True
    divided: bool = False
    scores: bool = False
    logit_rows: int = _LOGIT_ROWS[0]
    moments: float = 8.0


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one rank in the largest micro-batch: what stays, and what three moments add."""

    parameters: int  # this rank's rows
    gathered: int  # copies in compute precision of what is used right now
    gradients: int  # this rank's rows
    optimizer: int
    activations: int  # kept between forward and backward
    logits: int  # one chunk of them and the head's gradient, at the end of the forward pass
    backward: int  # the head's gradient, and gradients of activations on their way
    reduction: int  # gradients of the root while they are summed over ranks, behind all else

    @property
    def total(self) -> int:
        """All that is there at the same time."""
        together = self.parameters + self.gathered + self.gradients + self.optimizer
        return together + max(self.activations + max(self.logits, self.backward), self.reduction)


def estimate_memory(
    shape: ModelShape, *, settings: MemorySettings, tokens: int, learned: int, longest: int = 0
) -> MemoryEstimate:
    """The memory of one rank.

    Args:
        shape: of the model.
        settings: how it is trained.
        tokens: of the largest micro-batch, padding included.
        learned: of them, those with a weight: only these have logits.
        longest: tokens of the longest document; default: all of them.
    """
    here = -(-tokens // settings.sp_size)
    rest = _at_rest(shape, settings=settings)
    trained = shape.parameters if settings.adapters is None else settings.adapters
    held = 0 if settings.offload else 1
    rows = min(-(-learned // settings.sp_size), settings.logit_rows, here)
    size, full = settings.compute_bytes, settings.adapters is None
    head = shape.vocab * shape.hidden // (settings.shard_size if settings.divided else 1) * full
    # Logits in float32, and as they were multiplied; the same of the gradient that a chunk adds.
    half = size if size < _FP32 else 0
    return MemoryEstimate(
        parameters=held * rest // settings.shard_size,
        gathered=_gathered(shape, settings=settings),
        gradients=held * trained * settings.parameter_bytes // settings.shard_size,
        optimizer=int(held * trained * settings.moments) // settings.shard_size,
        activations=_activations(shape, settings=settings, tokens=here, longest=longest or tokens),
        logits=(rows * shape.vocab + head) * (_FP32 + half),
        backward=head * size + here * size * (3 * shape.intermediate + 2 * shape.hidden),
        # As they are, in float32, this rank's sum of them, and the latter before it is scaled.
        reduction=full
        * _root(shape, settings=settings)
        * (size + _FP32 + 2 * _FP32 // settings.shard_size),
    )


def memory_settings(
    config: TrainConfig, *, shape: ModelShape, world_size: int, half: bool, on_gpu: bool
) -> MemorySettings:
    """What a run's config means for memory.

    Args:
        config: of the run.
        shape: of its model.
        world_size: ranks in all.
        half: whether it computes in bf16.
        on_gpu: offloading does nothing elsewhere.
    """
    engine, model = config.engine, config.model
    sharded = world_size if engine.fsdp_size == -1 else min(engine.fsdp_size, world_size)
    at_rest = 2 if engine.model_dtype == "bf16" else _FP32
    name = config.optim.optimizer.lower()
    factor = next((f for known, f in _MOMENTS.items() if known in name), 2.0)
    adapters = None
    if wants_lora(model):
        targets = model.target_modules
        adapters = shape.lora_parameters(
            rank=max(model.lora_rank, 1), targets=targets, dora=model.use_dora
        )
    return MemorySettings(
        shard_size=sharded,
        sp_size=config.ulysses_sequence_parallel_size,
        parameter_bytes=at_rest,
        compute_bytes=2 if half or at_rest == 2 else _FP32,
        adapters=adapters,
        matrix_bytes={"nf4": 0.52, "int8": 1.0}.get(model.quantization),  # with its scales
        checkpointing=_checkpointing(model),
        offload=bool(engine.offload) and on_gpu,
        offload_activations=model.enable_activation_offload and on_gpu,
        reshard=engine.reshard_after_forward,
        scores=half and not on_gpu,
        logit_rows=_LOGIT_ROWS[not on_gpu],
        moments=factor * (1 if "8bit" in name else 0.5 if "4bit" in name else at_rest),
    )


def format_bytes(size: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _checkpointing(model: ModelConfig) -> str:
    return model.checkpoint_policy if model.enable_gradient_checkpointing else "none"


def _at_rest(shape: ModelShape, *, settings: MemorySettings) -> int:
    """Bytes of all parameters, before they are dealt out to ranks."""
    size, matrices = settings.parameter_bytes, 0
    if settings.matrix_bytes is not None:
        matrices = shape.layers * sum(a * b * n for a, b, n in shape.linears().values())
        matrices = int(matrices * (size - settings.matrix_bytes))
    return (shape.parameters + (settings.adapters or 0)) * size - matrices


def _gathered(shape: ModelShape, *, settings: MemorySettings) -> int:
    """Copies that FSDP makes, on one rank too: the root's stay, a layer's come one ahead."""
    layers = min(shape.layers, 2 if settings.reshard else shape.layers)
    numbers = _root(shape, settings=settings) + layers * shape.layer_parameters
    return numbers * settings.compute_bytes


def _root(shape: ModelShape, *, settings: MemorySettings) -> int:
    """Parameters outside the layers that a rank computes with; divided, its rows of the head."""
    rows = shape.vocab // settings.shard_size
    return (rows + 1) * shape.hidden if settings.divided else shape.root_parameters


def _activations(shape: ModelShape, *, settings: MemorySettings, tokens: int, longest: int) -> int:
    """What autograd keeps of `tokens` tokens between forward and backward."""
    size = settings.compute_bytes
    whole = tokens * _layer_bytes(shape, settings=settings, longest=longest)
    entry = tokens * shape.hidden * size  # all that a recomputed layer keeps
    ends = tokens * shape.hidden * (2 * size + _FP32)  # the last norm, and its gradient
    if settings.offload_activations:
        return 2 * whole + ends
    if settings.checkpointing == "full":
        return shape.layers * entry + whole + ends
    if settings.checkpointing == "selective":
        kept = 2 * shape.hidden + 3 * shape.query + 2 * shape.key_value
        kept += 2 * shape.intermediate * shape.active_experts
        return shape.layers * tokens * kept * size + whole + ends
    return shape.layers * whole + ends


def _layer_bytes(shape: ModelShape, *, settings: MemorySettings, longest: int) -> int:
    """What autograd keeps of one token in one layer: the inputs of each product and norm."""
    size, full = settings.compute_bytes, settings.adapters is None
    # A norm keeps its input in float32 and what its weight multiplies; the product behind it keeps
    # its own input. Frozen norms do not ask for what they multiply.
    norm = shape.hidden * (_FP32 + size + (size if full else 0))
    attention = size * (3 * shape.query + 2 * shape.key_value)
    if settings.scores:
        # A block of queries sees the keys up to its last row; queries of shared keys are copied.
        attention += size * shape.heads * (longest + min(longest, _QUERY_BLOCK)) // 2
        attention += size * shape.query * (shape.query != shape.key_value)
    return 2 * norm + attention + size * 4 * shape.intermediate * shape.active_experts
