"""Low-rank adapters through PEFT: put on a model, or loaded from a folder to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from verl_sft.config.train import ModelConfig
from verl_sft.errors import UsageError
from verl_sft.model.targets import check_targets, layer_names

_WEIGHTS = "adapter_model.safetensors"


def wants_lora(config: ModelConfig) -> bool:
    """Whether adapters are trained instead of the whole model."""
    return config.lora_rank > 0 or config.lora_adapter_path is not None


def add_lora(model: Any, *, config: ModelConfig) -> Any:
    """Freeze `model` and put adapters on it; returns the PEFT model.

    Raises:
        UsageError: targets that match no layer, or an adapter that does not fit.
    """
    from peft import LoraConfig, get_peft_model

    if config.lora_adapter_path is not None:
        return _load_adapter(model, config=config)
    check_targets(model, config=config)
    targets = config.target_modules
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=config.exclude_modules,
        target_parameters=config.target_parameters,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.lora_init == "default" else config.lora_init,
        task_type="CAUSAL_LM",
    )
    known = layer_names(model)
    try:
        return get_peft_model(model, lora)
    except ValueError as error:  # layers of a kind that PEFT has no adapter for
        raise UsageError(
            f"model.target_modules={targets}: {str(error).splitlines()[0].partition('. ')[0]}",
            fix=f"Use all-linear, or some of: {', '.join(known)}",
        ) from error


def needs_weights(config: ModelConfig) -> str:
    """Which setting computes the adapters out of the base weights; empty if none does."""
    if config.lora_adapter_path is not None:
        return "model.lora_adapter_path is loaded into a whole model"
    if wants_lora(config) and config.lora_init != "default":
        return f"model.lora_init={config.lora_init} starts from the weights"
    if wants_lora(config) and config.use_dora:
        return "model.use_dora starts from the weights"
    if config.quantization != "none":
        return f"model.quantization={config.quantization} is made from the weights"
    return ""


def _load_adapter(model: Any, *, config: ModelConfig) -> Any:
    from peft import PeftModel

    assert config.lora_adapter_path is not None
    path = Path(config.lora_adapter_path).expanduser()
    where = f"model.lora_adapter_path={path}"
    if not (path / "adapter_config.json").is_file():
        raise UsageError(
            "no adapter_config.json there",
            where=where,
            fix="Give the folder that PEFT saved an adapter to, such as huggingface/adapter",
        )
    if not (path / _WEIGHTS).is_file():
        raise UsageError(
            f"no {_WEIGHTS} there",
            where=where,
            fix="Save the adapter in this format; pickled weights are not read",
        )
    fix = "Use the base model that the adapter was trained on"
    base = _base_of(path / "adapter_config.json")
    ours = str(config.partial_pretrain or "").rstrip("/")
    hint = f"It was made for {base}, the model is {ours}" if base and base != ours else ""
    try:
        peft = PeftModel.from_pretrained(model, str(path), is_trainable=True)
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        what = next((x.strip() for x in str(error).splitlines() if "mismatch" in x), str(error))
        raise UsageError(
            f"the adapter does not fit the model: {what.splitlines()[0][:300]}",
            where=where,
            why=hint,
            fix=fix,
        ) from error
    unused = _unused(path, peft)
    if unused:
        raise UsageError(
            f"the adapter does not fit the model: {len(unused)} of its tensors have no place "
            f"there, such as {unused[0]}",
            where=where,
            why=hint,
            fix=fix,
        )
    return peft


def _base_of(file: Path) -> str:
    """The base model's name as PEFT recorded it."""
    try:
        return str(json.loads(file.read_text("utf-8")).get("base_model_name_or_path") or "")
    except (ValueError, AttributeError) as error:
        raise UsageError("this is no adapter configuration", where=str(file)) from error


def _unused(path: Path, peft: Any) -> list[str]:
    """Tensors of the adapter's file that PEFT, which only warns, left aside."""
    from peft import get_peft_model_state_dict

    with safe_open(path / _WEIGHTS, framework="pt") as opened:
        there = set(opened.keys())
    return sorted(there - set(get_peft_model_state_dict(peft)))
