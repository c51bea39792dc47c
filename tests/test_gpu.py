"""What only a GPU can show; skipped, with the reason, where there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train_ranks import (
    VOCAB,
    steps_of,
    toy_config,
    toy_model,
    toy_store,
    weights_of,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
ROOT = Path(__file__).parent.parent
GPU: dict[str, Any] = {"trainer__device": "cuda", "engine__dtype": "bf16"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_varlen_equals_split(shared: int) -> None:
    """The kernel of torch for packed documents against SDPA document by document, and gradients."""
    from verl_sft.model.attention import document_kwargs, split_attention, varlen_attention

    lengths = [5, 130, 64, 1]
    device, half = torch.device("cuda"), torch.bfloat16
    torch.manual_seed(0)
    shapes = [(1, 4, sum(lengths), 64)] + [(1, shared, sum(lengths), 64)] * 2
    inputs = [torch.randn(s, device=device, dtype=half, requires_grad=True) for s in shapes]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    kwargs = document_kwargs(bounds, max_seqlen=max(lengths))
    found = []
    for attention in (varlen_attention, split_attention):
        out, _ = attention(torch.nn.Identity(), *inputs, None, **kwargs)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=3e-2, rtol=3e-2)
    assert not torch.allclose(found[0][0][:, :5], found[0][0][:, 5:10])


@pytest.mark.parametrize("attention", ["varlen", "split", "sdpa"])
def test_packed_documents_are_isolated(model: Path, attention: str) -> None:
    """Changing one document leaves the logits of its neighbours to the last bit."""
    from verl_sft.data.collate import collate
    from verl_sft.model.attention import pick_attention
    from verl_sft.model.build import build_model, probe_packing

    device = torch.device("cuda")
    config = toy_config(model, Path("unused"))
    picked = pick_attention(attention, device=device, half=True)
    built = build_model(config.model, dtype=torch.bfloat16, attention=picked, seed=0)
    loss_model = built.loss_model.to(device)
    store = toy_store(3)
    batch = collate([[store[0], store[1], store[2]]], pad_id=0)
    names = ("input_ids", "position_ids", "cu_seqlens")

    def logits() -> torch.Tensor:
        tensors = {name: getattr(batch, name).to(device) for name in names}
        with torch.no_grad():
            return loss_model(**tensors, max_seqlen=batch.max_seqlen, mode="logits")

    first = logits()
    start, stop = len(store[0]), len(store[0]) + len(store[1])
    batch.input_ids[0, start] += 1
    second = logits()
    assert torch.equal(first[:start], second[:start]) and torch.equal(first[stop:], second[stop:])
    assert not torch.equal(first[start:stop], second[start:stop])
    assert probe_packing(loss_model, device=device, half=True, vocab_size=VOCAB) < 0.2


@pytest.mark.parametrize("changes", [{}, {"model__lora_rank": 4}], ids=["full", "lora"])
def test_bf16_follows_the_cpu(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """A bf16 run on the GPU gives the losses of float32 on the CPU within bf16's rounding."""
    found = []
    for name, settings in (("gpu", GPU), ("cpu", {"engine__dtype": "fp32"})):
        config = _train(model, tmp_path / name, {**settings, "optim__lr": 3e-4, **changes})
        found.append([loss for (loss,) in steps_of(config, "train/loss")])
    assert all(abs(a / b - 1) < 0.005 for a, b in zip(*found, strict=True))


def test_resume_is_bit_exact(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's deterministic mode the rest of a resumed run is the same to the last bit."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings = {**GPU, "trainer__save_freq": 1, "model__attn_implementation": "split"}
    whole = _train(model, tmp_path / "whole", settings)
    out = tmp_path / "rest"
    out.mkdir()
    shutil.copytree(tmp_path / "whole" / "global_step_3", out / "global_step_3")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", out)
    rest = _train(model, out, settings)
    keys = ("step", "train/loss", "train/grad_norm")
    assert steps_of(rest, *keys) == steps_of(whole, *keys)
    one, other = weights_of(out), weights_of(tmp_path / "whole")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# A process that has not touched the GPU forks the rank: CUDA does not survive a fork.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from tests.train_ranks import run_ranks, toy_config
config = toy_config(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))
def deterministic(trainer):
    torch.use_deterministic_algorithms(True, warn_only=True)
print(json.dumps(run_ranks(config, hook=deterministic)))
"""


def _train(model: Path, out: Path, settings: dict[str, Any]) -> Any:
    """One rank, in torch's deterministic mode; returns the config."""
    words = [sys.executable, "-c", SCRIPT, str(model), str(out), json.dumps(settings)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout.splitlines()[-1])
    assert report["code"] == 0, report
    return toy_config(model, out, **settings)
