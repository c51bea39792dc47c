"""`verl-sft plan data.train_files=DIR model.partial_pretrain=HF_DIR [world_size=N]`: a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from verl_sft.commands.common import default_ranks, read_words
from verl_sft.config.plan import PlanConfig


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    usage = (
        "verl-sft plan data.train_files=DIR model.partial_pretrain=HF_DIR [world_size=N] "
        "[json=FILE] [key=value ...]"
    )
    given = [w.removeprefix("world_size=") for w in words if w.startswith("world_size=")]
    size = int(given[-1]) if given and given[-1].isdecimal() else default_ranks(words)
    config = read_words(PlanConfig, words, usage=usage, world_size=size)
    if config is None:
        return 0
    from verl_sft.safe_io import make_output_dir, write_json
    from verl_sft.trainer.dry_run import dry_run, dry_run_lines

    result = dry_run(config, world_size=config.world_size)
    print("\n".join(dry_run_lines(result)))
    if config.json:
        out = Path(config.json).expanduser()
        make_output_dir(out.parent)
        write_json(out, asdict(result))
        print(f"\nwritten: {out}")
    return 0
