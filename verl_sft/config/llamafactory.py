"""A LLaMA-Factory YAML file and its `dataset_info.json`, read as our configuration.

Every key becomes keys of ours, or is named with what it means here, or is refused because the run
would be another one; `llamafactory_keys.py` says which. Defaults are LLaMA-Factory's own where they
differ from ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_sft.config.checks import one_of, real, whole
from verl_sft.config.llamafactory_data import sources, split_names
from verl_sft.config.llamafactory_file import read_arguments, with_switches, zero_stage
from verl_sft.config.llamafactory_keys import (
    CHANGED,
    DEFAULTS,
    IDLE,
    KERNELS,
    LOGGERS,
    MARKS,
    OPTIMIZERS,
    READ,
    REFUSED,
    SAME,
    SCHEDULES,
    asks_for,
)
from verl_sft.config.trainer_args import batch_keys, save_keys, when
from verl_sft.errors import UsageError
from verl_sft.registry import unknown_name

KNOWN = frozenset((*SAME, *READ, *CHANGED, *IDLE, *REFUSED))
# Arguments of a changed meaning that have a line of their own where it matters.
_TOLD = {"gradient_accumulation_steps", "num_train_epochs", "deepspeed", "metric_for_best_model",
         "split_special_tokens"}  # fmt: skip


@dataclass(slots=True)
class Translation:
    """Keys of ours with their values, and a line for each thing that changes its meaning."""

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_llamafactory(
    path: Path, *, world_size: int, changes: Mapping[str, Any] | None = None
) -> Translation:
    """Translate a YAML or JSON file; data sets are looked up in its `dataset_dir`.

    Args:
        path: the file.
        world_size: number of processes: their batch size is per process.
        changes: arguments of theirs given on the command line; they win.

    Raises:
        UsageError: the file cannot be read, asks for another kind of training, or names a data
            set that `dataset_info.json` does not have.
    """
    given = with_switches({**read_arguments(path), **(changes or {})}, where=str(path))
    asked = {key: value for key, value in given.items() if value is not None}
    for key, fix in REFUSED.items():
        if key in asked and asks_for(key, asked[key]):
            raise UsageError(f"{key}: {asked[key]} is not supported", where=str(path), fix=fix)
    if asked.get("stage", "sft") != "sft":
        raise UsageError(
            f"stage: {asked['stage']} is not supported", where=str(path), fix="Use sft"
        )
    done = Translation()
    known = {**DEFAULTS, **asked}
    for theirs, ours in SAME.items():
        if known.get(theirs) is not None:
            done.values[ours] = known[theirs]
    for step in (_data, _thoughts, _model, _adapters, _optimizer, _schedule, _length,
                 _engine, _saving):  # fmt: skip
        step(known, done, path)
    micro, rounds = known["per_device_train_batch_size"], known["gradient_accumulation_steps"]
    sizes, note = batch_keys(micro, rounds, world_size=world_size)
    done.values |= sizes
    done.notes.append(note)
    changed = [key for key in asked if key in CHANGED and asked[key] and key not in _TOLD]
    done.notes += [f"{key}: {CHANGED[key]}" for key in changed]
    done.notes += [f"{key} has no effect: {IDLE[key]}" for key in asked if key in IDLE]
    for key in sorted(asked.keys() - KNOWN):
        near_it = unknown_name("argument", key, KNOWN).fix.partition(" Known")[0]
        hint = f" ({near_it})" if near_it.startswith("Did") else ""
        done.notes.append(f"{key} has no counterpart here and is ignored{hint}")
    return done


def take_changes(words: Sequence[str], ours: Container[str]) -> tuple[dict[str, Any], list[str]]:
    """Take `argument=value` words of theirs out of a command line.

    Args:
        words: of the command line.
        ours: keys that are not theirs.

    Returns:
        Arguments with values as YAML reads them, and the words that are left.
    """
    import yaml

    changes: dict[str, Any] = {}
    rest: list[str] = []
    for word in words:
        key, sign, value = word.partition("=")
        if sign and key in KNOWN and key not in ours:
            changes[key] = yaml.safe_load(value)
        else:
            rest.append(word)
    return changes, rest


def _data(known: Mapping[str, Any], done: Translation, path: Path) -> None:
    where = {"directory": known.get("dataset_dir", "data"), "base": path}
    where["max_samples"] = known.get("max_samples")
    done.values["data.train_files"] = sources(known.get("dataset"), **where)
    if not done.values["data.train_files"]:
        raise UsageError("no dataset is named", where=str(path))
    held_out = sources(known.get("eval_dataset"), **where)
    done.values["data.val_files"] = held_out or "none"
    if held_out and known.get("eval_on_each_dataset"):
        done.values["data.val_files"] = {source["name"]: source for source in held_out}
    done.values["data.val_seed"] = known["seed"]
    if known.get("val_size"):
        done.notes.append(
            "val_size: rows that begin alike or belong to one task, here whole groups, are held "
            "out together, so their number is near the one asked for"
        )
    masked = bool(known.get("mask_history"))
    if known.get("train_on_prompt"):
        if masked:
            raise UsageError("mask_history and train_on_prompt exclude each other", where=str(path))
        done.values["data.prompt_weight"] = 1.0
    done.values["data.multiturn.enable"] = True
    done.values["data.mask_history"] = masked
    done.values["data.truncation"] = "oldest_turns" if masked else "right"
    done.values["data.shuffle"] = not known.get("disable_shuffling", False)
    if known.get("split_special_tokens") is False:
        done.notes.append("split_special_tokens: false needs data.special_tokens_in_content=allow")
    done.notes.append(
        "cutoff_len: too long conversations lose their oldest turns"
        if masked
        else "cutoff_len: too long conversations are cut on the right, and counted with lost stops"
    )


def _thoughts(known: Mapping[str, Any], done: Translation, path: Path) -> None:
    """Thoughts and the template that shows them."""
    if known.get("preserve_thinking"):
        done.values["data.history_thinking"] = "keep"
    elif not known.get("mask_history"):
        done.notes.append(
            "thoughts of earlier turns: as the chat template shows them when the model answers; "
            "there they stay in the text (data.history_thinking=keep)"
        )
    if "enable_thinking" in known:
        thinks = known["enable_thinking"]
        done.values["data.apply_chat_template_kwargs"] = {"enable_thinking": thinks}
    template = str(known.get("template") or "")
    name = max((n for n in MARKS if template.startswith(n)), key=len, default="")
    own = _chat_template(Path(str(known.get("model_name_or_path", ""))).expanduser())
    if name and own and MARKS[name] not in own:
        done.notes.append(
            f"template: {template} is another one than the model's chat template, which has no "
            f"{MARKS[name]}; model.custom_chat_template sets another"
        )


def _chat_template(folder: Path) -> str:
    """The chat template in a model's folder; empty where there is none, or no such folder."""
    try:
        if (file := folder / "chat_template.jinja").is_file():
            return file.read_text("utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        return json.dumps(settings.get("chat_template") or "", ensure_ascii=False)
    except (OSError, ValueError, AttributeError):
        return ""


def _model(known: Mapping[str, Any], done: Translation, path: Path) -> None:
    if known.get("quantization_bit"):
        bits = whole("quantization_bit", known["quantization_bit"])
        one_of("quantization_bit", str(bits), ("4", "8"))
        one_of("quantization_method", str(known.get("quantization_method", "bnb")).lower(),
               ("bnb", "bitsandbytes"))  # fmt: skip
        one_of("quantization_type", str(known.get("quantization_type", "nf4")), ("nf4",))
        done.values["model.quantization"] = "nf4" if bits == 4 else "int8"
    switches = [known.get(f"{what}_checkpointing") for what in ("gradient", "activation")]
    off = known.get("disable_gradient_checkpointing") or False in switches
    done.values["model.enable_gradient_checkpointing"] = not off
    kernel = str(known.get("flash_attn", "auto"))
    if kernel in KERNELS:
        done.values["model.attn_implementation"] = KERNELS[kernel]
    elif kernel != "auto":
        done.notes.append(f"flash_attn: {kernel} is not there; the fastest kernel is chosen")
    if known.get("use_cpu") or known.get("no_cuda"):
        done.values["trainer.device"] = "cpu"


def _adapters(known: Mapping[str, Any], done: Translation, path: Path) -> None:
    kind = known["finetuning_type"]
    if kind not in ("full", "lora"):
        raise UsageError(
            f"finetuning_type: {kind} is not supported", where=str(path), fix="Use full or lora"
        )
    loaded = split_names(known.get("adapter_name_or_path"))
    if len(loaded) > 1 or (loaded and kind == "full"):
        fix = "Merge adapters into the model first: verl-sft export"
        raise UsageError(f"adapter_name_or_path: {', '.join(loaded)} is not supported", fix=fix)
    if loaded:
        done.values["model.lora_adapter_path"] = loaded[0]
    if kind == "full":
        return
    rank = whole("lora_rank", known.get("lora_rank", 8))
    targets = split_names(known.get("lora_target", "all"))
    done.values["model.lora_rank"] = rank
    done.values["model.lora_alpha"] = whole("lora_alpha", known.get("lora_alpha", 2 * rank))
    done.values["model.lora_dropout"] = real("lora_dropout", known.get("lora_dropout", 0.0))
    done.values["model.target_modules"] = "all-linear" if targets == ["all"] else targets
    if known.get("pissa_init"):
        done.values["model.lora_init"] = "pissa"


def _optimizer(known: Mapping[str, Any], done: Translation, path: Path) -> None:
    name = str(known["optim"])
    if known.get("use_muon"):
        done.values["optim.optimizer"] = "Muon"
    elif name in OPTIMIZERS:
        library, optimizer = OPTIMIZERS[name]
        done.values |= {"optim.optimizer_impl": library, "optim.optimizer": optimizer}
    else:
        raise unknown_name("optim", name, OPTIMIZERS)
    done.values["optim.betas"] = [real(k, known[k]) for k in ("adam_beta1", "adam_beta2")]
    if known.get("optim_args"):
        done.values["optim.override_optimizer_config"] = _pairs(known["optim_args"], "optim_args")


def _schedule(known: Mapping[str, Any], done: Translation, path: Path) -> None:
    name = str(known["lr_scheduler_type"])
    if name not in SCHEDULES:
        raise unknown_name("lr_scheduler_type", name, SCHEDULES)
    done.values["optim.lr_scheduler"] = SCHEDULES[name]
    if known.get("warmup_steps"):
        steps = real("warmup_steps", known["warmup_steps"])
        key = "lr_warmup_steps_ratio" if steps < 1 else "lr_warmup_steps"  # below 1: a share
        done.values[f"optim.{key}"] = steps if steps < 1 else whole("warmup_steps", steps)
    if name == "constant":  # theirs has no warm-up, whatever is asked for
        done.values |= {"optim.lr_warmup_steps_ratio": 0.0, "optim.lr_warmup_steps": -1}
    more = _pairs(known.get("lr_scheduler_kwargs") or {}, "lr_scheduler_kwargs")
    for key in ("num_cycles", "power"):
        if real(key, more.pop(key, 1)) != 1 and name in ("cosine_with_restarts", "polynomial"):
            raise UsageError(
                f"lr_scheduler_kwargs: {name} with another {key} than 1 is not supported",
                where=str(path),
                fix=f"Use lr_scheduler_type: {SCHEDULES[name]}",
            )
    peak, least = real("learning_rate", known["learning_rate"]), more.pop("min_lr", None)
    least = more.pop("lr_end", least)
    if least is not None and peak > 0:
        done.values["optim.min_lr_ratio"] = real("min_lr", least) / peak
    for key in ("min_lr_rate", "min_lr_ratio"):
        if key in more:
            done.values["optim.min_lr_ratio"] = real(key, more.pop(key))
    if name == "warmup_stable_decay":
        done.notes.append("lr_scheduler_type: the decay is the last tenth of the run")
    done.notes += [f"lr_scheduler_kwargs: {key} has no effect" for key in more]


def _length(known: Mapping[str, Any], done: Translation, path: Path) -> None:
    epochs = real("num_train_epochs", known["num_train_epochs"])
    done.values["trainer.total_epochs"] = max(1, math.ceil(epochs))
    if epochs != math.ceil(epochs):
        done.notes.append(f"num_train_epochs: {epochs} is rounded up to {math.ceil(epochs)}")
    if real("max_steps", known.get("max_steps", -1)) > 0:  # data is repeated until they are done
        steps = whole("max_steps", known["max_steps"])
        done.values |= {"trainer.total_training_steps": steps, "trainer.total_epochs": steps}


def _engine(known: Mapping[str, Any], done: Translation, path: Path) -> None:
    half = bool(known.get("bf16") or known.get("fp16") or known.get("pure_bf16"))
    done.values["engine.dtype"] = "bf16" if half else "fp32"
    if known.get("pure_bf16"):
        done.values["engine.model_dtype"] = "bf16"
    if given := known.get("deepspeed"):
        stage, offload, how = zero_stage(given, base=path)
        kept = "sharded in the forward pass too" if stage == 3 else "kept until the backward pass"
        done.notes.append(f"deepspeed: ZeRO stage {stage} is FSDP2 with parameters {kept}{how}")
    elif given := known.get("fsdp"):
        words = given if isinstance(given, list) else str(given).replace(",", " ").split()
        stage, offload = 2 if "shard_grad_op" in words else 3, "offload" in words
    else:
        return
    done.values |= {"engine.reshard_after_forward": stage == 3, "engine.offload": offload}


def _saving(known: Mapping[str, Any], done: Translation, path: Path) -> None:
    done.values |= save_keys(known["save_strategy"], known["save_steps"])
    held = known.get("eval_strategy", known.get("evaluation_strategy", "no"))
    steps = known.get("eval_steps") or known.get("logging_steps") or 500
    done.values["trainer.test_freq"] = when("eval", held, steps)
    wanted = split_names(known.get("report_to"))
    if known.get("use_swanlab"):
        wanted.append("swanlab")
    more = [name for name in LOGGERS if name in wanted]
    done.values["trainer.logger"] = ["console", "file", "tensorboard", *more]
    if odd := set(wanted) - {*LOGGERS, "tensorboard", "none"}:
        done.notes.append(f"report_to: {', '.join(sorted(odd))} has no counterpart here")
    metric = str(known.get("metric_for_best_model", "loss"))
    if metric not in ("loss", "eval_loss"):
        done.notes.append(f"metric_for_best_model: {metric} is not measured; val/loss decides")
    if known.get("resume_from_checkpoint") not in (None, False, True):  # true: ours, `auto`
        done.values["trainer.resume_mode"] = "resume_path"
        done.values["trainer.resume_from_path"] = str(known["resume_from_checkpoint"])


def _pairs(value: Any, key: str) -> dict[str, Any]:
    """A mapping, or text `a=1,b=2` or JSON that spells one."""
    import yaml

    text = str(value)
    try:
        if not isinstance(value, Mapping):
            rows = text if text.lstrip().startswith("{") else text.replace("=", ": ")
            value = yaml.safe_load(rows if rows is text else rows.replace(",", "\n"))
        return {str(name): item for name, item in value.items()}
    except (yaml.YAMLError, AttributeError) as error:
        raise UsageError(f"{key}: {text:.80} holds no pairs name=value") from error
