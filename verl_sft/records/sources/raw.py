"""Our own raw episodes (`raw_trajectories.json`): rows of either granularity, made anew.

Prompts come from the template that the episode names, or from another one, which gives the answers
its own tags; what an answer does not say is never made up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from verl_sft.config.collect import FilterConfig
from verl_sft.errors import VerlSftError
from verl_sft.prompts.base import PromptTemplate, answer_text
from verl_sft.records.build import episode_rows
from verl_sft.records.filters import drop_reason, mask_steps
from verl_sft.records.parse import ReadOptions
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.values import BadRowError
from verl_sft.registry import PROMPTS, resolve
from verl_sft.types import JSON, Answer, Episode, Message, Step

_KEYS = {"episode_id", "env_name", "task_id", "prompt_template", "history_style", "steps"}


def _detect(row: JSON) -> bool:
    return row.keys() >= _KEYS


def _read(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
    try:
        episode = Episode.from_json(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = f"it is not an episode: {type(error).__name__}: {error}"
        raise BadRowError("", "BAD_EPISODE", text) from error
    for name, kind in (
        ("success", bool),
        ("reward", int | float),
        ("prompt_template", str),
        ("meta", dict),
    ):
        if not isinstance(getattr(episode, name), kind):
            text = f"{getattr(episode, name)!r:.40} is not what it holds"
            raise BadRowError(name, "BAD_VALUE", text)
    wanted = FilterConfig(
        require_success=options.require_success, valid_actions=options.valid_actions
    )
    try:
        if reason := drop_reason(episode, wanted):
            fix = "Set data.raw.require_success=false for failed ones" * (not episode.success)
            raise BadRowError("steps", reason.upper(), "the episode is left out", fix)
        template = _template(episode, options.prompt)
        episode = _in_form(mask_steps(episode, wanted), template)
        if options.history_length is not None:
            episode = replace(episode, history_length=options.history_length)
        return episode_rows(episode, template, rows=options.rows)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, BadRowError | VerlSftError):
            raise
        text = f"its steps cannot be used: {type(error).__name__}: {error}"
        raise BadRowError("steps", "BAD_EPISODE", text) from error


def _template(episode: Episode, asked: str) -> PromptTemplate:
    """The template that was asked for, else the one of the episode's label."""
    names = [asked] if asked else list(PROMPTS)
    found: PromptTemplate
    for name in names:
        found = resolve("prompt template", name, PROMPTS)
        if asked or found.label == episode.prompt_template:
            return found
    raise BadRowError(
        "prompt_template",
        "UNKNOWN_TEMPLATE",
        f"no template here is called {episode.prompt_template!r:.60}",
        "Set data.raw.prompt to the template that made it (NAME or module:attribute)",
    )


def _in_form(episode: Episode, template: PromptTemplate) -> Episode:
    """The episode as if its answers had been given under `template`."""
    if template.label == episode.prompt_template:
        return episode
    steps = (_reformed(step, template, f"steps[{n}]") for n, step in enumerate(episode.steps))
    return replace(episode, steps=tuple(steps), prompt_template=template.label)


def _reformed(step: Step, template: PromptTemplate, where: str) -> Step:
    text = answer_text(step.response)
    parts: dict[str, str] = {}
    for tag in template.tags:
        found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL | re.IGNORECASE)
        if found is None and step.weight <= 0:  # context: as it was said
            return step
        if found is None:
            raise BadRowError(
                f"{where}.response",
                "MISSING_TAG",
                f"the answer has no <{tag}>, which '{template.name}' asks for",
                "Leave data.raw.prompt empty, or name a template with fewer tags",
            )
        parts[tag] = found[1]
    answer = Answer(
        action=parts["action"],
        thought=parts.get("think", ""),
        observation=parts.get("observation", ""),
        prediction=parts.get("prediction", ""),
    )
    return replace(step, response=Message("assistant", template.format(answer)))


RAW = SourceFormat("raw", "our raw episodes: rows are built from them anew", _detect, _read)
