"""SIGKILL of a rank, of all ranks or of the launcher at any moment: the same bits in the end."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kill_harness import Tally, run_with_kills
from tests.train_ranks import run_ranks, steps_of, toy_config, toy_model, weights_of
from verl_sft.trainer import fsdp_sft_trainer, train_loop

LORA = {"model__lora_rank": 2, "model__lora_dropout": 0.2}
EXACT = ("step", "train/loss", "train/grad_norm", "train/lr", "train/total_tokens")
Changes = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def settings(*, lora: bool, beside: bool, epochs: int = 8) -> Changes:
    return {
        "trainer__save_freq": 1,
        "trainer__max_ckpt_to_keep": 2,
        "trainer__total_epochs": epochs,
        "trainer__async_save": beside,
        "data__micro_batch_size_per_gpu": 1,
        **(LORA if lora else {}),
    }


def outcome(config: Any) -> tuple[list[tuple[str, ...]], dict[str, torch.Tensor]]:
    """Hexadecimal figures of every step, and all tensors of the last checkpoint."""
    rows = [tuple(float(v).hex() for v in row) for row in steps_of(config, *EXACT)]
    return rows, weights_of(Path(config.trainer.default_local_dir))


def same(one: Any, other: Any) -> bool:
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    )


def kill_many(model: Path, folder: Path, *, kills: int, seed: int, epochs: int = 8) -> Tally:
    """Runs of all kinds until so many kills were made, each compared with one without."""
    rng, tally, references = random.Random(seed), Tally(), {}
    for number in itertools.count():
        lora, beside = number % 2 == 0, number // 2 % 2 == number % 2
        given = settings(lora=lora, beside=beside, epochs=epochs)
        if lora not in references:
            whole = toy_config(model, folder / f"whole-{lora}", **given)
            reports = run_ranks(whole, size=2)
            assert [r["code"] for r in reports] == [0, 0], reports
            references[lora] = outcome(whole)
            assert [int(float.fromhex(row[0])) for row in references[lora][0]] == list(
                range(1, 3 * epochs + 1)
            )
        config = toy_config(model, folder / f"killed-{number}", **given)
        run_with_kills(config, rng=rng, tally=tally, most=kills)
        assert same(outcome(config), references[lora]), f"run {number} differs, seed {seed}"
        left = list((folder / f"killed-{number}").glob(".tmp-*"))
        assert not left, left
        if tally.kills >= kills:
            return tally
    raise AssertionError


def test_kills_change_no_bit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forty kills, at least a tenth inside a save: losses and weights are those without kills."""
    seed = random.randrange(1 << 30)
    tally = kill_many(model, tmp_path, kills=40, seed=seed)
    with capsys.disabled():
        print(f"\nseed {seed}: {tally}")
    assert tally.inside_a_save >= 4
    assert all(tally.by_victim.values())


@pytest.mark.release
@pytest.mark.parametrize("part", range(4))
def test_a_thousand_kills_change_no_bit(model: Path, tmp_path: Path, part: int) -> None:
    """The same with a thousand kills in all, over longer runs."""
    seed = random.randrange(1 << 30)
    print(f"part {part}, seed {seed}: ", end="", flush=True)
    tally = kill_many(model, tmp_path, kills=250, seed=seed, epochs=40)
    print(tally)
    assert tally.inside_a_save >= 38


class Aimed(random.Random):
    """Kills all ranks when the third save begins."""

    def random(self) -> float:
        return 0.0

    def randrange(self, *args: Any) -> int:
        return 9  # bytes of the pipe: four for each save of two ranks

    def uniform(self, a: float, b: float) -> float:
        return 0.0

    def choice(self, options: Any) -> Any:
        return "all ranks"


def test_the_harness_sees_dropout_that_is_not_restored(model: Path, tmp_path: Path) -> None:
    """Negative control: with one stream of dropout seeds, begun anew, the bits differ."""
    given = settings(lora=True, beside=False, epochs=3)
    found = []
    for kills in (0, 1):

        def one_stream(kills: int = kills) -> None:
            numbers, steps = itertools.count(7), list[int]()

            def seed(seed: int, rank: int, step: int) -> int:
                steps.append(step)
                if kills and steps[0] == 0 and step == 5:  # the kill is late, it always comes
                    time.sleep(60)
                return next(numbers)

            train_loop.dropout_seed = seed
            fsdp_sft_trainer.plot_loss = lambda directory: ""

        config = toy_config(model, tmp_path / str(kills), **given)
        tally = Tally()
        run_with_kills(config, rng=Aimed(), tally=tally, most=kills, before=one_stream)
        assert tally.kills == kills
        found.append(outcome(config))
    assert not same(*found)
