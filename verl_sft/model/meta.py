"""A model without memory for its weights, and where in the files each of them is.

Parameters are built hollow (right shape, dtype and device, one number of storage), so adapters find
what they need to know of them; sharding takes meta tensors; then every rank fills its own rows.
Buffers, such as rotary frequencies, are computed as always.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from verl_sft.config.hub import hub_access
from verl_sft.config.train import ModelConfig
from verl_sft.errors import UsageError
from verl_sft.model.lora import needs_weights

_IGNORED_KEYS = re.compile(r"rotary_emb\.inv_freq$")  # old checkpoints hold what is computed


@dataclass(frozen=True)
class Slot:
    """A parameter without values: the modules that hold it, and the tensor that it will be.

    Attributes:
        places: (module, attribute); several where parameters are tied.
        file: a safetensors file.
        key: of the tensor there, of the parameter's whole shape.
    """

    places: tuple[tuple[nn.Module, str], ...]
    file: Path
    key: str

    @property
    def parameter(self) -> Any:
        """As it is now: hollow, then a meta tensor, then a sharded one."""
        module, name = self.places[0]
        return getattr(module, name)

    def assign(self, parameter: nn.Parameter) -> None:
        """Put another parameter into all the places."""
        for module, name in self.places:
            setattr(module, name, parameter)


def hollow_model(
    config: ModelConfig, *, path: str, dtype: torch.dtype, attention: str
) -> tuple[Any, list[Slot]] | str:
    """The transformers model without its weights, and the slots to fill; or why it cannot be.

    Args:
        config: of the run.
        path: of the model.
        dtype: of the parameters.
        attention: name in transformers' table.
    """
    why = obstacle(config, folder=Path(path))
    if why:
        return why
    try:
        return _hollow(path, dtype=dtype, attention=attention, code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return str(error)  # the ordinary way of loading says what is wrong


def empty_model(config: ModelConfig, *, path: str) -> Any | None:
    """The transformers model as meta tensors, for its names and shapes; None if that fails."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    code = config.trust_remote_code
    try:
        with hub_access(path), init_empty_weights():
            settings = AutoConfig.from_pretrained(path, trust_remote_code=code)
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=code)
    except (OSError, ValueError, KeyError, ImportError):
        return None  # the ordinary way of loading says what is wrong


def _hollow(
    path: str, *, dtype: torch.dtype, attention: str, code: bool
) -> tuple[Any, list[Slot]] | str:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(path, trust_remote_code=code)
    if getattr(settings, "quantization_config", None):
        return "its weights are quantised"
    with init_empty_weights(include_buffers=False):
        causal = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, attn_implementation=attention, trust_remote_code=code
        )
    if dtype is not torch.float32 and any(
        getattr(causal, name, None)
        for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    ):
        return "some of its weights stay in fp32"
    causal.tie_weights()
    slots = match(causal, tensors=list_tensors(Path(path)))
    if isinstance(slots, str):
        return slots
    for slot in slots:
        whole = torch.zeros((), dtype=slot.parameter.dtype).expand(slot.parameter.shape)
        slot.assign(nn.Parameter(whole))
    causal.config.use_cache = False
    return causal.train(), slots


def obstacle(config: ModelConfig, *, folder: Path) -> str:
    """Why a model cannot be started without its weights, as far as settings tell; or nothing."""
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        return "it is not a local folder with safetensors files"
    return needs_weights(config)


def list_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Name -> (file, shape) of every tensor of a checkpoint in one or several files."""
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.is_file():
        named = json.loads(index.read_text("utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(named))]
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                found[key] = (file, tuple(opened.get_slice(key).get_shape()))
    return found


def match(
    causal: nn.Module, *, tensors: dict[str, tuple[Path, tuple[int, ...]]]
) -> list[Slot] | str:
    """One tensor of the files for each parameter, none left over; or what does not fit."""
    names: dict[int, list[str]] = {}
    for name, parameter in causal.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    slots, used = [], set()
    for same in names.values():
        found = [name for name in same if name in tensors]
        if len(found) != 1:
            return f"{same[0]} is {len(found)} times in its files"
        (key,) = found
        places = tuple(_place(causal, name) for name in same)
        file, shape = tensors[key]
        slot = Slot(places, file, key)
        if shape != tuple(slot.parameter.shape):
            return f"{key} has another shape in its files"
        slots.append(slot)
        used.add(key)
    parameters = {name for same in names.values() for name in same}
    stored = set(causal.state_dict()) - parameters
    left = {key for key in set(tensors) - used if not _IGNORED_KEYS.search(key)}
    if stored or left:
        return f"{min(stored | left)} is no parameter that is both in the model and in its files"
    return slots


def to_meta(slots: Iterable[Slot]) -> None:
    """From hollow parameters to meta tensors, which sharding takes; what learns still does."""
    for slot in slots:
        old = slot.parameter
        slot.assign(nn.Parameter(old.detach().to("meta"), requires_grad=old.requires_grad))


def read_rows(slot: Slot, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a slot's tensor, in the dtype of its parameter.

    Raises:
        UsageError: the file ends early or is no safetensors file.
    """
    dtype, shape = slot.parameter.dtype, slot.parameter.shape
    if start == stop:
        return torch.empty((0, *shape[1:]), dtype=dtype)
    try:
        with safe_open(slot.file, framework="pt") as opened:
            # A copy: the reader may return a view of the mapped file.
            rows: Tensor = opened.get_slice(slot.key)[start:stop].to(dtype, copy=True)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"cannot read the weights: {error}",
            where=f"{slot.file}:{slot.key}",
            fix="Download the model again",
        ) from error
    return rows


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute
