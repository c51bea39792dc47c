"""What config and small files tell before any row is read: tokenising may take an hour."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from verl_sft.config.checks import naming
from verl_sft.config.train import TrainConfig
from verl_sft.distributed.sharding import compute_dtype
from verl_sft.errors import UsageError
from verl_sft.model.attention import pick_attention
from verl_sft.model.build import model_path
from verl_sft.model.lora import add_lora, wants_lora
from verl_sft.model.meta import empty_model
from verl_sft.model.shape import ModelShape
from verl_sft.model.ulysses import check_heads
from verl_sft.records.read import check_format
from verl_sft.registry import PROMPTS, resolve
from verl_sft.safe_io import make_output_dir
from verl_sft.trainer.planning import model_shape
from verl_sft.trainer.resume import named_checkpoint

_ADAPTER_FILE = "adapter_model.safetensors"
_ADAPTER_KEY = re.compile(r"\.(\w+)\.lora_A\.weight$")


def check_files(config: TrainConfig, *, device: torch.device, num_tokens: int) -> None:
    """Attention, adapters, checkpoint, and whether tokenizer, model and ranks fit one another.

    Args:
        config: of the run.
        device: of this rank.
        num_tokens: of the tokenizer.

    Raises:
        UsageError: naming the key.
    """
    half = compute_dtype(config.engine.dtype, device=device) is torch.bfloat16
    pick_attention(config.model.attn_implementation, device=device, half=half)
    if config.trainer.resume_mode == "resume_path":
        named_checkpoint(config)
    check_format("data.format", config.data.format)
    if config.data.raw.prompt:
        with naming("data.raw.prompt"):
            resolve("prompt template", config.data.raw.prompt, PROMPTS)
    if config.data.cache_dir:
        with naming("data.cache_dir"):
            make_output_dir(Path(config.data.cache_dir).expanduser())
    if config.model.lora_adapter_path is None and wants_lora(config.model):
        empty = empty_model(config.model, path=model_path(config.model))
        if empty is not None:
            # PEFT's own checks come with it; the start values of adapters need the weights.
            add_lora(empty, config=replace(config.model, lora_rank=1, lora_init="default"))
    try:
        shape = model_shape(config.model)
    except UsageError:
        return  # an architecture without the usual names is checked once it is loaded
    check_vocabulary(num_tokens, vocabulary=shape.vocab)
    heads = SimpleNamespace(num_attention_heads=shape.heads)
    check_heads(
        SimpleNamespace(get_text_config=lambda: heads),
        parts=config.ulysses_sequence_parallel_size,
    )
    if config.model.lora_adapter_path is not None:
        check_adapter(Path(config.model.lora_adapter_path).expanduser(), shape=shape)


def check_vocabulary(num_tokens: int, *, vocabulary: int) -> None:
    """Raise if the tokenizer knows tokens that the model does not.

    Raises:
        UsageError: with both numbers.
    """
    if num_tokens > vocabulary:
        raise UsageError(
            f"the tokenizer has {num_tokens} tokens, the model knows {vocabulary}",
            fix="Use the tokenizer that belongs to the model",
        )


def check_adapter(path: Path, *, shape: ModelShape) -> None:
    """Raise if the folder holds no adapter, or one for matrices of other sizes.

    Raises:
        UsageError: with the sizes.
    """
    where = f"model.lora_adapter_path={path}"
    fix = "Use the base model that the adapter was trained on"
    try:
        settings = json.loads((path / "adapter_config.json").read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError("no adapter_config.json there", where=where) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"adapter_config.json cannot be read: {error}", where=where) from error
    if not isinstance(settings, dict) or not (path / _ADAPTER_FILE).is_file():
        return  # an older form; PEFT decides
    from safetensors import SafetensorError, safe_open

    wanted = shape.linears()
    try:
        with safe_open(path / _ADAPTER_FILE, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                name = _ADAPTER_KEY.search(key)
                inputs = wanted[name[1]][0] if name and name[1] in wanted else None
                found = opened.get_slice(key).get_shape()[1] if inputs else None
                if found != inputs:
                    base = settings.get("base_model_name_or_path") or "unknown"
                    raise UsageError(
                        f"the adapter does not fit the model: {key} takes {found} numbers, the "
                        f"model gives {inputs}",
                        where=where,
                        why=f"It was trained on {base}",
                        fix=fix,
                    )
    except (SafetensorError, OSError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{_ADAPTER_FILE} cannot be read: {error}", where=where) from error
