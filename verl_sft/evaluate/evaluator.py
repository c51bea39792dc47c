"""Success rate of a model in an environment, through the same rollout as collection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from verl_sft.collect.rollout import (
    EpisodeSpec,
    RolloutSettings,
    plan_episodes,
    play,
    task_notes,
)
from verl_sft.config.collect import CollectConfig, EvaluateConfig, PromptConfig
from verl_sft.errors import PartialError, UsageError
from verl_sft.evaluate.metrics import summarise
from verl_sft.policies.hf_local import prompt_of_model
from verl_sft.records.filters import FAILED
from verl_sft.registry import ENVIRONMENTS, POLICIES, PROMPTS, resolve
from verl_sft.safe_io import make_output_dir, write_json
from verl_sft.types import JSON, Episode, Step

Progress = Callable[[int, int, str], None]  # episodes played, episodes in all, "n won"


def evaluate(
    config: EvaluateConfig,
    *,
    progress: Progress | None = None,
    on_step: Callable[[EpisodeSpec, Step], None] | None = None,
) -> JSON:
    """Play the episodes and write the report.

    Returns:
        The report: `overall`, `by_task_type`, `episodes` and the settings it was made with.

    Raises:
        UsageError: no model.
        InputError: no games, or a model that cannot be loaded.
        StorageError: the report cannot be written.
        PartialError: more than `rollout.max_errors` of the episodes failed; the report is there.
    """
    output = report_path(config)
    run = as_rollout(config)
    make_env = resolve("environment", run.env.name, ENVIRONMENTS)
    settings = RolloutSettings.from_config(run)
    first = make_env(run.env, **run.env_args)
    specs = plan_episodes(first, run)
    notes = [*task_notes(first, run.env.split), *_prompt_notes(config, settings)]
    if run.rollout.num_workers is not None:
        notes.append("rollout.num_workers has no effect: evaluation plays in one process.")
    first.close()
    policy = resolve("policy", run.policy.name, POLICIES)(run.policy)
    make_output_dir(output.parent)

    episodes: list[Episode] = []
    for episode in play(
        specs,
        make_env=lambda: make_env(run.env, **run.env_args),
        policy=policy,
        settings=settings,
        on_step=on_step,
    ):
        episodes.append(episode)
        if progress is not None:
            progress(len(episodes), len(specs), f"{sum(e.success for e in episodes)} won")
    order = {spec.episode_id: index for index, spec in enumerate(specs)}
    episodes.sort(key=lambda e: order[e.episode_id])
    report = {
        **summarise(episodes),
        "model": config.model,
        "env": run.env.name,
        "split": run.env.split,
        "policy": run.policy.name,
        "constrain": run.policy.constrain,
        "temperature": run.policy.temperature,
        "prompt_template": settings.prompt.label,
        "history": str(settings.history_style),
        "max_steps": settings.max_steps,
        "seed": run.rollout.seed,
        "notes": notes,
        "episodes": [
            {
                "task_id": e.task_id,
                "success": e.success,
                "steps": len(e.steps),
                "stop_reason": str(e.stop_reason),
                "invalid_actions": sum(not s.action_valid for s in e.steps),
            }
            for e in episodes
        ],
    }
    write_json(output, report)
    failed = sum(e.stop_reason in FAILED for e in episodes)
    if failed > run.rollout.max_errors * len(episodes):
        raise PartialError(
            f"{failed} of {len(episodes)} episodes failed",
            where=str(output),
            why=f"That is more than rollout.max_errors={run.rollout.max_errors:g}; the first "
            f"cause: {report['errors'][0]['error']}",
            fix="`errors` in the report names each game and its cause",
        )
    return report


def as_rollout(config: EvaluateConfig) -> CollectConfig:
    """The evaluation as a rollout: the export's own prompt unless the user said otherwise."""
    model = config.model or config.policy.model
    trained = prompt_of_model(model) if model else {}
    asked = config.prompt
    default = PromptConfig()
    prompt = PromptConfig(
        template=asked.template or _trained_template(trained) or default.template,
        history=asked.history or trained.get("history_style") or default.history,
        history_length=_first(
            asked.history_length, trained.get("history_length"), default.history_length
        ),
    )
    return CollectConfig(
        env=config.env,
        policy=replace(config.policy, model=model),
        prompt=prompt,
        rollout=config.rollout,
        env_args=config.env_args,
    )


def _prompt_notes(config: EvaluateConfig, settings: RolloutSettings) -> list[str]:
    """A sentence for each way in which the prompt is not the one the model was trained with."""
    model = config.model or config.policy.model
    trained = prompt_of_model(model) if model else {}
    used = {"prompt_template": settings.prompt.label, "history_style": str(settings.history_style)}
    return [
        f"The model was trained with {key} {trained[key]} and is evaluated with {now}."
        for key, now in used.items()
        if trained.get(key) and trained[key].partition("@")[0] != now.partition("@")[0]
    ]


def _trained_template(trained: JSON) -> str | None:
    """The name behind the export's `name@version`; another version is another prompt."""
    label = str(trained.get("prompt_template") or "")
    name = label.partition("@")[0]
    if name in PROMPTS and (known := resolve("prompt template", name, PROMPTS).label) != label:
        raise UsageError(
            f"the model was trained with the prompt {label}, this version has {known}",
            why="Another wording is another task",
            fix=f"Set prompt.template={name} to evaluate it all the same",
        )
    return name or None


def report_path(config: EvaluateConfig) -> Path:
    """Where the report goes."""
    if config.output:
        given = Path(config.output).expanduser()
        if given.is_dir():
            raise UsageError("the report is a file, this is a folder", where=f"output={given}")
        return given
    folder = config.model or config.policy.model
    if folder is None:
        if config.policy.name == "hf":
            raise UsageError("no model is named", fix="Set model=HF_DIR")
        folder = "."
    return Path(folder).expanduser() / f"evaluation_{config.env.split}.json"


def _first(*values: int | None) -> int:
    return next(v for v in values if v is not None)
