"""`verl-sft doctor [RUN_DIR] [dir=DIR]`: what is here, what is missing, what became of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from verl_sft.commands.common import read_words
from verl_sft.commands.doctor_checks import PROBLEM, WARNING, Finding, machine
from verl_sft.config.doctor import DoctorConfig


def main(words: Sequence[str]) -> int:
    """Run the command; returns 0, or 2 where something would stop a run."""
    usage = "verl-sft doctor [RUN_DIR] [dir=DIR] [json=FILE] [handshake=false]"
    config = read_words(DoctorConfig, [_named(word) for word in words], usage=usage)
    if config is None:
        return 0
    findings = []
    for finding in _all(config):
        findings.append(finding)
        print(f"[{finding.state}]".ljust(10) + f"{finding.name}: {finding.told}", flush=True)
        if finding.fix:
            print(" " * 10 + finding.fix, flush=True)
    counts = {state: sum(f.state == state for f in findings) for state in (PROBLEM, WARNING)}
    print(f"\n{len(findings)} checks, {counts[PROBLEM]} problems, {counts[WARNING]} warnings")
    if config.json:
        from verl_sft.safe_io import make_output_dir, write_json

        out = Path(config.json).expanduser()
        make_output_dir(out.parent)
        write_json(out, {"findings": [asdict(f) for f in findings], **counts})
    return 2 if counts[PROBLEM] else 0


def _all(config: DoctorConfig) -> Iterator[Finding]:
    if config.run:
        from verl_sft.commands.doctor_run import explain

        yield from explain(Path(config.run).expanduser())
        return
    yield from machine(Path(config.dir).expanduser(), handshake=config.handshake)


def _named(word: str) -> str:
    plain = "=" not in word and not word.startswith("-")
    return f"run={word}" if plain else word
