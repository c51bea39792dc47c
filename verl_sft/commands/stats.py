"""`verl-sft stats in=DIR`: sizes, successes, repetitions, leaks; as table, JSON and plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from verl_sft.commands.common import read_words, say
from verl_sft.config.checks import naming, tokenizer_folder
from verl_sft.config.stats import StatsConfig
from verl_sft.errors import InputError, UsageError
from verl_sft.types import JSON


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    usage = "verl-sft stats in=DIR [against=FILES] [model=HF_DIR] [out=DIR] [key=value ...]"
    config = read_words(StatsConfig, words, usage=usage, names={"in": "inputs", "from": "source"})
    if config is None:
        return 0
    if not config.inputs:
        raise UsageError("in= is needed", fix=f"usage: {usage}")
    if config.model:
        config.model = tokenizer_folder("model", config.model)
    from verl_sft.records.file_set import check_versions, versions_of
    from verl_sft.records.quality import Summary, defects, overlaps
    from verl_sft.records.read import check_format
    from verl_sft.safe_io import make_output_dir, write_json

    check_format("from", config.source)

    splits: dict[str, Summary] = {}
    dropped: Counter[str] = Counter()
    inputs = dict(_splits(config))
    before = versions_of(file for files in inputs.values() for file in files)
    for name, files in inputs.items():
        splits[name] = _summary(files, config=config, dropped=dropped)
    check_versions(before)
    result: JSON = {name: split.result() for name, split in splits.items()}
    result |= {"dropped": dict(dropped), "overlap": overlaps(splits)}
    if config.model:
        result["tokens"] = _tokens(config)
    if not any(split.records for split in splits.values()):
        reasons = Counter(dropped)
        for split in splits.values():
            reasons += split.refused
        raise InputError(
            "there is no record to count",
            where=str(config.inputs),
            why=", ".join(f"{code} {count}" for code, count in reasons.most_common(5))
            or "the files are empty",
            fix="Check in=, from= and select.*",
        )
    print("\n".join(_table(result, list(splits))))
    found = list(defects(splits))
    for line in found:
        print(f"attention: {line}")
    if config.out:
        out = make_output_dir(Path(config.out).expanduser())
        write_json(out / "stats.json", result)
        if note := _plot(out / "stats.png", {name: result[name] for name in splits}):
            say(note)
        print(f"written: {out / 'stats.json'}")
    refused = sum(s.refused.total() for s in splits.values())
    rows = refused + sum(s.records for s in splits.values())
    if (config.strict and found) or refused > config.max_reject_fraction * max(rows, 1):
        raise InputError(found[0], where=str(config.inputs), fix="See the lines above")
    return 0


def _splits(config: StatsConfig) -> Iterator[tuple[str, list[Path]]]:
    from verl_sft.records.resolve import held_out_files, resolve_files

    with naming("in"):
        files = resolve_files(config.inputs, split="train")
    yield "train", files
    if held_out := held_out_files(config.inputs):
        yield "val", held_out
    if config.against:
        with naming("against"):
            files = resolve_files(config.against, split="train")
        yield "against", files


def _summary(files: list[Path], *, config: StatsConfig, dropped: Counter[str]) -> Any:
    from verl_sft.records.parse import ReadOptions, Reject
    from verl_sft.records.quality import Summary
    from verl_sft.records.read import read_records
    from verl_sft.records.select import select

    summary = Summary()

    def refuse(bad: Reject) -> None:
        summary.refused[bad.code] += 1
        if summary.refused.total() <= 20:  # all of them are in the rejected.jsonl of convert
            say(str(bad))

    options = ReadOptions(multiturn=True, format=config.source)
    records = read_records(files, options=options, reject=refuse)
    for record in select(records, config=config.select, dropped=dropped):
        summary.add(record)
    return summary


def _tokens(config: StatsConfig) -> JSON:
    """Figures of the token cache that a multi-turn run on this data would have."""
    import tempfile

    from verl_sft.config.train import DataConfig, MultiturnConfig
    from verl_sft.data.audit import audit_figures
    from verl_sft.data.load import load_samples
    from verl_sft.records.mix import resolve_sources

    with tempfile.TemporaryDirectory() as folder:
        store = load_samples(
            resolve_sources(config.inputs, split="train"),
            tokenizer=str(config.model),
            config=DataConfig(
                multiturn=MultiturnConfig(enable=True),
                format=config.source,
                max_length=1 << 20,
            ),
            cache_dir=Path(folder),
            check=False,
        )
        return audit_figures(store)


def _table(result: JSON, names: list[str]) -> Iterator[str]:
    yield f"{'':<28}" + "".join(f"{name:>14}" for name in names)
    rows = ("records", "tasks", "learned_turns", "repeated_ids", "repeated_contents")
    for row in rows:
        yield f"{row.replace('_', ' '):<28}" + "".join(f"{result[n][row]:>14,}" for n in names)
    for row in ("learned_share_of_characters", "mean_reward"):
        yield f"{row.replace('_', ' '):<28}" + "".join(f"{result[n][row]:>14.3f}" for n in names)
    for what in ("turns", "characters"):
        for mark in ("min", "median", "p95", "max"):
            cells = (result[n][what].get(mark, 0) for n in names)
            yield f"{what + ' ' + mark:<28}" + "".join(f"{cell:>14,}" for cell in cells)
    first = result[names[0]]
    for kind in ("by_task_type", "by_agent_name", "by_data_source"):
        for value, counts in first[kind].items():
            if not value:
                continue
            rate = counts["success_rate"]
            shown = "unknown" if rate is None else f"{rate:.1%}"
            yield f"{kind[3:].replace('_', ' ')} {value}: {counts['records']:,}, success {shown}"
    if tokens := result.get("tokens"):
        yield (
            f"tokens: {tokens['tokens']:,}, learned {tokens['learned_share']:.1%}, "
            f"longest {tokens['longest']:,}, refused {tokens['refused']:,}"
        )
    if result["dropped"]:
        yield "dropped: " + ", ".join(f"{k} {v}" for k, v in result["dropped"].items())


def _plot(path: Path, splits: JSON) -> str:
    """Draw histograms and success rates; returns a note where that is not possible."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "stats.png is not drawn: the package 'matplotlib' is not installed"
    from verl_sft.safe_io import publishing

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    turns, chars, success = figure.subplots(1, 3)
    for axes, what in ((turns, "turns"), (chars, "characters")):
        for name, split in splits.items():
            values = {int(v): n for v, n in split[what]["histogram"].items()}
            axes.hist(list(values), weights=list(values.values()), bins=30, alpha=0.6, label=name)
        axes.set_xlabel(f"{what} per record")
        axes.set_ylabel("records")
        axes.legend()
    groups = next(iter(splits.values()))["by_task_type"]
    known = {k or "(none)": c["success_rate"] or 0.0 for k, c in groups.items()}
    success.barh(list(known), list(known.values()))
    success.set_xlabel("success rate by task type")
    with publishing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return ""
