"""What a LLaMA-Factory file holds, and the DeepSpeed file beside it, before any translation."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_sft.config.llamafactory_data import near
from verl_sft.errors import UsageError

# Arguments that are true or false and decide what is trained.
_SWITCHES = (
    *("mask_history", "train_on_prompt", "preserve_thinking", "enable_thinking"),
    *("split_special_tokens", "disable_shuffling", "eval_on_each_dataset"),
    *("bf16", "fp16", "pure_bf16", "use_cpu", "no_cuda", "use_muon", "pissa_init", "use_swanlab"),
    *("gradient_checkpointing", "activation_checkpointing", "disable_gradient_checkpointing"),
)
_WORDS = {"true": True, "false": False}
_OFFLOADED = ("cpu", "nvme")


def read_arguments(path: Path) -> dict[str, Any]:
    """The arguments of a YAML or JSON file.

    Raises:
        UsageError: it cannot be read, holds no mapping, or one argument twice.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        twice = _twice(yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise UsageError("cannot read the LLaMA-Factory file", where=str(path), why=why) from error
    if twice:
        why = "Which of the two is meant cannot be known"
        raise UsageError(f"'{twice}' stands there twice", where=str(path), why=why)
    if not isinstance(content, dict):
        raise UsageError("the file holds no key: value pairs", where=str(path))
    return {str(key): value for key, value in content.items()}


def _twice(root: Any) -> str:
    """A key that a mapping of a parsed file has twice; empty where there is none."""
    pending, visited = [root], set()
    while pending:
        node = pending.pop()
        if not isinstance(getattr(node, "value", None), list) or id(node) in visited:
            continue
        visited.add(id(node))  # aliases make one node the part of many
        pairs = [item for item in node.value if isinstance(item, tuple)]
        counts = Counter(key.value for key, _ in pairs if isinstance(key.value, str))
        if found := next((name for name, times in counts.items() if times > 1), ""):
            return found
        pending += [value for _, value in pairs] or node.value
    return ""


def with_switches(given: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The arguments, with true and false as such where they were quoted.

    Raises:
        UsageError: a switch is neither of the two.
    """
    done = {
        key: _WORDS.get(value.lower(), value) if isinstance(value, str) else value
        for key, value in given.items()
    }
    for key in _SWITCHES:
        if (value := done.get(key)) is None:
            continue
        if value not in (True, False):
            fix = "Write true or false"
            raise UsageError(f"{key}: {value} is neither true nor false", where=where, fix=fix)
        done[key] = bool(value)
    return done


def zero_stage(given: Any, *, base: Path) -> tuple[int, bool, str]:
    """What `deepspeed` asks for.

    Args:
        given: the name of a DeepSpeed file, or its content.
        base: the file that names it.

    Returns:
        The stage, whether something is offloaded, and how that is known where no file says so.

    Raises:
        UsageError: a file that cannot be read, or none whose name does not hold the stage.
    """
    file = Path() if isinstance(given, dict) else near(given, base)
    found = re.search(r"z(?:ero)?_?([0-3])", file.name.lower())
    if not isinstance(given, dict) and not file.exists():
        if not found:
            raise UsageError("no such DeepSpeed file", where=f"{base}: deepspeed={given}")
        return (
            int(found[1]),
            "offload" in file.name.lower(),
            " (by its name: there is no such file)",
        )
    try:
        content = given if isinstance(given, dict) else json.loads(file.read_text("utf-8-sig"))
        zero = content.get("zero_optimization", {})
        places = [zero.get(f"offload_{what}") or {} for what in ("param", "optimizer")]
        return int(zero.get("stage", 0)), any(p.get("device") in _OFFLOADED for p in places), ""
    except (OSError, ValueError, AttributeError, TypeError) as error:
        where = f"{base}: deepspeed={file if file.name else given}"
        raise UsageError("cannot read the DeepSpeed file", where=where, why=str(error)) from error
