"""What single formats and sources of records can be told; names as in `ReadOptions`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl_sft.config.checks import at_least, one_of
from verl_sft.config.secrets import hide_database
from verl_sft.errors import UsageError


@dataclass
class AgentRLConfig:
    """Which messages of AgentRL's rows and trajectories are learned, by their advantage."""

    drop_zero_advantage: bool | None = None  # null: of trajectories yes, of finished rows no
    minimal_advantage: float | None = None  # messages below it are context only


@dataclass
class RawConfig:
    """How rows are built from raw episodes."""

    rows: str = "step"  # step | episode
    prompt: str = ""  # another template for the prompts; empty: the one they were made with
    history_length: int | None = None  # steps that a windowed prompt quotes; null: as collected
    require_success: bool = True  # leave out episodes that failed
    valid_actions: str = "any"  # any | context (invalid steps get weight 0) | all (drop episode)

    def __post_init__(self) -> None:
        one_of("raw.rows", self.rows, ("step", "episode"))
        one_of("raw.valid_actions", self.valid_actions, ("any", "context", "all"))
        if self.history_length is not None:
            at_least("raw.history_length", self.history_length, 0)


@dataclass
class MongoConfig:
    """A MongoDB collection to train from, instead of `data.train_files`."""

    uri: str | None = None  # mongodb://... or mongodb+srv://...; passwords are never shown
    database: str | None = None  # null: the one that the uri names
    collection: str = "DBRecordData"  # of the rows
    filter: Any = None  # of documents, an object or its JSON text; see docs/data.md
    val_filter: Any = None  # of those to validate on; null: data.val_files alone says
    limit: int = -1  # documents at most, the first by _id; -1: all
    batch_size: int = 256  # documents per request
    timeout_s: float = 20.0  # without an answer of the server

    def __post_init__(self) -> None:
        self.uri = hide_database("data.mongo.uri", self.uri) if self.uri else None
        at_least("data.mongo.batch_size", self.batch_size, 1)
        at_least("data.mongo.timeout_s", self.timeout_s, 0.001)
        if self.limit == 0 or self.limit < -1:
            raise UsageError(f"data.mongo.limit={self.limit}: leaves no row", fix="-1 takes all")
