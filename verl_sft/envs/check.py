"""The conformance check that every environment must pass, ours and a newcomer's."""

from __future__ import annotations

from collections.abc import Callable

from verl_sft.envs.base import Environment
from verl_sft.types import Observation, StepResult


def check_environment(
    make_env: Callable[[], Environment], *, split: str = "train", max_steps: int = 10
) -> list[str]:
    """Play two short episodes and list everything that breaks the `Environment` contract.

    Args:
        make_env: makes a fresh environment; it is called twice.
        split: a split that has tasks.
        max_steps: length of the probe episodes.

    Returns:
        One sentence per finding; an empty list means that the environment conforms.
    """
    first, second = make_env(), make_env()
    try:
        found = _check_tasks(first, second, split)
        if found:
            return found
        task_id = first.task_ids(split)[0]
        one, problems = _play(first, task_id, max_steps)
        two, _ = _play(second, task_id, max_steps)
        again, _ = _play(first, task_id, max_steps)
        if one != two:
            problems.append("same task, seed and actions differ between two instances")
        if one != again:
            problems.append("a second reset of one instance does not replay the episode")
        return problems
    finally:
        first.close()
        second.close()


def _check_tasks(first: Environment, second: Environment, split: str) -> list[str]:
    found = []
    if not isinstance(first.name, str) or not first.name:
        found.append("name must be a non-empty string")
    ids = list(first.task_ids(split))
    if not ids:
        found.append(f"task_ids({split!r}) is empty: it must raise InputError instead")
    if ids != list(second.task_ids(split)) or ids != list(first.task_ids(split)):
        found.append("task_ids are not in a stable order")
    if len(set(ids)) != len(ids):
        found.append("task_ids are not unique")
    if any(not isinstance(t, str) or not t for t in ids):
        found.append("task ids must be non-empty strings")
    elif any(not first.task_type(t) for t in ids):
        found.append("task_type is empty for some task")
    return found


def _play(env: Environment, task_id: str, max_steps: int) -> tuple[list[object], list[str]]:
    """One episode of first admissible actions, rotating: what was seen, and what is wrong in it."""
    found: list[str] = []
    observation = env.reset(task_id, seed=7)
    seen: list[object] = [observation]
    found += _check_observation(observation, "reset")
    for index in range(max_steps):
        actions = observation.admissible_actions
        action = actions[index % len(actions)] if actions else "look"
        result = env.step(action)
        seen.append((result.observation, result.reward, result.terminated, result.truncated))
        found += _check_result(result, f"step {index}")
        observation = result.observation
        if result.terminated or result.truncated:
            break
    return seen, found


def _check_observation(observation: object, where: str) -> list[str]:
    if not isinstance(observation, Observation):
        return [f"{where}: not an Observation but {type(observation).__name__}"]
    found = []
    if not isinstance(observation.text, str):
        found.append(f"{where}: text is not a string")
    actions = observation.admissible_actions
    if not isinstance(actions, tuple):
        found.append(f"{where}: admissible_actions must be a tuple")
    elif len(set(actions)) != len(actions):
        found.append(f"{where}: admissible_actions repeat")
    return found


def _check_result(result: object, where: str) -> list[str]:
    if not isinstance(result, StepResult):
        return [f"{where}: not a StepResult but {type(result).__name__}"]
    found = _check_observation(result.observation, where)
    if not isinstance(result.info.get("success"), bool):
        found.append(f"{where}: info['success'] must be a bool")
    if not isinstance(result.reward, float):
        found.append(f"{where}: reward must be a float")
    if not isinstance(result.terminated, bool) or not isinstance(result.truncated, bool):
        found.append(f"{where}: terminated and truncated must be bools")
    return found
