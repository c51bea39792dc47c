"""Files to samples: folding, rejects, the shared cache."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.chat_templates import template_for
from verl_sft.config.train import DataConfig, MultiturnConfig
from verl_sft.data.load import load_samples
from verl_sft.data.store import SampleStore
from verl_sft.data.template import TokenizerSpec
from verl_sft.data.tokenizer import chatml
from verl_sft.errors import InputError, StorageError
from verl_sft.records.io import write_parquet
from verl_sft.records.schema import SFTRecord
from verl_sft.types import Message

SPEC: TokenizerSpec = template_for(chatml(), name="chatml").spec


def step_rows(episodes: int, steps: int = 3) -> list[SFTRecord]:
    """Step rows as the collector writes them: dialogue so far, its last answer learned."""
    rows = []
    for episode in range(episodes):
        messages: list[Message] = []
        for step in range(steps):
            messages += [
                Message("user", f"You see {episode} and {step}."),
                Message("assistant", f"go to {episode}{step}"),
            ]
            rows.append(
                SFTRecord(
                    messages=tuple(messages),
                    record_id=f"{episode}-{step}",
                    episode_id=f"e{episode}",
                    step=step,
                    prompt=f"Task. You see {episode} and {step}.",
                    response=f"go to {episode}{step}",
                    supervise=(len(messages) - 1,),
                )
            )
    return rows


def config(**given: Any) -> DataConfig:
    multiturn = MultiturnConfig(enable=given.pop("multiturn", True))
    return DataConfig(multiturn=multiturn, **{"max_length": 4096, **given})


def load(
    tmp_path: Path, rows: Sequence[SFTRecord], *, workers: int = 1, **given: Any
) -> SampleStore:
    write_parquet(tmp_path / "train.parquet", rows)
    return load_samples(
        [tmp_path / "train.parquet"],
        tokenizer=SPEC,
        config=config(**given),
        cache_dir=tmp_path / "cache",
        num_workers=workers,
    )


def test_step_rows_of_an_episode_fold_into_one_sample(tmp_path: Path) -> None:
    """Multi-turn: one sample per episode with every turn learned once; single-turn: one per row."""
    multi = load(tmp_path, step_rows(4))
    single = load(tmp_path, step_rows(4), multiturn=False)
    assert (len(multi), multi.report.rows, multi.report.folded) == (4, 12, 8)
    assert (len(single), single.report.folded) == (12, 0)
    assert all(len(sample.spans) == 3 for sample in multi)
    assert multi.report.learned_tokens == single.report.learned_tokens
    assert multi.num_learned().tolist() == [sample.num_learned for sample in multi]
    assert multi.lengths.tolist() == [len(sample) for sample in multi]
    assert multi[0].source == "train.parquet:2" and multi[0].record_id == "0-2"


def test_processes_give_the_same_cache_as_one(tmp_path: Path) -> None:
    """Two worker processes write the bytes that one process writes."""
    rows = step_rows(300, steps=1)
    caches = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        caches.append(load(folder, rows, workers=workers).path)
    for name in ("ids.i32", "weights.f32", "offsets.i64", "names.bin"):
        assert (caches[0] / name).read_bytes() == (caches[1] / name).read_bytes()
    assert caches[0].name == caches[1].name


def test_the_key_follows_everything_that_changes_tokens(tmp_path: Path) -> None:
    """Same data and options: the same cache; another option, template or file: another."""
    base = load(tmp_path, step_rows(2)).path
    built = (base / "ids.i32").stat().st_mtime_ns
    again = load(tmp_path, step_rows(2)).path
    assert again == base and (again / "ids.i32").stat().st_mtime_ns == built
    assert load(tmp_path, step_rows(2), train_on_eot_newline=False).path != base
    assert load(tmp_path, step_rows(3)).path != base


def test_the_key_follows_the_code_of_a_reader(tmp_path: Path) -> None:
    """A user's own format function that was edited is run again."""
    reader = tmp_path / "mine.py"
    found = []
    for answer in ("yes", "no"):
        turns = f"[dict(role='user', content='q'), dict(role='assistant', content='{answer}')]"
        reader.write_text(f"def read(row):\n    return dict(messages={turns})\n")
        store = load(tmp_path, step_rows(1), format=f"{reader}:read")
        found.append(list(store[0].input_ids))
    assert found[0] != found[1]


def test_a_stale_cache_is_refused_with_a_diff(tmp_path: Path) -> None:
    """Changed options or data: said with old and new values; `require` refuses to build."""
    load(tmp_path, step_rows(2))
    with pytest.raises(InputError, match="the token cache is stale") as stale:
        load(tmp_path, step_rows(2), token_cache="require", max_length=2048)
    assert "render.max_length: 4096 -> 2048" in str(stale.value)
    assert "read." not in str(stale.value)  # what is the same is not told
    with pytest.raises(InputError, match=r"contents of train\.parquet: ") as stale:
        load(tmp_path, step_rows(3), token_cache="require")
    assert "max_length" not in str(stale.value)
    said: list[str] = []
    write_parquet(tmp_path / "train.parquet", step_rows(2))
    for _ in range(2):
        load_samples(
            [tmp_path / "train.parquet"],
            tokenizer=replace(SPEC, chat_template=SPEC.chat_template + "{# other #}"),
            config=config(token_cache="build"),
            cache_dir=tmp_path / "cache",
            say=said.append,
        )
    (line,) = said
    assert "tokenizer.chat_template changed" in line and "tokenising anew" in line
    with pytest.raises(InputError, match="there is no token cache"):
        load_samples(
            [tmp_path / "train.parquet"],
            tokenizer=SPEC,
            config=config(token_cache="require"),
            cache_dir=tmp_path / "elsewhere",
        )


def test_old_caches_are_removed_by_last_use(tmp_path: Path) -> None:
    """Ten variants leave eight caches; the one that was opened again is among them."""
    first = load(tmp_path, step_rows(1)).path
    others = []
    for length in range(5000, 5009):
        others.append(load(tmp_path, step_rows(1), max_length=length).path)
        load(tmp_path, step_rows(1))
    left = {p for p in (tmp_path / "cache").iterdir() if p.is_dir()}
    assert left == {first, *others[-7:]}
    assert not [p for p in others[:2] if (tmp_path / "cache" / f".{p.name}.lock").exists()]


def test_the_order_of_keys_is_part_of_the_data(tmp_path: Path) -> None:
    """Tool schemas and arguments are trained in the order in which they were given."""
    text = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
        "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template = template_for(text, name="tools")
    call = {
        "type": "function",
        "function": {"name": "f", "arguments": {"z": 1, "a": {"y": 2, "b": 3}}},
    }
    row = SFTRecord(
        messages=(Message("user", "q"), Message("assistant", None, tool_calls=(call,))),
        tools=({"type": "function", "function": {"name": "f", "description": "d"}},),
    )
    write_parquet(tmp_path / "train.parquet", [row])
    store = load_samples(
        [tmp_path / "train.parquet"],
        tokenizer=template.spec,
        config=config(),
        cache_dir=tmp_path / "cache",
        num_workers=1,
    )
    pieces = Tokenizer.from_str(template.spec.backend_json)
    seen = pieces.decode([*store[0].input_ids], skip_special_tokens=False)
    assert '"name": "f", "description": "d"' in seen
    assert '"arguments": {"z": 1, "a": {"y": 2, "b": 3}}' in seen


def _rank(folder: Path, queue: Any) -> None:
    store = load_samples(
        [folder / "train.parquet"], tokenizer=SPEC, config=config(), cache_dir=folder / "cache"
    )
    queue.put((store.path.name, len(store)))


def test_ranks_that_start_together_share_one_cache(tmp_path: Path) -> None:
    """Three processes at once: one cache, no leftovers, all agree."""
    write_parquet(tmp_path / "train.parquet", step_rows(30))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(tmp_path, queue)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    seen = {queue.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join()
    assert len(seen) == 1 and next(iter(seen))[1] == 30
    assert [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".tmp")] == []


def test_refused_rows_are_named_and_do_not_take_their_episode_along(tmp_path: Path) -> None:
    """One bad step of an episode: the other steps are learned, the row is in rejected.jsonl."""
    rows = step_rows(8)
    bad = Message("assistant", "\n\ngo")
    messages = (*rows[4].messages[:-1], bad)
    rows[4] = SFTRecord(messages=messages, episode_id="e1", record_id="bad", supervise=(3,))
    store = load(tmp_path, rows)
    assert store.report.rejected == {"merged_boundary": 1}
    (line,) = (store.path / "rejected.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["file"], row["row"], row["code"]) == ("train.parquet", 4, "merged_boundary")
    assert row["reason"] and row["fix"]
    assert sum(len(sample.spans) for sample in store) == 23


def test_too_many_refused_rows_fail_with_the_reasons(tmp_path: Path) -> None:
    """Above `max_reject_fraction` the load fails; within it, it does not."""
    rows = step_rows(3, steps=1)
    rows[0] = SFTRecord(messages=(Message("user", "a"), Message("assistant", "\n\nb")))
    with pytest.raises(InputError, match="merged_boundary 1"):
        load(tmp_path, rows)
    assert len(load(tmp_path, rows, max_reject_fraction=0.5)) == 2


def test_too_long_rows_stop_or_drop(tmp_path: Path) -> None:
    """`error` stops with the count, `drop` counts apart from rejects, nothing left is an error."""
    rows = step_rows(2, steps=1)
    rows += [SFTRecord(messages=(Message("user", "a " * 200), Message("assistant", "b")))]
    with pytest.raises(InputError, match="1 of 3 rows have more than"):
        load(tmp_path, rows, max_length=100)
    store = load(tmp_path, rows, max_length=100, truncation="drop")
    assert len(store) == 2 and store.report.dropped == {"dropped_too_long": 1}
    with pytest.raises(InputError, match="nothing is left"):
        load(tmp_path, rows, max_length=5, truncation="drop")


def test_sample_weights_and_turn_weights_multiply(tmp_path: Path) -> None:
    """`sample_weight` scales the turn's own weight, folded or not."""
    messages = (Message("user", "a"), Message("assistant", "b"))
    row = SFTRecord(messages=messages, supervise=(1,), weights=(0.5,), sample_weight=4.0)
    (sample,) = load(tmp_path, [row])
    assert set(sample.weights.tolist()) == {0.0, 2.0}


def test_the_thinking_switch_is_of_the_row(tmp_path: Path) -> None:
    """A row's own value wins over the run's; rows with different values are never folded."""
    switch = "{{ '/think' if enable_thinking | default(false) else '/plain' }}"
    template = template_for(switch + chatml(), name="switch")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": messages},
        {"messages": messages, "enable_thinking": True},
        {"messages": messages, "enable_thinking": False},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    decode = Tokenizer.from_str(template.spec.backend_json).decode
    shown = {}
    for name, given in (("unset", {}), ("on", {"enable_thinking": True})):
        store = load_samples(
            [tmp_path / "rows.jsonl"],
            tokenizer=template.spec,
            config=config(apply_chat_template_kwargs=given),
            cache_dir=tmp_path / "cache",
            num_workers=1,
        )
        texts = [decode([*sample.input_ids], skip_special_tokens=False) for sample in store]
        shown[name] = [text.partition("<")[0] for text in texts]
    assert shown == {"unset": ["/plain", "/think", "/plain"], "on": ["/think", "/think", "/plain"]}


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    """A cut file is noticed before it is trained on."""
    store = load(tmp_path, step_rows(2))
    with (store.path / "ids.i32").open("r+b") as stream:
        stream.truncate(4)
    with pytest.raises(StorageError, match="damaged"):
        SampleStore(store.path)
