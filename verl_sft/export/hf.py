"""The result as a Hugging Face folder, reopened and compared before anyone may see it.

huggingface/
  config.json  model*.safetensors  tokenizer...  generation_config.json
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
from verl_sft.distributed.reduce import from_main, together
from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import gather_full, reshard
from verl_sft.errors import StorageError
from verl_sft.model.build import load_causal, read_model_config
from verl_sft.model.lora import add_lora, wants_lora

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
    vocabulary = model.causal.config.vocab_size
    probe = torch.arange(_PROBE_TOKENS).mul(2654435761).remainder(vocabulary)
    live = live_logits(model, probe, world=world)
    state = gather_trained(model)
    if not world.is_main:
        state = {}
    temporary = out.parent / f".tmp-{out.name}.{from_main(uuid.uuid4().hex[:8], world=world)}"
    try:
        with together(world):
            if world.is_main:
                report = _write(
                    temporary, state=state, config=config, tokenizer=tokenizer, probe=probe
                )
                safe_io.write_json(temporary / "verl_sft.json", dict(provenance))
                safe_io.write_json(temporary / "train_config.json", asdict(config))
                reopened = reopened_logits(temporary, probe)
                report["max_logit_difference_live"] = _difference(live, reopened)
                report["files"] = _digests(temporary)
                safe_io.write_json(temporary / "manifest.json", report)
                _replace(temporary, out)
    finally:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    return out


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


def _write(
    folder: Path,
    *,
    state: Mapping[str, Tensor],
    config: TrainConfig,
    tokenizer: Any,
    probe: Tensor,
) -> dict[str, Any]:
    """Save weights and tokenizer, reopen them, compare; returns what was measured."""
    causal, peft = rebuild(config.model, state=state)
    expected = _logits(causal, probe)
    if peft is not None:
        peft.save_pretrained(str(folder / "adapter"))
        causal = peft.merge_and_unload()
    name = str(read_model_config(config.model).get("dtype") or "float32")
    name = str(read_model_config(config.model).get("torch_dtype") or name)
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."), torch.float32)
    causal.config.use_cache = True
    causal.to(dtype).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    difference = _difference(expected, reopened_logits(folder, probe))
    scale = float(expected.std())
    if not difference <= _TOLERANCE.get(dtype, 0.2) * scale:
        raise StorageError(
            f"the exported model gives other logits than the trained one (by {difference:.3g}, "
            f"their standard deviation is {scale:.3g})",
            where=str(folder),
            why="The folder would not be the model that was trained, so it was removed",
        )
    return {
        "dtype": name,
        "max_logit_difference": difference,
        "logit_standard_deviation": scale,
        "lora_merged": peft is not None,
    }


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
