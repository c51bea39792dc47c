"""One contender of `benchmarks.train`, in a process of its own.

It trains on data made from the seed that all share, waits for a line on standard input before every
optimizer step, and answers each with a JSON line: CPU seconds, useful tokens, loss, peak memory,
the peak before the first step.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import MemoryStore, dialogues, model_config, pad_tokenizer
from verl_sft.data.plan import plan_epoch
from verl_sft.data.sample import TokenizedSample

LR = 1e-3
_Batches = list[list[TokenizedSample]]


class Pace:
    """Lets one step go on at a time and reports it."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a trainer prints does not mix with the reports
        self.started = 0.0
        self.before = 0.0  # peak memory before the first step, in MiB

    def start(self) -> None:
        """Wait for our turn."""
        if self.started:
            raise AssertionError("a step within a step")
        if not sys.stdin.readline():
            os._exit(0)
        self.before = self.before or _peak()
        self.started = time.process_time()

    def stop(self, *, tokens: int, loss: float) -> None:
        """Tell what the step took."""
        seconds = time.process_time() - self.started
        print(json.dumps([seconds, tokens, loss, _peak(), self.before]), file=self.out, flush=True)
        self.started = 0.0


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def batches_of(job: dict[str, Any]) -> _Batches:
    """The samples of each optimizer step, as our plan has them, so that all read the same ones."""
    samples = samples_of(job)
    plan = plan_epoch(
        np.array([len(s) for s in samples]),
        seed=1,
        epoch=0,
        token_budget=job["longest"],
        train_batch_size=job["batch"],
        dp_size=1,
    )
    return [[samples[i] for i in step.sample_indices()] for step in plan.steps]


def samples_of(job: dict[str, Any]) -> list[TokenizedSample]:
    """The data set, the same for every contender."""
    return dialogues(
        job["batch"] * job["steps"],
        seed=0,
        vocabulary=job["vocabulary"],
        longest=job["longest"],
    )


def ours(job: dict[str, Any], pace: Pace) -> None:
    """The trainer as `verl-sft train` runs it, with samples in place of files."""
    from verl_sft.config.load import load_config
    from verl_sft.config.train import TrainConfig
    from verl_sft.distributed.setup import setup_world
    from verl_sft.trainer import fsdp_sft_trainer as script
    from verl_sft.trainer import inputs

    store: Any = MemoryStore(samples_of(job))
    words = [
        f"model.partial_pretrain={job['model']}",
        "data.train_files=unused",
        f"data.train_batch_size={job['batch']}",
        f"data.max_length={job['longest']}",
        f"data.max_token_len_per_gpu={job.get('budget', job['longest'])}",
        f"optim.lr={LR}",
        "optim.lr_scheduler=constant",
        "optim.lr_warmup_steps=0",
        "trainer.total_epochs=1",
        "trainer.device=cpu",
        "trainer.logger=[file]",
        "trainer.export=false",
        "trainer.save_freq=-1",
        *job["words"],
    ]
    changes = set(job.get("changes", ()))
    build: Any = script.assemble

    def assemble(*args: Any, **kwargs: Any) -> Any:
        trainer, model = build(*args, **kwargs)
        if "all rows" in changes:
            model.split_head = False
        if "one chunk" in changes:
            model.chunk = 1 << 30
        if "plain adamw" in changes:
            for group in trainer.optimizer.param_groups:
                group.update(fused=False, foreach=False)
        step = trainer.train_step

        def paced(plan: Any) -> Any:
            pace.start()
            outcome = step(plan)
            pace.stop(tokens=outcome.tokens, loss=outcome.loss)
            return outcome

        trainer.train_step, trainer.save = paced, lambda **_: None
        return trainer, model

    def load(config: Any, **kwargs: Any) -> Any:
        plan = inputs.make_plan(config, train=store, val=None, world=kwargs["world"])
        return inputs.Inputs(store, None, [Path("unused.csv")], plan)

    replaced: Any = script
    replaced.assemble, replaced.load_inputs = assemble, load
    inputs.data_fingerprint = lambda store: "benchmark"  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = load_config(TrainConfig, [*words, f"trainer.default_local_dir={folder}/run"])
        script.run(config, world=setup_world("cpu"), stack=stack, owned=[])


def hugging_face(job: dict[str, Any], pace: Pace) -> None:
    """The Trainer of transformers: padded, or flattened into one row without padding."""
    from transformers import DataCollatorForTokenClassification, DataCollatorWithFlattening, Trainer

    rows = _in_order(job)
    flat = job["flatten"]
    trainer = Trainer(
        model=_model(job),
        args=_arguments(job),
        train_dataset=_Rows(rows),
        data_collator=DataCollatorWithFlattening()
        if flat
        else DataCollatorForTokenClassification(pad_tokenizer(), label_pad_token_id=-100),
        callbacks=[_callback(pace, _tokens_by_step(job))],
    )
    trainer.train()


def trl(job: dict[str, Any], pace: Pace) -> None:
    """TRL's SFTTrainer with best-fit packing: its own batches over the same data."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(_in_order(job))
    options = _options(job) | {
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": job["longest"] + 1,
        "gradient_checkpointing": False,
        "dataset_num_proc": None,
    }
    tokens: list[int] = []
    trainer = SFTTrainer(
        model=_model(job),
        args=SFTConfig(**options),
        train_dataset=data,
        processing_class=pad_tokenizer(),
        callbacks=[_callback(pace, tokens)],
    )
    per_step = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    sizes = [len(row["input_ids"]) - len(row["seq_lengths"]) for row in trainer.train_dataset]
    tokens += [sum(sizes[i : i + per_step]) for i in range(0, len(sizes), per_step)]
    trainer.train()


def _in_order(job: dict[str, Any]) -> list[dict[str, list[int]]]:
    """All rows as transformers reads them: unshifted labels, -100 where nothing is learned."""
    rows = []
    for batch in batches_of(job):
        for sample in sorted(batch, key=len) if job.get("sort") else batch:
            targets = np.where(sample.weights > 0, sample.target_ids, -100).tolist()
            ids = [*sample.input_ids.tolist(), int(sample.target_ids[-1])]
            rows.append({"input_ids": ids, "labels": [-100, *targets]})
    return rows


def _tokens_by_step(job: dict[str, Any]) -> list[int]:
    return [sum(map(len, batch)) for batch in batches_of(job)]


class _Rows:
    """A data set that is a list."""

    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def _model(job: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    if "shape" in job:  # random weights, where they are computed with
        with torch.device(job["device"]):
            config = model_config(job["shape"], positions=job["longest"] + 1)
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=job["attention"]
            )
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model.config.use_cache = False
    return model


def _options(job: dict[str, Any]) -> dict[str, Any]:
    micro = job["micro"]
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": max(1, job["accumulate"]),
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "adam_beta2": 0.95,
        "use_cpu": job.get("device", "cpu") == "cpu",
        "bf16": job["bf16"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }


def _arguments(job: dict[str, Any]) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(**_options(job))


def _callback(pace: Pace, tokens: list[int]) -> Any:
    from transformers import TrainerCallback

    class Paced(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pace.start()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                pace.stop(tokens=tokens[state.global_step - 1], loss=logs["loss"])

    return Paced()


KINDS = {"ours": ours, "hf": hugging_face, "trl": trl}


def main() -> None:
    """Run the contender that the JSON argument describes."""
    job = json.loads(sys.argv[1])
    pace = Pace()
    import torch

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(job["matmul"])
    KINDS[job["kind"]](job, pace)


if __name__ == "__main__":
    main()
