"""Levers: each makes a run smaller or faster and leaves its losses and gradients what they are."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train_ranks import run_ranks, steps_of, toy_config, toy_model, toy_store
from verl_sft.config.load import load_config
from verl_sft.config.train import TrainConfig
from verl_sft.data.collate import collate
from verl_sft.errors import MissingExtraError, UsageError
from verl_sft.model import activations, matmul
from verl_sft.model.attention import pick_attention
from verl_sft.model.build import build_model, decoder_layers
from verl_sft.model.kernels import compile_layers, use_liger
from verl_sft.model.levers import apply_levers
from verl_sft.model.loss import LossModel
from verl_sft.model.noise import add_noise
from verl_sft.trainer.idle_options import idle_options
from verl_sft.trainer.option_checks import check_levers
from verl_sft.trainer.precision import MATMUL_FILE

CPU = torch.device("cpu")
LORA = {"model__lora_rank": 4, "model__lora_dropout": 0.1}
NAMES = ("input_ids", "target_ids", "weights", "position_ids", "cu_seqlens", "max_seqlen")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("levers"))


def built(model: Path, **changes: Any) -> LossModel:
    """The loss model of a config, prepared as for a run, with adapters that do something."""
    config = toy_config(model, Path("unused"), **changes)
    attention = pick_attention("split", device=CPU, half=False)
    made = build_model(config.model, dtype=torch.float32, attention=attention, seed=0).loss_model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    apply_levers(made, config=config, device=CPU)
    return made


def batch(rows: list[list[int]], *, seed: int = 0) -> dict[str, Any]:
    """A batch of toy samples, each row a list of sample numbers."""
    store = toy_store(12, seed=seed)
    packed = collate([[store[i] for i in row] for row in rows], pad_id=0)
    return {name: getattr(packed, name) for name in NAMES}


def gradients(made: LossModel, inputs: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, dropout and noise seeded."""
    torch.manual_seed(7)
    made.zero_grad()
    loss = made(**inputs)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    return loss.item(), grads


def assert_equal_work(one: LossModel, other: LossModel, *, exact: bool = False) -> None:
    """The same loss and gradients on several batches, to the bit or within 1e-6 of their size."""
    for rows in ([[0, 1, 2]], [[3], [4]], [[5, 6, 7, 8]]):
        inputs = batch(rows)
        (loss, grads), (expected, wanted) = gradients(one, inputs), gradients(other, inputs)
        assert loss == expected if exact else math.isclose(loss, expected, rel_tol=1e-6)
        assert grads.keys() == wanted.keys() and grads
        for name, grad in grads.items():
            bound = 0.0 if exact else 1e-5 * float(wanted[name].abs().max()) + 1e-7
            assert float((grad - wanted[name]).abs().max()) <= bound, name


class Counting(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def products(made: LossModel) -> int:
    """Matrix products of a forward and backward pass."""
    with Counting() as counting:
        gradients(made, batch([[0, 1, 2]]))
    return sum(n for name, n in counting.seen.items() if "mm" in name)


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputation_is_exact(model: Path, policy: str, changes: dict[str, Any]) -> None:
    """Recomputed layers give the same bits, dropout included."""
    wanted = {"model__enable_gradient_checkpointing": True, "model__checkpoint_policy": policy}
    assert_equal_work(built(model, **wanted, **changes), built(model, **changes), exact=True)


def test_selective_recomputation_makes_no_product_twice(model: Path) -> None:
    """It has as many matrix products as no recomputation; `full` has more."""
    on = {"model__enable_gradient_checkpointing": True}
    plain, full = products(built(model)), products(built(model, **on))
    assert products(built(model, **on, model__checkpoint_policy="selective")) == plain < full


@pytest.mark.parametrize(
    "changes",
    [{}, LORA, {"model__enable_gradient_checkpointing": True, **LORA}],
    ids=["full", "lora", "recomputed"],
)
def test_last_layer_on_learned_rows_is_exact(model: Path, changes: dict[str, Any]) -> None:
    """Rows that are not learned take no part behind the last attention, and none is missed."""
    changes = {**changes, "model__lora_dropout": 0.0}
    ours = built(model, **changes)
    assert ours.last_rows_only
    assert_equal_work(ours, built(model, **changes, model__learned_rows_only=False))


def test_last_layer_computes_fewer_rows(model: Path) -> None:
    """Its MLP sees as many rows as are learned; the first layer's sees all."""
    made, seen = built(model), []
    for layer in decoder_layers(made.causal):
        layer.mlp.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    inputs = batch([[0, 1, 2]])
    gradients(made, inputs)
    assert seen[0] == inputs["input_ids"].numel()
    assert seen[-1] == int(inputs["weights"].count_nonzero()) < seen[0]


def test_without_learned_rows_every_parameter_is_reached(model: Path) -> None:
    """A batch of context alone still has gradients, all zero: other ranks wait for them."""
    inputs = batch([[0, 1]])
    inputs["weights"] = torch.zeros_like(inputs["weights"])
    loss, grads = gradients(built(model), inputs)
    assert loss == 0.0 and len(grads) == len(gradients(built(model), batch([[0]]))[1])
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("recomputed", [False, True])
def test_offloaded_activations_are_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch, recomputed: bool
) -> None:
    """What went through host memory gives the same bits; parameters never go there."""
    monkeypatch.setattr(activations, "OFFLOAD_BYTES", 1)
    moved: list[int] = []
    pack = activations._pack

    def spy(device: torch.device, parameters: set[int], tensor: torch.Tensor) -> Any:
        packed = pack(device, parameters, tensor)
        if not isinstance(packed, torch.Tensor):
            moved.append(tensor.untyped_storage().data_ptr())
        return packed

    monkeypatch.setattr(activations, "_pack", spy)
    changes = {**LORA, "model__enable_gradient_checkpointing": recomputed}
    made = built(model, **changes)
    for layer in decoder_layers(made.causal):
        activations.offload_activations(layer, device=CPU)
    assert_equal_work(made, built(model, **changes), exact=True)
    assert moved and not {p.untyped_storage().data_ptr() for p in made.parameters()} & set(moved)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's compiler looks at .grad of all
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_layers_agree(model: Path, recomputed: bool) -> None:
    """Traced layers give the same losses, and new lengths or documents are no new graphs."""
    from torch._dynamo.utils import counters

    changes = {"model__enable_gradient_checkpointing": recomputed}
    made = built(model, **changes)
    counters.clear()
    compile_layers(made.causal, layers=decoder_layers(made.causal)[:-1], backend="aot_eager")
    made.compiled = True
    assert_equal_work(made, built(model, **changes))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for rows in ([[0, 1]], [[2]], [[8, 9, 10, 11]]):
        gradients(made, batch(rows))
    assert counters["stats"]["unique_graphs"] <= graphs + 2


def test_noise_has_the_size_of_each_document() -> None:
    """Bounds and spread are alpha / sqrt(L * D) of the own document, whatever lies beside it."""
    torch.manual_seed(0)
    lengths, width = (4, 100, 9), 64
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    zeros = torch.zeros(1, sum(lengths), width)
    noise = add_noise(zeros, alpha=5.0, cu_seqlens=bounds)[0].split(list(lengths))
    for part, length in zip(noise, lengths, strict=True):
        size = 5.0 / math.sqrt(length * width)
        assert float(part.abs().max()) <= size
        assert math.isclose(float(part.std()), size / math.sqrt(3), rel_tol=0.1)


def test_noise_is_for_training_alone(model: Path) -> None:
    """It changes the training loss, the same way for the same seed, and never a validation."""
    noisy, plain = built(model, model__neftune_noise_alpha=5.0), built(model)
    inputs = batch([[0, 1]])
    first, again = gradients(noisy, inputs)[0], gradients(noisy, inputs)[0]
    assert first == again != gradients(plain, inputs)[0]
    for made in (noisy, plain):
        made.eval()
    with torch.no_grad():
        assert float(noisy(**inputs)) == float(plain(**inputs))


def test_no_gradient_of_the_base_is_computed(model: Path) -> None:
    """With adapters nothing else learns, nor does the head that is tied to the embeddings."""
    made = built(model, **LORA)
    _, grads = gradients(made, batch([[0, 1]]))
    assert grads and all("lora_" in name for name in grads)
    assert not made.causal.get_output_embeddings().weight.requires_grad
    assert not made.causal.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize(
    "changes",
    [
        {"model__neftune_noise_alpha": 5},
        {**LORA, "model__lora_init": "pissa"},
        {**LORA, "model__use_dora": True},
    ],
    ids=["noise", "pissa", "dora"],
)
def test_a_stopped_run_goes_on_to_the_bit(
    model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """With each of them a resumed run has the losses of one in one go, on two ranks."""

    def stop(trainer: Any) -> None:
        inner = trainer.train_step

        def step(plan: Any) -> Any:
            trainer.stop_asked |= trainer.progress.step == 2
            return inner(plan)

        trainer.train_step = step

    straight = toy_config(model, tmp_path / "straight", **changes)
    halved = toy_config(model, tmp_path / "halved", **changes)
    reports = run_ranks(straight, size=2)
    assert [r["code"] for r in reports] == [0, 0], reports
    assert [r["code"] for r in run_ranks(halved, size=2, hook=stop)] == [75, 75]
    assert [r["code"] for r in run_ranks(halved, size=2)] == [0, 0]
    keys = ("train/loss", "train/grad_norm")
    assert steps_of(halved, *keys) == steps_of(straight, *keys)


def test_precision_of_products_is_measured() -> None:
    """Plain fp32 keeps the bound; the choice keeps it too, and says how fast each level is."""
    before = torch.get_float32_matmul_precision()
    assert matmul.matmul_error("highest", device=CPU) < 0.5
    level, line = matmul.choose_level(device=CPU)
    assert level in matmul.LEVELS and "medium" in line
    assert matmul.matmul_error(level, device=CPU) < 1
    assert torch.get_float32_matmul_precision() == before


def test_products_that_are_not_fp32_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a level with the error of tf32 is refused, however fast it is."""
    monkeypatch.setattr(matmul, "matmul_error", lambda level, device: 30.0)
    monkeypatch.setattr(matmul, "time_ratio", lambda level, device: 100.0)
    assert matmul.choose_level(device=CPU)[0] == "highest"


def test_the_choice_of_products_is_kept(model: Path, tmp_path: Path) -> None:
    """`auto` writes what it chose into the run's directory, and a resumed run obeys that."""
    config = toy_config(model, tmp_path / "run", engine__fp32_matmul="auto")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / MATMUL_FILE).write_text('{"level": "medium"}')

    def see(trainer: Any) -> None:
        (tmp_path / "seen").write_text(torch.get_float32_matmul_precision())

    assert run_ranks(config, hook=see)[0]["code"] == 0
    assert (tmp_path / "seen").read_text() == "medium"
    (folder / MATMUL_FILE).unlink()
    fresh = toy_config(model, tmp_path / "fresh", engine__fp32_matmul="auto")
    assert run_ranks(fresh)[0]["code"] == 0
    assert (tmp_path / "fresh" / MATMUL_FILE).is_file()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["model.neftune_noise_alpha=5", "ulysses_sequence_parallel_size=2"], "slice"),
        (
            [
                "engine.use_torch_compile=true",
                "model.enable_gradient_checkpointing=true",
                "model.checkpoint_policy=selective",
            ],
            "selective",
        ),
        (["model.quantization=nf4"], "model.lora_rank"),
        (["model.quantization=nf4", "model.lora_rank=4", "model.use_dora=true"], "exact weights"),
    ],
)
def test_levers_that_cannot_work_are_refused(words: list[str], error: str) -> None:
    """With the key and the reason, before anything is loaded."""
    with pytest.raises(UsageError, match=error):
        check_levers(load_config(TrainConfig, words))


def test_missing_packages_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bitsandbytes or liger-kernel is not installed, the error says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for words, extra in (
        (["model.use_liger=true"], "liger"),
        (["model.lora_rank=4", "model.quantization=nf4"], "bitsandbytes"),
    ):
        with pytest.raises(MissingExtraError, match=rf"verl-sft\[{extra}\]"):
            check_levers(load_config(TrainConfig, words))


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the first step, not by a traceback in it."""
    monkeypatch.setattr("verl_sft.trainer.option_checks.find_compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="C\\+\\+ compiler"):
        check_levers(load_config(TrainConfig, ["engine.use_torch_compile=true"]))


def test_liger_needs_a_gpu(model: Path) -> None:
    """Its Triton kernels are refused on the CPU with the reason."""
    with pytest.raises(UsageError, match="GPU"):
        use_liger(built(model).causal, device=CPU)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_trains_its_adapters(model: Path, tmp_path: Path, kind: str) -> None:
    """Losses are near those of the exact base, on two ranks the same as on one."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    found = []
    for name, size, changes in (
        ("exact", 1, {}),
        ("one", 1, {"model__quantization": kind}),
        ("two", 2, {"model__quantization": kind}),
    ):
        config = toy_config(model, tmp_path / name, model__lora_rank=4, **changes)
        reports = run_ranks(config, size=size)
        assert [r["code"] for r in reports] == [0] * size, reports
        found.append(np.array(steps_of(config, "train/loss")))
    assert 0 < np.abs(found[1] - found[0]).max() < 0.1
    assert np.abs(found[2] - found[1]).max() < 1e-5


def test_levers_without_effect_are_said() -> None:
    """Each with its name; where it has its effect, nothing is said."""

    def said(*words: str, on_gpu: bool = False) -> list[str]:
        return idle_options(load_config(TrainConfig, words), on_gpu=on_gpu, world_size=1)

    assert said() == said("model.enable_activation_offload=true", on_gpu=True) == []
    assert said("model.lora_rank=4", "model.use_dora=true", "optim.loraplus_lr_ratio=16") == []
    for word in (
        "model.enable_activation_offload=true",
        "model.checkpoint_policy=selective",
        "model.use_rslora=true",
        "model.lora_init=pissa",
        "optim.loraplus_lr_ratio=16",
    ):
        (line,) = said(word)
        assert line.startswith(word.partition("=")[0])
    (line,) = said("engine.fp32_matmul=auto", "engine.dtype=bf16")
    assert line.startswith("engine.fp32_matmul")
