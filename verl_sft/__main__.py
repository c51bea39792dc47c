"""Start of the `verl-sft` command: Ctrl-C is one line from here on, also while modules load."""

from __future__ import annotations

import os
import sys


def start() -> None:
    """Run the command on the words of the process, and leave with its exit code."""
    try:
        from verl_sft.cli import main

        code = main()
    except KeyboardInterrupt:
        print("verl-sft: stopped by Ctrl-C", file=sys.stderr)
        code = 130
    if code == 130:  # Python would end itself by SIGINT if it came inside an `exec`
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    start()
