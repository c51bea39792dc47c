"""Episodes to records: the same episode gives the same rows, whenever they are built.

`episode_rows` is a pure function of the episode and its prompt template, so rows in either
granularity can be rebuilt from `raw_trajectories.json` at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from verl_sft.prompts.base import PromptTemplate
from verl_sft.records.schema import SFTRecord
from verl_sft.safe_io import content_hash
from verl_sft.types import JSON, Episode, Message, Step


def episode_rows(episode: Episode, template: PromptTemplate, *, rows: str) -> list[SFTRecord]:
    """The records of one episode.

    Args:
        episode: a finished episode, kept by the filters.
        template: the template that made its prompts.
        rows: "step" (one record per learned step) or "episode" (one record, all learned turns).

    Returns:
        Records in step order. A step of weight 0 has no record of its own and stays as context in
        later ones; an episode without a learned step gives none.
    """
    if rows == "step":
        return list(_step_rows(episode, template))
    return list(_episode_row(episode, template))


def record_id(record: SFTRecord) -> str:
    """The content hash of what is trained; everything else may differ between equal ids."""
    return content_hash(
        {
            "messages": [m.to_json() for m in record.messages],
            "prompt": record.prompt,
            "response": record.response,
            "tools": record.tools,
            "supervise": record.supervise,
            "weights": record.weights,
            "sample_weight": record.sample_weight,
        }
    )


def opening_hash(messages: Sequence[Message]) -> str:
    """A hash of the messages before the first answer: attempts at one task share it."""
    opening = []
    for message in messages:
        if message.role == "assistant":
            break
        opening.append(message.to_json())
    return content_hash(opening)


def group_of(record: SFTRecord) -> str:
    """What a record is split by: its group, task or episode, else how its chat begins."""
    known = record.group_id or record.task_id or record.episode_id
    if known or record.prompt is None:
        return known or opening_hash(record.messages)
    return content_hash(record.prompt)


def turn_records(record: SFTRecord) -> Iterator[SFTRecord]:
    """One record per learned turn: the chat up to it, only its last message learned.

    A record that is one already stays as it is; the others are parts of the same episode.
    """
    turns = record.supervise
    if turns is None:
        turns = tuple(i for i, m in enumerate(record.messages) if m.role == "assistant")
    if len(turns) == 1 and turns[0] == len(record.messages) - 1:
        yield record
        return
    for turn, weight in zip(turns, record.weights or (1.0,) * len(turns), strict=True):
        part = replace(
            record,
            messages=record.messages[: turn + 1],
            supervise=(turn,),
            weights=None if weight == 1 else (weight,),
            episode_id=record.episode_id or record.record_id,
            step=turn,
            prompt=None,
            response=None,
        )
        yield replace(part, record_id=record_id(part))


def _step_rows(episode: Episode, template: PromptTemplate) -> Iterator[SFTRecord]:
    for position, step in enumerate(episode.steps):
        if step.weight <= 0:
            continue
        messages = _dialogue(template, episode.steps[: position + 1])
        seen = template.windowed(
            step.observation, episode.steps[:position], history_length=episode.history_length
        )
        yield _finish(
            episode,
            step,
            messages=messages,
            prompt="\n\n".join(_text(m) for m in seen),
            response=_text(step.response),
            supervise=(len(messages) - 1,),
            weights=_weights((step.weight,)),
        )


def _episode_row(episode: Episode, template: PromptTemplate) -> Iterator[SFTRecord]:
    learned = [s for s in episode.steps if s.weight > 0]
    if not learned:
        return
    messages = _dialogue(template, episode.steps)
    turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
    assert len(turns) == len(episode.steps), "a dialogue has one assistant message per step"
    yield _finish(
        episode,
        learned[-1],
        messages=messages,
        prompt=None,
        response=None,
        supervise=tuple(i for i, s in zip(turns, episode.steps, strict=True) if s.weight > 0),
        weights=_weights([s.weight for s in learned]),
    )


def _dialogue(template: PromptTemplate, steps: Sequence[Step]) -> tuple[Message, ...]:
    """The chat up to and with the answer of the last of `steps`."""
    *past, last = steps
    return (*template.dialogue(last.observation, past), last.response)


def _weights(values: Sequence[float]) -> tuple[float, ...] | None:
    return None if all(v == 1 for v in values) else tuple(values)


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(str(part.get("text", "")) for part in message.content or ())


def _finish(episode: Episode, step: Step, **content: Any) -> SFTRecord:
    extra: JSON = {
        "index": step.index,
        "split": episode.split,
        "task": step.observation.task,
        "attempt": episode.attempt,
        "num_steps": len(episode.steps),
        "success": episode.success,
        "stop_reason": str(episode.stop_reason),
    }
    record = SFTRecord(
        group_id=episode.task_id,
        episode_id=episode.episode_id,
        step=step.index,
        tools=step.observation.tools,
        success=episode.success,
        agent_success=episode.success,
        reward=episode.reward,
        action=step.action,
        action_valid=step.action_valid,
        data_source=f"{episode.env_name}_sft_collection",
        env_name=episode.env_name,
        task_id=episode.task_id,
        task_type=episode.task_type,
        seed=episode.seed,
        agent_name=episode.agent_name,
        policy_name=episode.policy_name,
        turn_idx=step.index,
        prompt_template=episode.prompt_template,
        reward_model={"style": "environment", "ground_truth": step.observation.task}
        | {"step_reward": step.reward, "episode_reward": episode.reward},
        extra_info=extra,
        meta=dict(episode.meta),
        **content,
    )
    return replace(record, record_id=record_id(record))
