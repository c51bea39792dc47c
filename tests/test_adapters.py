"""Adapters: each kind is trained and rebuilt, one can be started from, foreign ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train_ranks import toy_config, toy_model
from verl_sft.errors import UsageError
from verl_sft.export.hf import gather_trained, rebuild
from verl_sft.model.build import BuiltModel, build_model

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"model__use_rslora": True},
    "dora": {"model__use_dora": True},
    "pissa": {"model__lora_init": "pissa"},
    "olora": {"model__lora_init": "olora"},
}
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("adapters"))


def built(model: Path, **changes: Any) -> BuiltModel:
    config = toy_config(model, Path("unused"), model__lora_rank=4, **changes).model
    return build_model(config, dtype=torch.float32, attention="eager", seed=0)


def logits(causal: Any) -> torch.Tensor:
    causal.eval()
    with torch.no_grad():
        found: torch.Tensor = causal(input_ids=IDS, use_cache=False).logits
    return found


def shake(made: BuiltModel) -> BuiltModel:
    """Move the trained parameters, as training would."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in made.loss_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return made


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_start_as_the_base_and_export_what_they_learned(
    model: Path, tmp_path: Path, name: str
) -> None:
    """Before training the logits are the base's; afterwards those of the rebuilt, merged model."""
    base = build_model(
        toy_config(model, Path("unused")).model, dtype=torch.float32, attention="eager", seed=0
    )
    made = built(model, **VARIANTS[name])
    torch.testing.assert_close(logits(made.causal), logits(base.causal), atol=1e-4, rtol=1e-4)
    shake(made)
    config = toy_config(model, Path("unused"), model__lora_rank=4, **VARIANTS[name]).model
    again, peft = rebuild(config, state=gather_trained(made.loss_model))
    assert peft is not None
    expected = logits(made.causal)
    assert float((expected - logits(base.causal)).abs().max()) > 1e-2
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)
    merged = peft.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


def test_variants_differ(model: Path) -> None:
    """Negative control: with the same trained change each kind is another model."""
    found = [logits(shake(built(model, **v)).causal) for v in VARIANTS.values()]
    for index, one in enumerate(found):
        assert all(float((one - other).abs().max()) > 1e-4 for other in found[:index])


def saved_adapter(model: Path, folder: Path) -> tuple[Path, torch.Tensor]:
    """An adapter of the model in PEFT's format, and the logits of both."""
    made = shake(built(model))
    assert made.peft is not None
    made.peft.save_pretrained(str(folder))
    return folder, logits(made.causal)


def test_training_starts_from_an_adapter(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model.lora_adapter_path`, `~` in it too: the logits it had, and its matrices learn on."""
    monkeypatch.setenv("HOME", str(tmp_path))
    _, expected = saved_adapter(model, tmp_path / "adapter")
    config = toy_config(model, Path("unused")).model
    config.lora_adapter_path = "~/adapter"
    made = build_model(config, dtype=torch.float32, attention="eager", seed=1)
    torch.testing.assert_close(logits(made.causal), expected, atol=1e-5, rtol=1e-5)
    trained = [n for n, p in made.loss_model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_an_adapter_of_another_base_is_refused(model: Path, tmp_path: Path) -> None:
    """Other shapes, more layers, or pickled weights: the error names the base it was made for."""
    import shutil

    (tmp_path / "other").mkdir()
    folder, _ = saved_adapter(model, tmp_path / "adapter")
    larger = toy_model(tmp_path / "other", size="tiny")

    def start(base: Path, adapter: Path) -> None:
        config = toy_config(base, Path("unused")).model
        config.lora_adapter_path = str(adapter)
        build_model(config, dtype=torch.float32, attention="eager", seed=0)

    with pytest.raises(UsageError, match=r"does not fit[^\0]*It was made for"):
        start(larger, folder)
    deeper = tmp_path / "deeper"
    shutil.copytree(folder, deeper)
    from safetensors.torch import load_file, save_file

    weights = load_file(deeper / "adapter_model.safetensors")
    name = min(weights)
    save_file(
        {**weights, name.replace("layers.0", "layers.99"): weights[name].clone()},
        deeper / "adapter_model.safetensors",
    )
    with pytest.raises(UsageError, match=r"layers\.99"):
        start(model, deeper)
    (deeper / "adapter_config.json").write_text("[")
    with pytest.raises(UsageError, match="no adapter configuration"):
        start(model, deeper)
    (deeper / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors"):
        start(model, deeper)
    with pytest.raises(UsageError, match=r"adapter_config\.json"):
        start(model, tmp_path)


def test_the_saved_adapter_names_its_base(model: Path, tmp_path: Path) -> None:
    """What the refusal reads is what PEFT writes."""
    folder, _ = saved_adapter(model, tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model)
