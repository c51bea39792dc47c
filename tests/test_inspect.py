"""`inspect`: figures, the page in a real browser, the dump."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chat_templates import template_for
from verl_sft.audit import gather
from verl_sft.audit.inspect import inspect
from verl_sft.audit.spell import Speller
from verl_sft.commands import inspect as command
from verl_sft.config.inspect import InspectConfig
from verl_sft.config.load import load_config
from verl_sft.config.train import DataConfig, MultiturnConfig
from verl_sft.data.audit import audit_lines
from verl_sft.data.sample import make_sample
from verl_sft.data.store import SampleStore
from verl_sft.data.template import TokenizerSpec
from verl_sft.data.tokenizer import chatml
from verl_sft.errors import InputError, UsageError
from verl_sft.records.io import write_parquet
from verl_sft.records.schema import SFTRecord
from verl_sft.types import Message

TEMPLATE = template_for(chatml(), name="chatml")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&lt;"


def episode(number: int, *texts: str, success: bool = True) -> SFTRecord:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(texts))
    return SFTRecord(
        messages=messages,
        record_id=f"r{number}",
        episode_id=f"e{number}",
        prompt=texts[0],
        response=texts[-1],
        success=success,
        task_type="cool" if number % 2 else "heat",
    )


ROWS = [
    episode(0, "2+2?", "4.", "3+3?", "\u4f60\u597d 6."),
    episode(1, ATTACK, "no", success=False),
    episode(2, "2?", "\n\nbad"),
    episode(3, "long " * 150, "yes"),
]


def run(
    tmp_path: Path, rows: Sequence[SFTRecord] = ROWS, *, multiturn: bool = True, **given: Any
) -> tuple[SampleStore, list[str], Path]:
    tmp_path.mkdir(exist_ok=True)
    write_parquet(tmp_path / "train.parquet", rows)
    data = DataConfig(
        train_files=str(tmp_path / "train.parquet"),
        multiturn=MultiturnConfig(enable=multiturn),
        truncation="left",
        max_length=250,
    )
    out = tmp_path / "out"
    config = InspectConfig(data=data, out=str(out), dump=str(out / "dump.jsonl"), **given)
    return *inspect(config, tokenizer=TEMPLATE.spec), out


def dom(page: Path, tmp_path: Path, *, view: str = "all") -> str:
    """The page's document after its script has run in a real browser."""
    if BROWSER is None:
        pytest.skip("no chromium on PATH")
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / ('browser-' + view)}", "--dump-dom",
         f"{page.as_uri()}#{view}"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def main_part(document: str) -> str:
    found = re.search(r'<main id="list">(.*)</main>', document, re.DOTALL)
    assert found is not None
    return found[1]


def test_figures_and_lines(tmp_path: Path) -> None:
    """Table, JSON and the five lines count rows, learned stops, refusals and outcomes."""
    store, lines, out = run(tmp_path)
    audit = json.loads((out / "audit.json").read_text())
    figures = audit["figures"]
    assert (figures["rows"], figures["samples"], figures["turns"]) == (4, 3, 4)
    assert figures["rejected"] == {"merged_boundary": 1} and figures["truncated"] == 1
    assert figures["learned_tokens"] == sum(s.num_learned for s in store)
    assert figures["samples_learning_nothing"] == 0
    assert audit["by_template"] == {"chatml": {"exact_rows": 3, "refused_rows": 1}}
    assert audit["success_by_task_type"] == {
        "cool": {"episodes": 2, "successes": 1, "unknown": 0},
        "heat": {"episodes": 2, "successes": 2, "unknown": 0},
    }
    for histogram in audit["histograms"].values():
        assert sum(histogram["counts"]) == 3
    assert len(audit["lines"]) == 5 and audit["lines"] == audit_lines(store)
    text = "\n".join(lines)
    assert re.search(r"turns with a learned stop token +4\n", text)
    assert re.search(r"merged_boundary +1\n", text)
    assert "train.parquet:2: merged_boundary" in text and "fix: " in text
    assert "[-100 x " in text and "4.<|im_end|>\\n" in text


def test_single_turn(tmp_path: Path) -> None:
    """Prompt and response pairs are audited in the same way."""
    store, _, out = run(tmp_path, multiturn=False)
    assert json.loads((out / "audit.json").read_text())["figures"]["turns"] == len(store) == 3


def test_the_dump_lets_anyone_check_the_masks(tmp_path: Path) -> None:
    """One object per sample; the learned text is that of the targets with a weight."""
    store, _, out = run(tmp_path)
    rows = [json.loads(line) for line in (out / "dump.jsonl").read_text().splitlines()]
    assert [r["record_id"] for r in rows] == ["r0", "r1", "r3"]
    assert [r["source"] for r in rows] == [f"train.parquet:{row}" for row in (0, 1, 3)]
    for row, sample in zip(rows, store, strict=True):
        assert set(row) == {"record_id", "source", "input_ids", "target_ids", "weights",
                            "position_ids", "learned_text"}  # fmt: skip
        assert row["input_ids"][1:] == row["target_ids"][:-1]
        assert row["weights"] == sample.weights.tolist()
        assert row["position_ids"] == list(range(len(sample)))
    assert rows[0]["learned_text"] == "4.<|im_end|>\n\u4f60\u597d 6.<|im_end|>\n"


def test_as_many_rows_as_the_run_would_read(tmp_path: Path) -> None:
    """`data.train_max_samples` holds here too, `max_rows` comes first; no empty fix is shown."""
    words = [f"data.train_files={tmp_path / 'rows.jsonl'}", "data.format=verl", f"out={tmp_path}"]
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    lines = [json.dumps(row), *["[1]"] * 2, *[json.dumps(row)] * 3]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for more, samples in (["data.train_max_samples=2"], 2), (["max_rows=3"], 3), ([], 4):
        config = load_config(InspectConfig, [*words, "data.multiturn.enable=true", *more])
        store, lines = inspect(config, tokenizer=TEMPLATE.spec)
        assert len(store) == samples
        text = "\n".join(lines)
        assert re.search(r"\nrefused .*rows\.jsonl:1", text) and "fix: \n" not in text


def test_text_of_tokens_joins_to_the_text() -> None:
    """Characters cut into several tokens are shown whole, at their first token."""
    speller, text = Speller(TEMPLATE.spec), "<|im_start|>user\n\u4f60\u597d \U0001f44d go<|im_end|>"
    ids = TEMPLATE.encode(text).ids
    pieces = speller.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    sample = make_sample(ids, weights=np.array([0, 0, *[1.0] * (len(ids) - 2)], dtype=np.float32))
    (line,) = speller.compressed(sample)
    assert line.startswith("[-100 x 2] ")


def test_page_in_a_browser(tmp_path: Path) -> None:
    """Tokens carry id, weight and position; a row's markup is text and cannot run."""
    store, _, out = run(tmp_path)
    shown = dom(out / "audit.html", tmp_path)
    assert "<title>What is trained on</title>" in shown
    listed = main_part(shown)
    assert listed.count("<details") == 3 and "<img" not in listed and "<script" not in listed
    tokens = re.findall(
        r'<span class="t([^"]*)" title="id (\d+), weight ([\d.]+), position (\d+)">([^<]*)</span>',
        listed,
    )
    assert len(tokens) == sum(len(s) + 1 for s in store)
    learned = [t for t in tokens if t[0] == " learned"]
    assert len(learned) == sum(s.num_learned for s in store)
    assert {t[2] for t in learned} == {"1"}
    whole = html.unescape("".join(t[4] for t in tokens))
    whole = whole.replace("\u21b5", "").replace("\u00b7", "")
    assert ATTACK in whole and "\u4f60\u597d 6.<|im_end|>" in whole
    first = store[0]
    ids = [int(t[1]) for t in tokens[: len(first) + 1]]
    assert ids == [int(first.input_ids[0]), *first.target_ids.tolist()]
    assert [int(t[3]) for t in tokens[: len(first) + 1]] == list(range(len(first) + 1))
    assert shown.count("<rect") == 60 and "<td>cool</td><td>2</td><td>1</td>" in shown


@pytest.mark.parametrize(
    ("view", "present", "absent"),
    [
        ("truncated", "train.parquet:3", "train.parquet:0"),
        ("failed", "failed episode", "train.parquet:0"),
        ("refused", "merged_boundary", "<details"),
    ],
)
def test_filters(tmp_path: Path, view: str, present: str, absent: str) -> None:
    """Each filter shows its rows and no others."""
    _, _, out = run(tmp_path)
    listed = main_part(dom(out / "audit.html", tmp_path, view=view))
    assert present in listed and absent not in listed


def test_nothing_is_fetched_and_nothing_else_may_run(tmp_path: Path) -> None:
    """The page names no address; its policy allows its own script and style by hash only."""
    _, _, out = run(tmp_path)
    page = (out / "audit.html").read_text()
    markup = page.split('<script id="data"')[0]
    assert "default-src 'none'" in markup and "unsafe" not in markup
    assert not re.search(r"""(src|href)\s*=\s*["']""", page)
    assert page.count("</script>") == 2


def test_the_page_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many tokens: samples are left out or cut, and the page says so."""
    monkeypatch.setattr(gather, "PAGE_TOKENS", 60)
    monkeypatch.setattr(gather, "SAMPLE_TOKENS", 25)
    _, _, out = run(tmp_path)
    shown = dom(out / "audit.html", tmp_path)
    assert "The page holds 2 of 3 samples; 1 more were chosen but are too long" in shown
    assert "more tokens" in main_part(shown)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.partial_pretrain=/nowhere/model", "model.partial_pretrain=/nowhere/model: no such"),
        ("model.partial_pretrain={folder}", "model.partial_pretrain={folder}: no tokenizer"),
        ("model.tokenizer_path=./nowhere", "model.tokenizer_path=./nowhere: no such folder"),
        ("data.train_files={{path: {rows}, format: shargpt}}", "data.train_files: format=shargpt"),
    ],
)
def test_wrong_options_are_named_by_their_keys(tmp_path: Path, word: str, message: str) -> None:
    """In our words, before anything is written."""
    write_parquet(tmp_path / "train.parquet", ROWS)
    places = {"folder": tmp_path, "rows": tmp_path / "train.parquet"}
    words = [f"data.train_files={tmp_path}", f"out={tmp_path}/out", word.format(**places)]
    with pytest.raises(UsageError, match=message.format(**places)):
        inspect(load_config(InspectConfig, words), tokenizer=spec_for(word))
    assert not (tmp_path / "out" / "audit.json").exists()


def spec_for(word: str) -> TokenizerSpec | None:
    """A tokenizer where it is not the subject."""
    return None if word.startswith("model.") else TEMPLATE.spec


def test_the_command_fails_where_training_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is shown and written first; then too many refused rows are an error."""
    write_parquet(tmp_path / "train.parquet", ROWS)
    monkeypatch.setattr("verl_sft.audit.inspect.load_tokenizer", lambda *_, **__: TEMPLATE.spec)
    words = [f"data.train_files={tmp_path}/train.parquet", "data.multiturn.enable=true",
             "model.partial_pretrain=any", f"out={tmp_path}/out"]  # fmt: skip
    with pytest.raises(InputError, match="merged_boundary 1"):
        command.main(words)
    assert "rows" in capsys.readouterr().out and (tmp_path / "out" / "audit.html").exists()
    assert command.main([*words, "data.max_reject_fraction=0.3"]) == 0
