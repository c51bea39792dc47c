"""Signals outside of the training steps: none is lost, and none is taken for another's error."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from verl_sft.errors import PeerLostError, Preempted
from verl_sft.export import upload
from verl_sft.trainer.ending import failed
from verl_sft.trainer.stopping import stop_at_signals, stop_on_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of a rank; this process gets its own back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop_at_signals()
    yield
    stop_at_signals()
    for number, handler in before.items():
        signal.signal(number, handler)


def send_to_all_that_catches() -> None:
    """A signal inside of a library that goes on whatever is raised."""
    with contextlib.suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_eaten_signal_stops_behind_the_first_step() -> None:
    """What a library's `except Exception` ate while the run started still asks it to stop."""
    send_to_all_that_catches()
    asked: list[int] = []
    stop_on_signals(asked.append)
    assert asked == [signal.SIGTERM]


def test_without_a_signal_nobody_is_asked() -> None:
    """Negative control; a signal of an earlier run in this process does not count either."""
    asked: list[int] = []
    stop_on_signals(asked.append)
    assert asked == []
    stop_at_signals()
    send_to_all_that_catches()
    stop_at_signals()
    stop_on_signals(asked.append)
    assert asked == []


def test_peers_that_stopped_earlier_are_no_failure(tmp_path: Path) -> None:
    """A rank that was told to stop, and then finds the others gone, was stopped: code 75, not 8."""
    assert failed(PeerLostError("gone"), directory=tmp_path).code == 8
    (tmp_path / "status.json").unlink()
    send_to_all_that_catches()
    assert failed(PeerLostError("gone"), directory=tmp_path).code == 75
    assert "preempted" in (tmp_path / "status.json").read_text()


def test_a_signal_is_no_failed_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM while an upload hangs ends the run; it is not tried again."""
    attempts: list[Path] = []

    def hang(folder: Path, uri: str, files: list[Path]) -> None:
        attempts.append(folder)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(upload, "_to_filesystem", hang)
    with pytest.raises(Preempted):
        upload.try_upload(tmp_path, f"file://{tmp_path}/there", say=print, wait_s=0)
    assert len(attempts) == 1
