"""A LLaMA-Factory YAML file and its `dataset_info.json`, read as our configuration.

Every key ends in one of three ways: it becomes keys of ours, it has no counterpart and is named, or
it is refused because the run would mean something else. Defaults are LLaMA-Factory's own where they
differ from ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_sft.config.checks import one_of, real, whole
from verl_sft.errors import UsageError
from verl_sft.registry import unknown_name

# Their key -> ours, the value as it is.
_SAME = {
    "model_name_or_path": "model.partial_pretrain",
    "adapter_name_or_path": "model.lora_adapter_path",
    "trust_remote_code": "model.trust_remote_code",
    "enable_liger_kernel": "model.use_liger",
    "use_rslora": "model.use_rslora",
    "use_dora": "model.use_dora",
    "neftune_noise_alpha": "model.neftune_noise_alpha",
    "loraplus_lr_ratio": "optim.loraplus_lr_ratio",
    "cutoff_len": "data.max_length",
    "mask_history": "data.mask_history",
    "preprocessing_num_workers": "data.num_workers",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.clip_grad",
    "warmup_ratio": "optim.lr_warmup_steps_ratio",
    "max_steps": "trainer.total_training_steps",
    "save_total_limit": "trainer.max_ckpt_to_keep",
    "logging_steps": "trainer.log_freq",
    "run_name": "trainer.experiment_name",
    "seed": "trainer.seed",
    "output_dir": "trainer.default_local_dir",
}
_DEFAULTS: dict[str, Any] = {
    "cutoff_len": 2048,
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "seed": 42,
    "save_strategy": "steps",
    "save_steps": 500,
    "finetuning_type": "lora",
    "optim": "adamw_torch",
}
_NO_COUNTERPART = {
    "do_train": "this command trains",
    "do_eval": "validation runs wherever there are validation rows",
    "overwrite_cache": "a token cache is never used for other data or settings",
    "overwrite_output_dir": "a run goes on, or is refused where it is another one",
    "ddp_timeout": "no rank waits for another one's preprocessing",
    "plot_loss": "loss.png is always drawn",
    "save_only_model": "checkpoints hold what a resume needs; the export is the model alone",
    "packing": "samples are always packed, and never see each other",
    "neat_packing": "samples are always packed, and never see each other",
    "dataloader_num_workers": "batches are read from a mapped file, without workers",
    "dataloader_pin_memory": "batches are read from a mapped file, without workers",
    "group_by_length": "packing does it better",
    "remove_unused_columns": "rows are read by the columns that a format has",
    "per_device_eval_batch_size": "validation has the micro-batches of training",
    "include_num_input_tokens_seen": "train/total_tokens is always there",
    "low_cpu_mem_usage": "engine.meta_start decides",
    "resize_vocab": "a tokenizer that does not fit the model is refused",
    "use_fast_tokenizer": "only fast tokenizers are read",
    "streaming": "rows are always streamed",
    "fp16": "compute is bf16 or fp32 here",
    "tf32": "engine.fp32_matmul decides",
    "cache_dir": "HF_HOME decides",
    "push_to_hub": "trainer.upload_uri decides",
}
# Fields of a data set that choose other rows, or another kind of training.
_OTHER_DATA = ("subset", "split", "folder", "ranking", "script_url", "ms_hub_url", "om_hub_url")
_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "cosine_with_min_lr": "cosine",
}
_LOGGERS = ("wandb", "mlflow", "tensorboard", "swanlab", "trackio")


@dataclass(slots=True)
class Translation:
    """Keys of ours with their values, and a line for each thing that changes its meaning."""

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_llamafactory(path: Path, *, world_size: int) -> Translation:
    """Translate a YAML file; data sets are looked up in its `dataset_dir`.

    Args:
        path: the YAML file.
        world_size: number of processes: their batch size is per process.

    Raises:
        UsageError: the file cannot be read, asks for another stage than sft, or names a data set
            that `dataset_info.json` does not have.
    """
    given = _read_yaml(path)
    asked = {k: v for k, v in given.items() if v is not None}
    if asked.get("stage", "sft") != "sft":
        raise UsageError(
            f"stage: {asked['stage']} is not supported", where=str(path), fix="Use sft"
        )
    done = Translation()
    known = {**_DEFAULTS, **asked}
    for theirs, ours in _SAME.items():
        if known.get(theirs) is not None:
            done.values[ours] = known[theirs]
    for step in (_data, _batches, _model, _schedule, _engine, _saving):
        step(known, done, path, world_size)
    done.notes += [
        f"{key} has no effect: {_NO_COUNTERPART[key]}" for key in asked if key in _NO_COUNTERPART
    ]
    left = sorted(asked.keys() - _SAME.keys() - _NO_COUNTERPART.keys() - _READ)
    done.notes += [f"{key}: {asked[key]} has no counterpart here and is ignored" for key in left]
    return done


def _data(known: Mapping[str, Any], done: Translation, path: Path, world_size: int) -> None:
    folder = _folder(known.get("dataset_dir", "data"), path)
    names = _names(known.get("dataset"))
    if not names:
        raise UsageError("no dataset is named", where=str(path))
    done.values["data.train_files"] = [_source(name, folder, known) for name in names]
    held_out = _names(known.get("eval_dataset"))
    done.values["data.val_files"] = [_source(n, folder, known) for n in held_out] or "none"
    if known.get("val_size"):
        done.notes.append(
            f"val_size: {known['val_size']} is not done while training: hold rows out once with "
            "verl-sft convert in=... out=DIR val_fraction=..., by group, and train from DIR"
        )
    done.values["data.multiturn.enable"] = True
    masked = bool(known.get("mask_history"))
    done.values["data.mask_history"] = masked
    done.values["data.truncation"] = "oldest_turns" if masked else "right"
    done.notes.append(
        "cutoff_len: too long conversations lose their oldest turns"
        if masked
        else "cutoff_len: too long conversations are cut on the right, and counted with lost stops"
    )
    if known.get("train_on_prompt"):
        done.values["data.prompt_weight"] = 1.0
    if "enable_thinking" in known:
        done.values["data.apply_chat_template_kwargs"] = {
            "enable_thinking": known["enable_thinking"]
        }
    if known.get("template"):
        done.notes.append(
            f"template: {known['template']} names a template; the tokenizer's own chat template is "
            "used. Turns without a thought get no empty one that is trained"
        )


def _source(name: str, folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """A data set of `dataset_info.json` as a source of a mix."""
    table = folder / "dataset_info.json"
    try:
        listed = json.loads(table.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read dataset_info.json: {error}",
            where=str(table),
            fix="Set dataset_dir to the folder that holds it",
        ) from error
    if not isinstance(listed, dict) or not isinstance(listed.get(name, {}), dict):
        raise UsageError(f"data set '{name}' is not described by an object", where=str(table))
    if name not in listed:
        raise unknown_name("data set", name, listed)
    entry = listed[name]
    if other := [key for key in _OTHER_DATA if entry.get(key) not in (None, False, "", "train")]:
        raise UsageError(
            f"data set '{name}': {other[0]}={entry[other[0]]} is not supported",
            where=str(table),
            fix="Fetch the rows that you mean into a file, and give it as file_name",
        )
    if "file_name" in entry:
        place = str(folder / entry["file_name"])
    elif "hf_hub_url" in entry:
        place = f"hf://datasets/{entry['hf_hub_url']}"
    else:
        raise UsageError(f"data set '{name}' has no file_name", where=str(table))
    source: dict[str, Any] = {"path": place, "name": name}
    source["format"] = str(entry.get("formatting", "alpaca"))
    for key in ("columns", "tags"):
        if entry.get(key):
            source[key] = entry[key]
    cap = entry.get("num_samples") or known.get("max_samples")
    if cap:
        source["max_rows"] = whole("max_samples", cap)
    return source


def _batches(known: Mapping[str, Any], done: Translation, path: Path, world_size: int) -> None:
    micro = whole("per_device_train_batch_size", known["per_device_train_batch_size"])
    rounds = whole("gradient_accumulation_steps", known["gradient_accumulation_steps"])
    total = micro * rounds * world_size
    done.values["data.micro_batch_size_per_gpu"] = micro
    done.values["data.train_batch_size"] = total
    done.notes.append(
        f"batch: {micro} x {rounds} x {world_size} processes = data.train_batch_size={total}"
    )


def _model(known: Mapping[str, Any], done: Translation, path: Path, world_size: int) -> None:
    kind = known["finetuning_type"]
    if kind not in ("full", "lora"):
        raise UsageError(
            f"finetuning_type: {kind} is not supported", where=str(path), fix="Use full or lora"
        )
    if kind == "lora":
        rank = whole("lora_rank", known.get("lora_rank", 8))
        targets = known.get("lora_target", "all")
        done.values["model.lora_rank"] = rank
        done.values["model.lora_alpha"] = whole("lora_alpha", known.get("lora_alpha", 2 * rank))
        done.values["model.lora_dropout"] = real("lora_dropout", known.get("lora_dropout", 0.0))
        done.values["model.target_modules"] = "all-linear" if targets == "all" else _names(targets)
    if known.get("pissa_init"):
        done.values["model.lora_init"] = "pissa"
    if known.get("quantization_bit"):
        bits = whole("quantization_bit", known["quantization_bit"])
        if bits not in (4, 8):
            raise UsageError(f"quantization_bit: {bits} is not supported", fix="Use 4 or 8")
        done.values["model.quantization"] = "nf4" if bits == 4 else "int8"
    recompute = not known.get("disable_gradient_checkpointing", False)
    done.values["model.enable_gradient_checkpointing"] = recompute
    kernels = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
    if wanted := kernels.get(str(known.get("flash_attn", "auto"))):
        done.values["model.attn_implementation"] = wanted


def _schedule(known: Mapping[str, Any], done: Translation, path: Path, world_size: int) -> None:
    name = str(known["lr_scheduler_type"])
    if name not in _SCHEDULES:
        raise unknown_name("lr_scheduler_type", name, _SCHEDULES)
    done.values["optim.lr_scheduler"] = _SCHEDULES[name]
    done.values["optim.betas"] = [real(k, known[k]) for k in ("adam_beta1", "adam_beta2")]
    if known.get("warmup_steps"):
        steps = real("warmup_steps", known["warmup_steps"])
        key = "lr_warmup_steps_ratio" if steps < 1 else "lr_warmup_steps"  # below 1: a share
        done.values[f"optim.{key}"] = steps if steps < 1 else whole("warmup_steps", steps)
    epochs = real("num_train_epochs", known["num_train_epochs"])
    done.values["trainer.total_epochs"] = max(1, math.ceil(epochs))
    if epochs != math.ceil(epochs):
        done.notes.append(f"num_train_epochs: {epochs} is rounded up to {math.ceil(epochs)}")
    if not str(known["optim"]).startswith("adamw"):
        done.notes.append(f"optim: {known['optim']} is replaced by AdamW; see optim.optimizer")


def _engine(known: Mapping[str, Any], done: Translation, path: Path, world_size: int) -> None:
    half = bool(known.get("bf16") or known.get("fp16"))
    done.values["engine.dtype"] = "bf16" if half else "fp32"
    if known.get("pure_bf16"):
        done.values |= {"engine.dtype": "bf16", "engine.model_dtype": "bf16"}
    given = known.get("deepspeed")
    if not given:
        return
    stage, offload = (
        _zero_of(given) if isinstance(given, dict) else _zero_file(_folder(given, path))
    )
    done.values["engine.reshard_after_forward"] = stage == 3
    done.values["engine.offload"] = offload
    kept = "sharded in the forward pass too" if stage == 3 else "gathered until the backward pass"
    done.notes.append(f"deepspeed: ZeRO stage {stage} is FSDP2 with parameters {kept}")


def _zero_of(content: Mapping[str, Any]) -> tuple[int, bool]:
    """The stage, and whether something is offloaded."""
    zero = content.get("zero_optimization", {})
    devices = [zero.get(f"offload_{what}", {}).get("device") for what in ("param", "optimizer")]
    return int(zero.get("stage", 0)), "cpu" in devices


def _zero_file(path: Path) -> tuple[int, bool]:
    """The same by the file or else by its name."""
    try:
        return _zero_of(json.loads(path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, AttributeError):
        name = path.name.lower()
        stage = next((n for n in (3, 2, 1) if f"z{n}" in name or f"zero{n}" in name), 0)
        return stage, "offload" in name


def _saving(known: Mapping[str, Any], done: Translation, path: Path, world_size: int) -> None:
    done.values["trainer.save_freq"] = _plan("save", known["save_strategy"], known["save_steps"])
    held = known.get("eval_strategy", known.get("evaluation_strategy", "no"))
    steps = known.get("eval_steps") or 500
    done.values["trainer.test_freq"] = _plan("eval", held, steps)
    wanted = [w for w in _names(known.get("report_to")) if w in _LOGGERS and w != "tensorboard"]
    done.values["trainer.logger"] = ["console", "file", "tensorboard", *wanted]
    if known.get("resume_from_checkpoint") not in (None, False, True):  # true: ours, `auto`
        done.values["trainer.resume_mode"] = "resume_path"
        done.values["trainer.resume_from_path"] = str(known["resume_from_checkpoint"])


def _plan(what: str, strategy: Any, steps: Any) -> Any:
    """When to save or validate, as our keys say it; YAML reads `no` as false."""
    named = "no" if strategy is False else str(strategy)
    one_of(f"{what}_strategy", named, ("epoch", "no", "steps"))
    plans = {"epoch": "after_each_epoch", "no": -1}
    return plans[named] if named in plans else whole(f"{what}_steps", steps)


# Keys that the steps above read.
_READ = {
    "stage", "dataset", "eval_dataset", "dataset_dir", "val_size", "train_on_prompt", "template",
    "enable_thinking", "max_samples", "per_device_train_batch_size", "gradient_accumulation_steps",
    "finetuning_type", "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "pissa_init",
    "quantization_bit", "disable_gradient_checkpointing", "flash_attn", "lr_scheduler_type",
    "adam_beta1", "adam_beta2", "warmup_steps", "num_train_epochs", "optim", "bf16", "pure_bf16",
    "deepspeed", "save_strategy", "save_steps", "eval_strategy", "evaluation_strategy",
    "eval_steps", "report_to", "resume_from_checkpoint",
}  # fmt: skip


def _names(value: Any) -> list[str]:
    if value is None:
        return []
    items = value if isinstance(value, list) else str(value).split(",")
    return [str(item).strip() for item in items if str(item).strip()]


def _folder(name: Any, path: Path) -> Path:
    """A path of the file: as it stands, else relative to the file or to a folder above it."""
    given = Path(str(name)).expanduser()
    places = [given, *(parent / given for parent in path.absolute().parents)]
    return next((place for place in places if place.exists()), given)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise UsageError("cannot read the LLaMA-Factory file", where=str(path), why=why) from error
    if not isinstance(content, dict):
        raise UsageError("the file holds no key: value pairs", where=str(path))
    return {str(key): value for key, value in content.items()}
