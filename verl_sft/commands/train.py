"""`verl-sft train nproc=N k=v ...`: torchrun on this machine, with the true exit code."""

from __future__ import annotations

from collections.abc import Sequence

from verl_sft.commands.common import read_words
from verl_sft.config.train import TrainConfig
from verl_sft.errors import UsageError


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    nproc, rest = _split_nproc(words)
    usage = (
        "verl-sft train [nproc=N] [--llamafactory FILE.yaml] data.train_files=DIR "
        "model.partial_pretrain=HF_DIR [key=value ...]"
    )
    if read_words(TrainConfig, rest, usage=usage, world_size=nproc, told_later=True) is None:
        return 0
    from verl_sft.trainer.launch import default_nproc, launch

    return launch(rest, nproc=nproc or default_nproc())


def _split_nproc(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """`nproc` is the launcher's, all other words are the trainer's."""
    nproc: int | None = None
    rest = []
    for word in words:
        if word.startswith("nproc="):
            value = word.removeprefix("nproc=")
            if not value.isdecimal() or int(value) < 1:
                raise UsageError(f"{word}: must be a number of processes, at least 1")
            nproc = int(value)
        else:
            rest.append(word)
    return nproc, rest
