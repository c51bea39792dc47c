"""What `export` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from verl_sft.config.checks import file_size
from verl_sft.config.secrets import hide


@dataclass
class ExportConfig:
    """`verl-sft export`: a checkpoint as a Hugging Face folder, without the training data."""

    checkpoint: str | None = None  # a global_step_N folder, or a run: its newest whole one
    out: str | None = None  # the folder to write; default: RUN/huggingface_stepN
    merge: bool = True  # LoRA: the merged model beside the adapter; false: the adapter alone
    max_shard_size: str = "5GB"  # of one safetensors file; more get an index
    model: str | None = None  # the base model, if it lies elsewhere now
    upload: str | None = None  # file://, s3://, ... through fsspec, or hf://user/repo

    def __post_init__(self) -> None:
        self.upload = hide(self.upload) if self.upload else None
        file_size("max_shard_size", self.max_shard_size)
