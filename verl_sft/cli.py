"""The `verl-sft` command: picks a subcommand, turns errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from verl_sft.errors import StorageError, VerlSftError
from verl_sft.registry import unknown_name

# name -> (module with `main(words) -> exit code`, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "make-games": ("verl_sft.commands.make_games", "generate ALFWorld games"),
    "make-model": ("verl_sft.commands.make_model", "build a small model and its tokenizer"),
    "collect": ("verl_sft.commands.collect", "play an environment, write train and val rows"),
    "convert": ("verl_sft.commands.convert", "data of other tools into ours, and back"),
    "stats": ("verl_sft.commands.stats", "sizes, successes, repetitions and leaks of data"),
    "upload": ("verl_sft.commands.upload", "records into a MongoDB collection"),
    "inspect": ("verl_sft.commands.inspect", "show what a run would train on, token by token"),
    "plan": ("verl_sft.commands.plan", "steps, fill, balance and memory of a run, before it"),
    "train": ("verl_sft.commands.train", "fine-tune a model on rows"),
    "export": ("verl_sft.commands.export", "a checkpoint as a Hugging Face folder"),
    "evaluate": ("verl_sft.commands.evaluate", "measure success in an environment"),
    "doctor": ("verl_sft.commands.doctor", "what this machine has, what became of a run"),
    "quickstart": ("verl_sft.commands.quickstart", "all of it on this machine, in minutes"),
}

_HELP = """usage: verl-sft COMMAND [key=value ...]

Commands:
{commands}

`verl-sft COMMAND --help` lists the keys of a command with their defaults. Options:
  --config FILE.yaml   read keys from a file before the words
  --dry-run            print the resolved configuration and stop
  --debug              show the traceback of an error
  --version            print the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see `verl_sft.errors`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        listed = "\n".join(f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items())
        print(_HELP.format(commands=listed), end="")
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from verl_sft import __version__

        print(f"verl-sft {__version__}")
        return 0
    debug = "--debug" in words
    try:
        with _terminable():
            return _run(words, debug)
    except _TerminatedError:
        print("verl-sft: stopped by SIGTERM", file=sys.stderr)
        return 128 + signal.SIGTERM


def _run(words: list[str], debug: bool) -> int:
    try:
        if words[0] not in COMMANDS:
            raise unknown_name("command", words[0], COMMANDS)
        module = importlib.import_module(COMMANDS[words[0]][0])
        code: int = module.main([w for w in words[1:] if w != "--debug"])
        return code
    except KeyboardInterrupt:
        print("verl-sft: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except VerlSftError as error:
        return _report(error, debug)
    except OSError as error:
        if debug:
            raise
        where = str(error.filename or "")
        return _report(StorageError(error.strerror or str(error), where=where), debug)


class _TerminatedError(BaseException):
    """SIGTERM came: temporary files are removed on the way out, as after Ctrl-C."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception while the block runs; commands that can save do better."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(error: VerlSftError, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    print(f"verl-sft: error: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
