"""One worker process: an environment, a policy, and episodes as JSON lines over its pipes.

Lines in: the config, then one episode spec each. Lines out: `{"ready": policy name}`, `{"beat": n}`
before every environment call, `{"episode": ...}`. It dies with its parent and leaves Ctrl-C to it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from verl_sft.collect.rollout import EpisodeSpec, RolloutSettings, play
from verl_sft.config.collect import CollectConfig
from verl_sft.envs.base import Environment
from verl_sft.errors import VerlSftError
from verl_sft.policies.base import Policy
from verl_sft.processes import die_with_parent
from verl_sft.registry import ENVIRONMENTS, POLICIES, resolve
from verl_sft.safe_io import dump_json
from verl_sft.types import JSON, Observation, StepResult, StopReason


def make_environment(config: CollectConfig) -> Environment:
    """The environment that the config names."""
    make = resolve("environment", config.env.name, ENVIRONMENTS)
    env: Environment = make(config.env, **config.env_args)
    return env


def make_policy(config: CollectConfig) -> Policy:
    """The policy that the config names."""
    policy: Policy = resolve("policy", config.policy.name, POLICIES)(config.policy)
    return policy


def main(parent: int) -> None:
    """Serve the process `parent` until it closes our standard input."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries print to standard output; the protocol gets a descriptor of its own.
    channel = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    def say(line: JSON) -> None:
        channel.write(dump_json(line) + "\n")
        channel.flush()

    try:
        _serve(say)
    except VerlSftError as error:
        say({"fatal": [error.what, error.where, error.why, error.fix, error.exit_code]})
    except BrokenPipeError:
        os._exit(1)


def _serve(say: Callable[[JSON], None]) -> None:
    config = config_from_json(json.loads(sys.stdin.readline()))
    settings = replace(RolloutSettings.from_config(config), batch_size=1)
    policy = make_policy(config)
    env = make_environment(config)
    say({"ready": policy.name})
    for line in sys.stdin:
        spec = EpisodeSpec(**json.loads(line))
        watched = _Watched(env, say, env.name)
        (episode,) = play([spec], make_env=watched.itself, policy=policy, settings=settings)
        if episode.stop_reason is StopReason.ENV_ERROR:
            # Whatever state the failure left behind must not reach the next episode.
            env.close()
            env = make_environment(config)
        say({"episode": episode.to_json()})
    env.close()


@dataclass(slots=True)
class _Watched:
    """The worker's environment: shows the parent signs of life, outlives one episode."""

    env: Environment
    say: Callable[[JSON], None]
    name: str
    beats: int = 0

    def task_ids(self, split: str) -> Sequence[str]:
        return self.env.task_ids(split)

    def task_type(self, task_id: str) -> str:
        return self.env.task_type(task_id)

    def reset(self, task_id: str, *, seed: int) -> Observation:
        self._beat()
        return self.env.reset(task_id, seed=seed)

    def step(self, action: str) -> StepResult:
        self._beat()
        return self.env.step(action)

    def close(self) -> None:
        """Nothing: the next episode uses the same environment."""

    def itself(self) -> Environment:
        return self

    def _beat(self) -> None:
        self.beats += 1
        self.say({"beat": self.beats})


def config_from_json(tree: JSON) -> CollectConfig:
    """The inverse of `dataclasses.asdict` for the collector's config."""
    parts: dict[str, Any] = {}
    for part in fields(CollectConfig):
        assert callable(part.default_factory)
        parts[part.name] = type(part.default_factory())(**tree[part.name])
    return CollectConfig(**parts)
