"""How fast the command line answers (goal: help in less than 0.5 s)."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.report import row, seconds


def main() -> None:
    """Time whole processes."""
    for words in (["--help"], ["collect", "--help"], ["train", "--dry-run"]):
        command = [sys.executable, "-m", "verl_sft.cli", *words]
        took = seconds(lambda c=command: subprocess.run(c, capture_output=True), repeat=5)
        row(f"verl-sft {' '.join(words)}", f"{took:.2f} s", "best of 5, whole process")


if __name__ == "__main__":
    main()
