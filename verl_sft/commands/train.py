"""`verl-sft train nproc=N k=v ...`: torchrun on this machine, with the true exit code."""

from __future__ import annotations

from collections.abc import Sequence

from verl_sft.commands.common import default_ranks, read_words
from verl_sft.config.train import TrainConfig
from verl_sft.errors import UsageError
from verl_sft.trainer.launch import MOST_RANKS, default_nproc, launch, number_of_ranks


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    nproc, rest = _split_nproc(words)
    usage = (
        "verl-sft train [nproc=N] [--llamafactory FILE.yaml] data.train_files=DIR "
        "model.partial_pretrain=HF_DIR [key=value ...]"
    )
    size = nproc or default_ranks(rest)
    if read_words(TrainConfig, rest, usage=usage, world_size=size, told_later=True) is None:
        return 0
    return launch(rest, nproc=nproc or default_nproc())


def _split_nproc(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """`nproc` is the launcher's, all other words are the trainer's."""
    nproc: int | None = None
    rest = []
    for word in words:
        if word.startswith("nproc="):
            value = word.removeprefix("nproc=")
            nproc = number_of_ranks(value)
            if not nproc:
                raise UsageError(f"{word}: must be a number of processes, from 1 to {MOST_RANKS}")
        else:
            rest.append(word)
    return nproc, rest
