"""A household in 80 lines with the wording of ALFWorld: fast, exact, no engine needed.

One apple lies somewhere; the task is to put it, perhaps cleaned, into the fridge.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from verl_sft.config.collect import EnvConfig
from verl_sft.errors import InputError
from verl_sft.types import Observation, StepResult

PLACES = ("countertop 1", "drawer 1", "shelf 1", "sinkbasin 1", "fridge 1")
OPENABLE = ("drawer 1", "fridge 1")


class Household:
    """Task ids are `<split>/<kind>-<n>`; `broken` raises at reset, `trap` at the third step."""

    name = "household"

    def __init__(self, tasks: int = 6, extra: Sequence[str] = ()) -> None:
        self._tasks = tasks
        self._extra = tuple(extra)

    def task_ids(self, split: str) -> Sequence[str]:
        kinds = ("pick", "clean")
        return [f"{split}/{kinds[i % 2]}-{i}" for i in range(self._tasks)] + [
            f"{split}/{name}" for name in self._extra
        ]

    def task_type(self, task_id: str) -> str:
        return task_id.split("/")[1].split("-")[0]

    def reset(self, task_id: str, *, seed: int) -> Observation:
        if "broken" in task_id:
            raise InputError("the game is broken", where=task_id)
        self._trap = "trap" in task_id
        self._clean_needed = "clean" in task_id
        chance = random.Random(task_id)
        self._things = {"apple 1": chance.choice(PLACES[:3]), "bread 1": chance.choice(PLACES[:3])}
        self._here, self._open, self._held, self._clean, self._steps = "", set(), "", False, 0
        self.task = "clean some apple and put it in fridge." if self._clean_needed else (
            "put a apple in fridge.")  # fmt: skip
        listed = ", ".join(PLACES[:-1])
        text = f"You are in the middle of a room. You see {listed}, and {PLACES[-1]}."
        return self._observe(text)

    def step(self, action: str) -> StepResult:
        self._steps += 1
        if self._trap and self._steps == 3:
            raise RuntimeError("the engine fell over")
        text = self._act(action) if action in self._actions() else "Nothing happens."
        won = self._things.get("apple 1") == "fridge 1" and (
            self._clean or not self._clean_needed)  # fmt: skip
        reward = 10.0 if won else 0.0
        return StepResult(self._observe(text), reward, won, False, {"success": won})

    def close(self) -> None:
        pass

    def _act(self, action: str) -> str:
        words = action.split(" ")
        if action.startswith("go to "):
            self._here = action[6:]
            return f"You arrive at loc 1. {self._look()}"
        if words[0] == "open":
            self._open.add(self._here)
            return f"You open {self._here}. {self._look()}"
        if words[0] == "take":
            self._held = " ".join(words[1:3])
            self._things[self._held] = ""
            return f"You take {self._held} from {self._here}."
        if words[0] == "put":
            self._things[self._held], self._held = self._here, ""
            return f"You {action}."
        if words[0] == "clean":
            self._clean = self._clean or self._held == "apple 1"
            return f"You clean {self._held} using {self._here}."
        return "You see nothing special."

    def _look(self) -> str:
        if self._here in OPENABLE and self._here not in self._open:
            return f"{self._here} is closed."
        things = sorted(t for t, place in self._things.items() if place == self._here)
        seen = ", and ".join(things) if things else "nothing"
        return f"{'In' if self._here in OPENABLE else 'On'} {self._here}, you see {seen}."

    def _actions(self) -> tuple[str, ...]:
        actions = [f"go to {p}" for p in PLACES if p != self._here] + ["look"]
        closed = self._here in OPENABLE and self._here not in self._open
        if closed:
            actions.append(f"open {self._here}")
        elif self._here:
            actions += [
                f"take {t} from {self._here}"
                for t, place in self._things.items()
                if place == self._here and not self._held
            ]
            if self._held:
                actions.append(f"put {self._held} in/on {self._here}")
        if self._held and self._here == "sinkbasin 1":
            actions.append(f"clean {self._held} with sinkbasin 1")
        return tuple(sorted(actions))

    def _observe(self, text: str) -> Observation:
        return Observation(text, self.task, self._actions())


def make_household(config: EnvConfig, **env_args: object) -> Household:
    """Built as a user's own environment is: `env=tests/household_world.py:make_household`."""
    tasks, extra = env_args.get("tasks", 6), env_args.get("extra", ())
    assert isinstance(tasks, int) and isinstance(extra, list | tuple)
    return Household(tasks, [str(e) for e in extra])
