"""Exports: what a user loads gives the logits of the model that was trained."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train_ranks import run_ranks, toy_config, toy_model
from verl_sft.config.collect import MakeModelConfig, PolicyConfig
from verl_sft.config.train import ModelConfig
from verl_sft.errors import InputError, UsageError
from verl_sft.export.hf import reopened_logits
from verl_sft.model.build import load_causal
from verl_sft.model.tiny import make_model
from verl_sft.policies.hf_local import make_hf_policy

PROBE = torch.arange(3, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def train(model: Path, out: Path, *, size: int, **changes: Any) -> dict[str, Any]:
    config = toy_config(model, out, trainer__export=True, optim__lr=1e-2, **changes)
    reports = run_ranks(config, size=size)
    assert [r["code"] for r in reports] == [0] * size, reports
    manifest: dict[str, Any] = json.loads((out / "huggingface/manifest.json").read_text())
    return manifest


def test_full_export_is_the_trained_model(model: Path, tmp_path: Path) -> None:
    """From two ranks: no difference to the gathered weights, rounding to the live model."""
    manifest = train(model, tmp_path / "run", size=2)
    assert manifest["max_logit_difference"] == 0.0
    assert manifest["max_logit_difference_live"] < 1e-5
    folder = tmp_path / "run" / "huggingface"
    assert not torch.allclose(reopened_logits(folder, PROBE), reopened_logits(model, PROBE))
    facts = json.loads((folder / "verl_sft.json").read_text())
    assert facts["history_style"] == "windowed" and facts["base_model"] == str(model)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(model).chat_template


def test_lora_export_respects_alpha(model: Path, tmp_path: Path) -> None:
    """Merged weights and adapter agree; an adapter with another alpha does not (control)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    manifest = train(model, tmp_path / "run", size=2, model__lora_rank=4, model__lora_alpha=24)
    assert manifest["max_logit_difference"] < 1e-5
    assert manifest["max_logit_difference_live"] < 1e-5
    folder = tmp_path / "run" / "huggingface"
    merged = reopened_logits(folder, PROBE)

    def adapted() -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
        tuned = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
        with torch.no_grad():
            logits: torch.Tensor = tuned(input_ids=PROBE[None]).logits[0]
        return logits

    assert torch.allclose(adapted(), merged, atol=1e-5)
    path = folder / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    assert settings["lora_alpha"] == 24 and settings["r"] == 4
    path.write_text(json.dumps({**settings, "lora_alpha": 1}))
    assert not torch.allclose(adapted(), merged, atol=1e-3)


def test_export_is_made_up_for(model: Path, tmp_path: Path) -> None:
    """A finished run whose export is missing writes it when started again."""
    train(model, tmp_path / "run", size=1)
    import shutil

    shutil.rmtree(tmp_path / "run" / "huggingface")
    manifest = train(model, tmp_path / "run", size=1)
    assert manifest["max_logit_difference"] == 0.0


def test_a_damaged_model_folder_is_named(model: Path, tmp_path: Path) -> None:
    """No weights, no tokenizer, cut weights, another size: one error with the folder, never more.

    The trainer and the policy refuse alike.
    """

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(model, tmp_path / name))

    next(damaged("weights").glob("*.safetensors")).unlink()
    for path in damaged("tokenizer").glob("tokenizer*"):
        path.unlink()
    os.truncate(next(damaged("cut").glob("*.safetensors")), 3000)
    config = damaged("size") / "config.json"
    changed = {**json.loads(config.read_text()), "hidden_size": 32}
    config.write_text(json.dumps(changed))
    for name in ("weights", "tokenizer", "cut", "size", "absent/./."):
        where = str(tmp_path / name)
        with pytest.raises(UsageError, match=re.escape(where)):
            load_causal(ModelConfig(partial_pretrain=where), dtype=torch.float32)
        with pytest.raises((UsageError, InputError), match=re.escape(where)):
            make_hf_policy(PolicyConfig(name="hf", model=where))


def test_make_model_is_deterministic(model: Path, tmp_path: Path) -> None:
    """The same data and seed give the same bytes, another seed other weights; digits are single.

    A blank belongs to the digit behind it, also in the tokenizer as it is loaded.
    """
    data = str(model.parent / "data")
    for name, seed, place in (("a", 0, data), ("b", 0, data[:-1] + "*"), ("c", 1, data)):
        make_model(
            MakeModelConfig(
                out=str(tmp_path / name), data=place, size="nano", vocab_size=300, seed=seed
            )
        )
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert "tokenizer.json" in files and "model.safetensors" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in "ac"]
    assert weights[0] != weights[1]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert len(tokenizer.tokenize("1234")) == 4
    numbered = tokenizer("shelf 12, 3")["input_ids"]
    assert [tokenizer.decode([i]) for i in numbered][-4:] == [" 1", "2", ",", " 3"]
    assert len(tokenizer) <= 300
    text = "tab\t \u00e9\u4e2d  <think>x</think>\n12"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(UsageError, match="exists"):
        make_model(MakeModelConfig(out=str(tmp_path / "a"), data=data, size="nano"))


def test_chat_template(model: Path) -> None:
    """ChatML with system, tools and tool messages; a prefix renders to a prefix."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A", "tool_calls": [call]},
        {"role": "tool", "content": "T"},
    ]
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)
    assert text.startswith("<|im_start|>system\nS\n\n# Tools\n")
    assert '<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call><|im_end|>' in text
    shorter = tokenizer.apply_chat_template(
        messages[:2], tools=[tool], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(shorter)
