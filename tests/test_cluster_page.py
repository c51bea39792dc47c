"""The recipes of docs/cluster.md: they parse, and every flag, key and module in them is real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from verl_sft.config.load import config_keys
from verl_sft.config.train import TrainConfig
from verl_sft.trainer.status import true_code, write_status

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "cluster.md").read_text()


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def shell_scripts() -> list[str]:
    """Shell blocks, and the scripts inside of the manifests."""
    return [*blocks("bash"), *(text for kind in manifests() for text in commands(kind))]


def manifests() -> list[dict]:
    return [kind for block in blocks("yaml") for kind in yaml.safe_load_all(block)]


def commands(node: object) -> list[str]:
    if isinstance(node, list):
        return [text for item in node for text in commands(item)]
    if not isinstance(node, dict):
        return []
    own = [node["command"][-1]] if "command" in node else []
    return own + [text for item in node.values() for text in commands(item)]


def test_manifests_and_scripts_parse() -> None:
    """YAML has the kinds that are spoken of; bash accepts every script."""
    kinds = [kind["kind"] for kind in manifests()]
    assert kinds == ["Service", "Job", "PyTorchJob"]
    assert len(shell_scripts()) == 5  # the two nodes of the PyTorchJob are one
    for script in shell_scripts():
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def unknown_flags(words: list[str]) -> list[str]:
    """Options that torchrun does not have."""
    from torch.distributed.run import get_args_parser

    known = get_args_parser()._option_string_actions
    return [w for w in words if w.partition("=")[0] not in known]


def unknown_keys(words: list[str]) -> list[str]:
    keys = dict(config_keys(TrainConfig))
    return [w for w in words if w.partition("=")[0] not in keys]


@pytest.mark.parametrize("number", range(5))
def test_every_torchrun_line_is_real(number: int) -> None:
    """Its flags are torchrun's, its module is ours, its keys are keys."""
    text = shell_scripts()[number].replace("\\\n", " ")
    (call,) = re.findall(r"torchrun (--.*)", text)
    options, _, rest = call.partition(" -m ")
    assert unknown_flags(options.split()) == []
    module, *words = [w for w in rest.split() if w != "&"]
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
    assert len(words) == 4 and unknown_keys(words) == []


def test_wrong_recipes_are_seen() -> None:
    """Negative control."""
    assert unknown_flags(["--nnodes=2", "--nodes=2"]) == ["--nodes=2"]
    assert unknown_keys(["data.train_files=x", "data.trainfiles=x"]) == ["data.trainfiles=x"]


def test_the_true_exit_code(tmp_path: Path) -> None:
    """Torchrun's code stands only for success, or where the run left none."""
    assert true_code(tmp_path, launcher_code=1) == 1
    write_status(tmp_path, state="running", code=None)
    assert true_code(tmp_path, launcher_code=1) == 1
    write_status(tmp_path, state="preempted", code=75)
    assert true_code(tmp_path, launcher_code=1) == 75
    assert true_code(tmp_path, launcher_code=0) == 0
    command = [sys.executable, "-m", "verl_sft.trainer.status", str(tmp_path), "1"]
    assert subprocess.run(command, cwd=ROOT).returncode == 75
