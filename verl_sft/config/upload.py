"""What `upload` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl_sft.config.checks import at_least, fraction, one_of
from verl_sft.config.secrets import hide_all, hide_database
from verl_sft.config.sources import AgentRLConfig, RawConfig


@dataclass
class UploadConfig:
    """`verl-sft upload in=... to=mongodb uri=...`: records as DBRecordData documents.

    On the command line `in` and `from` stand for `inputs` and `source`.
    """

    inputs: Any = None  # files, a directory, a glob, or a list of these
    source: str = "auto"  # format of the input, or file.py:function
    to: str = "mongodb"
    uri: str | None = None  # mongodb://USER:PASSWORD@HOST:27017/DATABASE
    database: str | None = None  # null: the one that the uri names
    collection: str = "DBRecordData"
    split: str = "train"  # of documents that do not name theirs: train | valid | test | eval
    batch_size: int = 256  # documents per request
    timeout_s: float = 20.0  # without an answer of the server
    rejected: str = "rejected.jsonl"  # where rows that cannot be stored are named
    max_reject_fraction: float = 0.05  # above it the command fails; the others are stored
    agentrl: AgentRLConfig = field(default_factory=AgentRLConfig)
    raw: RawConfig = field(default_factory=RawConfig)

    def __post_init__(self) -> None:
        self.inputs = hide_all(self.inputs)
        self.uri = hide_database("uri", self.uri) if self.uri else None
        one_of("to", self.to, ("mongodb",))
        one_of("split", self.split, ("train", "valid", "test", "eval"))
        at_least("batch_size", self.batch_size, 1)
        at_least("timeout_s", self.timeout_s, 0.001)
        fraction("max_reject_fraction", self.max_reject_fraction)
