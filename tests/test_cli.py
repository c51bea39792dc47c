"""The command line: exit codes, messages on standard error, and no surprises."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from verl_sft.cli import COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` lists all commands and succeeds."""
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command lists its keys with their defaults."""
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: verl-sft {command}") and "=" in text


def test_every_key_of_train_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Each has a comment, but for two whose names and defaults leave no room and no question."""
    assert main(["train", "--help"]) == 0
    keys = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    bare = [line.split("=")[0].strip() for line in keys if "#" not in line]
    assert bare == ["trainer.default_local_dir", "trainer.logger"] and len(keys) > 100


def test_dry_run_prints_what_would_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    """The resolved configuration as YAML; nothing is run."""
    assert main(["collect", "rollout.seed=7", "--dry-run"]) == 0
    assert "seed: 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["colect"], 2, "Did you mean 'collect'"),
        (["collect", "rollout.sed=7"], 2, "Did you mean rollout.seed"),
        (["collect", "env=alfwrld"], 2, "Did you mean 'alfworld'"),
        (["collect", "env.data_dir=/nowhere/at/all"], 3, "/nowhere/at/all"),
        (["evaluate", "env.data_dir=/nowhere"], 2, "model"),
        (["make-games"], 2, "out"),
        (["make-model"], 2, "out"),
    ],
)
def test_errors_have_their_exit_code(
    words: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line on standard error that says what to do, the documented code, and nothing left."""
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_sigterm_leaves_by_the_front_door(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that SIGTERM stops still cleans up; the exit code is the shell's 128 + 15."""
    cleaned: list[bool] = []

    def command(words: list[str]) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
            return 0
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("verl_sft.commands.make_games.main", command)
    assert main(["make-games"]) == 143 and cleaned == [True]
    assert "SIGTERM" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", ["0", "-1", "two", "\u00b2", "1025", "9" * 20, "9" * 5000])
def test_a_mistyped_number_of_ranks(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused at once: torchrun would begin to start so many."""
    assert main(["train", f"nproc={number}", "data.train_files=x"]) == 2
    assert "from 1 to 1024" in capsys.readouterr().err


def test_no_words_is_a_usage_error() -> None:
    """Without a command the help is shown and the exit code says so."""
    assert main([]) == 2


def test_the_module_runs() -> None:
    """`python -m verl_sft.cli` works as the installed command does."""
    done = subprocess.run(
        [sys.executable, "-m", "verl_sft.cli", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("verl-sft ")
