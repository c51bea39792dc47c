"""`verl-sft doctor`: findings about the machine and about a run, with exit code 0 or 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from verl_sft.cli import main
from verl_sft.commands import doctor_checks
from verl_sft.commands.doctor_checks import OK, PROBLEM, WARNING, Finding, disk, guarded, packages
from verl_sft.commands.doctor_run import explain
from verl_sft.errors import UsageError
from verl_sft.safe_io import run_lock

ROOT = Path(__file__).resolve().parent.parent


def test_the_machine_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part has a line and a row in the JSON file; nothing is left in the directory."""
    place, out = tmp_path / "place", tmp_path / "found.json"
    place.mkdir()
    assert main(["doctor", f"dir={place}", f"json={out}", "handshake=false"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    names = {row["name"] for row in found["findings"]}
    wanted = {"versions", "cores", "bf16", "attention", "disk", "memory", "ALFWorld"}
    assert wanted <= names
    assert all(f"{row['name']}: {row['told']}" in shown for row in found["findings"])
    assert not list(place.iterdir()) and found["problem"] == 0


def test_two_ranks_meet() -> None:
    """The handshake starts two processes, and says so when they cannot talk."""
    (good,) = doctor_checks.ranks()
    assert good.state == OK and "two gloo ranks met" in good.told


def test_without_torch() -> None:
    """What needs torch is a problem with its pip line, the other checks go on."""
    code = (
        "import sys, importlib.metadata as m\n"
        "sys.modules['torch'] = None\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'torch': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from verl_sft.cli import main\n"
        "sys.exit(main(['doctor', 'handshake=true']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert done.returncode == 2, done.stderr
    assert (
        "[problem] packages: missing: torch" in done.stdout and "pip install torch" in done.stdout
    )
    assert " disk: " in done.stdout and " memory: " in done.stdout
    assert "Traceback" not in done.stderr


def test_a_broken_check_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Errors of one check do not end the others; a place that cannot be written is a problem."""

    def broken() -> Iterator[Finding]:
        yield Finding(OK, "first", "")
        raise OSError("no such device")

    assert [f.state for f in guarded("x", broken)] == [OK, PROBLEM]
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert [f.state for f in guarded("disk", lambda: disk(blocked))] == [PROBLEM]
    monkeypatch.setattr(doctor_checks, "version_of", lambda name: None)
    assert [f.name for f in packages() if f.state == PROBLEM] == ["packages"]


def run_of(folder: Path, **status: object) -> Path:
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps(status))
    return folder


def states(run: Path) -> dict[str, str]:
    return {finding.name: finding.state for finding in explain(run)}


def test_a_run_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Finished, failed, killed and running ones; exit 2 where something is wrong."""
    done = run_of(tmp_path / "done", state="done", exit_code=0, step=7, upload="done: file:///x")
    (done / "metrics.jsonl").write_text('{"step": 7, "train/loss": 0.5}\n')
    assert main(["doctor", str(done)]) == 0
    shown = capsys.readouterr().out
    assert "finished at step 7; upload done: file:///x" in shown and "7 done, loss 0.5" in shown
    failed = run_of(tmp_path / "failed", state="failed", exit_code=7, message="step 3 did not fit")
    assert main(["doctor", str(failed)]) == 2
    shown = capsys.readouterr().out
    assert "it did not fit in memory" in shown and "step 3 did not fit" in shown
    stopped = run_of(tmp_path / "stopped", state="preempted", exit_code=75, message="stopped")
    assert states(stopped)["status"] == WARNING
    killed = run_of(tmp_path / "killed", state="running", exit_code=None)
    assert states(killed)["status"] == PROBLEM
    assert not (killed / ".run.lock").exists()  # looking leaves no trace
    with run_lock(killed):
        assert states(killed)["status"] == OK
    with pytest.raises(UsageError, match="no run was started there"):
        list(explain(tmp_path / "nothing"))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    """Checkpoints are verified to the byte, newest first."""
    run = run_of(tmp_path / "run", state="failed", exit_code=1)
    broken = run / "global_step_4"
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    assert states(run)["checkpoint 4"] == PROBLEM
