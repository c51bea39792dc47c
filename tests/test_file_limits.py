"""Files that would fill the memory or may not be read: refused by name, in the memory of others."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_sft.records.files import open_rows
from verl_sft.records.io import csv_writer
from verl_sft.records.schema import SFTRecord
from verl_sft.types import Message

# Prints how many rows were read and refused.
READ = """
import resource, sys
import pyarrow.parquet
from verl_sft.records.read import read_records
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = (int(status["VmSize"].split()[0]) << 10) + (int(sys.argv[2]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
bad = []
print(sum(1 for _ in read_records(sys.argv[1], reject=bad.append)), len(bad))
"""
CHAT = '[{"role": "assistant", "content": "a"}]'
ROOM = 600
MANY = 100 << 20  # more characters than any row may have


def read(path: Path) -> subprocess.CompletedProcess[str]:
    """Read a file in a process of its own that may use `ROOM` MiB more than it starts with."""
    command = [sys.executable, "-c", READ, str(path), str(ROOM)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def bomb(folder: Path, kind: str) -> Path:
    """A file that would fill the memory if a row or a batch of it were held."""
    path = folder / f"bomb.{kind.partition(' ')[2] or kind}"
    if kind.endswith("parquet"):
        chat = json.dumps([{"role": "assistant", "content": "x" * (65 << 20)}])
        text = pa.DictionaryArray.from_arrays(pa.array([0] * 10, pa.int32()), pa.array([chat]))
        table = pa.table({"messages": text})
        pq.write_table(table, path, compression="zstd", store_schema=kind == "parquet")
    elif kind.endswith("csv"):
        with csv_writer(path) as write:
            write(SFTRecord(messages=(Message("assistant", "a"),)))
        with path.open("a") as stream:
            stream.write('"' if kind == "cell csv" else "")
            for _ in range(100):
                stream.write("x" * (MANY // 100) + "\n" * (kind == "cell csv"))
    else:
        row = b'{"messages": "' + b"x" * MANY + b'"}'
        with gzip.open(path, "wb", compresslevel=1) as packed:
            packed.write(b"[" * (kind == "json.gz") + row + b"\n")
            packed.write(b'{"messages": ' + CHAT.encode() + b"}\n")
    return path


@pytest.mark.parametrize(("kind", "found"), [("jsonl.gz", (1, 1)), ("parquet", (0, 10))])
def test_bombs_are_refused_row_by_row(tmp_path: Path, kind: str, found: tuple[int, int]) -> None:
    """A line that is too long is not held and the row behind it is read; texts come one by one."""
    done = read(bomb(tmp_path, kind))
    assert done.returncode == 0, done.stderr[-500:]
    good, refused = map(int, done.stdout.split())
    assert (good, refused) == found


@pytest.mark.parametrize("kind", ["json.gz", "line csv", "cell csv", "dense parquet"])
def test_bombs_end_a_file_that_cannot_go_on(tmp_path: Path, kind: str) -> None:
    """Inside an array, a quoted cell or a batch there is no next row to go on with."""
    path = bomb(tmp_path, kind)
    done = read(path)
    last = done.stderr.splitlines()[-1]
    assert "InputError" in last and str(path) in done.stderr, done.stderr[-500:]


def test_a_file_of_a_batch_is_no_bomb(tmp_path: Path) -> None:
    """The same room is enough for rows of 4 MB in every format (negative control)."""
    rows = [SFTRecord(messages=(Message("assistant", "x" * 4_000_000),))] * 12
    with csv_writer(tmp_path / "rows.csv") as write:
        for record in rows:
            write(record)
    done = read(tmp_path / "rows.csv")
    assert done.stdout.startswith("12 0"), done.stderr[-500:]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.json", "a.jsonl.gz"])
def test_a_file_that_may_not_be_read(tmp_path: Path, name: str) -> None:
    """The error names the file and says that permission is denied."""
    script = """
import os, sys
from pathlib import Path
from verl_sft.errors import InputError
from verl_sft.records.read import read_records
import pyarrow.parquet
os.setgid(65534); os.setuid(65534)
try:
    list(read_records("a" + sys.argv[1]))
except InputError as error:
    print(error)
"""
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / name).chmod(0)
    command = [sys.executable, "-c", script, name[1:]]
    where = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        command, cwd=tmp_path, env=where, capture_output=True, text=True, check=True
    )
    assert name in done.stdout and "Permission denied" in done.stdout, done.stdout


def test_parquet_is_not_held(tmp_path: Path) -> None:
    """What Arrow holds does not grow with the row groups that were read, nor with their size.

    Negative control: read ahead, it is the file and more.
    """
    path = tmp_path / "rows.parquet"
    text = pa.array([os.urandom(1_000).hex() for _ in range(1_000)])
    with pq.ParquetWriter(path, pa.schema([("messages", pa.string())])) as writer:
        for _ in range(10):
            writer.write_table(pa.table({"messages": text}))
    size, base = path.stat().st_size, pa.total_allocated_bytes()
    assert max(pa.total_allocated_bytes() for _ in open_rows(path).rows) - base < size / 4
    ahead = pq.ParquetFile(path, pre_buffer=True).iter_batches(batch_size=256)
    assert max(pa.total_allocated_bytes() for _ in ahead) - base > size / 2
