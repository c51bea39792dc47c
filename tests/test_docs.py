"""The pages say nothing that is not there: tests, keys, files, targets and commands exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from verl_sft.cli import COMMANDS, main
from verl_sft.config.collect import (
    CollectConfig,
    EvaluateConfig,
    MakeGamesConfig,
    MakeModelConfig,
)
from verl_sft.config.dialects import ALIASES, NO_EFFECT
from verl_sft.config.doctor import DoctorConfig
from verl_sft.config.export import ExportConfig
from verl_sft.config.inspect import InspectConfig
from verl_sft.config.load import config_keys
from verl_sft.config.plan import PlanConfig
from verl_sft.config.quickstart import QuickstartConfig
from verl_sft.config.train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
SCHEMAS = (CollectConfig, DoctorConfig, EvaluateConfig, ExportConfig, InspectConfig,
           MakeGamesConfig, MakeModelConfig, PlanConfig, QuickstartConfig, TrainConfig)  # fmt: skip
TREES = [dict(config_keys(schema)) for schema in SCHEMAS]
SECTIONS = {key for tree in TREES for key, kind in tree.items() if kind and "." not in key}
FOREIGN = {**ALIASES, **NO_EFFECT}  # allowed where the row says what becomes of them
SAYS_FOREIGN = ("read as", "no effect")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def spans(text: str) -> list[str]:
    """What stands in backticks outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", prose)


def code_lines(text: str) -> list[str]:
    """Lines of fenced blocks, with continued lines joined."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def tables(text: str) -> Iterator[list[list[str]]]:
    """Each table as rows of cells, the header first and without the line of dashes."""
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        rows = [
            [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.splitlines()
        ]
        yield [rows[0], *rows[2:]]


# Tests that docs/features.md names.


@cache
def functions_of(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def missing_tests(text: str) -> list[str]:
    """`tests/FILE.py::NAME` references to what does not exist."""
    references = re.findall(r"(tests/\w+\.py)::(\w+)", text)
    return [
        f"{file}::{name}"
        for file, name in references
        if not (ROOT / file).is_file() or name not in functions_of(ROOT / file)
    ]


@each_page
def test_named_tests_exist(page: Path) -> None:
    """Every `tests/FILE.py::NAME` is a function of that file."""
    assert missing_tests(page.read_text()) == []


def feature_rows(text: str) -> list[list[str]]:
    return [row for table in tables(text) if table[0][0] == "id" for row in table[1:]]


def feature_errors(rows: list[list[str]]) -> list[str]:
    """Rows with an unknown state, and rows that work without anything that shows it."""
    wrong = []
    for row in rows:
        state = row[2].partition(":")[0]
        known = state in ("works", "partly", "not yet") and (state != "works" or row[2] == state)
        shown = re.search(r"`(tests/\w+\.py::\w+|make [\w-]+|verl-sft [\w-]+[^`]*)`", row[3])
        if len(row) != 4 or not known or (state == "partly" and ":" not in row[2]):
            wrong.append(f"{row[0]}: {row[2]}")
        elif state == "works" and not shown:
            wrong.append(f"{row[0]}: nothing shows it")
    return wrong


def test_every_feature_has_a_state_and_what_works_is_shown() -> None:
    """Rows 001 to 198, each once and in order; "works" names a test or a command."""
    rows = feature_rows((ROOT / "docs" / "features.md").read_text())
    assert [row[0] for row in rows] == [f"{n:03}" for n in range(1, 199)]
    assert feature_errors(rows) == []


# Keys in the tables whose first column is headed "key".


def key_tables(text: str) -> Iterator[list[list[str]]]:
    for table in tables(text):
        if table[0][0] == "key":
            yield table[1:]


def keys_of(rows: list[list[str]]) -> set[str]:
    """Keys that a table speaks of: all words of the first column, dotted ones of the others."""
    found = set()
    for row in rows:
        own = [w for span in spans(row[0]) for w in span.split()]
        others = [s for cell in row[1:] for s in spans(cell) if re.match(r"[a-z_]+\.[a-z_]", s)]
        others = [s for s in others if s.partition(".")[0] in SECTIONS]
        for word in [*own, *others]:
            key = word.partition("=")[0].removeprefix("+").removesuffix(".*")
            if key in FOREIGN and any(note in " ".join(row[1:]) for note in SAYS_FOREIGN):
                continue
            found.add(key)
    return found


def unknown_keys(keys: set[str]) -> set[str]:
    """Keys that are left over in the config tree that knows most of them."""
    return min((keys - set(tree) for tree in TREES), key=len)


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)
def test_documented_keys_exist(page: Path) -> None:
    """All keys of a key table belong to one command's config tree."""
    for rows in key_tables(page.read_text()):
        assert keys_of(rows) and unknown_keys(keys_of(rows)) == set()


# Files, make targets and commands.


def missing_links(page: Path, text: str) -> list[str]:
    """Targets of relative links that are not there."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    paths = [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:", t)]
    return [p for p in paths if p and not (page.parent / p).exists()]


@each_page
def test_linked_files_exist(page: Path) -> None:
    """Pages and pictures that a page links to are in the repository."""
    assert missing_links(page, page.read_text()) == []


def commands(text: str, program: str) -> set[str]:
    """The word after `program` wherever it stands in code."""
    pieces = [*spans(text), *code_lines(text)]
    pattern = re.compile(rf"(?:^|[\s/]){program}\s+([a-z][a-z-]*)")
    return {name for piece in pieces for name in pattern.findall(piece.partition(" #")[0])}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@each_page
def test_make_targets_exist(page: Path) -> None:
    """Every `make TARGET` is a target of the Makefile."""
    assert commands(page.read_text(), "make") <= make_targets()


@each_page
def test_commands_exist(page: Path) -> None:
    """Every `verl-sft COMMAND` is one."""
    assert commands(page.read_text(), "verl-sft") <= set(COMMANDS)


def command_words(text: str) -> list[list[str]]:
    """The words of every verl-sft call in a fenced block; `[key=value ...]` is left out."""
    calls = []
    for line in code_lines(text):
        words = shlex.split(re.sub(r"\[key=value \.\.\.\]", "", line), comments=True)
        if words and words[0].rpartition("/")[2] == "verl-sft":
            calls.append(words[1:])
    return calls


@each_page
def test_documented_calls_are_understood(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every call in a fenced block passes its own `--dry-run`."""
    for words in command_words(page.read_text()):
        assert main([*words, "--dry-run"]) == 0, (words, capsys.readouterr().err)


def test_wrong_pages_are_seen() -> None:
    """Negative control: each check finds a reference to something that is not there."""
    assert missing_tests("`tests/test_docs.py::test_no` `tests/test_no.py::test_x`") == [
        "tests/test_docs.py::test_no",
        "tests/test_no.py::test_x",
    ]
    assert {p.stem for p in DOCS if list(key_tables(p.read_text()))} >= {"collect", "train"}
    head = "| key | |\n|---|---|\n"
    (rows,) = key_tables(head + "| `policy=hf policy.modle=X` | see `rollout.sed`, `a.json` |\n")
    assert unknown_keys(keys_of(rows)) == {"policy.modle", "rollout.sed"}
    (rows,) = key_tables(head + "| `model.path` | a path |\n| `optim.warmup_style` | read as x |\n")
    assert keys_of(rows) == {"model.path"} == unknown_keys(keys_of(rows))
    assert missing_links(ROOT / "README.md", "![a](no.png) [b](docs/no.md#x) [c](https://x)") == [
        "no.png",
        "docs/no.md",
    ]
    text = "`make nothing`\n```bash\nmake test  # make up\n.venv/bin/verl-sft train\n```\n"
    assert commands(text, "make") - make_targets() == {"nothing"}
    assert commands("`verl-sft transmute` or `verl-sft train`", "verl-sft") - set(COMMANDS) == {
        "transmute"
    }
    assert command_words(text) == [["train"]]
    rows = [["1", "x", "works", ""], ["2", "x", "maybe", ""], ["3", "x", "partly", ""]]
    assert [error[0] for error in feature_errors(rows)] == ["1", "2", "3"]
