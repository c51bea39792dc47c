"""The GPU recipe runs as a whole without a GPU, with little more than torch and transformers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Not on the machine that the recipe is for: the trainer's other dependencies, and the peers.
ABSENT = (
    "tensordict", "hydra", "omegaconf", "datasets", "trl", "textworld", "alfworld",
    "pandas", "pyarrow", "rich", "tensorboard", "matplotlib", "flash_attn",
)  # fmt: skip
SCRIPT = """
import sys
for name in {absent!r}:
    sys.modules[name] = None
from benchmarks.gpu.__main__ import main
sys.exit(main({words!r}))
"""


def recipe(*words: str) -> subprocess.CompletedProcess[str]:
    """Run it in a process that cannot import what is absent there."""
    code = SCRIPT.format(absent=ABSENT, words=list(words))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """All figures of a dry run."""
    out = tmp_path_factory.mktemp("gpu") / "rows.jsonl"
    done = recipe("--dry", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_section_gives_figures(rows: list[dict[str, object]]) -> None:
    """Each figure is a number, or a kernel or peer that cannot be here, named."""
    assert {r["section"] for r in rows} == {
        "ceilings", "attention", "contenders", "ours", "levers"
    }  # fmt: skip
    failed = [str(r["what"]) for r in rows if math.isnan(float(str(r["figure"])))]
    cannot_be_here = ("varlen", "flash,", "flex", "TRL")
    assert [n for n in failed if not any(word in n for word in cannot_be_here)] == []
    assert len(failed) == len(cannot_be_here) and len(rows) - len(failed) >= 15
    for found in rows:
        assert found["dry"] is True
        assert {"machine", "torch", "transformers", "command", "date", "unit"} <= found.keys()


def test_losses_show_equal_work(rows: list[dict[str, object]]) -> None:
    """Levers change no loss: all of one size start and end alike."""
    ends = {
        str(r["note"]).rpartition("loss ")[2]
        for r in rows
        if r["section"] == "levers" and "of 1,024 tokens" in str(r["note"])
    }
    assert len(ends) >= 1
    starts, stops = zip(*(map(float, e.split(" to ")) for e in ends), strict=True)
    assert max(starts) - min(starts) < 2e-3 and max(stops) - min(stops) < 5e-3
    assert max(stops) < min(starts)


def test_the_table_names_command_date_and_machine(
    rows: list[dict[str, object]], tmp_path: Path
) -> None:
    """The writer for the performance page; toy figures are called so."""
    from benchmarks.gpu.table import table

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = table(path)
    assert text.startswith("DRY RUN") and f"`{rows[0]['command']}`" in text
    assert str(rows[0]["date"]) in text and "| ours | 1.5B, LoRA 16 |" in text


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    """Negative control: without --dry nothing is measured on a CPU."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = recipe("--out", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 2 and "no GPU is visible" in done.stderr
    assert not (tmp_path / "rows.jsonl").exists()


def test_flop_counts() -> None:
    """By hand for a toy: 6 per parameter and token, attention over half of each square."""
    from benchmarks.gpu.measure import flops_6n, flops_executed, parameters

    body, head = parameters("toy")
    assert body == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176) and head == 64 * 512
    assert flops_6n("toy", tokens=10) == 60 * (body + head)
    done = flops_executed("toy", lengths=[4, 6], head_rows=3)
    assert done == 60 * body + 3 * 2 * (16 + 36) * 64 * 2 + 18 * head
    less = flops_executed("toy", lengths=[4, 6], head_rows=3, lora=True)
    assert less == 40 * body + 3 * 2 * (16 + 36) * 64 * 2 + 12 * head
