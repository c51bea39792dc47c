"""The ALFWorld environment on generated games, and on the public ones where they are."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("alfworld") is None:  # importing it would set ALFWORLD_DATA
    pytest.skip("alfworld is not installed", allow_module_level=True)

from verl_sft.config.collect import EnvConfig, MakeGamesConfig
from verl_sft.envs.alfworld import AlfworldEnvironment, make_alfworld, split_intro
from verl_sft.envs.alfworld_data import TASK_TYPES
from verl_sft.envs.alfworld_games import make_games
from verl_sft.envs.check import check_environment
from verl_sft.errors import InputError, MissingExtraError, UsageError
from verl_sft.types import Observation

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def games(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("games") / "made"
    make_games(MakeGamesConfig(out=str(out), num=12, num_valid=6, seed=5, num_workers=1))
    return out


def _make(folder: Path, *, expert: bool = True, **env_args: object) -> AlfworldEnvironment:
    config = EnvConfig(data_dir=str(folder), expert_actions=expert)
    return make_alfworld(config, **env_args)


def _win(env: AlfworldEnvironment, task_id: str) -> list[float]:
    observation, rewards = env.reset(task_id, seed=0), []
    for _ in range(50):
        assert observation.expert_action in observation.admissible_actions
        result = env.step(observation.expert_action)
        rewards.append(result.reward)
        observation = result.observation
        if result.terminated:
            assert result.info["success"] is True
            return rewards
    raise AssertionError(f"no win: {task_id}")


def test_the_plan_wins_every_task_type(games: Path) -> None:
    """Following `expert_action` wins; only the winning step is rewarded, with 10."""
    env = _make(games)
    ids = env.task_ids("train")
    assert {env.task_type(t) for t in ids} == set(TASK_TYPES)
    for task_id in ids:
        rewards = _win(env, task_id)
        assert rewards[-1] == 10.0 and not any(rewards[:-1])
    env.close()


def test_what_is_observed(games: Path) -> None:
    """No banner, no task line and no `help`; actions are sorted and unique; ids are sorted."""
    env = _make(games)
    ids = env.task_ids("valid_unseen")
    assert list(ids) == sorted(ids) and ids[0].endswith("/game.tw-pddl") and len(ids) == 6
    seen = env.reset(ids[0], seed=0)
    assert seen.text.startswith("You are in the middle of a room")
    assert "Your task" not in seen.text and seen.task and "-=" not in seen.text
    assert "help" not in seen.admissible_actions and "look" in seen.admissible_actions
    assert list(seen.admissible_actions) == sorted(set(seen.admissible_actions))
    nothing = env.step("fly to the moon")
    assert nothing.observation.text == "Nothing happens."
    assert nothing.info["success"] is False and not nothing.terminated
    env.close()


def test_without_expert_nothing_is_planned(games: Path) -> None:
    """Without `expert_actions` the environment saves the planner's time and reveals nothing."""
    env = _make(games, expert=False)
    assert env.reset(env.task_ids("train")[0], seed=0).expert_action is None
    env.close()


def test_plan_recovers_from_a_foreign_object_in_hand(games: Path) -> None:
    """Plans are searched among the goal's objects; another one in the hand must not hide them."""
    env = _make(games)
    taken = False
    for task_id in env.task_ids("train"):
        observation = env.reset(task_id, seed=0)
        wanted = task_id.split("-")[1].lower()
        for place in [a for a in observation.admissible_actions if a.startswith("go to")]:
            actions = env.step(place).observation.admissible_actions
            foreign = [a for a in actions if a.startswith("take") and wanted not in a.split()[1]]
            if foreign:
                observation = env.step(foreign[0]).observation
                taken = True
                break
        else:
            continue
        for _ in range(20):
            assert observation.expert_action, task_id
            result = env.step(observation.expert_action)
            observation = result.observation
            if result.terminated:
                break
        assert result.info["success"], task_id
    assert taken
    env.close()


def test_conformance_and_a_negative_control(games: Path) -> None:
    """The environment conforms; one with a memory across resets and repeated actions does not."""
    assert check_environment(lambda: _make(games)) == []

    class Broken(AlfworldEnvironment):
        resets = 0

        def reset(self, task_id: str, *, seed: int) -> Observation:
            self.resets += 1
            seen = super().reset(task_id, seed=seed)
            actions = (*seen.admissible_actions, seen.admissible_actions[0])
            return Observation(f"{seen.text} {self.resets}", seen.task, actions)

    def broken() -> AlfworldEnvironment:
        env = _make(games)
        return Broken(env._root, task_types=env._task_types, engine=env._engine)

    found = check_environment(broken)
    assert any("repeat" in f for f in found) and any("second reset" in f for f in found)


def test_broken_games_are_named_and_the_environment_goes_on(games: Path, tmp_path: Path) -> None:
    """Missing, corrupt, incomplete, unsolvable, unloadable: InputError with the file and cause."""
    env = _make(games)
    good = env.task_ids("train")[0]
    whole = json.loads((env._root / good).read_text())
    root = tmp_path / "json_2.1.1"
    hopeless = whole["pddl_problem"].replace("(receptacleType ", "(checked ").replace("Type)", ")")
    contents = {
        "corrupt": '{"pddl_domain": ',
        "list": "[1]",
        "incomplete": json.dumps({"grammar": ""}),
        "unsolvable": json.dumps({**whole, "solvable": False}),
        "unparsable": json.dumps({**whole, "pddl_problem": "(define"}),
        "grammar": json.dumps({**whole, "grammar": "no grammar"}),
        "hopeless": json.dumps({**whole, "pddl_problem": hopeless}),
    }
    bad = AlfworldEnvironment(root, task_types=TASK_TYPES, engine=env._engine)
    for name in [*contents, "missing"]:
        game = root / "train" / f"pick_and_place_simple-{name}" / "trial_1" / "game.tw-pddl"
        if name in contents:
            game.parent.mkdir(parents=True)
            game.write_text(contents[name])
        with pytest.raises(InputError) as caught:
            bad.reset(game.relative_to(root).as_posix(), seed=0)
        assert str(game) in str(caught.value), name
    assert _win(env, good)
    env.close()


def test_listing_skips_what_the_public_loader_skips(games: Path, tmp_path: Path) -> None:
    """Movable receptacles, slicing, the mark `solvable: false` and missing game files are out."""
    root = tmp_path / "json_2.1.1"

    def put(folder: str, game: str | None) -> None:
        trial = root / "train" / folder / "trial_1"
        trial.mkdir(parents=True)
        (trial / "traj_data.json").write_text("{}")
        if game is not None:
            (trial / "game.tw-pddl").write_text(game)

    put("pick_and_place_simple-Mug-None-Desk-301", '{"solvable": true}')
    put("pick_and_place_simple-AppleSliced-None-Desk-301", "{}")
    put("pick_and_place_with_movable_recep-Pen-Mug-Desk-301", "{}")
    put("pick_two_obj_and_place-Mug-None-Desk-301", '{"solvable": false}')
    put("pick_two_obj_and_place-Pen-None-Desk-301", None)
    for folder in (root, tmp_path):
        ids = _make(folder).task_ids("train")
        assert [i.split("/")[1] for i in ids] == ["pick_and_place_simple-Mug-None-Desk-301"]
    put("look_at_obj_in_light-Pen-None-DeskLamp-301", "{}")
    (root / "train/look_at_obj_in_light-Pen-None-DeskLamp-301/trial_1/traj_data.json").unlink()
    env = _make(tmp_path)
    assert len(env.task_ids("train")) == 1
    assert [note.split(":")[0] for note in env.notes("train")] == [
        "1 games left out, marked unsolvable",
        "1 games left out, no game.tw-pddl",
        "1 games left out, no traj_data.json",
    ]
    assert "DeskLamp-301/trial_1/game.tw-pddl" in env.notes("train")[2]
    with pytest.raises(InputError, match="valid_seen"):
        env.task_ids("valid_seen")
    only = make_alfworld(EnvConfig(data_dir=str(root), task_types=["pick_two_obj_and_place"]))
    with pytest.raises(InputError, match="marked unsolvable"):
        only.task_ids("train")


def test_wrong_arguments_say_what_to_do(
    games: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder, a wrong one, an unknown task type or argument: named, with a way out."""
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(UsageError, match="ALFWORLD_DATA"):
        make_alfworld(EnvConfig())
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="make-games"):
            _make(folder)
    with pytest.raises(UsageError, match="Did you mean 'pick_two_obj_and_place'"):
        make_alfworld(EnvConfig(data_dir=str(games), task_types=["pick_two_obj_place"]))
    with pytest.raises(UsageError, match="exprt"):
        _make(games, exprt=True)
    only = make_alfworld(EnvConfig(data_dir=str(games), task_types=["look_at_obj_in_light"]))
    assert {only.task_type(t) for t in only.task_ids("train")} == {"look_at_obj_in_light"}
    monkeypatch.setitem(sys.modules, "alfworld.agents.environment.alfred_tw_env", None)
    with pytest.raises(MissingExtraError, match=r"verl-sft\[alfworld\]"):
        _make(games)


_REPLAY = """
import hashlib, sys
from verl_sft.config.collect import EnvConfig
from verl_sft.envs.alfworld import make_alfworld
env = make_alfworld(EnvConfig(data_dir=sys.argv[1], expert_actions=True))
digest = hashlib.sha256()
for task_id in env.task_ids("train")[::4]:
    seen = env.reset(task_id, seed=1)
    while seen.expert_action:
        digest.update(repr(seen).encode())
        seen = env.step(seen.expert_action).observation
print(digest.hexdigest())
"""


def test_episodes_do_not_depend_on_the_process(games: Path, tmp_path: Path) -> None:
    """Other processes and hash seeds give the same bytes, and importing leaves no trace."""
    digests = set()
    for hash_seed in ("0", "7"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "HOME": str(tmp_path)}
        env["PYTHONPATH"] = str(ROOT)
        env.pop("ALFWORLD_DATA", None)
        command = [sys.executable, "-c", _REPLAY, str(games)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1
    assert len(digests.pop().strip()) == len(hashlib.sha256().hexdigest()), "stdout is not clean"
    assert not (tmp_path / ".cache" / "alfworld").exists()


def test_many_resets_leave_nothing_behind(
    games: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No temporary files, open files, output or changed `sys.argv` after resets and a close."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    argv = list(sys.argv)
    env = _make(games)
    ids = env.task_ids("train")
    env.reset(ids[0], seed=0)
    before = len(os.listdir("/proc/self/fd"))
    for task_id in ids:
        env.step(env.reset(task_id, seed=0).admissible_actions[0])
    assert len(os.listdir("/proc/self/fd")) == before
    env.close()
    env.close()
    assert list(tmp_path.iterdir()) == [] and sys.argv == argv
    assert capfd.readouterr().out == ""


def test_intro_is_split() -> None:
    """Banner away, task apart; a text without either stays as it is."""
    text = "-= Welcome to TextWorld, ALFRED! =-\n\nYou see a bed 1.\n\nYour task is to: look."
    assert split_intro(text) == ("You see a bed 1.", "look.")
    assert split_intro("Just a room.") == ("Just a room.", "")


def test_public_games_play_in_their_own_wording(real_games: Path) -> None:
    """One public game per task type is won; it is "put X in/on Y", as its grammar has it."""
    env = make_alfworld(EnvConfig(data_dir=str(real_games), expert_actions=True))
    first = {env.task_type(t): t for t in reversed(env.task_ids("valid_unseen"))}
    assert set(first) == set(TASK_TYPES)
    for task_type, task_id in sorted(first.items()):
        assert _win(env, task_id)[-1] == 10.0
        if task_type == "pick_and_place_simple":
            seen = env.reset(task_id, seed=0)
            commands = []
            while seen.expert_action:
                commands.append(seen.expert_action)
                seen = env.step(seen.expert_action).observation
            assert commands[-1].startswith("put ") and " in/on " in commands[-1]
    env.close()


def test_translation_for_play_equals_the_stock_one(real_games: Path) -> None:
    """The shortcut in the translation changes no byte of the problem that is played."""
    import fast_downward

    from verl_sft.envs.alfworld_engine import _Translator

    game = sorted((real_games / "json_2.1.1" / "valid_unseen").glob("look*/*/game.tw-pddl"))[0]
    data = json.loads(game.read_text())
    domain, problem = data["pddl_domain"], data["pddl_problem"]
    argv = list(sys.argv)
    try:
        stock = fast_downward.pddl2sas(domain, problem)[1]
        stock_plan = fast_downward.pddl2sas(domain, problem, optimize=True)[1]
    finally:
        sys.argv[:] = argv
    translate = _Translator()
    assert translate(domain, problem)[1] == stock
    translate.whole_problem = True
    assert translate(domain, problem, optimize=True)[1] == stock_plan
    translate.whole_problem = False
    assert len(translate(domain, problem, optimize=True)[1]) < len(stock_plan)
