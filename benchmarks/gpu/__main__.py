"""`python -m benchmarks.gpu [section ...] --out FILE`: measure one GPU, a JSON line per figure.

Ceilings first, then attention, contenders, and ours with levers toggled. Each figure of the last
two is taken in a process of its own, so that memory is its own and a failure is only its own row.
Needs torch, transformers and numpy (peft for LoRA); no network. `--dry` runs every section with toy
shapes on the CPU in seconds; `--table FILE` prints the figures as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import attention, ceilings, ours, peers
from benchmarks.gpu.measure import Place
from benchmarks.gpu.table import table

SECTIONS = ("ceilings", "attention", "contenders", "ours", "levers")


def settings(*, dry: bool) -> dict[str, dict[str, ours.Setting]]:
    """What is measured in `ours` (full and LoRA by shape) and in `levers`, by name."""
    toy: dict[str, Any] = {"shape": "toy", "tokens": 512, "longest": 256} if dry else {}
    whole = {
        f"{shape}, {'LoRA 16' if lora else 'full'}": ours.Setting(
            **{"shape": shape, **toy}, lora=16 if lora else 0
        )
        for shape, lora in (
            ("0.5B", False),
            ("1.5B", False),
            ("1.5B", True),
            ("7B", True),
        )
    }
    levers: dict[str, dict[str, Any]] = {
        "defaults": {},
        "head on all rows": {"all_rows": True, "tokens": 512 if dry else 8192, "micros": 8},
        "logits in chunks of 4096": {"chunk": 4096},
        "attention split by document": {"attention": "split"},
        "attention sdpa with a mask": {"attention": "sdpa"},
        "padded": {"packed": False},
        "layers compiled": {"compile": True},
        "activations recomputed": {"recompute": True},
        "AdamW not fused": {"fused": False},
        "micro-batches of 16k": {"tokens": 512 if dry else 16384, "micros": 4},
    }
    if dry:
        del levers["layers compiled"]  # takes minutes on a CPU
    shape = {"shape": "1.5B", **toy}
    return {
        "ours": whole,
        "levers": {f"1.5B, {n}": ours.Setting(**{**shape, **c}) for n, c in levers.items()},
    }


def main(words: list[str] | None = None) -> int:
    """Run the sections; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="JSON lines")
    parser.add_argument("--dry", action="store_true", help="toy shapes on the CPU")
    parser.add_argument("--shapes", default="0.5B,1.5B,7B", help="of contenders and ours")
    parser.add_argument("--table", type=Path, help="print this file's figures and end")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--ceiling", type=float, default=0.0, help="bf16 FLOP/s; default: measured")
    given = parser.parse_args(words)
    if given.table:
        print(table(given.table))
        return 0
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if not given.dry and not torch.cuda.is_available():
        parser.error("no GPU is visible; --dry runs toy shapes on the CPU")
    command = "python -m benchmarks.gpu " + " ".join(sys.argv[1:] if words is None else words)
    device = torch.device("cpu" if given.dry else "cuda")
    place = Place(device, given.out, command.split(" --one")[0].strip(), dry=given.dry)
    torch.set_float32_matmul_precision("high")  # for all alike
    if given.one:
        one(place, json.loads(given.one), ceiling=given.ceiling)
        return 0
    wanted = given.sections or SECTIONS
    ceiling = given.ceiling
    if "ceilings" in wanted or not ceiling:
        ceiling = ceilings.run(place)
    if "attention" in wanted:
        attention.run(place)
    shapes = given.shapes.split(",")
    for figure in figures(place, wanted, shapes):
        if place.dry:
            one(place, figure, ceiling=ceiling)
        else:
            _apart(place, figure, ceiling=ceiling)
    return 0


def figures(place: Place, wanted: Any, shapes: list[str]) -> list[dict[str, Any]]:
    """All figures that need a process of their own, as JSON can carry them."""
    found: list[dict[str, Any]] = []
    if "contenders" in wanted:
        for shape in ["toy"] if place.dry else [s for s in shapes if s != "7B"]:
            for name, told in peers.contenders(place, shape).items():
                found.append({"section": "contenders", "what": name, "told": told})
    for section, by_name in settings(dry=place.dry).items():
        if section in wanted:
            found += [
                {"section": section, "what": name, "setting": asdict(setting)}
                for name, setting in by_name.items()
                if name.split(",")[0] in shapes
            ]
    return found


def one(place: Place, figure: dict[str, Any], *, ceiling: float) -> None:
    """Take one figure here; what goes wrong becomes its row."""
    section, what = figure["section"], figure["what"]
    try:
        if section == "contenders":
            peers.measure(place, what, figure["told"], ceiling=ceiling)
        else:
            setting = ours.Setting(**figure["setting"])
            ours.measure(place, setting, section=section, what=what, ceiling=ceiling)
    except Exception as error:
        place.failed(section, what, error)


def _apart(place: Place, figure: dict[str, Any], *, ceiling: float) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(place.out)]
    command += ["--ceiling", str(ceiling), "--one", json.dumps(figure)]
    try:
        done = subprocess.run(command, timeout=300, check=False)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}")
    except (subprocess.TimeoutExpired, RuntimeError) as error:
        place.failed(figure["section"], figure["what"], error)


if __name__ == "__main__":
    sys.exit(main())
