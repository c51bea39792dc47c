"""Models and tokenizers by their name on the Hugging Face hub, or from its cache without a network.

The hub's client waits and tries again for each of many files: a mistyped name without a network
would fail after a minute. One question decides whether it is worth while.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from verl_sft.errors import Preempted

_WAIT_S = 5.0
_ATTEMPTS = 2


@contextmanager
def hub_access(name: str) -> Iterator[None]:
    """Read from the cache alone while the block runs, if `name` needs a hub that does not answer.

    Args:
        name: a folder, or a name on the hub.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not Path(name).is_dir() and not _answers():
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def absence(name: str) -> str:
    """Why a name that could not be loaded is not there, with the nearest ones that are; or nothing.

    Args:
        name: a folder, or a name on the hub.
    """
    from huggingface_hub import constants

    if Path(name).is_dir() or _answers():
        return ""
    told = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "it does not answer"
    cached = [
        folder.name.removeprefix("models--").replace("--", "/")
        for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    ]
    near = difflib.get_close_matches(name, cached, n=3, cutoff=0.4)
    there = f", which has {' and '.join(near)}" if near else ""
    return (
        f"There is no such folder, the hub {constants.ENDPOINT} cannot be asked ({told}), and the "
        f"name is not in its cache {constants.HF_HUB_CACHE}{there}"
    )


@cache
def _answers() -> bool:
    """Whether the hub answers at all, with whatever status, through whatever proxy is set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    if constants.HF_HUB_OFFLINE:
        return False
    for _ in range(_ATTEMPTS):
        try:
            get_session().head(constants.ENDPOINT, timeout=_WAIT_S)
        except Preempted:
            raise
        except Exception:  # the client's library differs between versions
            continue
        return True
    return False
