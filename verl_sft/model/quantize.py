"""A frozen base model in 4 or 8 bits beside adapters (QLoRA), through bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from verl_sft.config.train import ModelConfig
from verl_sft.errors import MissingExtraError, UsageError
from verl_sft.model.lora import wants_lora


def quantization_config(config: ModelConfig) -> Any | None:
    """What transformers needs to load the base quantised, or None.

    Raises:
        UsageError: settings that do not go with it.
        MissingExtraError: bitsandbytes is not installed.
    """
    kind = config.quantization
    if kind == "none":
        return None
    wrong = ""
    if not wants_lora(config):
        wrong = "quantised weights do not learn: set model.lora_rank"
    elif config.lora_init != "default" or config.use_dora:
        wrong = "model.lora_init and model.use_dora start from exact weights"
    if wrong:
        raise UsageError(f"model.quantization={kind} does not work here", why=wrong)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            "bitsandbytes", "bitsandbytes", why=f"model.quantization={kind} needs it"
        )
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        # No outliers kept apart: which columns are would depend on all rows of a micro-batch.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )


def follow_inputs(causal: nn.Module) -> None:
    """Let 4-bit layers compute in the dtype of their inputs, and keep one layout on the CPU.

    In evaluation they would repack their weights there for a product that has no backward pass.
    """
    for module in causal.modules():
        if hasattr(module, "compute_type_is_set"):
            module.compute_type_is_set = False  # type: ignore[assignment]
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def quantised_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Weights whose numbers are codes: they are frozen, and every rank keeps all of them."""
    return {p for p in model.parameters() if type(p).__name__ in ("Params4bit", "Int8Params")}
