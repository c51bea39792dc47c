"""The rules of docs/architecture.md, read from the source: layers, sizes, light imports."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "verl_sft"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part may import beside itself, the standard library and third parties.
BASE = {"types", "errors", "registry", "safe_io", "hashed_file", "processes", "__init__"}
SMALL = BASE | {"config", "prompts"}
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(BASE, BASE),
    "config": BASE,
    "prompts": BASE,
    "envs": SMALL,
    "policies": SMALL,
    "records": SMALL,
    "collect": SMALL | {"envs", "policies", "records"},
    "data": SMALL | {"records"},
    "model": SMALL,
    "distributed": SMALL,
    "trainer": SMALL | {"data", "records", "model", "distributed", "export"},
    "export": SMALL | {"model", "distributed"},
    "evaluate": SMALL | {"collect", "records", "envs", "policies"},
    "audit": SMALL | {"data", "records"},
}
ENTRY_POINTS = {"__main__", "cli", "commands"}  # the only places where both halves meet
NO_TORCH = ("verl_sft", "verl_sft.records.io", "verl_sft.collect.collector", "verl_sft.cli",
            "verl_sft.envs.alfworld", "verl_sft.policies.expert", "verl_sft.evaluate.evaluator",
            "verl_sft.config.load")  # fmt: skip
HEAVY = ("torch", "transformers", "pandas", "textworld", "alfworld")
FORBIDDEN_CALLS = {"eval", "exec"}
FORBIDDEN_MODULES = {"pickle", "dill", "marshal", "shelve"}


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """The parts of verl_sft that a file imports, at any depth of the code."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [n.split(".")[1] if "." in n else "__init__" for n in names
                  if n.split(".")[0] == "verl_sft"]  # fmt: skip
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    """A file imports only from the parts its layer may see."""
    part = part_of(path)
    if part in ENTRY_POINTS:
        return
    allowed = ALLOWED[part] | {part}
    wrong = [name for name in imports_of(path) if name not in allowed]
    assert not wrong, f"{path.relative_to(ROOT)} may not import {wrong}"


def test_the_layer_rule_can_fail() -> None:
    """Negative control: an upward import is seen as one."""
    assert "trainer" not in ALLOWED["records"]
    assert "trainer" in imports_of(PACKAGE / "commands" / "train.py")


def test_sizes() -> None:
    """No file over 400 lines, no function over 80, a median file of at most 150 lines."""
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > 400}
    assert not long, long
    assert statistics.median(n for n in lengths.values() if n > 1) <= 150
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                limit = {"train_step": 40, "fit": 50}.get(node.name, 80)
                assert size <= limit, f"{path.relative_to(ROOT)}:{node.name} has {size} lines"


def test_every_argument_is_annotated() -> None:
    """Every argument of every function has a type."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                bare = [a.arg for a in arguments if a.annotation is None]
                assert set(bare) <= {"self", "cls"}, f"{path}:{node.name} {bare}"


def test_nothing_unsafe() -> None:
    """No pickle, no torch.load, no eval or exec, no shell, no plain yaml.load."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & FORBIDDEN_MODULES, where
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES, where
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in FORBIDDEN_CALLS | {"torch.load", "yaml.load"}, where
                shell = [k for k in node.keywords if k.arg == "shell"]
                assert not shell, where


@pytest.mark.parametrize("module", NO_TORCH)
def test_light_imports(module: str) -> None:
    """The collecting half and the command line start without torch and its like."""
    code = (
        f"import sys, {module}\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_each_file_of_the_trainer_answers_a_question() -> None:
    """The table of docs/architecture.md leads to every file of the largest folder."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page[page.index("## Where to look") : page.index("## Seams")]
    names = {str(p.relative_to(ROOT)) for p in FILES if part_of(p) == "trainer"}
    absent = [name for name in sorted(names) if f"`{name}" not in table]
    assert absent == ["verl_sft/trainer/__init__.py"]


def test_text_is_ascii() -> None:
    """Source and docs hold ASCII only; no file holds a path of the machine it was made on."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        check=True, cwd=ROOT, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in names:
        path = ROOT / name
        if path.suffix not in {".py", ".md", ".sh", ".toml", ".yaml", ""} or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), f"{name}: not ASCII"
