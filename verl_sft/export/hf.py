"""The result as a Hugging Face folder, reopened and compared before anyone may see it.

huggingface/
  config.json  model*.safetensors (several with an index)  tokenizer...
  adapter/          the PEFT adapter with its true alpha (LoRA runs only)
  verl_sft.json     prompt template and history style the data was made with, base model
  train_config.json the resolved config
  manifest.json     sha256 of each file, and the largest difference of the logits
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_sft import safe_io
from verl_sft.config.train import ModelConfig, TrainConfig
from verl_sft.distributed.reduce import together
from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import gather_full, reshard
from verl_sft.errors import StorageError
from verl_sft.model.build import load_causal, read_model_config
from verl_sft.model.lora import add_lora, wants_lora

ADAPTER_DIR = "adapter"
_PROBE_TOKENS = 32
# Largest difference that rounding explains, in standard deviations of the logits.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}


def export_hf(
    out: Path,
    *,
    model: Any,
    config: TrainConfig,
    tokenizer: Any,
    provenance: Mapping[str, Any],
    world: World,
) -> Path:
    """Write the trained model to `out`; it appears complete and verified, or not at all.

    Args:
        out: the folder; an older one is replaced.
        model: the live, sharded `LossModel`; every rank must call.
        config: of the run.
        tokenizer: saved as it is, with its chat template.
        provenance: goes to `verl_sft.json`.
        world: the ranks.

    Raises:
        StorageError: nothing could be written, or what was written does not give the live logits.
    """
    live = live_logits(model, _probe_ids(model.causal), world=world)
    state = gather_trained(model)
    if not world.is_main:
        state = {}
    with together(world):
        if world.is_main:
            write_folder(
                out,
                state=state,
                config=config,
                tokenizer=tokenizer,
                provenance=provenance,
                max_shard_size=config.trainer.max_shard_size,
                live=live,
            )
    return out


def write_folder(
    out: Path,
    *,
    state: Mapping[str, Tensor],
    config: TrainConfig,
    tokenizer: Any,
    provenance: Mapping[str, Any],
    merge: bool = True,
    max_shard_size: str = "5GB",
    live: Tensor | None = None,
) -> dict[str, Any]:
    """Write whole trained tensors as a folder, in this process alone; returns its manifest.

    Args:
        out: the folder; an older one is replaced.
        state: whole trainable parameters, named as in the transformers model (or PEFT's).
        config: of the run.
        tokenizer: saved as it is, with its chat template.
        provenance: goes to `verl_sft.json`.
        merge: False writes the adapter alone, for which the base model is needed later.
        max_shard_size: of one safetensors file.
        live: logits of the live model for the probe, [T, V], if there is one.

    Raises:
        StorageError: nothing could be written, or what was written does not give the logits of
            the trained tensors.
    """
    temporary = out.parent / f".tmp-{out.name}.{uuid.uuid4().hex[:8]}"
    try:
        report = _write(
            temporary,
            state=state,
            config=config,
            tokenizer=tokenizer,
            merge=merge,
            max_shard_size=max_shard_size,
            live=live,
        )
        safe_io.write_json(temporary / "verl_sft.json", dict(provenance))
        safe_io.write_json(temporary / "train_config.json", asdict(config))
        report["files"] = _digests(temporary)
        safe_io.write_json(temporary / "manifest.json", report)
        _replace(temporary, out)
    except Exception as error:
        known = safe_io.as_storage_error(error, out)
        if known is None or known is error:
            raise
        raise known from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def live_logits(model: Any, ids: Tensor, *, world: World) -> Tensor:
    """Logits [T, V] of the sharded model for one document, as it computes in training."""
    ids = ids.to(world.device)
    length = len(ids)
    bounds = torch.tensor([0, length], dtype=torch.int32, device=world.device)
    positions = torch.arange(length, device=world.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(ids[None], positions[None], bounds, length, mode="logits")
    model.train(training)
    reshard(model)
    return logits.float().cpu()


def gather_trained(model: Any) -> dict[str, Tensor]:
    """Whole trainable parameters on the CPU, named as in the transformers model (or PEFT's)."""
    prefix = "causal."
    return {
        name.removeprefix(prefix): gather_full(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def rebuild(config: ModelConfig, *, state: Mapping[str, Tensor]) -> tuple[Any, Any | None]:
    """The trained model as a plain one on this process, in fp32, and its PEFT view if any.

    Raises:
        StorageError: a trained tensor has no place in the model.
    """
    causal = load_causal(config, dtype=torch.float32)
    peft = add_lora(causal, config=config) if wants_lora(config) else None
    _, unexpected = causal.load_state_dict(dict(state), strict=False)
    wanted = {n for n, p in causal.named_parameters() if p.requires_grad}
    if unexpected or wanted != set(state):
        odd = sorted(wanted ^ set(state))
        raise StorageError(f"the trained tensors do not fit the base model: {odd[:3]}")
    return causal.eval(), peft


def reopened_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits [T, V] of a saved folder, loaded the way a user loads it, computed in fp32."""
    from transformers import AutoModelForCausalLM

    reopened = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return _logits(reopened, ids)


def adapted_logits(adapter: Path, ids: Tensor, *, config: ModelConfig) -> Tensor:
    """Logits [T, V] of the base model with a saved adapter, as PEFT loads them, in fp32."""
    from peft import PeftModel

    base = load_causal(config, dtype=torch.float32)
    return _logits(PeftModel.from_pretrained(base, str(adapter)), ids)


def _write(
    folder: Path,
    *,
    state: Mapping[str, Tensor],
    config: TrainConfig,
    tokenizer: Any,
    merge: bool,
    max_shard_size: str,
    live: Tensor | None,
) -> dict[str, Any]:
    """Save weights and tokenizer, reopen them, compare; returns what was measured."""
    causal, peft = rebuild(config.model, state=state)
    probe = _probe_ids(causal)
    expected = _logits(causal, probe)
    if peft is not None:
        peft.save_pretrained(str(folder / ADAPTER_DIR))
    tokenizer.save_pretrained(str(folder))
    name = str(read_model_config(config.model).get("dtype") or "float32")
    name = str(read_model_config(config.model).get("torch_dtype") or name).removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, name, torch.float32)
    if peft is None or merge:
        causal = causal if peft is None else peft.merge_and_unload()
        causal.config.use_cache = True
        causal.to(dtype).save_pretrained(str(folder), max_shard_size=max_shard_size)
        reopened = reopened_logits(folder, probe)
    else:
        dtype = torch.float32
        reopened = adapted_logits(folder / ADAPTER_DIR, probe, config=config.model)
    difference, scale = _difference(expected, reopened), float(expected.std())
    if not difference <= _TOLERANCE.get(dtype, 0.2) * scale:
        raise StorageError(
            f"the exported model gives other logits than the trained one (by {difference:.3g}, "
            f"their standard deviation is {scale:.3g})",
            where=str(folder),
            why="The folder would not be the model that was trained, so it was removed",
        )
    report = {
        "dtype": name,
        "max_logit_difference": difference,
        "logit_standard_deviation": scale,
        "lora_merged": peft is not None and merge,
    }
    if live is not None:
        report["max_logit_difference_live"] = _difference(live, reopened)
    return report


def _probe_ids(causal: Any) -> Tensor:
    """A document that every model understands, int64 [T]."""
    return torch.arange(_PROBE_TOKENS).mul(2654435761).remainder(causal.config.vocab_size)


def _logits(model: Any, ids: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits
    return logits[0].float()


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": safe_io.file_sha256(p)}
        for p in files
    }


def _replace(temporary: Path, out: Path) -> None:
    """Publish, moving an older export away first."""
    if not out.exists():
        safe_io.publish_dir(temporary, out)
        return
    aside = out.with_name(f".tmp-{out.name}.old-{uuid.uuid4().hex[:8]}")
    out.rename(aside)
    safe_io.publish_dir(temporary, out)
    shutil.rmtree(aside, ignore_errors=True)
