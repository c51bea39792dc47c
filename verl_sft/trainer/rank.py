"""One rank under our own launcher: it is bound to the launcher before torch takes its time to load.

`python -m verl_sft.trainer.rank key=value ...`, with the launcher's process id in `LAUNCHER_ENV`.
"""

from __future__ import annotations

import os
import warnings

from verl_sft.processes import die_with_parent

LAUNCHER_ENV = "VERL_SFT_LAUNCHER"


def start() -> None:
    """Train, and end the process."""
    die_with_parent(int(os.environ[LAUNCHER_ENV]))
    ignore_warnings()
    from verl_sft.trainer.ending import leave
    from verl_sft.trainer.fsdp_sft_trainer import main

    leave(main())


def ignore_warnings() -> None:
    """Keep what libraries say about themselves out of a run's output."""
    warnings.filterwarnings("ignore", module=r"torch\.distributed.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\..*")


if __name__ == "__main__":
    start()
