"""Files as users have them: odd encodings, stray rows, wrong paths; nothing lost, no traceback."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_sft.cli import main
from verl_sft.errors import UsageError
from verl_sft.records import json_array
from verl_sft.records.json_array import array_items
from verl_sft.records.mix import resolve_sources
from verl_sft.records.read import read_records
from verl_sft.records.values import BadRowError


def chat(number: int | str) -> dict[str, Any]:
    turns = [("human", f"question {number}"), ("gpt", f"answer {number}")]
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


LINES = "\n".join(json.dumps(chat(i)) for i in range(5))


def convert(tmp_path: Path, content: str | bytes, *words: str, name: str = "in.jsonl") -> int:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return main(["convert", f"in={path}", f"out={tmp_path / 'out.jsonl'}", *words])


def written(tmp_path: Path) -> list[Any]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def refused(tmp_path: Path) -> list[Any]:
    text = (tmp_path / "out.jsonl.rejected.jsonl").read_text()
    return [(row["row"], row["code"]) for row in map(json.loads, text.splitlines())]


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(JSONS, max_size=6), indent=st.sampled_from([None, 1]), block=st.integers(1, 9)
)
def test_arrays_are_read_as_by_json(values: list[Any], indent: int | None, block: int) -> None:
    """Any array gives its elements back, wherever the blocks that are read end."""
    text = json.dumps(values, indent=indent).encode()
    before, json_array._BLOCK = json_array._BLOCK, block
    try:
        assert list(array_items(io.BytesIO(text), most_chars=1 << 20)) == json.loads(text)
    finally:
        json_array._BLOCK = before


@pytest.mark.parametrize(
    "text", ["[", "[1", "[1,", "[1 2]", '[{"a": 1]', "[1] 2", "1", "", "[tru]"]
)
def test_damaged_arrays_are_refused(text: str) -> None:
    """An array that ends early or goes on behind its end is an error."""
    with pytest.raises(ValueError, match=r"array|element"):
        list(array_items(io.BytesIO(text.encode()), most_chars=100))


def test_an_endless_element_is_not_held() -> None:
    """An element above the limit ends the reading."""
    stream = io.BytesIO(b'["' + b"x" * (1 << 21))
    with pytest.raises(ValueError, match="more than 1,000 long"):
        list(array_items(stream, most_chars=1000))


def test_one_number_that_is_none_spoils_one_element() -> None:
    """NaN in an array is a bad row, and the rows behind it are read."""
    first, bad, last = array_items(io.BytesIO(b'[{"a": 1}, {"a": NaN}, {"a": 2}]'), most_chars=100)
    assert (first, last) == ({"a": 1}, {"a": 2}) and isinstance(bad, BadRowError)


def test_text_of_an_array_is_kept_to_the_last_character(tmp_path: Path) -> None:
    """A lone surrogate in an array comes through as it does in JSON lines."""
    (tmp_path / "a.json").write_text(json.dumps([chat("\ud800 \x00 end")]))
    (record,) = read_records(tmp_path / "a.json")
    assert record.messages[0].content == "question \ud800 \x00 end"


@pytest.mark.parametrize("junk", ["{broken", "1", "{}", '{"a": 1}'])
@pytest.mark.parametrize("name", ["in.jsonl", "in.json"])
def test_a_bad_first_line_hides_no_other(tmp_path: Path, junk: str, name: str) -> None:
    """Whatever stands in the first line, the five good ones are used."""
    assert convert(tmp_path, f"{junk}\n{LINES}", "max_reject_fraction=0.5", name=name) == 0
    assert len(written(tmp_path)) == 5 and [row for row, _ in refused(tmp_path)] == [0]


def test_many_bad_lines_hide_no_good_one(tmp_path: Path) -> None:
    """Good rows behind 25 bad ones are used; each bad one is named."""
    assert convert(tmp_path, "junk\n" * 25 + LINES, "max_reject_fraction=1") == 0
    assert len(written(tmp_path)) == 5 and len(refused(tmp_path)) == 25


def test_an_unknown_format_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file without a usable row names the keys that it has."""
    assert convert(tmp_path, '{"foo": 1}\n' * 30) == 3
    assert "foo" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row",
    [
        '"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1e999}}}]}]',
        '"tool_calls": [{"function": {"name": "f", "arguments": {"x": %s}}}]}]'
        % ("[" * 400 + "]" * 400),
        '"content": "a"}], "reward": 1e300',
        f'"content": "a"}}], "reward": {"9" * 400}',
    ],
)
@pytest.mark.parametrize("shape", ["%s\n%s", "[%s,%s]"])
def test_values_that_no_column_holds(tmp_path: Path, row: str, shape: str) -> None:
    """Too large numbers and too deep nesting refuse their row, and no other."""
    bad = f'{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", {row}}}'
    good = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    name = "in.json" if shape.startswith("[") else "in.jsonl"
    assert convert(tmp_path, shape % (bad, good), "max_reject_fraction=0.5", name=name) == 0
    assert len(written(tmp_path)) == 1 and [place for place, _ in refused(tmp_path)] == [0]


def test_a_value_that_does_not_fit_refuses_its_row_alone(tmp_path: Path) -> None:
    """A seed of 70 bits in one row leaves the other to be written, to all outputs."""
    rows = [chat(1) | {"verl_sft": {"seed": 2**70}}, chat(2)]
    content = "\n".join(map(json.dumps, rows))
    for words in (["select.where=turns > 0"], [f"out={tmp_path / 'set'}"]):
        assert convert(tmp_path, content, *words, "max_reject_fraction=0.5") == 0
    (bad,) = (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(bad)["code"] == "NOT_STORABLE" and json.loads(bad)["row"] == 0


@pytest.mark.parametrize("content", ["", "[]", "\n\n"])
def test_nothing_to_write_replaces_nothing(tmp_path: Path, content: str) -> None:
    """An input without rows ends with code 3, and the files of before stay."""
    (tmp_path / "out.jsonl").write_text("before")
    assert convert(tmp_path, content, name="in.json") == 3
    assert (tmp_path / "out.jsonl").read_text() == "before"


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    """out= equal to in= is a wrong use, by any spelling of the path."""
    path = tmp_path / "out.jsonl"
    path.write_text(LINES)
    (tmp_path / "x").mkdir()
    os.symlink(path, tmp_path / "link.jsonl")
    for name in (path, tmp_path / "link.jsonl", tmp_path / "x" / ".." / "out.jsonl"):
        assert main(["convert", f"in={name}", f"out={path}"]) == 2
    assert path.read_text() == LINES


def test_an_output_that_is_a_loop_of_links(tmp_path: Path) -> None:
    """A path that leads to itself cannot be written: code 5, no traceback."""
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    assert convert(tmp_path, LINES, f"out={tmp_path / 'loop'}") == 5


def test_paths_that_name_no_file(tmp_path: Path) -> None:
    """Devices, numbers, null and objects are refused, with the code of what they are."""
    for word, code in (("/dev/null", 2), ("5", 2), ("[null]", 2), ("[{path: x}]", 2), ("''", 2)):
        assert main(["convert", f"in={word}", f"out={tmp_path / 'out'}"]) == code, word


def test_a_list_of_directories_gives_their_held_out_rows_too(tmp_path: Path) -> None:
    """in=[DIR] is in=DIR."""
    assert convert(tmp_path, LINES, f"out={tmp_path / 'set_v1.5'}") == 0
    for number, word in enumerate((tmp_path / "set_v1.5", f"[{tmp_path / 'set_v1.5'}]")):
        assert main(["convert", f"in={word}", f"out={tmp_path / f'{number}.jsonl'}"]) == 0
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    assert len((tmp_path / "1.jsonl").read_text().splitlines()) == 5


def test_equal_ids_of_different_content_stay(tmp_path: Path) -> None:
    """What is repeated is said by content, not by an id that rows share."""
    rows = [chat(i) | {"verl_sft": {"record_id": "same"}} for i in (1, 2, 2)]
    assert convert(tmp_path, "\n".join(map(json.dumps, rows))) == 0
    assert len(written(tmp_path)) == 2


def train(*words: str) -> int:
    return main(["train", "--dry-run", *words])


@pytest.mark.parametrize(
    "words",
    [
        "--batch_size abc", "--batch_size 0", "--save_steps 0.5", "--lora_r x",
        "--gradient_accumulation_steps", "training.batch_size=abc", "--save_strategy epochs",
        "data.train_files=a,b",
    ],
)  # fmt: skip
def test_wrong_words_are_named(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags that are no numbers, and lists without brackets: code 2 and the key."""
    assert train(*words.split()) == 2
    key = words.split()[0].partition("=")[0].split(".")[-1].strip("-").replace("per_device_", "")
    assert key in capsys.readouterr().err


LISTED = {"d": {"file_name": "d.json", "formatting": "sharegpt"}}


def factory(tmp_path: Path, text: str, listed: Any = LISTED) -> int:
    (tmp_path / "dataset_info.json").write_text(json.dumps(listed), encoding="utf-8-sig")
    path = tmp_path / "run.yaml"
    base = f"model_name_or_path: m\ndataset: d\ndataset_dir: {tmp_path}\noutput_dir: o\n"
    kind = "" if "finetuning_type" in text else "finetuning_type: full\n"
    path.write_text(base + kind + text)
    return train("--llamafactory", str(path))


@pytest.mark.parametrize(
    "text",
    [
        "num_train_epochs: two", "per_device_train_batch_size: abc", "max_samples: many",
        "quantization_bit: four", "save_steps: 0.1", "eval_strategy: sometimes", "lora_rank: x\n"
        "finetuning_type: lora",
    ],
)  # fmt: skip
def test_wrong_llamafactory_values(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value that is no number, or would save at every step zero, is named."""
    assert factory(tmp_path, text) == 2
    assert text.partition(":")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1: 2", "1 has no counterpart"),
        ("save_strategy: no", "save_freq: -1"),
        ("warmup_steps: 0.1", "lr_warmup_steps_ratio: 0.1"),
        ("max_samples: 1e3", "max_rows: 1000"),
        ("deepspeed: {zero_optimization: {stage: 3}}", "ZeRO stage 3"),
        ("resume_from_checkpoint: true", "resume_mode: auto"),
    ],
)
def test_llamafactory_spellings(
    tmp_path: Path, text: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What their files hold beside plain numbers means the same here."""
    assert factory(tmp_path, text) == 0
    said = capsys.readouterr()
    assert line in said.out + said.err


@pytest.mark.parametrize(
    "listed",
    [
        [1], {"d": "d.json"}, {"d": {"file_name": "d.json", "ranking": True}},
        {"d": {"hf_hub_url": "a/b", "subset": "zh"}}, {"d": {"hf_hub_url": "a/b", "split": "x"}},
    ],
)  # fmt: skip
def test_data_sets_that_would_be_other_rows(tmp_path: Path, listed: Any) -> None:
    """What chooses other rows of a data set, or another kind of training, is refused."""
    assert factory(tmp_path, "", listed) == 2


@pytest.mark.parametrize("code", ["def f(:", "1 / 0", "import nothing_like_that"])
def test_a_reader_that_cannot_be_loaded(tmp_path: Path, code: str) -> None:
    """A broken file of the user is a wrong use, whatever is wrong in it."""
    (tmp_path / "mine.py").write_text(code)
    assert convert(tmp_path, LINES, f"from={tmp_path / 'mine.py'}:f") == 2


def test_a_condition_that_fails_on_a_row(tmp_path: Path) -> None:
    """SQL that is fine on most rows and fails on one is a wrong use."""
    where = "select.where=CASE WHEN turns = 0 THEN 1 ELSE json(record_id) END"
    assert convert(tmp_path, LINES, where) == 2


def test_per_turn_counts_what_has_no_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record without an answer is counted, not lost."""
    prompt = {"prompt": [{"role": "user", "content": "q"}], "data_source": "d"}
    rows = "\n".join(map(json.dumps, [prompt, prompt | {"data_source": "e"}]))
    assert convert(tmp_path, rows, "view=per_turn") == 3
    assert "nothing_learned 2" in capsys.readouterr().out


PICTURE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}
ANSWERED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": [{"role": "user", "content": [PICTURE]}, ANSWERED[1]]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"},
                                                    {"type": "video", "video": "v"}]}]},
         "messages[0].content[1]"),
        ({"messages": ANSWERED, "images": ["a.png"]}, "images"),
        (chat(1) | {"videos": ["a.mp4"]}, "videos"),
        (chat("<image>") | {"image": "a.png"}, "image"),
        ({"instruction": "<image> what?", "output": "a", "images": '["a.png"]'}, "images"),
    ],
)  # fmt: skip
def test_rows_that_are_not_text_alone(tmp_path: Path, row: dict[str, Any], field: str) -> None:
    """Images, videos and sound are refused row by row; the same rows without them are used."""
    assert convert(tmp_path, f"{json.dumps(row)}\n{LINES}", "max_reject_fraction=0.5") in (0, 3)
    text = (tmp_path / "out.jsonl.rejected.jsonl").read_text()
    (bad,) = [json.loads(line) for line in text.splitlines() if json.loads(line)["row"] == 0]
    assert (bad["field"], bad["code"]) == (field, "NOT_TEXT")


@pytest.mark.parametrize("more", [{"images": []}, {"image": "docker.io/x"}, {"videos": None}])
def test_other_things_of_those_names(tmp_path: Path, more: dict[str, Any]) -> None:
    """An empty column of images, or an `image` that no text mentions, is no reason."""
    assert convert(tmp_path, json.dumps(chat("an <img> tag") | more)) == 0
    assert len(written(tmp_path)) == 1


@pytest.mark.parametrize(
    ("given", "near"),
    [({"columns": {"mesages": "a"}}, "messages"), ({"tags": {"user": "a"}}, "user")],
)
def test_unknown_names_of_columns_and_tags(
    tmp_path: Path, given: dict[str, Any], near: str
) -> None:
    """A mistyped key of `columns` or `tags` is not passed over."""
    (tmp_path / "a.jsonl").write_text(LINES)
    with pytest.raises(UsageError, match=f"Did you mean '{near}"):
        resolve_sources({"path": str(tmp_path / "a.jsonl"), **given}, split="train")
