"""Conversion to another tool's format and back changes no trained token and no weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.chat_templates import read_template, template_for
from verl_sft.cli import main
from verl_sft.config.train import DataConfig, MultiturnConfig
from verl_sft.data.load import load_samples
from verl_sft.data.template import TokenizerSpec
from verl_sft.data.tokenizer import chatml
from verl_sft.records.io import write_parquet
from verl_sft.records.read import read_records
from verl_sft.records.schema import SFTRecord
from verl_sft.types import Message

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
CHATML: TokenizerSpec = template_for(chatml(), name="chatml").spec
QWEN3: TokenizerSpec = template_for(read_template("qwen3.jinja"), name="qwen3").spec
FORMATS = ("sharegpt", "alpaca", "envscaler", "pettingllms")
Samples = list[tuple[list[int], list[float]]]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "K"}}}
TOOLS = SFTRecord(
    messages=(
        Message("system", "You are terse."),
        Message("user", "Is it raining in K?"),
        Message("assistant", "Let me see.", reasoning_content="A tool says.", tool_calls=(CALL,)),
        Message("tool", '{"rain": true}', tool_call_id="c1", name="weather"),
        Message("assistant", "Yes.", reasoning_content="It rains."),
        Message("user", "Thanks <think> & so on"),
        Message("assistant", "Welcome."),
    ),
    record_id="weather",
    tools=(WEATHER,),
    supervise=(2, 4, 6),
    weights=(1.0, 0.5, 2.0),
    sample_weight=0.25,
)


def samples(
    files: Sequence[Path], cache: Path, spec: TokenizerSpec, *, multiturn: bool = True
) -> Samples:
    """Token ids and weights of every sample, in any order."""
    store = load_samples(
        files,
        tokenizer=spec,
        config=DataConfig(multiturn=MultiturnConfig(enable=multiturn), max_length=1 << 16),
        cache_dir=cache,
        num_workers=1,
    )
    found = [store[i] for i in range(len(store))]
    return sorted((np.asarray(s.input_ids).tolist(), np.asarray(s.weights).tolist()) for s in found)


def there_and_back(source: Path, folder: Path, kind: str) -> Path:
    """`source` as `kind`, and that as our own parquet."""
    foreign, back = folder / f"{kind}.json", folder / f"{kind}_back.parquet"
    assert main(["convert", f"in={source}", f"out={foreign}", f"to={kind}"]) == 0
    assert main(["convert", f"in={foreign}", f"out={back}"]) == 0
    return back


@pytest.mark.parametrize("kind", [*FORMATS, "agentrl", "verl_pairs"])
def test_collected_rows(tmp_path: Path, kind: str) -> None:
    """The sample data: the same records, tokens and weights, as dialogues and as pairs."""
    source = SAMPLE / "train.parquet"
    back = there_and_back(source, tmp_path, kind)
    given = [replace(r, source="") for r in read_records(source)]
    assert [replace(r, source="") for r in read_records(back)] == given
    for multiturn in (True, False):
        wanted = samples([source], tmp_path / "a", CHATML, multiturn=multiturn)
        assert samples([back], tmp_path / "b", CHATML, multiturn=multiturn) == wanted
        foreign = [tmp_path / f"{kind}.json"]
        assert samples(foreign, tmp_path / "c", CHATML, multiturn=multiturn) == wanted


@pytest.mark.parametrize("kind", FORMATS)
def test_calls_and_thoughts(tmp_path: Path, kind: str) -> None:
    """Tools, calls, thoughts and weights reach the tokens unchanged.

    Alpaca alone has one row per learned turn; rows of one episode are folded when they are read.
    """
    write_parquet(tmp_path / "in.parquet", [TOOLS])
    back = there_and_back(tmp_path / "in.parquet", tmp_path, kind)
    wanted = samples([tmp_path / "in.parquet"], tmp_path / "a", QWEN3)
    assert any(w > 0 for _, weights in wanted for w in weights)
    assert samples([back], tmp_path / "b", QWEN3) == wanted
    assert samples([tmp_path / f"{kind}.json"], tmp_path / "c", QWEN3) == wanted


def test_an_edited_text_is_what_is_trained(tmp_path: Path) -> None:
    """A text changed in the ShareGPT file wins over what is kept beside it."""
    write_parquet(tmp_path / "in.parquet", [TOOLS])
    there_and_back(tmp_path / "in.parquet", tmp_path, "sharegpt")
    file = tmp_path / "sharegpt.json"
    file.write_text(file.read_text().replace('"value": "Welcome."', '"value": "Any time."'))
    (record,) = read_records(file)
    assert record.messages[-1].content == "Any time."
    assert record.messages[:-1] == TOOLS.messages[:-1] and record.weights == TOOLS.weights


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_kind_of_file_gives_the_record_back(tmp_path: Path, kind: str, suffix: str) -> None:
    """Whatever file a format is written to, the reader recognises it and loses nothing."""
    last = replace(TOOLS, supervise=(6,), weights=(2.0,), group_id="g", reward=0.5, success=True)
    write_parquet(tmp_path / "in.parquet", [last])
    out = tmp_path / f"out.{suffix}"
    assert main(["convert", f"in={tmp_path / 'in.parquet'}", f"out={out}", f"to={kind}"]) == 0
    (record,) = read_records(out)
    assert replace(record, source="") == last
