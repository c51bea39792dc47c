"""The game generator: deterministic, resumable, balanced, disjoint, playable by everyone."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("alfworld") is None:  # importing it would set ALFWORLD_DATA
    pytest.skip("alfworld is not installed", allow_module_level=True)

from verl_sft.config.collect import MakeGamesConfig
from verl_sft.envs import alfworld_games
from verl_sft.envs.alfworld_data import SPLITS, TASK_TYPES
from verl_sft.envs.alfworld_draw import SIZES, draw_task, goals_in, scenes_for
from verl_sft.envs.alfworld_engine import import_alfworld
from verl_sft.envs.alfworld_games import make_games, play_to_win
from verl_sft.envs.alfworld_problem import Task, game_text, object_type
from verl_sft.envs.alfworld_rooms import load_room, tables
from verl_sft.envs.alfworld_wording import grammar
from verl_sft.errors import InputError, MissingExtraError, UsageError


def _config(out: Path, **changes: object) -> MakeGamesConfig:
    values: dict[str, object] = {"num": 6, "num_valid": 6, "seed": 3, "num_workers": 1}
    return MakeGamesConfig(out=str(out), **{**values, **changes})  # type: ignore[arg-type]


def _bytes(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".run.lock"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(files)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("games") / "made"
    report = make_games(_config(out))
    splits = Counter(game.partition("/")[0] for game in report.games)
    assert report.made == 18 and splits == dict.fromkeys(SPLITS, 6)
    assert report.by_task_type == dict.fromkeys(sorted(TASK_TYPES), 3)
    return out


def _scenes(out: Path, split: str) -> set[int]:
    folders = (out / "json_2.1.1" / split).iterdir()
    return {int(folder.name.rpartition("-")[2]) for folder in folders}


def test_layout_and_rooms(made: Path) -> None:
    """The public folder layout; seen rooms are train rooms, unseen rooms are not; no game twice."""
    pattern = r"(\w+)-([A-Za-z]+)-None-([A-Za-z]+)-(\d+)"
    problems = []
    for split in SPLITS:
        for game in sorted((made / "json_2.1.1" / split).glob("*/trial_*/game.tw-pddl")):
            name = re.fullmatch(pattern, game.parent.parent.name)
            assert name and name[1] in TASK_TYPES
            traj = json.loads(game.with_name("traj_data.json").read_text())
            assert traj["task_type"] == name[1] and traj["scene"]["scene_num"] == int(name[4])
            assert traj["pddl_params"]["object_target"] == name[2]
            assert traj["task_id"] == game.parent.name
            data = json.loads(game.read_text())
            assert data["solvable"] is True
            problems.append(data["pddl_problem"].split("(:objects")[1])
    assert len(problems) == len(set(problems)) == 18
    assert _scenes(made, "valid_seen") <= _scenes(made, "train")
    assert _scenes(made, "valid_unseen").isdisjoint(_scenes(made, "train"))
    assert _scenes(made, "valid_unseen") <= set(tables().unseen_scenes)


def test_same_bytes_for_any_number_of_workers(made: Path, tmp_path: Path) -> None:
    """Two worker processes write what one process writes; another seed writes something else."""
    make_games(_config(tmp_path / "two", num_workers=2))
    assert _bytes(tmp_path / "two") == _bytes(made)
    make_games(_config(tmp_path / "other", seed=4, num=1, num_valid=0))
    assert not set(_bytes(tmp_path / "other")) & set(_bytes(made)) - {"games.json"}


def test_resume_and_no_op(made: Path, tmp_path: Path) -> None:
    """Cut short at any point, the next run completes the same bytes; then nothing is made."""

    class Stop(Exception):
        pass

    def stop_after_four(done: int, total: int) -> None:
        assert total == 18
        if done == 4:
            raise Stop

    out = tmp_path / "cut"
    with pytest.raises(Stop):
        make_games(_config(out), progress=stop_after_four)
    (out / ".tmp-trial_000000_leftover").mkdir()
    counts: list[int] = []
    report = make_games(_config(out), progress=lambda done, total: counts.append(done))
    assert report.made == 14 and counts[0] == 4 and counts[-1] == 18
    assert _bytes(out) == _bytes(made)
    assert not [p for p in out.iterdir() if p.name.startswith(".tmp-")]
    assert make_games(_config(out)).made == 0
    next((out / "json_2.1.1").rglob("game.tw-pddl")).unlink()
    assert make_games(_config(out)).made == 1
    assert _bytes(out) == _bytes(made)


def test_other_folders_are_refused(made: Path, tmp_path: Path) -> None:
    """Games of another config, or anything else, are never written over; no `out` is an error."""
    with pytest.raises(UsageError, match="Changed: seed, wording"):
        make_games(_config(made, seed=9, wording="2.1.1"))
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        make_games(_config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="out=DIR"):
        make_games(MakeGamesConfig())
    with pytest.raises(UsageError, match="Did you mean"):
        make_games(_config(tmp_path / "new", task_types=["pick_two_obj"]))


def _task(task_type: str, *, seed: int = 1, size: str = "small") -> Task:
    room = load_room(scenes_for(task_type, scenes=tables().train_scenes)[0])
    return draw_task(room, task_type=task_type, size=size, rng=random.Random(seed))


def _without(task: Task, kind: str) -> Task:
    kept = tuple(r for r in task.receptacles if r.kind != kind)
    ids = {r.id for r in kept}
    placed = tuple(p for p in task.placed if p[1] in ids)
    return dataclasses.replace(task, receptacles=kept, placed=placed)


def test_cause_of_the_key_error() -> None:
    """A goal out of reach: TextWorld fails with KeyError: 'val1', our check says it in words."""
    import textworld
    from textworld.envs.pddl import PddlEnv

    task = _task("pick_heat_then_place_in_recep")
    hopeless = game_text(_without(task, "Microwave"), trial="trial_1", wording="2.1.2")
    with pytest.raises(KeyError, match="val1"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["stock"])
        PddlEnv(textworld.EnvInfos()).load(json.loads(hopeless))
    assert play_to_win(hopeless).startswith("the game cannot be solved")
    assert play_to_win(game_text(task, trial="trial_1", wording="2.1.2")) == ""


def test_failed_games_are_drawn_anew_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number asked for is the number made; what was thrown away is in the report."""
    draws = Counter[str]()

    def draw_badly_first(*args: object, **kwargs: object) -> Task:
        task = draw_task(*args, **kwargs)  # type: ignore[arg-type]
        draws["all"] += 1
        return _without(task, "Microwave") if draws["all"] == 1 else task

    monkeypatch.setattr(alfworld_games, "draw_task", draw_badly_first)
    heat = ["pick_heat_then_place_in_recep"]
    report = make_games(_config(tmp_path / "a", num=2, num_valid=0, task_types=heat))
    assert len(report.games) == 2 and draws["all"] == 3
    assert len(report.skipped) == 1 and "cannot be solved" in report.skipped[0]
    assert json.loads((tmp_path / "a" / "games.json").read_text())["rows"][0]["skipped"]
    monkeypatch.setattr(
        alfworld_games, "draw_task", lambda *a, **k: _without(draw_task(*a, **k), "Microwave")
    )
    with pytest.raises(InputError, match="20 attempts"):
        make_games(_config(tmp_path / "b", num=1, num_valid=0, task_types=heat))


@given(st.integers(0, 10**6), st.sampled_from(TASK_TYPES), st.sampled_from(sorted(SIZES)))
@settings(max_examples=60, deadline=None)
def test_drawn_tasks_make_sense(seed: int, task_type: str, size: str) -> None:
    """Nothing lies where it cannot, the goal is open at the start, and the size is kept."""
    known = tables()
    rng = random.Random(seed)
    scenes = scenes_for(task_type, scenes=(*known.train_scenes, *known.unseen_scenes))
    rooms = [room for s in scenes if goals_in(room := load_room(s), task_type=task_type)]
    room = rng.choice(rooms)
    task = draw_task(room, task_type=task_type, size=size, rng=rng)
    kind_of = {r.id: r.kind for r in task.receptacles}
    for name, place in task.placed:
        if object_type(name) != "DeskLamp":
            assert object_type(name) in known.contains[kind_of[place]]
    wanted = [p for name, p in task.placed if object_type(name) == task.object_type]
    assert len(wanted) == (2 if task_type == "pick_two_obj_and_place" else 1)
    assert all(kind_of[place] != task.target_kind for place in wanted)
    ids = [name for name, _ in task.placed]
    assert len(set(ids)) == len(ids) == len({i.lower() for i in ids})
    assert task.start not in {r.location for r in task.receptacles}
    (low, high), _ = SIZES[size]
    whole = len(room.receptacles)
    assert min(low, whole) <= len(task.receptacles) <= high


@pytest.mark.parametrize("wording", ["2.1.1", "2.1.2"])
def test_wordings_play(wording: str) -> None:
    """Both wordings are grammars that the engine plays to the win, and they differ as they say."""
    task = _task("pick_and_place_simple")
    text = game_text(task, trial="trial_1", wording=wording)
    assert play_to_win(text) == ""
    assert ("put {o} in/on {r}" in json.loads(text)["grammar"]) == (wording == "2.1.1")


def test_wording_2_1_1_is_that_of_the_public_games(real_games: Path) -> None:
    """Every rule and template of the public grammar is ours, word for word."""
    game = next((real_games / "json_2.1.1" / "train").rglob("game.tw-pddl"))
    public = json.loads(game.read_text())["grammar"]

    def wording(text: str) -> list[str]:
        found = re.findall(r'(?:template :: |"rhs": |"condition": )".*"', text)
        return [line for line in found if "Your task is to" not in line]

    ours = Counter(wording(grammar("2.1.1")))
    theirs = Counter(wording(public))
    # Two things differ: a list that no rule uses, and the command `help` of later releases.
    assert all(
        "overview_with_state(r)" in t or t == '"rhs": "nothing"' or "receptacleatlocation" in t
        for t in theirs - ours
    )
    assert all("help" in t or "Available commands" in t for t in ours - theirs)
    shipped = Counter(wording(grammar("2.1.2")))
    assert len(shipped - theirs) > 15, "the comparison sees no difference where there is one"


def test_stock_alfworld_loads_and_plays_them(made: Path) -> None:
    """The public package's own class lists the games and wins one with its planner."""
    root = str(made / "json_2.1.1")
    config = {
        "env": {
            "goal_desc_human_anns_prob": 0,
            "task_types": [1, 2, 3, 4, 5, 6],
            "domain_randomization": False,
            "expert_type": "planner",
        },
        "dataset": {
            "data_path": f"{root}/train",
            "eval_id_data_path": f"{root}/valid_seen",
            "eval_ood_data_path": f"{root}/valid_unseen",
            "num_train_games": -1,
            "num_eval_games": -1,
        },
        "general": {"training_method": "dagger"},
        "dagger": {"training": {"max_nb_steps_per_episode": 50}},
    }
    module = import_alfworld("alfworld.agents.environment.alfred_tw_env")
    import textworld
    from textworld.envs.pddl import PddlEnv

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["stock"])
        assert module.AlfredTWEnv(config, train_eval="eval_out_of_distribution").num_games == 6
        stock = module.AlfredTWEnv(config, train_eval="train")
        assert stock.num_games == 6
        # The wrappers of `init_env`, in this process: its own workers are never joined.
        infos = textworld.EnvInfos(won=True, admissible_commands=True, policy_commands=True)
        env = module.AlfredExpert(
            module.AlfredInfos(module.AlfredDemangler(PddlEnv(infos))), expert_type="planner"
        )
        env.load(stock.game_files[0])
        state = env.reset()
        for _ in range(40):
            state, _, done = env.step(state["extra.expert_plan"][0])
            if done:
                break
        assert state["won"]


def test_without_the_engine_no_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing extra is found out before `out` exists."""

    def absent(*args: object) -> None:
        raise MissingExtraError("alfworld", "alfworld")

    monkeypatch.setattr(alfworld_games, "tables", absent)
    with pytest.raises(MissingExtraError):
        make_games(_config(tmp_path / "games"))
    assert not (tmp_path / "games").exists()
