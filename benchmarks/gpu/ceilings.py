"""What the device can do at most: bf16 products and memory traffic."""

from __future__ import annotations

import torch

from benchmarks.gpu.measure import Place, seconds


def run(place: Place) -> float:
    """Write the ceilings; returns bf16 FLOP/s of the best product, for MFU."""
    best = 0.0
    for size in (256,) if place.dry else (4096, 8192, 16384):
        one, other = (
            torch.randn(size, size, device=place.device, dtype=torch.bfloat16) for _ in range(2)
        )
        rate = 2 * size**3 / seconds(lambda a=one, b=other: a @ b, device=place.device)
        place.write("ceilings", f"bf16 product, {size} square", rate / 1e12, "TFLOP/s")
        best = max(best, rate)
    size = 1 << (16 if place.dry else 31)
    source = torch.empty(size, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    took = seconds(lambda: target.copy_(source), device=place.device)
    place.write("ceilings", "copy on the device, read and written", 2 * size / took / 1e9, "GB/s")
    return best
