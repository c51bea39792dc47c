"""`verl-sft make-model out=DIR data=SFT_DATA_DIR`: a small model to try everything with."""

from __future__ import annotations

from collections.abc import Sequence

from verl_sft.commands.common import read_words
from verl_sft.config.collect import MakeModelConfig


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    usage = "verl-sft make-model out=DIR data=SFT_DATA_DIR [key=value ...]"
    config = read_words(MakeModelConfig, words, usage=usage)
    if config is None:
        return 0
    from verl_sft.model.tiny import make_model

    print(make_model(config))
    return 0
