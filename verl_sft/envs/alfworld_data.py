"""Where ALFWorld games lie on disk: splits, task ids, and which games the public loader skips."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_sft.errors import InputError, UsageError
from verl_sft.registry import unknown_name

SPLITS = ("train", "valid_seen", "valid_unseen")
GAME_FILE = "game.tw-pddl"
TRAJ_FILE = "traj_data.json"
_NAMED = 5  # games named in a message
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


@dataclass(frozen=True, slots=True)
class Games:
    """The games of a split that can be played, and what else lies there, by reason."""

    playable: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]]


def scan_games(root: Path, *, split: str, task_types: Sequence[str]) -> Games:
    """The task ids of a split: POSIX paths of the game files under `root`, sorted.

    As in the public loader, games with movable receptacles or slicing, those without their
    trajectory file, and those marked unsolvable are left out. A file that cannot be read is
    listed: its reset names it, and the run counts it.
    """
    folder = root / split
    wanted = set(task_types)
    playable: list[str] = []
    left_out: dict[str, list[str]] = {}
    files = (path for name in (TRAJ_FILE, GAME_FILE) for path in folder.glob(f"*/*/{name}"))
    for trial in sorted({path.parent for path in files}):
        game = trial / GAME_FILE
        name = game.relative_to(root).as_posix()
        if "movable" in name or "Sliced" in name or task_type_of(name) not in wanted:
            continue
        reason = _why_left_out(game)
        if reason:
            left_out.setdefault(reason, []).append(name)
        else:
            playable.append(name)
    return Games(tuple(playable), {reason: tuple(left_out[reason]) for reason in sorted(left_out)})


def list_games(root: Path, *, split: str, task_types: Sequence[str]) -> tuple[str, ...]:
    """The playable games of `scan_games`.

    Raises:
        InputError: the split has none.
    """
    games = scan_games(root, split=split, task_types=task_types)
    if not games.playable:
        looked = f"Looked for {split}/*/*/{GAME_FILE} of type {', '.join(task_types)}"
        why = ". ".join([looked, *left_out_lines(games)])
        raise InputError(f"no games in split '{split}'", where=str(root), why=why, fix=_FIX)
    return games.playable


def left_out_lines(games: Games) -> list[str]:
    """One sentence for each reason, with the count and the first names."""
    return [
        f"{len(names)} games left out, {reason}: {', '.join(names[:_NAMED])}"
        + (", ..." if len(names) > _NAMED else "")
        for reason, names in games.left_out.items()
    ]


def task_type_of(task_id: str) -> str:
    """The task type that a task id (or the name of a task's folder) begins with."""
    return task_id.rpartition("/trial_")[0].rpartition("/")[2].partition("-")[0]


def _why_left_out(game: Path) -> str:
    """Why the public loader skips the game; empty: it can be played, or shows why not."""
    if not game.is_file():
        return f"no {GAME_FILE}"
    if not game.with_name(TRAJ_FILE).is_file():
        return f"no {TRAJ_FILE}"
    return "marked unsolvable" if _marked_unsolvable(game) else ""


def _marked_unsolvable(game: Path) -> bool:
    try:
        # Whole problems are large; the mark is a top-level key, so its spelling is enough.
        text = game.read_text(encoding="utf-8")
        return '"solvable"' in text and json.loads(text).get("solvable") is False
    except (OSError, ValueError, AttributeError):
        return False
