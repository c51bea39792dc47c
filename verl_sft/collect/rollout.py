"""The agent loop: episodes played side by side, one batched policy call per round.

Collection, evaluation and quick start all come through `play`. A failure of an environment or a
policy ends that episode with the reason on it and leaves its siblings alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from verl_sft.config.collect import CollectConfig
from verl_sft.envs.base import Environment
from verl_sft.errors import VerlSftError
from verl_sft.policies.base import Policy, PolicyRequest
from verl_sft.prompts.base import PromptTemplate, answer_text
from verl_sft.registry import PROMPTS, resolve
from verl_sft.safe_io import content_hash
from verl_sft.types import (
    Completion,
    Episode,
    HistoryStyle,
    Message,
    Observation,
    ParsedAction,
    Step,
    StepResult,
    StopReason,
)


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """One episode to play: a task, a seed, and the identity that follows from them."""

    task_id: str
    task_type: str
    split: str
    seed: int
    attempt: int
    episode_id: str


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """What all episodes of a run have in common."""

    env_name: str
    prompt: PromptTemplate
    history_style: HistoryStyle
    history_length: int
    max_steps: int
    max_invalid: int | None = None
    batch_size: int = 1

    @classmethod
    def from_config(cls, config: CollectConfig) -> RolloutSettings:
        """The settings that a command's config asks for."""
        return cls(
            env_name=config.env.name,
            prompt=resolve("prompt template", config.prompt.template, PROMPTS),
            history_style=HistoryStyle(config.prompt.history),
            history_length=config.prompt.history_length,
            max_steps=config.rollout.max_steps,
            max_invalid=config.rollout.max_invalid,
            batch_size=1 if config.policy.name == "expert" else config.policy.batch_size,
        )


def plan_episodes(env: Environment, config: CollectConfig) -> tuple[EpisodeSpec, ...]:
    """The episodes of a run in their canonical order, a pure function of tasks and config.

    Tasks are shuffled by seed and cycled through; the n-th visit of a task is attempt n.
    """
    tasks = list(env.task_ids(config.env.split))
    seed = config.rollout.seed
    random.Random(f"{seed}:tasks").shuffle(tasks)
    total = config.rollout.num_episodes or len(tasks)
    policy = config.policy
    identity = {
        "env": config.env.name,
        "policy": [policy.name, policy.expert, policy.noise, policy.constrain, policy.model],
        "sampling": [policy.temperature, policy.top_p, policy.max_new_tokens],
        "prompt": [config.prompt.template, config.prompt.history, config.prompt.history_length],
        "limits": [config.rollout.max_steps, config.rollout.max_invalid],
    }
    if policy.search_order != "likely":
        identity["search_order"] = [policy.search_order]
    specs = []
    for index in range(total):
        task_id, attempt = tasks[index % len(tasks)], index // len(tasks)
        task_seed = int(content_hash([seed, task_id, attempt]), 16) % 2**31
        episode_id = content_hash([identity, task_id, task_seed, attempt])
        specs.append(
            EpisodeSpec(
                task_id, env.task_type(task_id), config.env.split, task_seed, attempt, episode_id
            )
        )
    return tuple(specs)


def task_notes(env: Environment, split: str) -> list[str]:
    """What an environment has to say about its tasks; the method is optional."""
    notes = getattr(env, "notes", None)
    return [] if notes is None else list(notes(split))


def play(
    specs: Iterable[EpisodeSpec],
    *,
    make_env: Callable[[], Environment],
    policy: Policy,
    settings: RolloutSettings,
    on_step: Callable[[EpisodeSpec, Step], None] | None = None,
) -> Iterator[Episode]:
    """Play `specs`, at most `settings.batch_size` at a time; yield each episode as it ends.

    `on_step` hears of every step of an episode that goes on (progress, heartbeats).
    """
    waiting = iter(specs)
    envs: list[Environment] = []
    idle: list[Environment] = []
    running: list[_Running] = []
    try:
        while True:
            while len(running) < settings.batch_size and (spec := next(waiting, None)) is not None:
                if not idle:
                    envs.append(make_env())
                    idle.append(envs[-1])
                episode = _Running(spec, idle.pop(), settings)
                episode.reset()
                running.append(episode)
            if not running:
                return
            _advance([r for r in running if r.stop is None], policy)
            for episode in running:
                if episode.stop is not None:
                    idle.append(episode.env)
                    yield episode.finish(policy.name)
                elif on_step is not None:
                    on_step(episode.spec, episode.steps[-1])
            running = [r for r in running if r.stop is None]
    finally:
        for env in envs:
            env.close()


def _advance(episodes: Sequence[_Running], policy: Policy) -> None:
    """One decision and one environment step for every episode."""
    if not episodes:
        return
    try:
        completions = policy.complete([e.request() for e in episodes])
    except Exception as error:
        for episode in episodes:
            episode.fail(StopReason.POLICY_ERROR, error)
        return
    for episode, completion in zip(episodes, completions, strict=True):
        episode.step(completion)


@dataclass(slots=True)
class _Running:
    """An episode in progress."""

    spec: EpisodeSpec
    env: Environment
    settings: RolloutSettings
    observation: Observation = field(default_factory=lambda: Observation(""))
    steps: list[Step] = field(default_factory=list)
    stop: StopReason | None = None
    success: bool = False
    error: str = ""

    def reset(self) -> None:
        try:
            self.observation = self.env.reset(self.spec.task_id, seed=self.spec.seed)
        except Exception as error:
            self.fail(StopReason.ENV_ERROR, error)

    def request(self) -> PolicyRequest:
        return PolicyRequest(
            episode_id=self.spec.episode_id,
            seed=self.spec.seed,
            messages=self.prompt(),
            observation=self.observation,
            steps=tuple(self.steps),
            template=self.settings.prompt,
        )

    def prompt(self) -> tuple[Message, ...]:
        template = self.settings.prompt
        if self.settings.history_style is HistoryStyle.DIALOGUE:
            return template.dialogue(self.observation, self.steps)
        return template.windowed(
            self.observation, self.steps, history_length=self.settings.history_length
        )

    def step(self, completion: Completion) -> None:
        """Do what the completion says and keep what followed."""
        if completion.error:
            self.stop, self.error = StopReason.POLICY_ERROR, completion.error
            return
        template, admissible = self.settings.prompt, self.observation.admissible_actions
        if completion.draft is not None:
            parsed = ParsedAction(completion.draft.action, completion.draft.action in admissible)
        else:
            assert completion.message is not None
            parsed = template.parse(answer_text(completion.message), admissible)
        try:
            result = self.env.step(parsed.action)
        except Exception as error:
            self.fail(StopReason.ENV_ERROR, error)
            return
        self.steps.append(self._record(completion, parsed, result))
        self.success = self.success or bool(result.info.get("success", False))
        self.observation = result.observation
        if result.terminated:
            self.stop = StopReason.TERMINATED
        elif result.truncated:
            self.stop = StopReason.TRUNCATED
        elif len(self.steps) >= self.settings.max_steps:
            self.stop = StopReason.MAX_STEPS
        elif self._gave_up():
            self.stop = StopReason.INVALID

    def _gave_up(self) -> bool:
        limit = self.settings.max_invalid
        if limit is None or len(self.steps) < limit:
            return False
        return not any(step.action_valid for step in self.steps[-limit:])

    def _record(self, completion: Completion, parsed: ParsedAction, result: StepResult) -> Step:
        template = self.settings.prompt
        prompt = self.prompt()
        if self.settings.history_style is HistoryStyle.DIALOGUE:
            prompt = prompt[-1:]
        response = completion.message
        if completion.draft is not None:
            # An expert predicts what really came: it is formatted only now.
            draft = replace(
                completion.draft,
                observation=template.shorten(self.observation.text),
                prediction=template.shorten(result.observation.text),
            )
            response = Message("assistant", template.format(draft))
            read = template.parse(answer_text(response), self.observation.admissible_actions)
            assert read.action == parsed.action, (read, parsed)
        assert response is not None
        return Step(
            index=len(self.steps),
            observation=self.observation,
            prompt=prompt,
            response=response,
            action=parsed.action,
            action_valid=parsed.valid,
            invalid_reason=parsed.reason,
            next_observation=result.observation.text,
            reward=result.reward,
            terminated=result.terminated,
            truncated=result.truncated,
            weight=completion.weight,
            finish_reason=completion.finish_reason,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
        )

    def fail(self, reason: StopReason, error: Exception) -> None:
        self.stop = reason
        text = str(error) or type(error).__name__
        self.error = text if isinstance(error, VerlSftError) else f"{type(error).__name__}: {text}"

    def finish(self, policy_name: str) -> Episode:
        """The frozen episode."""
        assert self.stop is not None
        return make_episode(
            self.spec,
            settings=self.settings,
            policy_name=policy_name,
            stop_reason=self.stop,
            steps=self.steps,
            success=self.success,
            error=self.error,
        )


def make_episode(
    spec: EpisodeSpec,
    *,
    settings: RolloutSettings,
    policy_name: str,
    stop_reason: StopReason,
    steps: Sequence[Step] = (),
    success: bool = False,
    error: str = "",
) -> Episode:
    """An episode that has ended, with what its run and its spec say of it."""
    return Episode(
        episode_id=spec.episode_id,
        env_name=settings.env_name,
        task_id=spec.task_id,
        task_type=spec.task_type,
        split=spec.split,
        seed=spec.seed,
        attempt=spec.attempt,
        policy_name=policy_name,
        prompt_template=settings.prompt.label,
        history_style=settings.history_style,
        history_length=settings.history_length,
        steps=tuple(steps),
        stop_reason=stop_reason,
        success=success,
        reward=float(sum(s.reward for s in steps)),
        error=error,
    )
