"""Everything that can be checked before a model is loaded: options, data, and the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from verl_sft.config.train import TrainConfig
from verl_sft.data.audit import audit_figures, audit_lines
from verl_sft.data.joined import JoinedStore
from verl_sft.data.load import load_samples
from verl_sft.data.plan import EpochPlan, plan_epoch
from verl_sft.data.sources import open_sources
from verl_sft.data.store import SampleStore
from verl_sft.data.tokenizer import tokenizer_spec
from verl_sft.data.tree import shared_lengths
from verl_sft.distributed.reduce import together
from verl_sft.distributed.setup import World
from verl_sft.model.build import model_fingerprint
from verl_sft.records.file_set import check_versions, versions_of
from verl_sft.records.mix import Source, mix_lines
from verl_sft.safe_io import content_hash, file_sha256, write_json
from verl_sft.trainer.best import check_best
from verl_sft.trainer.file_checks import check_files
from verl_sft.trainer.planning import planning_cost
from verl_sft.trainer.sharing import missed_sharing, shared_tokens, shuffle_units
from verl_sft.trainer.train_loop import RunPlan
from verl_sft.trainer.validation import join_sets, plan_sets

_TEMPLATE_COLUMN = "prompt_template"
_ADAPTER_KEYS = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "lora_adapter_path",
    "lora_init",
    "use_rslora",
    "use_dora",
    "quantization",
    "neftune_noise_alpha",
)
_TOKEN_FILES = ("ids.i32", "weights.f32", "offsets.i64")


@dataclass(frozen=True)
class Inputs:
    """Samples of both splits and the plan over them."""

    train: SampleStore
    val: SampleStore | JoinedStore | None
    train_files: list[Path]
    plan: RunPlan


def load_inputs(
    config: TrainConfig,
    *,
    tokenizer: Any,
    directory: Path,
    world: World,
    say: Callable[[str], None],
) -> Inputs:
    """Tokenise both splits, or open what another rank has tokenised, and plan the run.

    Raises:
        InputError: no usable row, or a sample that fits into no micro-batch.
    """
    with together(world):
        check_files(config, device=world.device, num_tokens=len(tokenizer))
    train, val, paths = read_splits(config, tokenizer=tokenizer, directory=directory, world=world)
    with together(world):
        if world.is_main:
            lines = [*audit_lines(train), *mix_lines(train.report.mix)]
            say("\n".join(lines))
            write_json(directory / "audit.json", {"lines": lines, "figures": audit_figures(train)})
    count, batch = len(train.lengths), config.data.train_batch_size
    if count < batch:
        say(f"{count} samples are fewer than data.train_batch_size={batch}: one partial batch each")
    plan = make_plan(config, train=train, val=val, world=world)
    missed = missed_sharing(config, train, on_gpu=world.device.type == "cuda")
    if missed:
        say(missed)
    with together(world):
        if world.is_main:
            facts = {
                "quadratic_cost": planning_cost(config.model),
                "world_size": world.size,
                "token_budget": config.data.token_budget,
                "steps_per_epoch": plan.steps_per_epoch,
                "total_steps": plan.total_steps,
            }
            write_json(directory / "plan.json", facts)
    return Inputs(train, val, paths, plan)


def read_splits(
    config: TrainConfig, *, tokenizer: Any, directory: Path, world: World
) -> tuple[SampleStore, SampleStore | JoinedStore | None, list[Path]]:
    """The token caches of both splits, built where they are missing, and the training files.

    Raises:
        InputError: no usable row.
    """
    data = config.data
    cache = Path(data.cache_dir) if data.cache_dir else directory / "token_cache"

    def read(files: list[Source], limit: int) -> SampleStore:
        return load_samples(
            files,
            tokenizer=tokenizer_spec(tokenizer, name=str(config.model.partial_pretrain)),
            config=data,
            cache_dir=cache,
            num_workers=data.num_workers,
            max_samples=limit,
            say=lambda line: print(line, flush=True),  # only one rank builds
        )

    def say(line: str) -> None:
        if world.is_main:
            print(line, flush=True)

    with together(world):
        train_files, val_files = open_sources(data, cache=cache, say=say)
        check_best(config.trainer, val_sets=list(val_files))
    sources = [*train_files, *(source for found in val_files.values() for source in found)]
    before = versions_of(file for source in sources for file in source.files)
    with together(world):  # the cache lets one rank build while the others wait
        train = read(train_files, data.train_max_samples)
        val = join_sets(
            {name: read(found, data.val_max_samples) for name, found in val_files.items()}
        )
        check_versions(before)
    return train, val, [file for source in train_files for file in source.files]


def make_plan(
    config: TrainConfig,
    *,
    train: SampleStore,
    val: SampleStore | JoinedStore | None,
    world: World,
) -> RunPlan:
    """The plan of the whole run, a pure function of config, lengths and number of ranks."""
    data = config.data
    options: dict[str, Any] = {
        "token_budget": data.token_budget,
        "dp_size": world.dp_size,
        "packed": config.use_remove_padding,
        "micro_batch_size": data.micro_batch_size_per_gpu,
        "quadratic_cost": planning_cost(config.model),
    }
    on_gpu, units = world.device.type == "cuda", shuffle_units(config, train)
    shared = shared_tokens(config, train, units=units, on_gpu=on_gpu)

    @lru_cache(maxsize=1)
    def epoch_plan(epoch: int) -> EpochPlan:
        return plan_epoch(
            train.lengths,
            seed=config.trainer.seed,
            epoch=epoch,
            train_batch_size=data.train_batch_size,
            shuffle=data.shuffle,
            units=units,
            shared=shared,
            **options,
        )

    per_epoch = len(epoch_plan(0).steps)
    total = per_epoch * config.trainer.total_epochs
    if config.trainer.total_training_steps is not None:
        total = min(total, config.trainer.total_training_steps)
    validation = {}
    if val is not None and len(val.lengths):
        trees = None
        if shared is not None:
            trees = shared_lengths(val, units=shuffle_units(config, val))
        validation = plan_sets(val, shared=trees, **options)
    return RunPlan(epoch_plan, per_epoch, total, validation, share=shared is not None)


def fingerprint(config: TrainConfig, *, inputs: Inputs) -> dict[str, Any]:
    """What must be the same when a run goes on: data, order, model, adapters, optimizer."""
    model = config.model
    found: dict[str, Any] = {
        "data": data_fingerprint(inputs.train),
        "data.train_batch_size": config.data.train_batch_size,
        "data.shuffle": config.data.shuffle,
        "data.shuffle_unit": config.data.shuffle_unit,
        "trainer.seed": config.trainer.seed,
        "model": model_fingerprint(model),
        "engine.model_dtype": config.engine.model_dtype,
        **{f"optim.{k}": v for k, v in asdict(config.optim).items()},
    }
    for key in _ADAPTER_KEYS:
        value = getattr(model, key)
        found[f"model.{key}"] = list(value) if isinstance(value, tuple) else value
    if config.optim.lr_scheduler != "constant":  # the learning rate depends on the run's length
        found["total_steps"] = inputs.plan.total_steps
    return found


def data_fingerprint(store: SampleStore) -> str:
    """A hash of all tokens and weights, whatever files and code they came from."""
    parts = [file_sha256(store.path / name) for name in _TOKEN_FILES]
    return content_hash(parts)


def provenance(config: TrainConfig, *, files: list[Path]) -> dict[str, Any]:
    """How the data's prompts were made, so that evaluation can make the same ones."""
    return {
        "prompt_template": _prompt_template(files[0]),
        "history_style": "dialogue" if config.data.multiturn.enable else "windowed",
        "base_model": config.model.partial_pretrain,
        "train_files": [path.name for path in files],
    }


def _prompt_template(path: Path) -> str:
    """The only one that the rows of a parquet file name, or nothing."""
    if path.suffix != ".parquet":
        return ""
    import pyarrow.parquet as pq

    if _TEMPLATE_COLUMN not in pq.read_schema(path).names:
        return ""
    names = pq.read_table(path, columns=[_TEMPLATE_COLUMN])[_TEMPLATE_COLUMN].unique()
    found = sorted({str(n) for n in names.to_pylist() if n})
    return found[0] if len(found) == 1 else ""
