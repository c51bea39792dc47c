"""`verl-sft export checkpoint=RUN/global_step_N [out=DIR]`: a checkpoint as a model folder."""

from __future__ import annotations

from collections.abc import Sequence

from verl_sft.commands.common import read_words, say
from verl_sft.config.export import ExportConfig
from verl_sft.errors import UsageError


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    usage = "verl-sft export checkpoint=RUN/global_step_N [out=DIR] [upload=URI] [key=value ...]"
    config = read_words(ExportConfig, words, usage=usage)
    if config is None:
        return 0
    if not config.checkpoint:
        raise UsageError("checkpoint= is needed", fix=f"usage: {usage}")
    from verl_sft.trainer.exporting import export_checkpoint

    print(export_checkpoint(config, say=say))
    return 0
