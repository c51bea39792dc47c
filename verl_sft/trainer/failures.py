"""Foreign exceptions as errors that a user can act on."""

from __future__ import annotations

import torch
import torch.distributed as dist

from verl_sft.errors import OutOfMemoryError, PeerLostError, VerlSftError


def as_user_error(error: Exception) -> VerlSftError | None:
    """What a user can act on: our own errors, lack of memory, a lost peer; else None."""
    if isinstance(error, VerlSftError):
        return error
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return OutOfMemoryError(
            f"out of memory: {text.splitlines()[0] if text else ''}",
            fix="Lower data.max_token_len_per_gpu, set model.enable_gradient_checkpointing=true, "
            "or use more ranks",
        )
    lost = ("closed by peer", "Connection reset", "Timed out waiting", "Broken pipe")
    if isinstance(error, dist.DistError) or any(part in text for part in lost):
        return PeerLostError(f"another rank is gone: {text.splitlines()[0]}")
    return None
