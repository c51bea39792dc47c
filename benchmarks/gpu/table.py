"""JSON lines as the Markdown table of docs/performance.md."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.gpu.measure import read_rows


def table(path: Path) -> str:
    """The figures, with command, date and machine; the last of several with one name counts.

    Toy figures of a dry run are marked, so that none is ever taken for a measurement.
    """
    rows = {(r["section"], r["what"]): r for r in read_rows(path)}
    if not rows:
        return "No figure was taken."
    first = next(iter(rows.values()))
    dry = "DRY RUN on toy shapes: no figure below means anything. " if first["dry"] else ""
    lines = [
        f"{dry}{first['machine']}, torch {first['torch']}, transformers {first['transformers']}, "
        f"{first['date']}: `{first['command']}`",
        "",
        "| section | what | figure | note |",
        "|---|---|---|---|",
    ]
    for (section, what), found in rows.items():
        figure = float(found["figure"])
        shown = "failed" if math.isnan(figure) else f"{_short(figure)} {found['unit']}"
        lines.append(f"| {section} | {what} | {shown} | {found['note']} |")
    return "\n".join(lines)


def _short(figure: float) -> str:
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.4g}"
