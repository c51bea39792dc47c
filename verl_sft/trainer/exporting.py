"""From a checkpoint of any number of ranks to a Hugging Face folder, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_sft import safe_io
from verl_sft.config.export import ExportConfig
from verl_sft.config.load import load_config
from verl_sft.config.secrets import hidden
from verl_sft.config.train import TrainConfig, TrainerConfig
from verl_sft.errors import StorageError, UsageError
from verl_sft.export.hf import write_folder
from verl_sft.export.upload import DONE, check_target, try_upload, upload
from verl_sft.model.build import load_tokenizer
from verl_sft.trainer import checkpoint
from verl_sft.trainer.status import write_status

CONFIG, PROVENANCE = "train_config.json", "provenance.json"
UPLOADED = "upload.json"  # which export arrived where
_SHARD_PREFIX, _MODEL_PREFIX = "model.", "causal."


def export_checkpoint(config: ExportConfig, *, say: Callable[[str], None]) -> Path:
    """Write, verify and, if wanted, upload the folder; the training data is not needed.

    Args:
        config: of the command.
        say: hears what is done.

    Returns:
        The folder.

    Raises:
        UsageError: no checkpoint there, or no configuration of its run.
        StorageError: the checkpoint is damaged, or the folder does not give its logits.
    """
    if config.upload:
        check_target(config.upload, key="upload")
    path, manifest = find_checkpoint(Path(str(config.checkpoint)).expanduser(), say=say)
    run = path.parent
    train = read_run_config(run)
    if config.model:
        train = replace(train, model=replace(train.model, partial_pretrain=config.model))
    step = manifest["progress"]["step"]
    out = Path(config.out or run / f"huggingface_step{step}").expanduser()
    safe_io.make_output_dir(out.parent)
    files = [path / name for name in sorted(manifest["files"])]
    report = write_folder(
        out,
        state=read_parameters(files, names=manifest["tensors"]),
        config=train,
        tokenizer=load_tokenizer(train.model),
        provenance={**read_provenance(run, config=train), "checkpoint_step": step},
        merge=config.merge,
        max_shard_size=config.max_shard_size,
    )
    say(
        f"step {step}: reopened logits differ by {report['max_logit_difference']:.2g} at most "
        f"(their standard deviation is {report['logit_standard_deviation']:.3g})"
    )
    if config.upload:
        say(f"uploaded {upload(out, config.upload)} files to {hidden(config.upload)}")
    return out


def upload_export(
    out: Path, *, directory: Path, config: TrainerConfig, step: int, say: Callable[[str], None]
) -> None:
    """Upload the export of a run, once: what arrived is remembered in the run's directory.

    The run has succeeded whatever comes of it; `status.json` tells.

    Args:
        out: the folder.
        directory: of the run.
        config: says where to.
        step: that was exported.
        say: hears of each attempt.
    """
    if not (config.export and config.upload_uri):
        return
    made = safe_io.file_sha256(out / "manifest.json")
    wanted = {"to": hidden(config.upload_uri), "manifest": made}
    record = directory / UPLOADED
    if record.is_file() and json.loads(record.read_text("utf-8")) == wanted:
        return
    outcome = try_upload(out, config.upload_uri, say=say)
    if outcome.startswith(DONE):
        safe_io.write_json(record, wanted)
    write_status(directory, state="done", code=0, step=step, upload=outcome)


def find_checkpoint(path: Path, *, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The verified checkpoint at `path`, or the newest whole one of the run there.

    Raises:
        UsageError: there is none.
        StorageError: what is there is damaged.
    """
    if (path / checkpoint.MANIFEST).is_file():
        return path, checkpoint.verify(path)
    found = checkpoint.find_resume(path, say=say) if path.is_dir() else None
    if found is None:
        raise UsageError(
            "no checkpoint there",
            where=f"checkpoint={path}",
            fix="Give a global_step_N folder, or the directory of a run",
        )
    return found


def read_run_config(run: Path) -> TrainConfig:
    """The configuration that a run was started with.

    Raises:
        UsageError: it is not there.
    """
    path = run / CONFIG
    if not path.is_file():
        raise UsageError(
            f"no {CONFIG} beside the checkpoint",
            where=str(run),
            fix="Keep global_step_N in the directory of its run",
        )
    return load_config(TrainConfig, ["--config", str(path)])


def read_provenance(run: Path, *, config: TrainConfig) -> dict[str, Any]:
    """How the data's prompts were made, as the run noted it; what the config tells otherwise."""
    for path in (run / PROVENANCE, run / "huggingface" / "verl_sft.json"):
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
            return found
    return {
        "prompt_template": "",
        "history_style": "dialogue" if config.data.multiturn.enable else "windowed",
        "base_model": config.model.partial_pretrain,
        "train_files": [],
    }


def read_parameters(files: list[Path], *, names: Iterable[str]) -> dict[str, Tensor]:
    """Whole parameters from the rows in verified shards, named as in the transformers model.

    Raises:
        StorageError: a tensor of the manifest is in no shard.
    """
    from safetensors import safe_open

    found = {}
    with ExitStack() as stack:
        shards = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        held = [set(shard.keys()) for shard in shards]
        for name in names:
            key = f"{_SHARD_PREFIX}{name}"
            parts = [
                shard.get_tensor(key)
                for shard, keys in zip(shards, held, strict=True)
                if key in keys
            ]
            if not parts:
                raise StorageError(f"{name} is in no shard", where=str(files[0].parent))
            whole = torch.cat(parts) if parts[0].ndim else parts[0]
            found[name.removeprefix(_MODEL_PREFIX)] = whole
    return found
