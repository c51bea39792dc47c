"""The agent loop: identity, isolation, and what is written down."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from tests.household_world import Household
from verl_sft.collect.rollout import RolloutSettings, plan_episodes, play
from verl_sft.config.collect import CollectConfig, PolicyConfig, PromptConfig, RolloutConfig
from verl_sft.policies.base import PolicyRequest
from verl_sft.policies.expert import make_expert
from verl_sft.policies.scripted import Scripted
from verl_sft.types import Completion, Episode, Message, StopReason


def run(config: CollectConfig, policy: object = None, batch_size: int = 1,
        extra: Sequence[str] = ()) -> list[Episode]:  # fmt: skip
    from dataclasses import replace

    settings = replace(RolloutSettings.from_config(config), batch_size=batch_size)
    return list(
        play(
            plan_episodes(Household(6, extra), config),
            make_env=lambda: Household(6, extra),
            policy=policy or make_expert(config.policy),  # type: ignore[arg-type]
            settings=settings,
        )
    )


@pytest.mark.parametrize("template", ["default", "add_wm1", "add_wm2"])
@pytest.mark.parametrize("history", ["windowed", "dialogue"])
def test_an_episode_survives_json(template: str, history: str) -> None:
    """Raw JSON is lossless: reading it back gives the same episode."""
    config = CollectConfig(prompt=PromptConfig(template=template, history=history))
    for episode in run(config):
        text = json.dumps(episode.to_json())
        assert Episode.from_json(json.loads(text)) == episode


def test_batch_size_changes_nothing() -> None:
    """Episodes side by side are the same as one after the other."""
    config = CollectConfig(policy=PolicyConfig(noise=0.2))
    alone = {e.episode_id: e for e in run(config)}
    together = {e.episode_id: e for e in run(config, batch_size=4)}
    assert alone == together


def test_expert_predicts_what_really_came() -> None:
    """In `add_wm1` data the prediction is the true next observation, shortened."""
    config = CollectConfig(prompt=PromptConfig(template="add_wm1"))
    episode = run(config)[0]
    for step in episode.steps:
        short = step.next_observation.removeprefix("You arrive at loc 1. ")
        assert f"<prediction>{short}</prediction>" in str(step.response.content)


def test_failures_stay_on_their_episode() -> None:
    """A game that cannot start and one that dies midway are recorded; the others are won."""
    episodes = run(CollectConfig(), extra=["broken-1", "trap-1"], batch_size=3)
    failed = {e.task_id: e for e in episodes if e.stop_reason is StopReason.ENV_ERROR}
    assert set(failed) == {"train/broken-1", "train/trap-1"}
    assert "the game is broken" in failed["train/broken-1"].error
    assert "RuntimeError: the engine fell over" in failed["train/trap-1"].error
    assert len(failed["train/trap-1"].steps) == 2
    assert all(e.success for e in episodes if e.task_id not in failed)


def test_a_policy_error_ends_only_its_episode() -> None:
    """A completion with an error ends that episode as a policy error."""

    class Fussy:
        name = "fussy"

        def complete(self, requests: Sequence[PolicyRequest]) -> list[Completion]:
            good = Message("assistant", "<think>x</think><action>look</action>")
            return [
                Completion(error="too long") if "clean" in r.observation.task else Completion(good)
                for r in requests
            ]

    config = CollectConfig(rollout=RolloutConfig(max_steps=4))
    stops = {e.task_type: (e.stop_reason, e.error) for e in run(config, Fussy(), batch_size=6)}
    assert stops["clean"] == (StopReason.POLICY_ERROR, "too long")
    assert stops["pick"] == (StopReason.MAX_STEPS, "")


def test_invalid_actions_are_marked() -> None:
    """An action that is not admissible reaches the environment and is marked with the reason."""
    answers = ("<think>x</think><action>dance</action>", "no tags at all, just words")
    config = CollectConfig(rollout=RolloutConfig(max_steps=3))
    steps = run(config, Scripted(answers))[0].steps
    assert [s.action_valid for s in steps] == [False, False, False]
    assert steps[0].action == "dance" and "admissible" in steps[0].invalid_reason
    assert steps[1].action == answers[1][-30:] and "<action>" in steps[1].invalid_reason
    assert steps[0].next_observation == "Nothing happens."


def test_plan_is_deterministic_and_identities_differ() -> None:
    """Same config, same episodes; another seed, policy or attempt is another episode."""
    config = CollectConfig(rollout=RolloutConfig(num_episodes=15))
    specs = plan_episodes(Household(), config)
    assert specs == plan_episodes(Household(), config)
    assert len({s.episode_id for s in specs}) == 15
    assert {s.attempt for s in specs} == {0, 1, 2}
    other = CollectConfig(rollout=RolloutConfig(num_episodes=15, seed=1))
    noisy = CollectConfig(rollout=RolloutConfig(num_episodes=15), policy=PolicyConfig(noise=0.1))
    for changed in (other, noisy):
        ids = {s.episode_id for s in plan_episodes(Household(), changed)}
        assert not ids & {s.episode_id for s in specs}


def test_dialogue_prompts_grow_by_one_message() -> None:
    """In dialogue style a step stores only the message that was new."""
    episode = run(CollectConfig(prompt=PromptConfig(history="dialogue")))[0]
    assert all(len(s.prompt) == 1 and s.prompt[0].role == "user" for s in episode.steps)
