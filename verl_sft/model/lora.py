"""Low-rank adapters through PEFT: put on a model, or loaded from a folder to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl_sft.config.train import ModelConfig
from verl_sft.errors import UsageError


def wants_lora(config: ModelConfig) -> bool:
    """Whether adapters are trained instead of the whole model."""
    return config.lora_rank > 0 or config.lora_adapter_path is not None


def add_lora(model: Any, *, config: ModelConfig) -> Any:
    """Freeze `model` and put adapters on it; returns the PEFT model.

    Raises:
        UsageError: targets that match no layer, or an adapter that does not fit.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if config.lora_adapter_path is not None:
        path = Path(config.lora_adapter_path)
        if not (path / "adapter_config.json").is_file():
            raise UsageError(
                "no adapter_config.json there", where=f"model.lora_adapter_path={path}"
            )
        try:
            return PeftModel.from_pretrained(model, str(path), is_trainable=True)
        except (ValueError, RuntimeError, KeyError) as error:
            raise UsageError(
                f"the adapter does not fit the model: {str(error).splitlines()[0]}",
                where=f"model.lora_adapter_path={path}",
                fix="Use the base model that the adapter was trained on",
            ) from error
    targets = config.target_modules
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, _ in _linears(model)})
        raise UsageError(
            f"model.target_modules={targets} matches no layer of this model",
            fix=f"Use all-linear, or some of: {', '.join(names)}",
        ) from error


def _linears(model: Any) -> list[tuple[str, Any]]:
    from torch import nn

    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
