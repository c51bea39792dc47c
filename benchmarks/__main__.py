"""`python -m benchmarks [name ...]`: run the benchmarks and print one table.

Each benchmark runs in a process of its own, so that memory and imports do not mix.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

NAMES = (
    "start",
    "games",
    "collect",
    "masks",
    "data",
    "cache",
    "records",
    "plan",
    "memory",
    "save",
    "train",
    "parallel",
)


def main(words: list[str]) -> int:
    """Run the named benchmarks, or all."""
    rows: list[tuple[str, str, str]] = []
    failed = 0
    for name in words or NAMES:
        print(f"running {name} ...", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}"],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        if done.returncode:
            failed += 1
            rows.append((name, "failed", done.stderr.strip().splitlines()[-1]))
            continue
        rows += [tuple(json.loads(line)) for line in done.stdout.splitlines() if line[:1] == "["]
    width = max(len(r[0]) for r in rows)
    for what, figure, note in rows:
        print(f"{what:<{width}}  {figure:>14}  {note}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
