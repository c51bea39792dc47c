"""The tensors of a run (trainable parameters, AdamW's moments, RNG) as rows of safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import local, rows_of
from verl_sft.errors import StorageError

_MOMENTS = ("exp_avg", "exp_avg_sq")
_RNG_CPU, _RNG_CUDA, _STEP = "rng.cpu", "rng.cuda", "optim.step"


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


def ensure_optimizer_state(state: TrainState) -> None:
    """Give every parameter the moments that AdamW would create at its first step."""
    for parameter in state.parameters().values():
        if not state.optimizer.state[parameter]:
            state.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=local(parameter).device),
                **{key: torch.zeros_like(parameter) for key in _MOMENTS},
            }


def write_shard(path: Path, *, state: TrainState, world: World) -> None:
    """Write this rank's rows of every tensor; of a second copy only what is this rank's own."""
    from safetensors.torch import save_file

    ensure_optimizer_state(state)
    tensors: dict[str, Tensor] = {_RNG_CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[_RNG_CUDA] = torch.cuda.get_rng_state()
    for name, parameter in state.parameters().items() if world.replica == 0 else ():
        moments = state.optimizer.state[parameter]
        tensors[f"model.{name}"] = parameter.detach()
        tensors.update({f"optim.{key}.{name}": moments[key] for key in _MOMENTS})
        tensors[_STEP] = local(moments["step"]).reshape(1)
    save_file({k: local(v).detach().cpu().contiguous() for k, v in tensors.items()}, path)


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
    ensure_optimizer_state(state)
    with ExitStack() as stack, torch.no_grad():
        shards = [stack.enter_context(safe_open(f, framework="pt")) for f in files]
        rows = [s for s in shards if _STEP in s.keys()]  # noqa: SIM118
        for name, parameter in state.parameters().items():
            moments = state.optimizer.state[parameter]
            _fill(parameter, rows, f"model.{name}", world=world)
            for key in _MOMENTS:
                _fill(moments[key], rows, f"optim.{key}.{name}", world=world)
            local(moments["step"]).fill_(shards[0].get_tensor(_STEP).item())
        if len(shards) == world.size:  # another number of ranks has no use for these states
            torch.set_rng_state(shards[world.rank].get_tensor(_RNG_CPU))
            if torch.cuda.is_available() and _RNG_CUDA in shards[world.rank].keys():  # noqa: SIM118
                torch.cuda.set_rng_state(shards[world.rank].get_tensor(_RNG_CUDA))


def _fill(target: Tensor, shards: Sequence[Any], name: str, *, world: World) -> None:
    """Copy this rank's rows of one tensor out of all shards that overlap them."""
    mine = local(target)
    if target.ndim == 0:
        mine.copy_(shards[0].get_tensor(name))
        return
    rows = target.shape[0]
    start, stop = rows_of(world.shard_rank, size=world.shard_size, rows=rows)
    assert mine.shape[0] == stop - start, f"{name}: not sharded by rows"
    for index, shard in enumerate(shards):
        low, high = rows_of(index, size=len(shards), rows=rows)
        first, last = max(start, low), min(stop, high)
        if first < last:
            part = shard.get_slice(name)[first - low : last - low]
            mine[first - start : last - start].copy_(part)
