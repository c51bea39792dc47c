"""Reading and validating rows: rate on one core, peak memory from 10,000 to 1,000,000 rows.

Goals: 20,000 rows per second and core for plain messages rows, memory that does not grow.
`python -m benchmarks.records ROWS ...` runs other sizes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.cache import rows
from benchmarks.report import row
from verl_sft.records.convert import ConvertReport, write_file
from verl_sft.records.io import write_parquet
from verl_sft.records.read import find_format, read_records

SIZES = (10_000, 100_000, 1_000_000)


def main(words: list[str]) -> None:
    """Each size and kind of file in a process of its own."""
    for size in map(int, words or map(str, SIZES)):
        with tempfile.TemporaryDirectory() as folder:
            write_parquet(Path(folder) / "own.parquet", rows(size))
            with (Path(folder) / "messages.jsonl").open("w") as stream:
                for record in rows(size):
                    messages = [m.to_json() for m in record.messages]
                    stream.write(json.dumps({"messages": messages}) + "\n")
            for name in ("sharegpt.json", "agentrl.jsonl"):
                write_file(
                    Path(folder) / name,
                    rows(size),
                    target=find_format(name.partition(".")[0]),
                    report=ConvertReport(),
                    reject=print,
                )
            for path in sorted(Path(folder).iterdir()):
                command = [sys.executable, "-m", "benchmarks.records", "--read", str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rate, peak = map(float, done.stdout.split())
                note = f"peak {peak:.0f} MiB; file of {path.stat().st_size >> 20} MiB"
                row(f"reading {path.name}, {size:,} rows", f"{rate:,.0f} rows/s", note)


def read(path: Path) -> None:
    """Read one file to its end; print rows per second of processor time and the peak in MiB."""
    started = time.process_time()
    count = sum(1 for _ in read_records(path))
    took = time.process_time() - started
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    # Not ru_maxrss: it remembers the size of the process that started this one.
    print(count / took, int(status["VmHWM"].split()[0]) / 1024)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]))
    else:
        main(sys.argv[1:])
