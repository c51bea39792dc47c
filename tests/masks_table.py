"""The sweep's table in docs/masking.md: `python -m tests.masks_table` writes it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "masking.md"
BEGIN, END = "<!-- sweep begins -->\n", "<!-- sweep ends -->"


def table(cells: Mapping[tuple[str, str], str]) -> str:
    """One line per template: how many shapes are exact, and which are refused for what."""
    rows: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for (name, shape), code in cells.items():
        rows[name.removesuffix(".jinja")][code].append(shape)
    size = max(sum(map(len, row.values())) for row in rows.values())
    counts = Counter(cells.values())
    refused = ", ".join(f"{code} {n}" for code, n in counts.most_common() if code != "exact")
    lines = [
        f"{counts['exact']} of {len(cells)} cells are exact; refused: {refused}.",
        "",
        f"| template | exact of {size} | refused |",
        "|---|---|---|",
    ]
    for name, row in sorted(rows.items()):
        exact = len(row.pop("exact", []))
        reasons = "; ".join(f"{code}: {', '.join(shapes)}" for code, shapes in sorted(row.items()))
        lines.append(f"| {name} | {exact} | {reasons} |")
    return "\n".join(lines) + "\n"


def parts() -> tuple[str, str, str]:
    """The page before the table, the table, and the page behind it."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    found, _, behind = rest.partition(END)
    return before + BEGIN, found, END + behind


if __name__ == "__main__":
    from tests.test_masks_sweep import sweep

    before, _, behind = parts()
    PAGE.write_text(before + table(sweep()) + behind, encoding="utf-8")
