"""Shared fixtures: real games where they are, a small world where they are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def real_games() -> Path:
    """The folder that holds the public games; a test that needs them skips where they are not."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "alfworld"
    folder = Path(os.environ.get("ALFWORLD_DATA", beside))
    if not (folder / "json_2.1.1").is_dir():
        pytest.skip("the public ALFWorld games are not here; set ALFWORLD_DATA to their folder")
    return folder
