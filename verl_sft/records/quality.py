"""What is in a set of records: sizes, successes, repetitions, and overlap between splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from verl_sft.records.rows import message_text
from verl_sft.records.schema import SFTRecord
from verl_sft.safe_io import content_hash
from verl_sft.types import JSON

_GROUPED = ("task_type", "agent_name", "data_source")


@dataclass(slots=True)
class Summary:
    """Counts of one split as its records stream by; what it holds grows with tasks, not texts."""

    records: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)  # answers per record -> records
    chars: Counter[int] = field(default_factory=Counter)  # characters per record, in steps of 100
    learned_turns: int = 0
    learned_chars: int = 0
    all_chars: int = 0
    rewards: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sum, number
    by: dict[str, dict[str, Counter[str]]] = field(
        default_factory=lambda: {name: defaultdict(Counter) for name in _GROUPED}
    )
    ids: Counter[str] = field(default_factory=Counter)
    contents: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)

    def add(self, record: SFTRecord) -> None:
        """Count one record."""
        self.records += 1
        sizes = [len(message_text(m)) for m in record.messages]
        answers = [i for i, m in enumerate(record.messages) if m.role == "assistant"]
        learned = answers if record.supervise is None else record.supervise
        self.turns[len(answers)] += 1
        self.chars[sum(sizes) // 100 * 100] += 1
        self.learned_turns += len(learned)
        self.learned_chars += sum(sizes[i] for i in learned)
        self.all_chars += sum(sizes)
        if record.reward is not None:
            self.rewards[0] += record.reward
            self.rewards[1] += 1
        for name, groups in self.by.items():
            outcome = {True: "succeeded", False: "failed", None: "unknown"}[record.success]
            groups[getattr(record, name)].update({"records": 1, outcome: 1})
        if record.record_id:
            self.ids[record.record_id] += 1
        self.contents[_content(record)] += 1
        if task := record.task_id or record.group_id:
            self.tasks[task] += 1

    def result(self) -> JSON:
        """The counts as JSON."""
        return {
            "records": self.records,
            "refused": dict(self.refused),
            "tasks": len(self.tasks),
            "learned_turns": self.learned_turns,
            "learned_share_of_characters": _ratio(self.learned_chars, self.all_chars),
            "mean_reward": _ratio(self.rewards[0], self.rewards[1]),
            "turns": _spread(self.turns),
            "characters": _spread(self.chars),
            "repeated_ids": _repeated(self.ids),
            "repeated_contents": _repeated(self.contents),
            **{
                f"by_{name}": {
                    value: {**counts, "success_rate": _rate(counts)}
                    for value, counts in sorted(groups.items())
                }
                for name, groups in self.by.items()
            },
        }


def overlaps(splits: Mapping[str, Summary]) -> JSON:
    """For each pair of splits, how many tasks and how many whole texts are in both."""
    names = list(splits)
    found: JSON = {}
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            a, b = splits[first], splits[second]
            found[f"{first} and {second}"] = {
                "tasks": len(a.tasks.keys() & b.tasks.keys()),
                "contents": len(a.contents.keys() & b.contents.keys()),
            }
    return found


def defects(splits: Mapping[str, Summary]) -> Iterator[str]:
    """One line for each thing that a careful reader would want to know before training."""
    for name, split in splits.items():
        if split.refused:
            reasons = ", ".join(f"{code} {count}" for code, count in split.refused.most_common(5))
            yield f"{name}: {split.refused.total()} rows cannot be used ({reasons})"
        if repeated := _repeated(split.ids):
            yield f"{name}: {repeated} records repeat the record_id of another"
        if repeated := _repeated(split.contents):
            yield f"{name}: {repeated} records repeat the messages of another"
    for pair, counts in overlaps(splits).items():
        for what, count in counts.items():
            if count:
                yield f"{pair} share {count} {what}"


def _content(record: SFTRecord) -> str:
    """A hash of what is trained: messages, tools and which answers are learned."""
    return content_hash(
        [
            [m.to_json() for m in record.messages],
            record.prompt,
            None if record.tools is None else list(record.tools),
            None if record.supervise is None else list(record.supervise),
        ]
    )


def _repeated(counts: Counter[str]) -> int:
    return counts.total() - len(counts)


def _spread(counts: Counter[int]) -> JSON:
    """Least, quantiles, most and mean of a histogram, and the histogram itself."""
    total = counts.total()
    marks: JSON = {}
    for name, share in (("min", 0.0), ("median", 0.5), ("p95", 0.95), ("max", 1.0)):
        seen = 0
        for value in sorted(counts):
            seen += counts[value]
            if seen >= share * total:
                marks[name] = value
                break
    mean = _ratio(sum(v * n for v, n in counts.items()), total)
    return {**marks, "mean": mean, "histogram": {str(v): counts[v] for v in sorted(counts)}}


def _rate(counts: Mapping[str, int]) -> float | None:
    known = counts.get("succeeded", 0) + counts.get("failed", 0)
    return _ratio(counts.get("succeeded", 0), known) if known else None


def _ratio(part: float, whole: float) -> float:
    return round(part / whole, 6) if whole else 0.0
