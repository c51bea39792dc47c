"""Optimizers by name, from a few known libraries, over parameters that may be sharded.

No module is imported because a script names it: the libraries are listed here. Most optimizers of
torch know sharded parameters; the others are given this rank's rows as plain tensors.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from verl_sft.config.train import OptimConfig
from verl_sft.distributed.sharding import local
from verl_sft.errors import MissingExtraError, UsageError
from verl_sft.registry import unknown_name

# Library -> the extra that installs it.
IMPLEMENTATIONS = {
    "torch.optim": "",
    "torchao.optim": "torchao",
    "bitsandbytes.optim": "bitsandbytes",
    "pytorch_optimizer": "pytorch-optimizer",
}
_UNFIT = {"LBFGS", "SparseAdam"}  # they need a closure, sparse gradients
_NEEDS_MATRICES = {"Adafactor"}  # its state is of whole rows and columns, not of one rank's rows
_PLAIN_ONLY = {"Adafactor", "Rprop"}  # of torch.optim: they fail on sharded tensors
_OF_GROUPS = {"lr", "weight_decay"}  # each group of parameters has its own
_OTHER_EPS = {"Adafactor", "Muon"}  # it means something else there
_FUSED = {"Adam", "AdamW"}  # sharded ones too

Groups = list[dict[str, Any]]
Make = Callable[[Groups], torch.optim.Optimizer]


def make_optimizer(
    model: nn.Module, *, config: OptimConfig, shard_size: int = 1
) -> torch.optim.Optimizer:
    """The chosen optimizer over the trainable parameters.

    Norms and biases are not decayed by default. Matrices B of adapters learn
    `optim.loraplus_lr_ratio` times as fast: their groups have that `lr_scale`.
    """
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim >= 2 or config.decay_norms_and_biases
            faster = config.loraplus_lr_ratio is not None and "lora_B" in name
            faster |= config.loraplus_lr_ratio is not None and "lora_embedding_B" in name
            found.setdefault((not decayed, faster), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": 0.0 if plain else config.weight_decay,
            "lr_scale": config.loraplus_lr_ratio if faster else 1.0,
        }
        for (plain, faster), parameters in sorted(found.items(), key=lambda item: item[0])
    ]
    heads = [
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    ]
    output = getattr(getattr(model, "causal", None), "get_output_embeddings", lambda: None)()
    if output is not None:
        heads.extend(output.parameters())
    return build_optimizer(groups, config=config, shard_size=shard_size, heads=heads)


def build_optimizer(
    groups: Groups, *, config: OptimConfig, shard_size: int = 1, heads: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer that `optim.optimizer` and `optim.optimizer_impl` name.

    Args:
        groups: parameter groups with their weight decay.
        config: names, learning rate and further arguments.
        shard_size: ranks over which each parameter is spread.
        heads: embeddings and output head, which Muon leaves to AdamW.

    Raises:
        UsageError: an unknown library, optimizer or argument, with the nearest known one.
        MissingExtraError: the library is not installed.
    """
    cls = optimizer_class(config.optimizer, config.optimizer_impl)
    library, name = config.optimizer_impl, cls.__name__
    check_shards(name, shard_size=shard_size)
    arguments = optimizer_arguments(cls, config=config)
    if cls is getattr(torch.optim, "Muon", None):
        return _muon(groups, arguments=arguments, config=config, heads=heads)
    make = partial(cls, **arguments)
    if library == "bitsandbytes.optim" or (library == "torch.optim" and name in _PLAIN_ONLY):
        return _on_own_rows(groups, make)
    return _called(make, groups, name=name)


def check_shards(name: str, *, shard_size: int) -> None:
    """Raise if the optimizer needs whole matrices, and parameters are spread over ranks.

    Raises:
        UsageError: naming it.
    """
    if shard_size > 1 and name.lower() in {known.lower() for known in _NEEDS_MATRICES}:
        raise UsageError(
            f"optim.optimizer={name} does not work with sharded parameters",
            why="Its state is made of the rows and columns of whole matrices",
            fix="Use one rank, engine.fsdp_size=1, or optim.optimizer=AdamW with "
            "optim.optimizer_impl=bitsandbytes.optim",
        )


def optimizer_class(name: str, library: str) -> Any:
    """The class behind a name, whatever its letters' case.

    Raises:
        UsageError: an unknown library or optimizer.
        MissingExtraError: the library is not installed.
    """
    if library not in IMPLEMENTATIONS:
        error = unknown_name("library", library, IMPLEMENTATIONS)
        raise UsageError(
            f"optim.optimizer_impl={library}: unknown library",
            why="Only these are imported",
            fix=error.fix,
        )
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        package = library.partition(".")[0]
        raise MissingExtraError(
            package, IMPLEMENTATIONS[library], why=f"optim.optimizer_impl={library} needs it"
        ) from error
    known = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and key[0] != "_"
        and key not in {*_UNFIT, "Optimizer"}
    }
    folded = {key.lower(): key for key in known}
    if name.lower() not in folded:
        fix = unknown_name("optimizer", name, known).fix
        near = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)
        if near:
            fix = f"Did you mean {' or '.join(folded[n] for n in near)}? Known: {', '.join(known)}"
        raise UsageError(f"optim.optimizer={name}: {library} has none of that name", fix=fix)
    return known[folded[name.lower()]]


def optimizer_arguments(cls: Any, *, config: OptimConfig) -> dict[str, Any]:
    """What `cls` is called with: our keys that it knows, then `override_optimizer_config`.

    Raises:
        UsageError: an argument that `cls` does not know.
    """
    known = inspect.signature(cls).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in known.values())
    own = {"lr": config.lr, "eps": config.eps, "betas": tuple(config.betas)}
    found = {key: value for key, value in own.items() if takes(cls, key)}
    if cls.__name__ in _FUSED and "fused" in known and config.fused:
        found["fused"] = True
    for key, value in (config.override_optimizer_config or {}).items():
        if key in _OF_GROUPS:
            raise UsageError(
                f"optim.override_optimizer_config.{key} would have no effect",
                why=f"The schedule and the groups of parameters take optim.{key}",
                fix=f"Use optim.{key}={value}",
            )
        if key == "params" or (key not in known and not free):
            fix = unknown_name("argument", key, set(known) - {"params"}).fix
            raise UsageError(
                f"optim.override_optimizer_config.{key}: {cls.__name__} has no such argument",
                fix=fix,
            )
        found[key] = tuple(value) if isinstance(value, list) else value
    if found.get("foreach") or found.get("differentiable") or found.get("capturable"):
        found.pop("fused", None)
    return found


def takes(cls: Any, name: str) -> bool:
    """Whether `cls` has an argument that means what `optim.<name>` means."""
    known = inspect.signature(cls).parameters
    if name == "betas":
        default = getattr(known.get("betas"), "default", None)
        return isinstance(default, tuple) and len(default) == 2
    return name in known and not (name == "eps" and cls.__name__ in _OTHER_EPS)


class JoinedOptimizer(torch.optim.Optimizer):
    """Several optimizers as one, each over its parameters or over plain tensors in their place."""

    def __init__(
        self,
        parts: Sequence[torch.optim.Optimizer],
        twins: Mapping[nn.Parameter, nn.Parameter],
    ) -> None:
        # Not the base class's: groups and states are those of the parts.
        self.parts, self.twins = list(parts), dict(twins)
        self.defaults: dict[str, Any] = {}
        self._inner = [group for part in parts for group in part.param_groups]
        known = {id(twin): p for p, twin in self.twins.items()}
        self.param_groups = [
            {**group, "params": [known.get(id(p), p) for p in group["params"]]}
            for group in self._inner
        ]
        self._owner = {p: part for part in parts for g in part.param_groups for p in g["params"]}
        self._mine = list(self.twins) or list(self._owner)

    @property
    def state(self) -> Any:  # type: ignore[override]
        """State of each parameter, by the parameter that the model knows."""
        twin = {p: self.twins.get(p, p) for p in self._mine}
        return {p: self._owner[t].state[t] for p, t in twin.items()}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update by every part."""
        assert closure is None
        for parameter, twin in self.twins.items():
            twin.grad = None if parameter.grad is None else local(parameter.grad)
        for inner, group in zip(self._inner, self.param_groups, strict=True):
            inner["lr"] = group["lr"]  # the only one that changes
        for part in self.parts:
            part.step()
        for twin in self.twins.values():
            twin.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        assert set_to_none
        for parameter in self._mine:
            parameter.grad = None


def _on_own_rows(groups: Groups, make: Make) -> torch.optim.Optimizer:
    """The optimizer over plain tensors that share memory with this rank's rows."""
    twins = {p: nn.Parameter(local(p.detach())) for group in groups for p in group["params"]}
    plain = [{**group, "params": [twins[p] for p in group["params"]]} for group in groups]
    return JoinedOptimizer([make(plain)], twins)


def _muon(
    groups: Groups,
    *,
    arguments: dict[str, Any],
    config: OptimConfig,
    heads: Iterable[nn.Parameter],
) -> torch.optim.Optimizer:
    """Muon for the matrices inside the layers, AdamW for the rest, as its authors use it.

    Its updates are scaled to the size of AdamW's, so that one learning rate serves both.
    """
    arguments = {"adjust_lr_fn": "match_rms_adamw", **arguments}
    others = {id(p) for p in heads}

    def split(matrices: bool) -> Groups:
        parts = [
            {**g, "params": [p for p in g["params"]
                             if (p.ndim == 2 and id(p) not in others) == matrices]}
            for g in groups
        ]  # fmt: skip
        return [g for g in parts if g["params"]]

    beta1, beta2 = config.betas
    adam = partial(
        torch.optim.AdamW, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=config.fused
    )
    made: list[torch.optim.Optimizer] = []
    if split(True):
        made.append(torch.optim.Muon(split(True), **arguments))
    if split(False):
        made.append(adam(split(False)))
    return JoinedOptimizer(made, {})


def _called(make: Make, groups: Groups, *, name: str) -> torch.optim.Optimizer:
    try:
        return make(groups)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"optim.optimizer={name} does not take these settings: {error}",
            fix="See optim.override_optimizer_config",
        ) from error


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a group's learning rate; some libraries keep it as a tensor and accept no other."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def tensors_in(value: Any) -> dict[str, Tensor]:
    """The plain tensors of one entry of an optimizer's state; quantised ones consist of several."""
    inner = getattr(
        local(value) if isinstance(value, Tensor) else value, "__tensor_flatten__", None
    )
    if inner is None:
        return {"": local(value)}
    names, _ = inner()
    return {f"/{name}": getattr(local(value), name) for name in names}
