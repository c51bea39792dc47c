"""Which layers get adapters: every name and pattern has to mean something in this model.

PEFT itself refuses only where nothing matches at all: one mistyped name among others would silently
go without an adapter. Names are known from a model of meta tensors, before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from verl_sft.config.train import ModelConfig
from verl_sft.errors import UsageError
from verl_sft.registry import unknown_name

ALL_LINEAR = "all-linear"


def check_targets(model: Any, *, config: ModelConfig) -> None:
    """Raise for a name or a pattern of adapters that this model has nothing for.

    Args:
        model: of transformers; its parameters may be meta tensors.
        config: which layers and parameters get adapters.

    Raises:
        UsageError: naming the key, with the nearest names.
    """
    modules, known = dict(model.named_modules()), layer_names(model)
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    ends = [module for module in found if module is not None]
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    inner = {name for name in linear if not any(modules[name] is end for end in ends)}
    key, wanted = "model.target_modules", config.target_modules
    if wanted == ALL_LINEAR:
        hit = inner or set(modules)  # layers of another class: PEFT knows some
    elif wanted == [] and config.target_parameters:
        hit = set()
    else:
        hit = _meant(key, wanted, names=modules, known=known)
    if config.exclude_modules:
        hit -= _meant("model.exclude_modules", config.exclude_modules, names=hit, known=known)
        if not hit:
            raise UsageError(f"model.exclude_modules={config.exclude_modules} leaves no layer")
    if config.target_parameters:
        names = dict(model.named_parameters())
        ends_of = sorted({".".join(name.split(".")[-2:]) for name in names})
        _meant("model.target_parameters", config.target_parameters, names=names, known=ends_of)
    for name in sorted(hit):
        if model.config.tie_word_embeddings and any(modules[name] is end for end in ends):
            raise UsageError(
                f"{name} cannot have an adapter in this model",
                where=f"{key}={wanted}",
                why="Its head is its embedding, so an adapter on one would change the other",
                fix="Take it out, or use all-linear, which leaves both alone",
            )


def layer_names(model: Any) -> list[str]:
    """The last parts of the names of all linear layers."""
    found = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return sorted(found)


def _meant(key: str, wanted: Any, *, names: Collection[str], known: Collection[str]) -> set[str]:
    """Of `names`, those that a pattern or a list of endings means, as PEFT reads them.

    Raises:
        UsageError: a part means none; the nearest of `known` are told.
    """
    if isinstance(wanted, str):
        try:
            matches = {wanted: {name for name in names if re.fullmatch(wanted, name)}}
        except re.error as error:
            raise UsageError(
                f"{key}={wanted}: no regular expression: {error}",
                fix="Give a list of names, or a pattern of whole names such as .*_proj",
            ) from error
    elif isinstance(wanted, list | tuple) and wanted and all(isinstance(p, str) for p in wanted):
        matches = {p: {n for n in names if n == p or n.endswith(f".{p}")} for p in wanted}
    else:
        raise UsageError(
            f"{key}={wanted}: names no layer", fix=f"Write {key}=[{','.join(list(known)[:2])}]"
        )
    for part, found in matches.items():
        if not found:
            raise UsageError(
                f"{key}={wanted}: '{part}' matches nothing in this model",
                fix=unknown_name("name", part, known).fix,
            )
    return set().union(*matches.values())
