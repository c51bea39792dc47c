"""What one rank needs: memory while loading and for one long document, and its large vocabulary.

Every rank is a process of its own; what is counted is how far its resident memory rises.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import row

TOKENS = 16384
VOCABULARY, ROUNDS = 65536, 2  # of the divided head; micro-batches of one step


def main() -> None:
    """Compare two ranks that share the work with ranks that do not."""
    with tempfile.TemporaryDirectory() as folder:
        million, path = write_model(Path(folder))
        for on_meta in (False, True):
            peak = max(run(folder, 2, load, path, on_meta))
            how = "each reads its rows" if on_meta else "each reads the whole"
            row(f"loading {million}M parameters, 2 ranks, {how}", f"{peak} MiB", "most of a rank")
        for size in (1, 2, 4):
            peak = max(run(folder, size, step, size))
            row(f"one document of {TOKENS} tokens, {size} rank(s)", f"{peak} MiB", "most of a rank")
        for trained in (True, False):
            for divided in (False, True):
                found = run(folder, 2, vocabulary, divided, trained)
                row(
                    f"vocabulary of {VOCABULARY}, 2 ranks, "
                    f"{'full' if trained else 'frozen'}, {'divided' if divided else 'gathered'}",
                    f"{max(f['peak'] for f in found)} MiB",
                    f"{found[0]['bytes'] / 2**20:.1f} MiB received and "
                    f"{max(f['seconds'] for f in found):.2f} s of CPU per micro-batch",
                )


def write_model(folder: Path) -> tuple[int, str]:
    """A random model folder; returns its million parameters and its path."""
    path = folder / "model"
    model = tiny("base", vocabulary=32000)
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")  # a folder without one is no model
    return round(sum(p.numel() for p in model.parameters()) / 1e6), str(path)


def tiny(size: str, *, vocabulary: int) -> Any:
    """A random Qwen2 model of one of the sizes of `verl-sft make-model`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from verl_sft.model.tiny import SIZES

    hidden, inner, layers, heads, shared = SIZES[size]
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=shared,
            max_position_embeddings=TOKENS,
            tie_word_embeddings=True,
        )
    )


def load(world: Any, path: str, on_meta: bool) -> int:
    """Build and shard the model; MiB by which memory rose at most."""
    import torch

    from verl_sft.config.train import ModelConfig
    from verl_sft.distributed.sharding import shard
    from verl_sft.model.build import build_model, decoder_layers
    from verl_sft.trainer.meta_start import fill

    start = begin()
    config = ModelConfig(partial_pretrain=path)
    built = build_model(config, dtype=torch.float32, attention="sdpa", seed=0, on_meta=on_meta)
    layers = decoder_layers(built.causal)
    shard(built.loss_model, layers=layers, world=world, dtype=torch.float32)
    fill(built.slots, world=world, offload=False)
    return peak() - start


def step(world: Any, parts: int) -> int:
    """Forward and backward of one document; MiB by which memory rose at most."""
    import torch

    from verl_sft.data.slice import slice_batch
    from verl_sft.distributed.setup import arrange
    from verl_sft.distributed.sharding import shard
    from verl_sft.model.build import decoder_layers
    from verl_sft.model.loss import LossModel
    from verl_sft.trainer.batches import model_inputs

    world = arrange(world, sp_size=parts, fsdp_size=-1)
    causal = tiny("tiny", vocabulary=2048)
    causal.set_attn_implementation(attention(world))
    layers = decoder_layers(causal)
    model = shard(LossModel(causal), layers=layers, world=world, dtype=torch.float32)
    batch = slice_batch(document(TOKENS), part=world.sp_rank, parts=parts)
    start = begin()
    model(**model_inputs(batch, world.device)).backward()
    return peak() - start


def attention(world: Any) -> str:
    """The name of the attention function for these ranks."""
    from verl_sft.model.attention import pick_attention
    from verl_sft.model.ulysses import register_ulysses

    name = pick_attention("split", device=world.device, half=False)
    return name if world.sp_group is None else register_ulysses(name, group=world.sp_group)


def document(length: int, *, learned: int = 0) -> Any:
    """A batch of one document of which the last tokens (0: all) are learned."""
    import numpy as np

    from verl_sft.data.collate import collate
    from verl_sft.data.sample import make_sample

    weights = np.ones(length + 1, dtype=np.float32)
    weights[: length + 1 - (learned or length + 1)] = 0
    sample = make_sample(np.arange(length + 1) % 2000, weights=weights, record_id="x")
    return collate([[sample]], pad_id=0)


def vocabulary(world: Any, divided: bool, trained: bool) -> dict[str, float]:
    """Steps of few learned tokens against a large vocabulary, by the median of 5.

    Returns:
        `peak`, MiB by which memory rose at most behind the model; `bytes` received and `seconds`
        of CPU, both per micro-batch.
    """
    from statistics import median

    import torch

    from verl_sft.config.train import TrainConfig
    from verl_sft.distributed.sharding import begin_micro_batch, shard
    from verl_sft.model.build import decoder_layers
    from verl_sft.model.loss import LossModel
    from verl_sft.trainer.batches import model_inputs
    from verl_sft.trainer.vocab import VocabWork, divide_vocabulary

    causal = tiny("tiny", vocabulary=VOCABULARY)
    causal.set_attn_implementation(attention(world))
    causal.requires_grad_(trained)
    layers = decoder_layers(causal)
    layers[-1].requires_grad_(True)  # stands for adapters
    model = LossModel(causal)
    config = TrainConfig()
    config.model.vocab_parallel = str(divided).lower()
    rows = divide_vocabulary(
        model, config=config, world=world, dtype=torch.float32, work=VocabWork(1, 1, 1), say=print
    )
    sharded = shard(model, layers=layers, world=world, dtype=torch.float32, divided=rows)
    if rows:
        rows.watch()
    batch = document(1024, learned=256)
    times: list[float] = []
    start, received = begin(), count_received(world)
    for _ in range(5):
        began = time.process_time()
        received.clear()
        for number in range(ROUNDS):
            begin_micro_batch(sharded, last=number == ROUNDS - 1)
            sharded(**model_inputs(batch, world.device), denominator=256.0).backward()
        sharded.zero_grad()
        times.append((time.process_time() - began) / ROUNDS)
    return {"peak": peak() - start, "bytes": sum(received) / ROUNDS, "seconds": median(times)}


def count_received(world: Any) -> list[int]:
    """Put in front of torch's collectives what notes how many bytes come from other ranks."""
    import torch.distributed as dist

    received: list[int] = []
    others = (world.size - 1) / world.size

    def counted(name: str, place: int) -> None:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[place] if args else list(kwargs.values())[place]
            received.append(round(tensor.nbytes * others))
            return original(*args, **kwargs)

        setattr(dist, name, call)

    counted("all_gather_single", 0)  # the output; of a reduction what goes in, of which parts come
    counted("reduce_scatter_single", 1)
    counted("all_to_all_single", 0)
    return received


def run(folder: str, size: int, job: Any, *arguments: Any) -> list[int]:
    """What `job` returns on each of `size` fresh ranks."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    store = tempfile.mktemp(dir=folder)
    ranks = [
        context.Process(target=_rank, args=(rank, size, store, results, job, arguments))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    found = [results.get() for _ in ranks]
    for process in ranks:
        process.join()
    failed = [f for f in found if isinstance(f, str)]
    if failed:
        raise RuntimeError(failed[0])
    return found


def _rank(rank: int, size: int, store: str, results: Any, job: Any, arguments: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    import torch.distributed as dist

    from verl_sft.distributed.setup import setup_world

    try:
        results.put(job(setup_world("cpu", store=dist.FileStore(store, size)), *arguments))
    except Exception as error:
        results.put(f"rank {rank}: {error!r}")
    results.close()
    results.join_thread()
    os._exit(0)


def begin() -> int:
    """Forget the peak so far; resident MiB now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most resident memory since `begin`, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


if __name__ == "__main__":
    main()
