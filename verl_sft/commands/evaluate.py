"""`verl-sft evaluate model=HF_DIR env=alfworld`: success rate by task type."""

from __future__ import annotations

from collections.abc import Sequence

from verl_sft.commands.common import progress, read_words, say
from verl_sft.config.collect import EvaluateConfig


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    usage = "verl-sft evaluate model=HF_DIR env=NAME env.split=SPLIT [key=value ...]"
    config = read_words(EvaluateConfig, words, usage=usage)
    if config is None:
        return 0
    from verl_sft.evaluate.evaluator import evaluate, report_path
    from verl_sft.evaluate.metrics import table

    with progress("episodes") as bar:
        report = evaluate(config, progress=bar.update)
    for note in report["notes"]:
        say(note)
    print(table(report))
    if report["errors"]:
        say(f"{len(report['errors'])} episodes failed and are named in the report (`errors`)")
    print(f"policy.constrain={report['constrain']}, report: {report_path(config)}")
    return 0
