"""Names for environments, policies, prompt templates and sources, resolved lazily.

A registry is a dict `name -> "module:attribute"`; `resolve` also takes a user's own
`package.module:attribute` or `path/to/file.py:attribute`, so a plug-in needs no registration.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from verl_sft.errors import Preempted, UsageError

ENVIRONMENTS: dict[str, str] = {"alfworld": "verl_sft.envs.alfworld:make_alfworld"}
POLICIES: dict[str, str] = {
    "expert": "verl_sft.policies.expert:make_expert",
    "hf": "verl_sft.policies.hf_local:make_hf_policy",
    "scripted": "verl_sft.policies.scripted:make_scripted",
}
PROMPTS: dict[str, str] = {
    "default": "verl_sft.prompts.alfworld:DEFAULT",
    "add_wm1": "verl_sft.prompts.alfworld:ADD_WM1",
    "add_wm2": "verl_sft.prompts.alfworld:ADD_WM2",
    "compact": "verl_sft.prompts.alfworld:COMPACT",
}

# In the order in which formats are tried on a row.
SOURCES: dict[str, str] = {
    "own": "verl_sft.records.sources.own:OWN",
    "envscaler": "verl_sft.records.sources.envscaler:ENVSCALER",
    "pettingllms": "verl_sft.records.sources.pettingllms:PETTINGLLMS",
    "raw": "verl_sft.records.sources.raw:RAW",
    "verl_agent": "verl_sft.records.sources.verl_agent:VERL_AGENT",
    "agentrl_chain": "verl_sft.records.sources.agentrl_chain:AGENTRL_CHAIN",
    "agentrl": "verl_sft.records.sources.agentrl:AGENTRL",
    "userrl": "verl_sft.records.sources.userrl:USERRL",
    "verl_rl": "verl_sft.records.sources.userrl:VERL_RL",
    "sharegpt": "verl_sft.records.sources.sharegpt:SHAREGPT",
    "alpaca": "verl_sft.records.sources.alpaca:ALPACA",
    "verl_pairs": "verl_sft.records.sources.verl:VERL_PAIRS",
    "verl": "verl_sft.records.sources.verl:VERL",
}


def resolve(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """The object behind `name`.

    Args:
        kind: what is looked for, as the user would say it ("environment").
        name: a key of `table`, `module:attribute` or `file.py:attribute`.
        table: the known names.

    Raises:
        UsageError: the name is unknown (with the nearest known one) or cannot be imported.
    """
    target = table.get(name, name if ":" in name else None)
    if target is None:
        raise unknown_name(kind, name, table)
    module_name, _, attribute = target.rpartition(":")
    try:
        if module_name.endswith(".py"):
            module = _load_file(Path(module_name))
        else:
            module = importlib.import_module(module_name)
        return getattr(module, attribute)
    except (ModuleNotFoundError, FileNotFoundError, AttributeError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and name in table:
            raise
        raise UsageError(
            f"cannot load the {kind} '{name}': {error}",
            fix="Give it as package.module:attribute or path/to/file.py:attribute",
        ) from error


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not among `known`, with the nearest one that is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return UsageError(f"unknown {kind} '{name}'", fix=f"{hint}Known: {', '.join(names)}")


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Preempted:
        raise
    except (Exception, SystemExit) as error:  # a script without a guard may end the process
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UsageError(
            f"the file cannot be run: {type(error).__name__}: {error}", where=f"{path}{line}"
        ) from error
    return module
