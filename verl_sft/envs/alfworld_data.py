"""Where ALFWorld games lie on disk: splits, task ids, and which games the public loader skips."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from verl_sft.errors import InputError, UsageError
from verl_sft.registry import unknown_name

SPLITS = ("train", "valid_seen", "valid_unseen")
GAME_FILE = "game.tw-pddl"
TRAJ_FILE = "traj_data.json"
RELEASE = "json_2.1.1"  # the folder name that every public tool looks for
TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
_FIX = (
    "Set env.data_dir (or ALFWORLD_DATA) to the folder that holds json_2.1.1/, "
    "or make games with: verl-sft make-games out=DIR"
)


def check_task_types(task_types: Sequence[str]) -> tuple[str, ...]:
    """`task_types`, or all six if empty.

    Raises:
        UsageError: an unknown type, with the nearest known one.
    """
    for name in task_types:
        if name not in TASK_TYPES:
            raise unknown_name("task type", name, TASK_TYPES)
    return tuple(task_types) or TASK_TYPES


def find_root(data_dir: str | None) -> Path:
    """The folder whose children are the splits.

    Args:
        data_dir: that folder, or the one that holds `json_2.1.1/`; default `$ALFWORLD_DATA`.

    Raises:
        UsageError: neither is set.
        InputError: there is no such folder, or it holds no split.
    """
    given = data_dir or os.environ.get("ALFWORLD_DATA")
    if not given:
        raise UsageError("no ALFWorld games given: env.data_dir is not set", fix=_FIX)
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise InputError("no such folder of ALFWorld games", where=str(folder), fix=_FIX)
    for root in (folder, folder / RELEASE):
        if any((root / split).is_dir() for split in SPLITS):
            return root
    why = f"Neither it nor its {RELEASE}/ has one of {', '.join(SPLITS)}"
    raise InputError("no ALFWorld games here", where=str(folder), why=why, fix=_FIX)


def list_games(root: Path, *, split: str, task_types: Sequence[str]) -> tuple[str, ...]:
    """The task ids of a split: POSIX paths of the game files under `root`, sorted.

    As in the public loader, games with movable receptacles or slicing, and those marked unsolvable,
    are left out. A file that cannot be read is listed: its reset names it, and the run counts it.

    Raises:
        InputError: the split has no such game.
    """
    folder = root / split
    wanted = set(task_types)
    games = []
    for traj in sorted(folder.glob(f"*/*/{TRAJ_FILE}")):
        game = traj.with_name(GAME_FILE)
        name = game.relative_to(root).as_posix()
        if "movable" in name or "Sliced" in name or not game.is_file():
            continue
        if task_type_of(name) in wanted and not _marked_unsolvable(game):
            games.append(name)
    if not games:
        why = f"Looked for {split}/*/*/{GAME_FILE} of type {', '.join(task_types)}"
        raise InputError(f"no games in split '{split}'", where=str(root), why=why, fix=_FIX)
    return tuple(games)


def task_type_of(task_id: str) -> str:
    """The task type that a task id (or the name of a task's folder) begins with."""
    return task_id.rpartition("/trial_")[0].rpartition("/")[2].partition("-")[0]


def _marked_unsolvable(game: Path) -> bool:
    try:
        # Whole problems are large; the mark is a top-level key, so its spelling is enough.
        text = game.read_text(encoding="utf-8")
        return '"solvable"' in text and json.loads(text).get("solvable") is False
    except (OSError, ValueError, AttributeError):
        return False
