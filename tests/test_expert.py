"""The search expert knows only what it has seen, and wins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.household_world import Household
from verl_sft.collect.rollout import RolloutSettings, plan_episodes, play
from verl_sft.config.collect import CollectConfig, EnvConfig, PolicyConfig
from verl_sft.policies.expert import make_expert
from verl_sft.policies.household import Belief, Change, read_goal, search_order
from verl_sft.types import Episode


def run(config: CollectConfig, tasks: int = 12) -> list[Episode]:
    specs = plan_episodes(Household(tasks), config)
    return list(
        play(
            specs,
            make_env=lambda: Household(tasks),
            policy=make_expert(config.policy),
            settings=RolloutSettings.from_config(config),
        )
    )


@pytest.mark.parametrize(
    ("task", "thing", "target", "change", "count"),
    [
        ("put a pencil in shelf.", "pencil", "shelf", Change.NONE, 1),
        ("put some plate on dresser.", "plate", "dresser", Change.NONE, 1),
        ("put two cd in safe.", "cd", "safe", Change.NONE, 2),
        ("find two vase and put them in coffeetable.", "vase", "coffeetable", Change.NONE, 2),
        ("put a clean cloth in cabinet.", "cloth", "cabinet", Change.CLEAN, 1),
        ("clean some egg and put it in microwave.", "egg", "microwave", Change.CLEAN, 1),
        ("put a hot mug in coffeemachine.", "mug", "coffeemachine", Change.HEAT, 1),
        ("heat some apple and put it in fridge.", "apple", "fridge", Change.HEAT, 1),
        ("put a cool pan in countertop.", "pan", "countertop", Change.COOL, 1),
        ("cool some tomato and put it in microwave.", "tomato", "microwave", Change.COOL, 1),
        ("look at bowl under the desklamp.", "bowl", "", Change.LIGHT, 1),
        ("examine the cd with the desklamp.", "cd", "", Change.LIGHT, 1),
    ],
)  # fmt: skip
def test_every_wording_of_a_task_is_read(
    task: str, thing: str, target: str, change: Change, count: int
) -> None:
    """Both public wordings of all six task types."""
    goal = read_goal(task)
    assert goal is not None
    assert (goal.thing, goal.target, goal.change, goal.count) == (thing, target, change, count)


def test_a_foreign_task_is_not_guessed() -> None:
    """A task of another kind has no goal, and the expert's episode says so."""
    assert read_goal("solve the riddle") is None


def test_expert_wins_and_every_answer_is_valid() -> None:
    """All tasks solved, every action admissible, nothing but weight 1."""
    episodes = run(CollectConfig())
    assert all(e.success for e in episodes)
    assert all(s.action_valid and s.weight == 1 for e in episodes for s in e.steps)


def test_expert_uses_no_hidden_knowledge() -> None:
    """Its decision does not change when the environment's own plan does."""
    from dataclasses import replace

    from verl_sft.policies.base import PolicyRequest
    from verl_sft.prompts.alfworld import DEFAULT

    env = Household()
    seen = env.reset("train/pick-0", seed=0)
    expert = make_expert(PolicyConfig())
    answers = {
        expert.complete([PolicyRequest("e", 0, (), o, (), DEFAULT)])[0].draft
        for o in (seen, replace(seen, expert_action="look"))
    }
    assert len(answers) == 1


def test_noise_is_context_and_the_expert_recovers() -> None:
    """Random steps have weight 0, the rest of the episode is right and wins nevertheless."""
    config = CollectConfig(policy=PolicyConfig(noise=0.3))
    episodes = run(config, tasks=20)
    random_steps = [s for e in episodes for s in e.steps if s.weight == 0]
    share = len(random_steps) / sum(len(e.steps) for e in episodes)
    assert 0.15 < share < 0.45
    assert sum(e.success for e in episodes) >= 18
    assert all(s.action_valid for e in episodes for s in e.steps)


def test_belief_is_a_pure_fold() -> None:
    """The same steps give the same belief, and an action that did nothing changes nothing."""
    episode = run(CollectConfig(), tasks=2)[0]
    last = episode.steps[-1].observation
    one = Belief.of(episode.steps, last.text, last.admissible_actions)
    assert one == Belief.of(episode.steps, last.text, last.admissible_actions)
    assert one.holding == "" and "apple 1" in one.contents["fridge 1"]


def test_search_order_puts_plausible_places_first() -> None:
    """Common sense first, then everything else; nothing is left out."""
    places = ["bed 1", "fridge 1", "countertop 2", "countertop 1"]
    assert search_order("apple", places) == ["countertop 1", "countertop 2", "fridge 1", "bed 1"]


def test_listed_order_is_that_of_the_room() -> None:
    """Each list of places left is the room's own list without some, and the games are won."""
    episodes = run(CollectConfig(policy=PolicyConfig(search_order="listed", noise=0.1)), tasks=20)
    assert sum(e.success for e in episodes) >= 18
    lists = 0
    for episode in episodes:
        room = re.findall(r"[a-z]+ \d+", episode.steps[0].observation.text)
        for step in episode.steps:
            found = re.search(r"To check: (.*?)\. Go", str(step.response.content))
            if found:
                lists += 1
                named = found.group(1).split(", ")
                assert named == [place for place in room if place in named]
    assert lists > 20
    likely = run(CollectConfig(policy=PolicyConfig(noise=0.1)), tasks=20)
    assert {e.episode_id for e in likely}.isdisjoint(e.episode_id for e in episodes)


@pytest.mark.parametrize("expert", ["search", "planner"])
def test_experts_win_real_games(real_games: Path, expert: str) -> None:
    """Both experts on public games of different task types."""
    from verl_sft.envs.alfworld import make_alfworld

    config = CollectConfig(
        env=EnvConfig(data_dir=str(real_games)), policy=PolicyConfig(expert=expert)
    )
    env = make_alfworld(config.env)
    specs = plan_episodes(env, config)
    by_type = {s.task_type: s for s in specs}
    episodes = list(
        play(
            by_type.values(),
            make_env=lambda: env,
            policy=make_expert(config.policy),
            settings=RolloutSettings.from_config(config),
        )
    )
    assert len(episodes) == 6
    assert all(e.success for e in episodes), [(e.task_id, e.error) for e in episodes]
