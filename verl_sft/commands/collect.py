"""`verl-sft collect env=alfworld policy=expert`: episodes in, train and val rows out."""

from __future__ import annotations

from collections.abc import Sequence

from verl_sft.commands.common import progress, read_words, say
from verl_sft.config.collect import CollectConfig


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    usage = "verl-sft collect env=NAME policy=NAME output.dir=DIR [key=value ...]"
    config = read_words(CollectConfig, words, usage=usage)
    if config is None:
        return 0
    from verl_sft.collect.collector import collect

    with progress("episodes") as bar:
        report = collect(config, progress=bar.update)
    for note in report.notes:
        say(note)
    errors = f", {report.errors} failed (see stats.json)" if report.errors else ""
    print(
        f"{report.episodes} episodes, {report.successes} won, {report.kept} kept{errors}: "
        f"{report.rows_train} train rows, {report.rows_val} val rows"
    )
    print(report.directory)
    return 0
