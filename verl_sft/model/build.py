"""From a config to a model ready for sharding, its tokenizer, and the probe that proves both."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from verl_sft.config.checks import model_folder, template_text, tokenizer_folder
from verl_sft.config.hub import absence, hub_access
from verl_sft.config.train import ModelConfig
from verl_sft.errors import UsageError
from verl_sft.model.activations import recompute_activations
from verl_sft.model.lora import add_lora, wants_lora
from verl_sft.model.loss import LossModel
from verl_sft.model.meta import Slot, hollow_model, to_meta
from verl_sft.model.quantize import follow_inputs, quantised_parameters, quantization_config

_MODEL_KEY, _TOKENIZER_KEY = "model.partial_pretrain", "model.tokenizer_path"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SAMPLED_BYTES = 1 << 20
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class BuiltModel:
    """`loss_model` computes and is sharded; `peft` is the adapter's view of it, or None."""

    loss_model: LossModel
    peft: Any | None
    slots: tuple[Slot, ...] = ()  # parameters that are meta tensors until they are filled
    whole_because: str = ""  # why there are none

    @property
    def causal(self) -> Any:
        """The transformers model inside."""
        return self.loss_model.causal


def model_path(config: ModelConfig) -> str:
    """`model.partial_pretrain`, checked as far as it can be without loading.

    Raises:
        UsageError: not given, or a path that is not a model folder.
    """
    path = config.partial_pretrain
    if not path:
        raise UsageError(
            "no model given",
            where=_MODEL_KEY,
            fix="Give an HF folder or hub name, or make a small one with verl-sft make-model",
        )
    own = config.tokenizer_path is None
    return model_folder(_MODEL_KEY, path, with_tokenizer=own)


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of the model or of `model.tokenizer_path`, with its chat template or ours.

    Raises:
        UsageError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    key, path = _MODEL_KEY, model_path(config)
    if config.tokenizer_path is not None:
        key, path = _TOKENIZER_KEY, tokenizer_folder(_TOKENIZER_KEY, config.tokenizer_path)
    try:
        trusts = config.trust_remote_code
        with hub_access(path):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusts)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _cannot_load(path, error, key=key) from error
    if config.custom_chat_template:
        tokenizer.chat_template = template_text(config.custom_chat_template)
    return tokenizer


def load_causal(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    seed: int = 0,
    quantised_on: torch.device | None = None,
) -> Any:
    """The transformers model with weights in `dtype`, in training mode, on the CPU.

    `quantised_on`: the device to put it on as `model.quantization` asks; None: it is not quantised.

    Raises:
        UsageError: it cannot be found or loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = model_path(config)
    quantization = quantization_config(config) if quantised_on is not None else None
    extra: dict[str, Any] = {}
    if quantization is not None:
        extra = {"quantization_config": quantization, "device_map": {"": quantised_on}}
    torch.manual_seed(seed)  # heads that the checkpoint lacks must be the same on every rank
    try:
        with hub_access(path):
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                **extra,
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _cannot_load(path, error) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise _cannot_load(path, ValueError("config.json does not fit the weights")) from error
    model.config.use_cache = False
    follow_inputs(model)
    return model.train()


def build_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    seed: int,
    on_meta: bool = False,
    device: torch.device = _CPU,
) -> BuiltModel:
    """Load the model, add adapters and recomputation where wanted, wrap it in its loss.

    Args:
        config: which model, which of its parameters learn.
        dtype: of the parameters.
        attention: name in transformers' table.
        seed: of new parameters.
        on_meta: leave the weights in their files, to be read into slots later, if that is possible.
        device: where quantised weights go; all others are loaded to the CPU.
    """
    slots: list[Slot] = []
    path = model_path(config)
    hollow = hollow_model(config, path=path, dtype=dtype, attention=attention) if on_meta else ""
    if isinstance(hollow, str):
        causal = load_causal(
            config, dtype=dtype, attention=attention, seed=seed, quantised_on=device
        )
    else:
        causal, slots = hollow
    peft = None
    if wants_lora(config):
        torch.manual_seed(seed)
        peft = add_lora(causal, config=config)
    if config.enable_gradient_checkpointing:
        recompute_activations(causal, policy=config.checkpoint_policy)
    loss_model = LossModel(causal)
    loss_model.train()
    if dtype is torch.bfloat16:
        for parameter in set(loss_model.parameters()) - quantised_parameters(loss_model):
            parameter.data = parameter.data.to(dtype)
    to_meta(slots)
    return BuiltModel(loss_model, peft, tuple(slots), hollow if isinstance(hollow, str) else "")


def decoder_layers(causal: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the model, one unit of sharding each."""
    names = set(getattr(causal, "_no_split_modules", None) or ())
    layers = [m for m in causal.modules() if type(m).__name__ in names]
    if layers:
        return layers
    lists = [list(m) for m in causal.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def model_fingerprint(config: ModelConfig) -> str:
    """A hash of the base model's files: configuration, sizes, headers and samples of the weights.

    It detects another model, not a forged one.
    """
    folder = Path(model_path(config))
    if not folder.is_dir():
        return str(folder)
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as stream:
            for start in sorted({0, size // 2, max(0, size - _SAMPLED_BYTES)}):
                stream.seek(start)
                digest.update(stream.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def probe_packing(model: LossModel, *, device: torch.device, half: bool, vocab_size: int) -> float:
    """Prove on the real model that packed documents do not see each other.

    Returns:
        The largest difference between packed logits and those of each document alone, computed by
        the model's own forward, in units of the logits' standard deviation.

    Raises:
        UsageError: they differ by more than rounding explains.
    """
    lengths = [7, 5, 9]
    ids = torch.arange(sum(lengths), device=device).mul(2654435761).remainder(vocab_size)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    training = model.training
    model.eval()
    with torch.no_grad():
        packed = model(ids[None], positions[None], bounds, max(lengths), mode="logits")
        alone = torch.cat(
            [
                model(part[None], torch.arange(len(part), device=device)[None], bounds, 0,
                      mode="reference")
                for part in torch.split(ids, lengths)
            ]
        )  # fmt: skip
    model.train(training)
    difference = float((packed.float() - alone.float()).abs().max() / alone.float().std())
    if not difference < (0.2 if half else 1e-3):
        raise UsageError(
            f"packed documents do not give the logits that they give alone ({difference:.3g} "
            "standard deviations apart)",
            why="This model ignores document boundaries, so training on packed rows would be wrong",
            fix="Use model.attn_implementation=sdpa or eager",
        )
    return difference


def read_model_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a local model folder, or nothing."""
    path = Path(model_path(config)) / "config.json"
    loaded: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return loaded


def _cannot_load(path: str, error: Exception, *, key: str = _MODEL_KEY) -> UsageError:
    what = "tokenizer" if key == _TOKENIZER_KEY else "model"
    parts = "a tokenizer.json" if what == "tokenizer" else "config.json, tokenizer, *.safetensors"
    why = absence(path)
    told = "" if why else f": {str(error).strip().splitlines()[0]}"
    return UsageError(
        f"cannot load the {what}{told}",
        where=f"{key}={path}",
        why=why,
        fix=f"Give a folder with {parts}, or a hub name",
    )
