"""A tiny environment for collector tests: open the right one of three boxes in the right order.

Task ids are `train/0007` and so on; `env_args` break chosen tasks in chosen ways. It is loaded by
path in worker processes, so it needs nothing but verl_sft.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence

from verl_sft.config.collect import EnvConfig, PolicyConfig
from verl_sft.errors import InputError
from verl_sft.policies.base import PolicyRequest
from verl_sft.types import Answer, Completion, Observation, StepResult

COLOURS = ("red", "green", "blue")


class ToyEnv:
    """`broken` maps a task number to raise | kill | hang | refuse | lose."""

    name = "toy"

    def __init__(self, *, tasks: int, broken: dict[str, str], delay: float, shared: bool) -> None:
        self.tasks, self.broken, self.delay, self.shared = tasks, broken, delay, shared

    def task_ids(self, split: str) -> Sequence[str]:
        first = 0 if split == "train" or self.shared else 1000
        if split == "valid_seen":
            raise InputError("no such split")
        return [f"{split}/{n:04d}" for n in range(first, first + self.tasks)]

    def task_type(self, task_id: str) -> str:
        return f"type_{int(task_id[-4:]) % 3}"

    def reset(self, task_id: str, *, seed: int) -> Observation:
        self.number = str(int(task_id[-4:]))
        if self.broken.get(self.number) == "refuse":
            raise InputError("the game file is broken", where=task_id)
        self.wanted = [random.Random(seed * 7 + i).choice(COLOURS) for i in range(3)]
        self.done = 0
        self.task = f"open {', then '.join(self.wanted)}"
        return self._look(f"Room {task_id}. There are boxes.")

    def step(self, action: str) -> StepResult:
        self._break()
        time.sleep(self.delay)
        right = action == f"open {self.wanted[self.done]}"
        self.done += right
        won = self.done == len(self.wanted)
        text = f"You {action}. It is {'right' if right else 'empty'}."
        return StepResult(self._look(text), float(won), won, False, {"success": won})

    def close(self) -> None:
        pass

    def _look(self, text: str) -> Observation:
        actions = tuple(f"open {c}" for c in COLOURS)
        plan = None
        if self.done < len(self.wanted):
            plan = f"open {self.wanted[self.done]}"
        return Observation(text, self.task, actions, plan)

    def _break(self) -> None:
        how = self.broken.get(self.number)
        if how == "raise":
            raise RuntimeError("the engine broke")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "exit":
            os._exit(3)
        if how == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)


class ToyExpert:
    """Follows the plan, after one wrong turn of weight 0 where the seed is odd."""

    name = "toy_expert"

    def __init__(self, *, gives_up: bool) -> None:
        self.gives_up = gives_up

    def complete(self, requests: Sequence[PolicyRequest]) -> list[Completion]:
        return [self._one(r) for r in requests]

    def _one(self, request: PolicyRequest) -> Completion:
        plan = request.observation.expert_action or ""
        noisy = request.seed % 2 == 1 and not request.steps
        wrong = next(a for a in request.observation.admissible_actions if a != plan)
        action = wrong if noisy or self.gives_up else plan
        thought = f"Step {len(request.steps)}: I {action}."
        return Completion(draft=Answer(action, thought), weight=0.0 if noisy else 1.0)


def make_env(
    config: EnvConfig,
    *,
    tasks: int = 6,
    broken: dict[str, str] | None = None,
    delay: float = 0.0,
    shared: bool = False,
) -> ToyEnv:
    return ToyEnv(tasks=tasks, broken=broken or {}, delay=delay, shared=shared)


def make_policy(config: PolicyConfig) -> ToyExpert:
    return ToyExpert(gives_up=config.expert == "search")
