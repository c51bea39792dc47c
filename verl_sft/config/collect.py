"""What `collect`, `evaluate` and `make-games` can be told; validated when built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl_sft.config.checks import at_least, between, fraction, one_of
from verl_sft.errors import UsageError

MOST = 10_000_000  # games or episodes of one run: more is a slip of the keyboard


@dataclass
class EnvConfig:
    """Which environment, which tasks."""

    name: str = "alfworld"
    data_dir: str | None = None  # the folder that holds json_2.1.1/; default $ALFWORLD_DATA
    split: str = "train"  # train | valid_seen | valid_unseen
    task_types: list[str] = field(default_factory=list)  # empty: all
    expert_actions: bool = False  # plan at every step; policy.expert=planner switches it on
    step_timeout: float = 60.0  # seconds for one reset or step, then the worker is replaced

    def __post_init__(self) -> None:
        one_of("env.split", self.split, ("train", "valid_seen", "valid_unseen"))
        at_least("env.step_timeout", self.step_timeout, 0.001)


@dataclass
class PolicyConfig:
    """Who plays."""

    name: str = "expert"  # expert | hf | scripted | module:attribute
    expert: str = "search"  # search (no hidden knowledge) | planner (the game's own plan)
    search_order: str = "likely"  # where search looks next: likely places | listed (room's order)
    noise: float = 0.0  # share of the expert's steps replaced by a random admissible action
    constrain: str = "none"  # none | admissible: generation may only spell an admissible action
    model: str | None = None  # HF folder, for policy=hf
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    max_new_tokens: int = 512
    batch_size: int = 16  # episodes played side by side by one model

    def __post_init__(self) -> None:
        one_of("policy.expert", self.expert, ("search", "planner"))
        one_of("policy.search_order", self.search_order, ("likely", "listed"))
        one_of("policy.constrain", self.constrain, ("none", "admissible"))
        fraction("policy.noise", self.noise)
        fraction("policy.top_p", self.top_p)
        at_least("policy.temperature", self.temperature, 0)
        at_least("policy.max_new_tokens", self.max_new_tokens, 1)
        at_least("policy.batch_size", self.batch_size, 1)
        ignored = {  # a policy that is imported by name may read any of these
            "policy.noise": self.name == "hf" and self.noise != 0,
            "policy.search_order": self.name == "hf" and self.search_order != "likely",
            "policy.constrain": self.name == "expert" and self.constrain != "none",
            "policy.temperature": self.name == "expert" and self.temperature != 0,
        }
        for key, wrong in ignored.items():
            if wrong:
                raise UsageError(
                    f"{key} has no effect with policy.name={self.name}",
                    fix="Leave it out, or use the policy that reads it (expert: noise, order)",
                )


@dataclass
class PromptConfig:
    """What the policy is shown and asked for."""

    template: str = "default"  # default | add_wm1 | add_wm2 | module:attribute
    history: str = "windowed"  # windowed | dialogue
    history_length: int = 2  # past steps quoted in a windowed prompt

    def __post_init__(self) -> None:
        one_of("prompt.history", self.history, ("windowed", "dialogue"))
        at_least("prompt.history_length", self.history_length, 0)


@dataclass
class RolloutConfig:
    """How many episodes, how long, by how many workers."""

    num_episodes: int | None = None  # default: each task of the split once
    max_steps: int = 50
    max_invalid: int | None = None  # invalid answers in a row after which an episode is given up
    seed: int = 0
    num_workers: int | None = None  # default: the number of cores
    max_errors: float = 0.5  # share of failed episodes above which the run is called failed

    def __post_init__(self) -> None:
        if self.num_episodes is not None:
            between("rollout.num_episodes", self.num_episodes, 1, MOST)
        if self.num_workers is not None:
            at_least("rollout.num_workers", self.num_workers, 1)
        if self.max_invalid is not None:
            at_least("rollout.max_invalid", self.max_invalid, 1)
        at_least("rollout.max_steps", self.max_steps, 1)
        fraction("rollout.max_errors", self.max_errors)


@dataclass
class FilterConfig:
    """Which episodes and steps become rows; every drop is counted by reason."""

    require_success: bool = True
    min_reward: float | None = None
    valid_actions: str = "any"  # any | context (invalid steps get weight 0) | all (drop episode)
    min_steps: int = 1
    max_steps: int | None = None
    dedup: bool = True

    def __post_init__(self) -> None:
        one_of("filter.valid_actions", self.valid_actions, ("any", "context", "all"))
        at_least("filter.min_steps", self.min_steps, 0)
        if self.max_steps is not None:
            at_least("filter.max_steps", self.max_steps, max(self.min_steps, 1))


@dataclass
class OutputConfig:
    """Where the rows go and in which granularity."""

    dir: str = "."  # parent of sft_data_YYYYMMDD_HHMMSS, unless `name` is given
    name: str | None = None  # folder name; default sft_data_<date>_<time>; an existing one resumes
    rows: str = "step"  # step | episode
    val_fraction: float = 0.1
    csv_safe_for_spreadsheets: bool = False

    def __post_init__(self) -> None:
        one_of("output.rows", self.rows, ("step", "episode"))
        fraction("output.val_fraction", self.val_fraction)
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name):
            raise UsageError(
                f"output.name={self.name}: must be the name of one folder",
                fix="Give the path that leads to it as output.dir",
            )


@dataclass
class CollectConfig:
    """`verl-sft collect`."""

    env: EnvConfig = field(default_factory=EnvConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    env_args: dict[str, Any] = field(default_factory=dict)  # passed to the environment as they are

    def __post_init__(self) -> None:
        if self.policy.name == "expert" and self.policy.expert == "planner":
            self.env.expert_actions = True


@dataclass
class EvaluatePromptConfig:
    """As `PromptConfig`, but by default what the model was trained with."""

    template: str | None = None  # default: the export's, else "default"
    history: str | None = None  # default: the export's, else windowed
    history_length: int | None = None  # default: the export's, else 2


@dataclass
class EvaluateConfig:
    """`verl-sft evaluate`."""

    model: str | None = None  # HF folder
    env: EnvConfig = field(default_factory=lambda: EnvConfig(split="valid_unseen"))
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(name="hf"))
    prompt: EvaluatePromptConfig = field(default_factory=EvaluatePromptConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    output: str | None = None  # JSON report; default <model>/evaluation_<split>.json
    env_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class MakeGamesConfig:
    """`verl-sft make-games`."""

    out: str | None = None
    num: int = 100  # games of the train split; each valid split gets `num_valid`
    num_valid: int | None = None  # default: a tenth of `num`, at least 6
    seed: int = 0
    size: str = "small"  # tiny | small | medium | full (as large as the public games)
    task_types: list[str] = field(default_factory=list)
    wording: str = "2.1.2"  # 2.1.1 "put X in/on Y" | 2.1.2 "move X to Y"
    num_workers: int | None = None

    def __post_init__(self) -> None:
        between("num", self.num, 1, MOST)
        if self.num_valid is not None:
            between("num_valid", self.num_valid, 0, MOST)
        if self.num_workers is not None:
            at_least("num_workers", self.num_workers, 1)
        one_of("size", self.size, ("tiny", "small", "medium", "full"))
        one_of("wording", self.wording, ("2.1.1", "2.1.2"))


@dataclass
class MakeModelConfig:
    """`verl-sft make-model`."""

    out: str | None = None
    data: str | None = None  # an sft_data directory or parquet files: the tokenizer's corpus
    size: str = "tiny"  # nano | tiny | small | base
    vocab_size: int = 2048
    max_position_embeddings: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("vocab_size", self.vocab_size, 300)
        at_least("max_position_embeddings", self.max_position_embeddings, 1)
