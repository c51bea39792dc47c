"""Which episodes become rows; every episode or step that does not is counted by reason."""

from __future__ import annotations

from dataclasses import replace

from verl_sft.config.collect import FilterConfig
from verl_sft.types import Episode, Step, StopReason

FAILED = frozenset({StopReason.ENV_ERROR, StopReason.POLICY_ERROR, StopReason.ABORTED})


def drop_reason(episode: Episode, config: FilterConfig) -> str:
    """Why the whole episode is left out, as one word for the statistics; empty: it is kept."""
    count = len(episode.steps)
    if episode.stop_reason in FAILED:
        return str(episode.stop_reason)
    if config.require_success and not episode.success:
        return "not_successful"
    if config.min_reward is not None and not episode.reward >= config.min_reward:
        return "reward_too_low"
    if count < max(config.min_steps, 1):
        return "too_few_steps"
    if config.max_steps is not None and count > config.max_steps:
        return "too_many_steps"
    if config.valid_actions == "all" and any(_invalid(s) for s in episode.steps):
        return "invalid_action"
    if not any(s.weight > 0 for s in mask_steps(episode, config).steps):
        return "nothing_learned"
    return ""


def mask_steps(episode: Episode, config: FilterConfig) -> Episode:
    """The episode with weight 0 on steps that are context only.

    These are answers that were cut off at the token limit, and under `valid_actions=context` those
    with an invalid action; the policy's own weights stay.
    """
    return replace(
        episode,
        steps=tuple(
            replace(s, weight=0.0) if _context_only(s, config) else s for s in episode.steps
        ),
    )


def _invalid(step: Step) -> bool:
    return step.weight > 0 and not step.action_valid


def _context_only(step: Step, config: FilterConfig) -> bool:
    return step.finish_reason == "length" or (
        config.valid_actions == "context" and not step.action_valid
    )
