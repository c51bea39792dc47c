"""What `doctor` can be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DoctorConfig:
    """`verl-sft doctor`: what is here, what is missing, and what became of a run."""

    run: str | None = None  # the directory of a run to explain
    dir: str = "."  # where a run would write
    json: str | None = None  # file for the same findings as JSON
    handshake: bool = True  # start two local ranks and let them talk
