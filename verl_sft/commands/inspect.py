"""`verl-sft inspect data.train_files=DIR model.partial_pretrain=HF_DIR`: what is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from verl_sft.commands.common import read_words
from verl_sft.config.inspect import InspectConfig


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    usage = (
        "verl-sft inspect data.train_files=DIR model.partial_pretrain=HF_DIR [out=DIR] "
        "[dump=FILE.jsonl] [key=value ...]"
    )
    config = read_words(InspectConfig, words, usage=usage)
    if config is None:
        return 0
    from verl_sft.audit.inspect import inspect
    from verl_sft.data.load import check_store

    store, lines = inspect(config)
    print("\n".join(lines))
    print(f"\nwritten: {Path(config.out) / 'audit.json'}, {Path(config.out) / 'audit.html'}")
    check_store(store, config=config.data)  # what would stop a training run stops here too
    return 0
