"""Foreign exceptions as errors that a user can act on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from verl_sft.data.plan import Lengths, MicroBatch
from verl_sft.errors import OutOfMemoryError, PeerLostError, VerlSftError
from verl_sft.safe_io import as_storage_error

_WAYS_OUT = (
    "Lower data.max_token_len_per_gpu, set model.enable_gradient_checkpointing=true, or use more "
    "ranks; then run the same command again to go on from the last checkpoint"
)


def as_user_error(error: Exception) -> VerlSftError | None:
    """What a user can act on: our own errors, no memory, no space, a lost peer; else None."""
    if isinstance(error, VerlSftError):
        return error
    if _is_memory(error):
        return OutOfMemoryError(f"out of memory: {_first_line(error)}", fix=_WAYS_OUT)
    lost = ("closed by peer", "Connection reset", "Timed out waiting", "Broken pipe")
    told = not isinstance(error, OSError) and any(part in str(error) for part in lost)
    if isinstance(error, dist.DistError) or told:  # an OSError is of a pipe or a server
        return PeerLostError(f"another rank is gone: {_first_line(error)}")
    name = error.filename if isinstance(error, OSError) else None
    return as_storage_error(error, Path(str(name or "the disk")))


@contextlib.contextmanager
def explain_memory(
    step: int, *, micro: MicroBatch, lengths: Lengths, name: Callable[[int], str]
) -> Iterator[None]:
    """Say what was computed when the memory did not suffice.

    Args:
        step: number of the step.
        micro: the samples in the block.
        lengths: tokens of each sample.
        name: of a sample by its index.

    Raises:
        OutOfMemoryError: with step, tokens and the longest sample.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, VerlSftError) or not _is_memory(error):
            raise
        samples = [index for row in micro for index in row]
        longest = max(samples, key=lambda index: int(lengths[index]))
        raise OutOfMemoryError(
            f"out of memory at step {step}, in a micro-batch of "
            f"{sum(int(lengths[i]) for i in samples)} tokens",
            why=f"Its longest sample is {name(longest)} with {int(lengths[longest])} tokens. "
            f"torch says: {_first_line(error)}",
            fix=_WAYS_OUT,
        ) from error


def _is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in str(error)
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
