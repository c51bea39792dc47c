"""What a page about a token cache shows, gathered in one pass over rows and in bounded memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from verl_sft.audit.spell import Speller
from verl_sft.data.audit import audit_figures, audit_lines
from verl_sft.data.store import LOST_STOP, SPLIT, TRUNCATED, SampleStore
from verl_sft.records.schema import SFTRecord
from verl_sft.types import JSON

PAGE_TOKENS = 200_000  # of all samples shown together
SAMPLE_TOKENS = 4_000
_REFUSED_ROWS = 200
_TASK_TYPES = 50
_EPISODE_ROWS = 200
_CHARS = 300
_BINS = 30
_FLAGS = {TRUNCATED: "truncated", LOST_STOP: "stop token lost", SPLIT: "view"}


@dataclass(slots=True)
class Outcomes:
    """Episodes by task type, facts about wanted rows, and rows of the first failed episodes."""

    wanted: set[str] = field(default_factory=set)
    most_failed: int = 20
    by_type: dict[str, Counter[str]] = field(default_factory=dict)
    facts: dict[str, JSON] = field(default_factory=dict)
    failed: dict[str, None] = field(default_factory=dict)  # sources, in order

    def read(self, records: Iterable[SFTRecord]) -> Outcomes:
        """Take in all records; rows of one episode are expected beside one another."""
        last, rows, failures = "", 0, 0
        for record in records:
            name = record.episode_id or record.source
            rows = rows + 1 if name == last else 1
            if rows == 1:
                self._count(record)
                failures += record.success is False
            last = name
            is_failed = record.success is False and failures <= self.most_failed
            if is_failed and rows <= _EPISODE_ROWS:
                self.failed[record.source] = None
            if record.source in self.wanted or record.source in self.failed:
                self.facts[record.source] = _facts(record)
        return self

    def _count(self, record: SFTRecord) -> None:
        kind = record.task_type[:_CHARS] or "(none)"
        if kind not in self.by_type and len(self.by_type) >= _TASK_TYPES:
            kind = "(other)"
        counts = self.by_type.setdefault(kind, Counter())
        counts["episodes"] += 1
        counts["successes"] += record.success is True
        counts["unknown"] += record.success is None


def choose(store: SampleStore, *, most: int) -> list[int]:
    """Indices of the first samples, and of the first ones that were cut."""
    cut = np.flatnonzero(store.flags & (TRUNCATED | LOST_STOP))[:most]
    return sorted({*range(min(most, len(store))), *map(int, cut)})


def find_sources(store: SampleStore, sources: Mapping[str, Any], *, most: int) -> list[int]:
    """Indices of the first samples that were made from these rows."""
    if not sources:
        return []
    found = (i for i in range(len(store)) if store.source(i) in sources)
    return list(islice(found, most))


def audit_json(store: SampleStore, *, outcomes: Outcomes, files: list[str], model: str) -> JSON:
    """The content of `audit.json`."""
    report, lengths, learned = store.report, store.lengths, store.num_learned()
    exact = report.rows - report.num_rejected - report.dropped.total()
    return {
        "model": model,
        "files": files,
        "lines": audit_lines(store),
        "figures": audit_figures(store),
        "by_template": {
            report.template: {"exact_rows": exact, "refused_rows": report.num_rejected}
        },
        "success_by_task_type": {k: dict(v) for k, v in sorted(outcomes.by_type.items())},
        "histograms": {
            "tokens of a sample": histogram(lengths),
            "learned share of a sample (%)": histogram(100 * learned / np.maximum(lengths, 1)),
        },
        "refused_rows": list(islice(_refused(store), _REFUSED_ROWS)),
    }


def histogram(values: npt.NDArray[Any]) -> JSON:
    """Counts of values in equal bins between the least and the greatest."""
    if not len(values):
        return {"edges": [], "counts": []}
    counts, edges = np.histogram(values, bins=_BINS)
    return {"edges": [round(float(e), 2) for e in edges], "counts": counts.tolist()}


def page_samples(
    store: SampleStore, indices: Iterable[int], *, outcomes: Outcomes, speller: Speller
) -> tuple[list[JSON], int]:
    """Samples as the page wants them, and how many did not fit into `PAGE_TOKENS`."""
    shown: list[JSON] = []
    room, left_out = PAGE_TOKENS, 0
    for index in indices:
        sample = store[index]
        size = min(len(sample) + 1, SAMPLE_TOKENS)
        if size > room:
            left_out += 1
            continue
        room -= size
        ids = [int(sample.input_ids[0]), *sample.target_ids[: size - 1].tolist()]
        weights = [0.0, *sample.weights[: size - 1].tolist()]
        flags = int(store.flags[index])
        shown.append(
            {
                "name": sample.record_id[:_CHARS],
                "source": sample.source[:_CHARS],
                "tokens": len(sample) + 1,
                "learned": sample.num_learned,
                "marks": [text for bit, text in _FLAGS.items() if flags & bit],
                "cut": bool(flags & (TRUNCATED | LOST_STOP)),
                **outcomes.facts.get(sample.source, {}),
                "ids": ids,
                "texts": speller.pieces(ids),
                "weights": _runs(weights),
            }
        )
    return shown, left_out


def _runs(weights: list[float]) -> list[list[float]]:
    """`[0, 0, 1]` as `[[2, 0], [1, 1]]`."""
    runs: list[list[float]] = []
    for weight in weights:
        shown = round(weight, 6)
        if runs and runs[-1][1] == shown:
            runs[-1][0] += 1
        else:
            runs.append([1, shown])
    return runs


def _facts(record: SFTRecord) -> JSON:
    return {
        "task_type": record.task_type[:_CHARS],
        "task_id": record.task_id[:_CHARS],
        "episode": record.episode_id[:_CHARS],
        "success": record.success,
    }


def _refused(store: SampleStore) -> Iterable[JSON]:
    with (store.path / "rejected.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            where = row["file"] if row["row"] is None else f"{row['file']}:{row['row']}"
            texts = {k: str(row[k])[: 2 * _CHARS] for k in ("field", "code", "reason", "fix")}
            yield {"where": where, **texts}
