"""`verl-sft quickstart`: games -> episodes -> rows -> model -> training -> export -> success rate.

Every stage is the real command with a small size. A stage whose result is there is not repeated,
so an interrupted quick start goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_sft.commands.common import progress, read_words, say
from verl_sft.config.collect import (
    CollectConfig,
    EnvConfig,
    EvaluateConfig,
    EvaluatePromptConfig,
    FilterConfig,
    MakeGamesConfig,
    MakeModelConfig,
    OutputConfig,
    PolicyConfig,
    PromptConfig,
    RolloutConfig,
)
from verl_sft.config.quickstart import QuickstartConfig
from verl_sft.errors import VerlSftError
from verl_sft.safe_io import make_output_dir, run_lock, write_json
from verl_sft.types import JSON


@dataclass(frozen=True)
class Paths:
    """Where everything lies."""

    out: Path

    @property
    def games(self) -> Path:
        """Generated games."""
        return self.out / "games"

    @property
    def data(self) -> Path:
        """The collector's directory."""
        found = sorted(self.out.glob("sft_data_*"))
        return found[-1] if found else self.out / time.strftime("sft_data_%Y%m%d_%H%M%S")

    @property
    def model(self) -> Path:
        """The untrained model."""
        return self.out / "model"

    @property
    def run(self) -> Path:
        """Checkpoints, metrics and the export."""
        return self.out / "run"

    @property
    def export(self) -> Path:
        """The trained model."""
        return self.run / "huggingface"


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    config = read_words(QuickstartConfig, words, usage="verl-sft quickstart [key=value ...]")
    if config is None:
        return 0
    out = make_output_dir(Path(config.out))
    with run_lock(out):
        summary = _run(config, Paths(out))
    print(_report(summary))
    return 0


def _run(config: QuickstartConfig, paths: Paths) -> JSON:
    started = time.monotonic()
    seconds: dict[str, float] = {}

    def stage(name: str, title: str) -> None:
        seconds[name] = -time.monotonic()
        say(f"\n[{len(seconds)}/6] {title}")

    def done(name: str) -> None:
        seconds[name] = round(seconds[name] + time.monotonic(), 1)

    stage("games", f"making {config.train_games} ALFWorld games in {paths.games}")
    _make_games(config, paths)
    done("games")
    stage("collect", f"an expert plays {config.episodes} episodes")
    collected = _collect(config, paths)
    done("collect")
    stage("model", f"building a {config.model_size} Qwen2-architecture model in {paths.model}")
    _make_model(config, paths)
    done("model")
    stage("before", f"playing {config.eval_games} unseen games before training")
    before = _evaluate(config, paths, paths.model, "admissible")
    done("before")
    stage("train", f"training in {paths.run}")
    _train(config, paths)
    done("train")
    stage("after", f"playing the same {config.eval_games} unseen games after training")
    after = _evaluate(config, paths, paths.export, "admissible")
    free = _evaluate(config, paths, paths.export, "none")
    done("after")
    summary = {
        "success_before": before["overall"]["success_rate"],
        "success_after": after["overall"]["success_rate"],
        "success_after_free_generation": free["overall"]["success_rate"],
        "before": before["overall"],
        "after": after["overall"],
        "after_free_generation": free["overall"],
        "by_task_type": after["by_task_type"],
        "constrain": "admissible",
        "episodes": collected["episodes"],
        "seconds": round(time.monotonic() - started, 1),
        "seconds_by_stage": seconds,
        "paths": {
            "games": str(paths.games),
            "data": str(paths.data),
            "model": str(paths.model),
            "run": str(paths.run),
            "export": str(paths.export),
            "metrics": str(paths.run / "metrics.jsonl"),
            "loss_curve": str(paths.run / "loss.png"),
        },
    }
    write_json(paths.out / "summary.json", summary)
    return summary


def _make_games(config: QuickstartConfig, paths: Paths) -> None:
    from verl_sft.envs.alfworld_games import make_games

    games = MakeGamesConfig(
        out=str(paths.games),
        num=config.train_games,
        num_valid=config.eval_games,
        seed=config.seed,
        size=config.game_size,
    )
    with progress("games") as bar:
        make_games(games, progress=bar.update)


def _collect(config: QuickstartConfig, paths: Paths) -> JSON:
    import json

    from verl_sft.collect.collector import collect

    data = paths.data
    run = CollectConfig(
        env=EnvConfig(data_dir=str(paths.games), split="train"),
        policy=PolicyConfig(
            name="expert", expert="search", search_order="listed", noise=config.noise
        ),
        prompt=PromptConfig(template="compact", history="dialogue"),
        rollout=RolloutConfig(num_episodes=config.episodes, seed=config.seed),
        filter=FilterConfig(max_steps=config.longest_episode),
        output=OutputConfig(dir=str(paths.out), name=data.name, rows="episode"),
    )
    with progress("episodes") as bar:
        collect(run, progress=bar.update)
    stats: JSON = json.loads((data / "stats.json").read_text(encoding="utf-8"))
    return stats


def _make_model(config: QuickstartConfig, paths: Paths) -> None:
    if paths.model.exists():
        return
    from verl_sft.model.tiny import make_model

    make_model(
        MakeModelConfig(
            out=str(paths.model),
            data=str(paths.data),
            size=config.model_size,
            vocab_size=config.vocab_size,
            seed=config.seed,
        )
    )


def _evaluate(config: QuickstartConfig, paths: Paths, model: Path, constrain: str) -> JSON:
    from verl_sft.evaluate.evaluator import evaluate
    from verl_sft.evaluate.metrics import table

    trained = model == paths.export
    run = EvaluateConfig(
        model=str(model),
        env=EnvConfig(data_dir=str(paths.games), split="valid_unseen"),
        policy=PolicyConfig(name="hf", constrain=constrain, max_new_tokens=96, batch_size=30),
        rollout=RolloutConfig(
            num_episodes=config.eval_games,
            max_steps=config.max_steps,
            max_invalid=5,
            seed=config.seed,
        ),
        output=str(paths.out / ("after" if trained else "before") / f"evaluation_{constrain}.json"),
    )
    run.prompt = EvaluatePromptConfig(template="compact", history="dialogue")
    with progress("episodes") as bar:
        report = evaluate(run, progress=bar.update)
    say(f"generation constrained to admissible actions: {constrain == 'admissible'}")
    say(table(report))
    return report


def _train(config: QuickstartConfig, paths: Paths) -> None:
    from verl_sft.trainer.launch import default_nproc, launch

    words = [
        f"data.train_files={paths.data}",
        "data.multiturn.enable=true",
        f"data.train_batch_size={config.batch_size}",
        f"data.max_length={config.max_length}",
        f"data.max_token_len_per_gpu={config.token_budget}",
        "data.truncation=drop",
        f"data.prompt_weight={config.prompt_weight}",
        f"model.partial_pretrain={paths.model}",
        f"optim.lr={config.lr}",
        "optim.lr_warmup_steps_ratio=0.03",
        "optim.weight_decay=0.1",
        f"trainer.default_local_dir={paths.run}",
        f"trainer.total_epochs={config.epochs}",
        "trainer.max_ckpt_to_keep=1",
        "trainer.save_freq=500",
        "trainer.experiment_name=quickstart",
        f"trainer.seed={config.seed}",
    ]
    code = launch(words, nproc=config.nproc or default_nproc())
    if code:
        error = VerlSftError("training failed", fix="The message above says why")
        error.exit_code = code
        raise error


def _report(summary: JSON) -> str:
    def line(title: str, row: dict[str, Any]) -> str:
        rate, low, high = row["success_rate"], row["success_low"], row["success_high"]
        return f"  {title:<46}{rate:>7.1%}   95 % interval {low:.1%} - {high:.1%}"

    games = summary["before"]["episodes"]
    rows = [
        "",
        f"Success on {games} unseen games (rooms that no training game had):",
        line("before training", summary["before"]),
        line("after training, admissible actions only", summary["after"]),
        line("after training, free generation", summary["after_free_generation"]),
        "",
        f"{summary['episodes']} expert episodes, {summary['seconds']:.0f} seconds in all.",
        *(f"  {name:<11} {path}" for name, path in summary["paths"].items()),
    ]
    return "\n".join(rows)
