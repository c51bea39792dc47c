"""Precision of fp32 matrix products: torch's setting, or the faster one where it is as exact."""

from __future__ import annotations

import statistics
import time

import torch

LEVELS = ("highest", "high", "medium")
_SHAPE = (256, 1024, 1024)  # of the product that is probed
_WORTH = 1.05  # below this gain nothing is changed
_ROUNDS = 5


def matmul_error(level: str, *, device: torch.device) -> float:
    """The largest error of a product against float64, in units of what rounding to fp32 explains.

    That is sqrt(K) * 2**-24 * (|A| @ |B|) for K summands; tf32 is at 30 and bf16 at 400.
    """
    rows, inner, columns = _SHAPE
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(rows, inner, generator=generator).to(device)
    other = torch.randn(inner, columns, generator=generator).to(device)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(level)
        found = (one @ other).double()
    finally:
        torch.set_float32_matmul_precision(before)
    allowed = one.double().abs() @ other.double().abs() * inner**0.5 * 2.0**-24
    return float(((found - one.double() @ other.double()).abs() / allowed).max())


def time_ratio(level: str, *, device: torch.device) -> float:
    """How many times as fast a product is as at `highest`: the median of interleaved runs."""
    rows, inner, columns = _SHAPE
    one, other = torch.ones(rows, inner, device=device), torch.ones(inner, columns, device=device)
    before = torch.get_float32_matmul_precision()
    seconds: dict[str, list[float]] = {"highest": [], level: []}
    try:
        for _ in range(_ROUNDS):
            for name, found in seconds.items():
                torch.set_float32_matmul_precision(name)
                started = time.perf_counter()
                float((one @ other)[0, 0])  # waits for the device
                found.append(time.perf_counter() - started)
    finally:
        torch.set_float32_matmul_precision(before)
    return statistics.median(seconds["highest"]) / statistics.median(seconds[level])


def choose_level(*, device: torch.device) -> tuple[str, str]:
    """The fastest level that keeps the bound of fp32, and a line that says why.

    The choice depends on the clock: record it, or a resumed run may compute other bits.
    """
    best, said, most = "highest", [], _WORTH
    for level in LEVELS[1:]:
        error = matmul_error(level, device=device)
        if error > 1:
            said.append(f"{level}: {error:.0f} times the error that fp32 may have")
            continue
        ratio = time_ratio(level, device=device)
        said.append(f"{level}: {ratio:.2f}x as fast")
        if ratio > most:
            best, most = level, ratio
    return best, f"engine.fp32_matmul=auto takes {best} ({'; '.join(said)})"
