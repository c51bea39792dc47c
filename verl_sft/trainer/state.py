"""The tensors of a run (trainable parameters, optimizer states, RNG) as rows of safetensors.

An optimizer's state of a parameter is rows like the parameter's (AdamW's moments), single numbers
(counters), or neither: then only as many ranks as wrote it can read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import local, rows_of
from verl_sft.errors import StorageError
from verl_sft.hashed_file import write_hashed
from verl_sft.trainer.optimizers import set_rate, tensors_in
from verl_sft.trainer.tensor_file import file_parts

_RNG_CPU, _RNG_CUDA, _STEP = "rng.cpu", "rng.cuda", "optim.step"
NUMBER = "optim.number."  # of each parameter in turn, float64, NaN where it has none


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds: the trainable parameters of `model` and their optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name; a tied one once."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def describe(self) -> dict[str, Any]:
        """Whole shape and dtype of each parameter."""
        return {
            name: {"shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch.")}
            for name, p in self.parameters().items()
        }


def make_optimizer_state(state: TrainState) -> None:
    """Let the optimizer create all its states, by a step of size 0; they are then overwritten."""
    rates = [float(group["lr"]) for group in state.optimizer.param_groups]
    for parameter in state.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    for group in state.optimizer.param_groups:
        set_rate(group, 0.0)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        set_rate(group, rate)


def optimizer_state(state: TrainState) -> dict[str, dict[str, Any]]:
    """Numbers and tensors that the optimizer holds for each parameter, by the parameter's name."""
    held = state.optimizer.state
    return {
        name: {k: v for k, v in held.get(p, {}).items() if isinstance(v, Tensor | int | float)}
        for name, p in state.parameters().items()
    }


def shard_tensors(
    state: TrainState, *, world: World, into: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """This rank's rows of every tensor, on the CPU; of a second copy only what is its own.

    Args:
        state: of the run.
        world: the ranks.
        into: copy to these tensors, which are made where they are missing or of another shape, so
            that the state may change; None: what is on the CPU already shares the state's memory.
    """
    tensors: dict[str, Tensor] = {_RNG_CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[_RNG_CUDA] = torch.cuda.get_rng_state()
    if world.replica == 0:
        moments = optimizer_state(state)
        for name, parameter in state.parameters().items():
            tensors[f"model.{name}"] = parameter
            for key, value in moments[name].items():
                if not _is_number(value):
                    parts = tensors_in(value).items()
                    tensors.update({f"optim.{key}{part}.{name}": t for part, t in parts})
        tensors.update(_numbers(moments))
        tensors[_STEP] = torch.tensor([float(len(moments))])
    own = {name: local(value).detach() for name, value in tensors.items()}
    if into is None:
        return {name: tensor.cpu().contiguous() for name, tensor in own.items()}
    return {name: _copied(tensor, into, name) for name, tensor in own.items()}


def _copied(tensor: Tensor, into: dict[str, Tensor], name: str) -> Tensor:
    """A copy in memory that is kept from save to save: getting fresh pages takes far longer."""
    kept = into.get(name)
    if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
        kept = into[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
    return kept.copy_(tensor)


def write_shard(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    check: Callable[[str, Tensor], None] | None = None,
) -> dict[str, Any]:
    """Write the tensors of one rank, synced; returns the file's `name`, `size` and `sha256`.

    Args:
        path: of the file.
        tensors: by name.
        check: of each tensor before it is written; what it raises leaves a part of the file.

    Raises:
        StorageError: the disk is full or the place is not writable.
    """
    need = sum(tensor.nbytes for tensor in tensors.values())
    return write_hashed(path, file_parts(tensors, check=check), need=need)


def read_shards(
    files: Sequence[Path], *, tensors: Mapping[str, Any], state: TrainState, world: World
) -> None:
    """Fill parameters and moments from the shards of any number of ranks.

    Raises:
        StorageError: the checkpoint is of another model.
    """
    from safetensors import safe_open

    if dict(tensors) != state.describe():
        changed = sorted(set(tensors) ^ set(state.describe())) or sorted(tensors)
        raise StorageError(
            f"the checkpoint is of another model (differs at {changed[0]})",
            where=str(files[0].parent),
            fix="Use the model and LoRA settings that the run was started with",
        )
    make_optimizer_state(state)
    with ExitStack() as stack, torch.no_grad():
        shards = [stack.enter_context(safe_open(f, framework="pt")) for f in files]
        rows = [s for s in shards if _STEP in s.keys()]  # noqa: SIM118
        for name, parameter in state.parameters().items():
            _fill(parameter, rows, f"model.{name}", world=world)
        _fill_optimizer(state, rows, world=world)
        if len(shards) == world.size:  # another number of ranks has no use for these states
            torch.set_rng_state(shards[world.rank].get_tensor(_RNG_CPU))
            if torch.cuda.is_available() and _RNG_CUDA in shards[world.rank].keys():  # noqa: SIM118
                torch.cuda.set_rng_state(shards[world.rank].get_tensor(_RNG_CUDA))


def _fill_optimizer(state: TrainState, shards: Sequence[Any], *, world: World) -> None:
    """Overwrite every state; what a parameter had none of when it was saved is forgotten."""
    there = set(shards[0].keys())
    moments, every = optimizer_state(state), state.optimizer.state
    for index, (name, parameter) in enumerate(state.parameters().items()):
        held = every[parameter]
        for key, value in moments[name].items():
            if _is_number(value):
                saved = f"{NUMBER}{key}"
                number = float("nan")
                if saved in there:
                    number = shards[0].get_slice(saved)[index : index + 1].item()
                if number != number:
                    del held[key]
                elif isinstance(value, Tensor):
                    local(value).fill_(number)
                else:
                    held[key] = type(value)(number)
                continue
            parts = {f"optim.{key}{k}.{name}": v for k, v in tensors_in(value).items()}
            if not parts.keys() <= there:
                del held[key]
                continue
            for saved, tensor in parts.items():
                if tensor.shape == local(parameter).shape:
                    _fill(tensor, shards, saved, world=world, rows=parameter.shape[:1])
                else:
                    _fill_own(tensor, shards, saved, world=world)


def _fill_own(target: Tensor, shards: Sequence[Any], name: str, *, world: World) -> None:
    """Copy what the rank with this rank's rows wrote; nobody else can use it."""
    if len(shards) != world.shard_size:
        raise StorageError(
            f"the optimizer's state was written by {len(shards)} ranks and cannot be spread over "
            f"{world.shard_size}",
            where=name,
            fix="Resume with as many ranks as before, or use optim.optimizer=AdamW",
        )
    target.copy_(shards[world.shard_rank].get_tensor(name))


def _numbers(moments: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    keys = sorted({k for held in moments.values() for k, v in held.items() if _is_number(v)})
    return {
        f"{NUMBER}{key}": torch.tensor(
            [float(held.get(key, float("nan"))) for held in moments.values()], dtype=torch.float64
        )
        for key in keys
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


def _fill(
    target: Tensor,
    shards: Sequence[Any],
    name: str,
    *,
    world: World,
    rows: Sequence[int] | None = None,
) -> None:
    """Copy this rank's rows of one tensor of `rows` rows out of all shards that overlap them."""
    mine = local(target)
    shape = target.shape[:1] if rows is None else rows
    if not shape:
        mine.copy_(shards[0].get_tensor(name))
        return
    start, stop = rows_of(world.shard_rank, size=world.shard_size, rows=shape[0])
    assert mine.shape[0] == stop - start, f"{name}: not sharded by rows"
    for index, shard in enumerate(shards):
        low, high = rows_of(index, size=len(shards), rows=shape[0])
        first, last = max(start, low), min(stop, high)
        if first < last:
            part = shard.get_slice(name)[first - low : last - low]
            mine[first - start : last - start].copy_(part)
