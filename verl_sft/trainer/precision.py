"""How fp32 products are computed in a run: as configured, or as measured once and remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from verl_sft.distributed.reduce import from_main, together
from verl_sft.distributed.setup import World
from verl_sft.model.matmul import LEVELS, choose_level
from verl_sft.safe_io import write_json

MATMUL_FILE = "fp32_matmul.json"  # in the run's directory: what `auto` chose


def set_matmul(wanted: str, *, directory: Path, world: World, say: Callable[[str], None]) -> str:
    """Set the precision of fp32 products on every rank; returns it.

    `auto` measures once and leaves its choice in the run's directory: a resumed run takes the same.
    """
    level = wanted
    if wanted == "auto":
        with together(world):
            level = ""
            file = directory / MATMUL_FILE
            if world.is_main and file.is_file():
                level = str(json.loads(file.read_text("utf-8")).get("level"))
            if world.is_main and level not in LEVELS:
                level, line = choose_level(device=world.device)
                write_json(file, {"level": level, "why": line})
                say(line)
        level = from_main(level, world=world)
    torch.set_float32_matmul_precision(level)
    return level
