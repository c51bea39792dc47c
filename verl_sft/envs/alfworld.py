"""ALFWorld as an `Environment`: the public text games in the public engine."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_sft.config.collect import EnvConfig
from verl_sft.envs.alfworld_data import (
    check_task_types,
    find_root,
    left_out_lines,
    list_games,
    scan_games,
    task_type_of,
)
from verl_sft.envs.alfworld_engine import Engine, admissible
from verl_sft.errors import UsageError
from verl_sft.types import Observation, StepResult

WIN_REWARD = 10.0  # the scale of the public agents that train on these games
_TASK_MARK = "Your task is to: "
_BANNER_MARK = "-= "


def make_alfworld(config: EnvConfig, **env_args: Any) -> AlfworldEnvironment:
    """ALFWorld's text games from `config.data_dir`, filtered by `config.task_types`.

    Args:
        config: `data_dir`, `task_types`; `expert_actions` asks for a plan at every step.
        env_args: none are known.

    Raises:
        MissingExtraError: `alfworld` is not installed.
        UsageError: no data folder given, an unknown task type or argument.
        InputError: the data folder has no games.
    """
    if env_args:
        raise UsageError(f"unknown env_args for alfworld: {', '.join(sorted(env_args))}")
    types = check_task_types(config.task_types)
    root = find_root(config.data_dir)
    return AlfworldEnvironment(root, task_types=types, engine=Engine(expert=config.expert_actions))


class AlfworldEnvironment:
    """Plays one game at a time in one engine; a task id is the game file's path under the root."""

    name = "alfworld"

    def __init__(self, root: Path, *, task_types: Sequence[str], engine: Engine) -> None:
        self._root = root
        self._task_types = tuple(task_types)
        self._engine = engine
        self._task = ""
        self._won = False
        self._playing = False

    def task_ids(self, split: str) -> tuple[str, ...]:
        """The games of a split, sorted, e.g. `train/pick_.../trial_.../game.tw-pddl`."""
        return list_games(self._root, split=split, task_types=self._task_types)

    def notes(self, split: str) -> list[str]:
        """Sentences about the games of a split that are not among its tasks."""
        return left_out_lines(scan_games(self._root, split=split, task_types=self._task_types))

    def task_type(self, task_id: str) -> str:
        """One of the six task types, read from the task id."""
        return task_type_of(task_id)

    def reset(self, task_id: str, *, seed: int) -> Observation:
        """Start a game. The engine is deterministic: `seed` changes nothing.

        The banner of the first text is dropped and the goal moved to `Observation.task`, so that
        `text` is what the agent sees in the room.

        Raises:
            InputError: the game is missing, corrupt or unsolvable, or the engine refuses it.
        """
        self._playing = False
        with contextlib.redirect_stdout(io.StringIO()):
            state = self._engine.reset(self._root / task_id)
        text, self._task = split_intro(state["feedback"])
        self._won, self._playing = bool(state["won"]), True
        return self._observe(state, text)

    def step(self, action: str) -> StepResult:
        """Do `action`. Reward is 10 on the step that wins, else 0; `info["score"]` is raw (0, 1).

        An action that the game does not know changes nothing ("Nothing happens.").
        """
        assert self._playing, "step() before reset()"
        with contextlib.redirect_stdout(io.StringIO()):
            state = self._engine.step(action)
        just_won = bool(state["won"]) and not self._won
        self._won = self._won or just_won
        observation = self._observe(state, state["feedback"].strip())
        info = {"success": self._won, "score": float(state["score"])}
        reward = WIN_REWARD if just_won else 0.0
        return StepResult(observation, reward, terminated=self._won, truncated=False, info=info)

    def close(self) -> None:
        """Give the engine back."""
        self._playing = False
        self._engine.close()

    def _observe(self, state: Mapping[str, Any], text: str) -> Observation:
        plan = self._engine.plan()
        return Observation(
            text=text,
            task=self._task,
            admissible_actions=admissible(state),
            expert_action=plan[0] if plan else None,
        )


def split_intro(text: str) -> tuple[str, str]:
    r"""A game's first text as (what is seen, the task).

    >>> split_intro("-= Welcome =-\n\nYou see a bed 1.\n\nYour task is to: put a cd in bed.")
    ('You see a bed 1.', 'put a cd in bed.')
    """
    seen, _, task = text.partition(_TASK_MARK)
    lines = [line for line in seen.splitlines() if not line.startswith(_BANNER_MARK)]
    return "\n".join(lines).strip(), task.strip()
