"""What a token cache holds, in figures and in the five lines shown before every training run."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from verl_sft.data.store import LOST_STOP, SampleStore
from verl_sft.data.tree import shared_lengths
from verl_sft.types import JSON


def audit_figures(store: SampleStore) -> JSON:
    """Counts of the load report and the spread of learned tokens, as JSON."""
    report, learned = store.report, store.num_learned()
    figures: JSON = {f.name: getattr(report, f.name) for f in fields(report)}
    figures["learned_share"] = report.learned_tokens / max(report.tokens, 1)
    figures["shared_tokens"] = int(shared_lengths(store, units=store.units()).sum())
    figures["refused"] = report.num_rejected
    figures["samples_with_lost_stop"] = int(np.count_nonzero(store.flags & LOST_STOP))
    figures["samples_learning_nothing"] = int(np.count_nonzero(learned == 0))
    spread = (learned.min(), np.median(learned), learned.max()) if len(learned) else (0, 0, 0)
    figures["learned_per_sample"] = [int(n) for n in spread]  # least, median, most
    return figures


def audit_lines(store: SampleStore) -> list[str]:
    """Five lines: rows, learned tokens, stop tokens, what was left out, where to read more."""
    report, figures = store.report, audit_figures(store)
    least, median, most = figures["learned_per_sample"]
    stops = report.turns - report.lost_stops - report.without_stop
    reasons = [*report.rejected.most_common(3), *report.dropped.most_common(2)]
    named = ", ".join(f"{code} {count:,}" for code, count in reasons)
    repeated = figures["shared_tokens"] / max(report.tokens, 1)
    saved = f", {repeated:.1%} of all tokens repeat a view's beginning" if repeated else ""
    return [
        f"data: {report.rows:,} rows -> {report.samples:,} samples ({report.folded:,} rows folded "
        f"into their episode's, {report.split:,} samples are views of split conversations{saved})",
        f"learned: {report.learned_tokens:,} of {report.tokens:,} tokens "
        f"({figures['learned_share']:.1%}); per sample {least:,} to {most:,}, median {median:,}",
        f"stop token: learned in {stops:,} of {report.turns:,} turns "
        f"({report.lost_stops:,} cut off, {report.without_stop:,} not printed by the template)",
        f"left out: {report.num_rejected:,} refused, {report.dropped.total():,} dropped"
        + (f" ({named})" if named else "")
        + f"; {report.truncated:,} truncated, {report.escaped:,} control texts escaped",
        f"masks: proven for {report.template}; longest {report.longest:,} tokens; {store.path}",
    ]
