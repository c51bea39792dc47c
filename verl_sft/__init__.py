"""verl-style supervised fine-tuning of agents: collect episodes, train, export, measure."""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # as in typing, whose import takes longer than all of this
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`SFTTrainer`, imported when it is asked for: everything else here works without torch."""
    if name != "SFTTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("verl_sft.trainer.api").SFTTrainer
