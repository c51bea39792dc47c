"""NEFTune: uniform noise on the embeddings while training, drawn like dropout."""

from __future__ import annotations

import torch
from torch import Tensor


def add_noise(embeddings: Tensor, *, alpha: float, cu_seqlens: Tensor) -> Tensor:
    """Embeddings plus noise from +-alpha / sqrt(L * D), L being the length of each own document.

    Not that of the packed row: its noise would shrink with every document beside it. The numbers
    come from the generator that dropout uses, so they are the same after a resumption.

    Args:
        embeddings: [1, T, D].
        alpha: size of the noise.
        cu_seqlens: int32 [S+1], document boundaries.
    """
    lengths = cu_seqlens.diff().long()
    per_token = lengths.repeat_interleave(lengths, output_size=embeddings.shape[1])
    size = alpha / (per_token * embeddings.shape[2]).float().sqrt()
    noise = torch.rand(embeddings.shape, dtype=torch.float32, device=embeddings.device)
    return embeddings + ((2 * noise - 1) * size[None, :, None]).to(embeddings.dtype)
