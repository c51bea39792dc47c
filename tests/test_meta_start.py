"""Weights that every rank reads by rows: the same bits as in a model that is loaded whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train_ranks import run_ranks, steps_of, toy_config, toy_model, weights_of
from verl_sft.distributed.sharding import gather_full
from verl_sft.model.build import build_model
from verl_sft.model.meta import hollow_model, list_tensors, match

COMMON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def other_model(base: Path, out: Path, kind: str, *, shards: str = "5GB", **changes: Any) -> Path:
    """A random model of another architecture with the tokenizer of `base`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**COMMON, **changes})
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    AutoModelForCausalLM.from_config(config).save_pretrained(out, max_shard_size=shards)
    return out


KINDS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen2", {"tie_word_embeddings": True}, {}),
    ("qwen2", {"tie_word_embeddings": False, "shards": "40KB"}, {"engine__model_dtype": "bf16"}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"model__lora_rank": 4}),
    ("gemma2", {}, {"engine__fsdp_size": 1, "engine__meta_start": "true"}),
    ("qwen3", {"tie_word_embeddings": True}, {"engine__fsdp_size": 2, "model__lora_rank": 4}),
]


@pytest.mark.parametrize(("kind", "sizes", "changes"), KINDS)
def test_rows_have_the_bits_of_the_whole(
    model: Path, tmp_path: Path, kind: str, sizes: dict[str, Any], changes: dict[str, Any]
) -> None:
    """All parameters, adapters and buffers of the sharded model equal the ordinary load."""
    path = other_model(model, tmp_path / "model", kind, **sizes)
    config = toy_config(path, tmp_path / "run", trainer__total_training_steps=1, **changes)
    half = changes.get("engine__model_dtype") == "bf16"

    def compare(trainer: Any) -> None:
        dtype = torch.bfloat16 if half else torch.float32
        seed = config.trainer.seed
        whole = build_model(config.model, dtype=dtype, attention="eager", seed=seed).loss_model
        ours = dict(trainer.model.named_parameters())
        wanted = dict(whole.named_parameters())
        assert ours.keys() == wanted.keys()
        for name, parameter in wanted.items():
            full = gather_full(ours[name])
            assert full.dtype == parameter.dtype and torch.equal(full, parameter), name
            assert ours[name].requires_grad == parameter.requires_grad
        buffers, expected = dict(trainer.model.named_buffers()), dict(whole.named_buffers())
        assert buffers.keys() == expected.keys()
        assert all(torch.equal(buffers[name], expected[name]) for name in expected)

    reports = run_ranks(
        config, size=4 if changes.get("engine__fsdp_size") == 2 else 2, hook=compare
    )
    assert all(r["code"] == 0 for r in reports), "\n".join(r["error"] for r in reports)


@pytest.mark.parametrize("changes", [{}, {"model__lora_rank": 4, "model__lora_dropout": 0.1}])
def test_the_run_is_the_same(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Losses, gradient norms and weights of a whole run are those of the ordinary load."""
    found = []
    for start in ("auto", "false"):
        config = toy_config(model, tmp_path / start, engine__meta_start=start, **changes)
        reports = run_ranks(config, size=2)
        assert [r["code"] for r in reports] == [0, 0], reports
        found.append(
            (steps_of(config, "train/loss", "train/grad_norm"), weights_of(tmp_path / start))
        )
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[1][1])


def test_no_values_before_they_are_read(model: Path, tmp_path: Path) -> None:
    """A hollow model has the shapes of the whole one and one number of storage per parameter."""
    config = toy_config(model, tmp_path)
    built = build_model(config.model, dtype=torch.float32, attention="sdpa", seed=0, on_meta=True)
    assert built.slots and not built.whole_because
    assert all(p.is_meta for p in built.loss_model.parameters())
    hollow = hollow_model(config.model, path=str(model), dtype=torch.float32, attention="sdpa")
    assert not isinstance(hollow, str)
    assert all(p.untyped_storage().nbytes() == 4 for p in hollow[0].parameters())


def test_what_does_not_match_is_loaded_whole(model: Path, tmp_path: Path) -> None:
    """Keys that differ, experts that are merged and values held twice are found beforehand."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(model)
    tensors = list_tensors(model)
    assert not isinstance(match(causal, tensors=tensors), str)
    key = next(k for k in tensors if k.endswith("q_proj.weight"))
    file, shape = tensors[key]
    for wrong in (
        {k: v for k, v in tensors.items() if k != key},
        {**tensors, key: (file, (*shape[:-1], 1))},
        {**tensors, "extra.weight": (file, (1,))},
    ):
        assert isinstance(match(causal, tensors=wrong), str)

    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    shared = {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}
    moe = other_model(model, tmp_path / "moe", "qwen2_moe", **experts, **shared)
    twice = other_model(model, tmp_path / "twice", "qwen2", tie_word_embeddings=True)
    values = load_file(twice / "model.safetensors")
    values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
    save_file(values, twice / "model.safetensors", metadata={"format": "pt"})
    for path, said in ((moe, "experts"), (twice, "2 times")):
        config = toy_config(path, tmp_path / "run").model
        built = build_model(config, dtype=torch.float32, attention="sdpa", seed=0, on_meta=True)
        assert not built.slots and said in built.whole_because


def test_demanded_and_impossible(model: Path, tmp_path: Path) -> None:
    """`true` is refused with the reason where `auto` loads the whole model."""
    path = other_model(model, tmp_path / "twice", "qwen2", tie_word_embeddings=True)
    from safetensors.torch import load_file, save_file

    values = load_file(path / "model.safetensors")
    values["other"] = torch.zeros(1)
    save_file(values, path / "model.safetensors", metadata={"format": "pt"})
    config = toy_config(path, tmp_path / "run", engine__meta_start="true")
    reports = run_ranks(config, size=2)
    assert [r["code"] for r in reports] == [2, 2]
    assert "other is no parameter" in reports[0]["error"]
