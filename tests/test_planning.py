"""`verl-sft plan`: dimensions, cost and memory from config.json, and the figures of a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train_ranks import toy_config, toy_model, toy_store
from verl_sft.cli import main
from verl_sft.config.train import ModelConfig
from verl_sft.data.plan import QUADRATIC_COST, EpochPlan, StepPlan, plan_epoch
from verl_sft.errors import UsageError
from verl_sft.model.attention import SPLIT, register_attention
from verl_sft.model.loss import LossModel
from verl_sft.model.shape import ModelShape, read_shape
from verl_sft.trainer.flops import ModelFlops
from verl_sft.trainer.memory import MemorySettings, estimate_memory, memory_settings
from verl_sft.trainer.planning import plan_figures, planning_cost

SAMPLE = Path(__file__).resolve().parent.parent / "data" / "sample"
NARROW: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def config_of(kind: str, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**{**NARROW, **changes})


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 24}),
        ("llama", {}),
        ("gemma", {"head_dim": 16}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}),
    ],
)
def test_parameters_are_those_of_the_model(kind: str, changes: dict[str, Any]) -> None:
    """The count from config.json is the exact count of the model that transformers builds."""
    from transformers import AutoModelForCausalLM

    config = config_of(kind, **changes)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in built.parameters())
    assert read_shape(config.to_dict()).parameters == counted


def test_dimensions_that_are_missing_are_named() -> None:
    """A config without a decoder's dimensions says which file and which field."""
    with pytest.raises(UsageError, match=r"here\.json.*hidden_size"):
        read_shape({"model_type": "vit"}, where="here.json")


def test_cost_is_of_the_model(tmp_path: Path) -> None:
    """Wider models pay less for attention, learning more rows makes it cheaper; pure."""
    narrow = read_shape(config_of("qwen2").to_dict())
    wide = read_shape(config_of("qwen2", hidden_size=512, intermediate_size=768).to_dict())
    assert wide.quadratic_cost() < narrow.quadratic_cost() < narrow.quadratic_cost(learned_share=0)
    # Qwen2.5-1.5B by hand: 46.8M numbers in the matrices of a layer, 1536 of all heads.
    size = dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, vocab_size=151936)
    big = read_shape(config_of("qwen2", num_attention_heads=12, **size).to_dict())
    assert big.quadratic_cost(learned_share=0) == pytest.approx(1536 / 46.8e6, rel=0.01)
    assert planning_cost(ModelConfig(partial_pretrain=str(tmp_path / "no"))) == QUADRATIC_COST


def kept_bytes(loss_model: LossModel, tokens: int) -> int:
    """Bytes that autograd really keeps of one document, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in loss_model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    ids = torch.arange(tokens)[None] % 300
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    weights = (torch.arange(tokens)[None] % 3 == 0).float()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_model(ids, torch.arange(tokens)[None], bounds, tokens, ids, weights)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize(("lora", "half"), [(False, False), (True, False), (False, True)])
def test_activations_are_those_that_autograd_keeps(lora: bool, half: bool) -> None:
    """Within 3 % of what is saved for backward, full and LoRA; within 7 % in bf16 on a CPU."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    register_attention()
    config = config_of("qwen2", hidden_size=128, intermediate_size=352)
    causal = AutoModelForCausalLM.from_config(config, attn_implementation=SPLIT)
    shape, adapters = read_shape(config.to_dict()), None
    if lora:
        get_peft_model(causal, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        adapters = sum(p.numel() for p in causal.parameters() if p.requires_grad)
        assert adapters == shape.lora_parameters(rank=4, targets="all-linear")
    settings = MemorySettings(adapters=adapters, compute_bytes=2 if half else 4, scores=half)
    causal.to(torch.bfloat16 if half else torch.float32)
    estimate = estimate_memory(shape, settings=settings, tokens=512, learned=171)
    kept = kept_bytes(LossModel(causal).train(), 512)
    assert estimate.activations == pytest.approx(kept, rel=0.07 if half else 0.03)


def test_each_setting_moves_its_own_part() -> None:
    """Sharding, LoRA, checkpointing, offload, bf16, sequence parallelism shrink their part."""
    shape = read_shape(config_of("qwen2", num_hidden_layers=16).to_dict())

    def parts(**changes: Any) -> Any:
        settings = MemorySettings(**changes)
        return estimate_memory(shape, settings=settings, tokens=4096, learned=1000)

    plain = parts()
    assert plain.parameters == 4 * shape.parameters and plain.optimizer == 2 * plain.parameters
    assert parts(shard_size=4).parameters == plain.parameters // 4
    assert parts(shard_size=4).optimizer == plain.optimizer // 4
    assert parts(adapters=1000).optimizer == 8000
    assert parts(checkpointing="full").activations < parts(checkpointing="selective").activations
    assert parts(checkpointing="selective").activations < plain.activations
    assert parts(compute_bytes=2).activations < plain.activations
    assert parts(sp_size=2).activations < 0.6 * plain.activations
    assert parts(offload=True).optimizer == 0 == parts(offload=True).parameters
    assert plain.total < sum(
        (plain.parameters, plain.gradients, plain.optimizer, plain.activations,
         plain.logits, plain.backward)
    )  # fmt: skip


@pytest.mark.parametrize(("size", "full"), [(4, True), (2, True), (4, False)])
def test_each_term_counted_by_hand(size: int, full: bool) -> None:
    """2 layers, width 4, MLP 6, one head, vocabulary 10, tied: every term as its sum of tensors."""
    shape = ModelShape(
        hidden=4, layers=2, intermediate=6, heads=1, query=4, key_value=4, vocab=10, tied=True
    )
    layer, root, tokens, rows = 4 * 4 * 4 + 3 * 4 * 6 + 2 * 4, 10 * 4 + 4, 16, 3
    adapters = None if full else 50
    settings = MemorySettings(compute_bytes=size, adapters=adapters, logit_rows=rows)
    found = estimate_memory(shape, settings=settings, tokens=tokens, learned=8)
    whole = 2 * layer + root
    trained = whole if full else 50
    assert found.parameters == 4 * (whole + (adapters or 0))
    assert found.gathered == size * whole  # two layers and the root: all there is
    assert (found.gradients, found.optimizer) == (4 * trained, 8 * trained)
    norm = 4 * 4 + 4 * size + (4 * size if full else 0)  # its input, normalised, times its weight
    kept = 2 * norm + size * (3 * 4 + 2 * 4) + size * 4 * 6
    assert found.activations == tokens * (2 * kept + 4 * (2 * size + 4))
    logits = rows * 10 * (4 if size == 4 else 4 + 2)
    head = 10 * 4 * (4 if size == 4 else 4 + 2) if full else 0
    assert found.logits == logits + head
    assert found.backward == (40 * size if full else 0) + tokens * size * (3 * 6 + 2 * 4)
    assert found.reduction == (root * (size + 4 + 4 + 4) if full else 0)
    largest = max(found.activations + max(found.logits, found.backward), found.reduction)
    stays = found.parameters + found.gathered + found.gradients + found.optimizer
    assert found.total == stays + largest


def test_only_active_experts_work() -> None:
    """Two of eight experts: a quarter of their numbers counts, by hand, in both kinds of FLOPs."""
    from transformers import AutoModelForCausalLM

    config = config_of(
        "qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16
    )
    size = ModelFlops.of(AutoModelForCausalLM.from_config(config))
    attention = 64 * 64 * 2 + 64 * 32 * 2
    layer = attention + 64 * 8 + 2 * 3 * 64 * 32  # router, two experts of three matrices
    assert (size.body, size.body_trained) == (3 * layer, 3 * layer)
    assert size.six_n(7) == 6 * 7 * (3 * layer + 300 * 64)
    assert size.executed(7, learned=2, pairs=0.0) == 6 * (7 * 3 * layer + 2 * 300 * 64)


def test_settings_are_read_from_the_run(model: Path, tmp_path: Path) -> None:
    """LoRA, precision, checkpointing and replicas of a config reach the estimate."""
    shape = read_shape(json.loads((model / "config.json").read_text()))
    config = toy_config(
        model, tmp_path, model__lora_rank=4, engine__fsdp_size=2,
        model__enable_gradient_checkpointing=True,
    )  # fmt: skip
    found = memory_settings(config, shape=shape, world_size=4, half=True, on_gpu=True)
    assert found.shard_size == 2 and found.compute_bytes == 2 and found.parameter_bytes == 4
    assert found.checkpointing == "full" and not found.scores
    assert found.adapters == shape.lora_parameters(rank=4, targets="all-linear")


def test_figures_of_a_plan_counted_by_hand() -> None:
    """Two steps on two ranks: fill, idle and empty micro-batches are what they look like."""
    lengths, learned = np.array([4, 6, 10, 5]), np.array([1, 2, 3, 4])
    plan = EpochPlan(
        (
            StepPlan(((((0, 1),),), (((2,),),))),
            StepPlan(((((3,),),), ((),))),
        )
    )
    figures = plan_figures(plan, lengths=lengths, learned=learned, budget=10, quadratic_cost=0.0)
    assert (figures.steps, figures.documents, figures.tokens) == (2, 4, 25)
    assert (figures.micro_batches, figures.empty_micro_batches) == (3, 1)
    assert figures.fill == pytest.approx(25 / 30) and figures.padding == 0
    assert figures.idle == pytest.approx(1 - 25 / 30)  # 10 + 10 and 5 + 0 of two rounds
    assert (figures.largest_tokens, figures.largest_learned, figures.longest) == (10, 4, 10)
    shared = np.array([0, 4, 0, 0])
    again = plan_figures(
        plan, lengths=lengths, learned=learned, budget=10, quadratic_cost=0.0, shared=shared
    )
    assert (again.tokens, again.shared_tokens) == (21, 4)
    padded = EpochPlan((StepPlan(((((0,), (1,)),),)),))
    figures = plan_figures(padded, lengths=lengths, learned=learned, budget=12, quadratic_cost=0)
    assert figures.padding == pytest.approx(2 / 12) and figures.largest_tokens == 12


def test_figures_hold_for_any_plan() -> None:
    """Tokens and documents of a planned epoch are those of the data."""
    store = toy_store(200)
    plan = plan_epoch(
        store.lengths, seed=0, epoch=0, token_budget=64, train_batch_size=32, dp_size=3
    )
    figures = plan_figures(
        plan, lengths=store.lengths, learned=store.lengths, budget=64, quadratic_cost=QUADRATIC_COST
    )
    assert figures.documents == 200 and figures.tokens == int(store.lengths.sum())
    assert figures.steps == 7 and 0 <= figures.idle < 0.5 < figures.fill <= 1


def words_for(model: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        "plan", f"data.train_files={SAMPLE}", f"model.partial_pretrain={model}",
        "data.max_length=4096", f"trainer.default_local_dir={tmp_path / 'run'}",
        "data.train_batch_size=8", "trainer.device=cpu", *more,
    ]  # fmt: skip


def test_the_command_reads_no_weights(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The table and the JSON file come from a model whose weights are an empty file."""
    import shutil

    hollow = Path(shutil.copytree(model, tmp_path / "hollow"))
    for path in hollow.glob("*.safetensors"):
        path.write_bytes(b"")
    out = tmp_path / "plan.json"
    more = ("world_size=2", f"json={out}", "trainer.total_epochs=3")
    assert main(words_for(hollow, tmp_path, *more)) == 0
    table = capfd.readouterr().out
    found = json.loads(out.read_text())
    assert found["world_size"] == 2 and found["total_steps"] == 3 * found["epoch"]["steps"]
    assert f"{found['epoch']['steps']} per epoch" in table and "memory    about" in table
    assert found["memory_total"] > found["memory"]["parameters"] > 0
    assert list((tmp_path / "run" / "token_cache").iterdir())  # where train looks for it


def test_rows_and_steps_can_be_capped(model: Path, tmp_path: Path) -> None:
    """`data.train_max_samples` reads so many rows, `trainer.total_training_steps` ends a run."""
    found = []
    for more in ([], ["data.train_max_samples=9"], ["trainer.total_training_steps=4"]):
        out = tmp_path / "plan.json"
        assert main(words_for(model, tmp_path, f"json={out}", *more)) == 0
        plan = json.loads(out.read_text())
        found.append((plan["data"]["rows"], plan["epoch"]["documents"], plan["total_steps"]))
    rows, samples, steps = found[0]
    assert found[1:] == [(9, 9, 2 * 4), (rows, samples, 4)] and rows > 9 and steps > 8


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("world_size=3", "ulysses_sequence_parallel_size=2"), "does not divide the 3 ranks"),
        (("data.max_token_len_per_gpu=100",), "max_token_len_per_gpu=100 is smaller than"),
        (("world_size=0",), "world_size=0: must be at least 1"),
    ],
)
def test_what_cannot_run_is_refused(
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    """A world size that does not divide and a budget below the longest sample: exit 2, numbers."""
    assert main(words_for(model, tmp_path, *words)) == 2
    assert told in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("model.attn_implementation=flashy",), "attn_implementation=flashy"),
        (("optim.optimizer=AdmW",), "Did you mean AdamW"),
        (("model.lora_adapter_path=ADAPTER",), "takes 32 numbers, the model gives 64"),
        (("model.lora_adapter_path=nowhere",), "no adapter_config.json there"),
        (("world_size=6", "ulysses_sequence_parallel_size=3"), "model's 4 attention heads"),
        (
            ("world_size=2", "ulysses_sequence_parallel_size=2", "model.attn_implementation=sdpa"),
            "sdpa does not work with sequence parallelism",
        ),
        (
            ("engine.meta_start=true", "model.lora_rank=4", "model.use_dora=true"),
            "model.use_dora starts from the weights",
        ),
        (
            ("trainer.resume_mode=resume_path", "trainer.resume_from_path=runs/global_step_4"),
            "no such checkpoint",
        ),
        (
            ("trainer.env_eval_freq=1", "trainer.env_eval_data_dir=no_games"),
            "env_eval_data_dir=no_games: no such folder",
        ),
        (("world_size=2", "optim.optimizer=adafactor"), "does not work with sharded parameters"),
    ],
)
def test_mistakes_are_told_before_the_data_is_read(
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    """A wrong kernel, optimizer, adapter or number of heads costs no tokenising."""
    from safetensors.torch import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "other"}')
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({key: torch.zeros(4, 32)}, adapter / "adapter_model.safetensors")
    given = [word.replace("ADAPTER", str(adapter)) for word in words]
    assert main(words_for(model, tmp_path, *given)) == 2
    assert told in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A vocabulary smaller than the tokenizer's is told with both numbers."""
    import shutil

    small = Path(shutil.copytree(model, tmp_path / "small"))
    settings = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**settings, "vocab_size": 100}))
    assert main(words_for(small, tmp_path)) == 2
    assert "the model knows 100" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
