"""The one file that touches TextWorld, fast-downward and ALFWorld: load a game, reset, step.

The stock engine translates each problem four times per episode and parses the same grammar rules
again at every step. `_shared_work` lets both be done once; what is shown is the same to the byte.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from verl_sft.errors import InputError, MissingExtraError

_HIDDEN_COMMAND = "help"  # never changes anything and would be learned as noise
# Environments of closed engines, to be used again: each holds its own copy of the planner's
# library, and unloading one copy while another is in use crashes the process when it ends.
_IDLE: list[Any] = []
_TRIVIAL_TASK = "dummy(val"  # the stand-in problem that the translator writes for hopeless goals


def import_alfworld(module: str) -> ModuleType:
    """Import a module of the `alfworld` package without its side effects.

    The package makes a cache folder and sets `ALFWORLD_DATA` for the whole process when imported.

    Raises:
        MissingExtraError: `alfworld` or `textworld` is not installed.
    """
    before = os.environ.get("ALFWORLD_DATA")
    os.environ["ALFWORLD_DATA"] = tempfile.gettempdir()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise MissingExtraError(package, "alfworld") from error
    finally:
        if before is None:
            del os.environ["ALFWORLD_DATA"]
        else:
            os.environ["ALFWORLD_DATA"] = before


class Engine:
    """One TextWorld environment into which any number of games are loaded, one after the other.

    Args:
        expert: also ask the planner for the rest of the plan at every step.
    """

    def __init__(self, *, expert: bool = True) -> None:
        wrappers = import_alfworld("alfworld.agents.environment.alfred_tw_env")
        import textworld
        from textworld.envs.pddl import PddlEnv

        self._translator = _Translator()
        self._expert = expert
        self._plan: tuple[str, ...] = ()
        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        self._base = _IDLE.pop() if _IDLE else PddlEnv(infos)
        self._env = wrappers.AlfredInfos(wrappers.AlfredDemangler(self._base))
        self._closed = False

    def reset(self, game: Path) -> Mapping[str, Any]:
        """Load `game` and return TextWorld's first state.

        Raises:
            InputError: the file is missing, corrupt, marked unsolvable, or the engine refuses it.
        """
        _check_game_file(game)
        try:
            with _shared_work(self._translator):
                self._env.load(str(game))
                state: Mapping[str, Any] = self._env.reset()
                self._plan = self._replan()
                return state
        except InputError as error:
            raise InputError(error.what, where=str(game), why=error.why, fix=error.fix) from error
        except (Exception, SystemExit) as error:
            # The translator leaves with SystemExit on a problem that it cannot parse.
            raise InputError(
                "the game engine cannot load this game",
                where=str(game),
                why=f"{type(error).__name__}: {error}",
                fix="Remove the game or get a fresh copy of it",
            ) from error

    def step(self, command: str) -> Mapping[str, Any]:
        """TextWorld's state after `command`; an unknown command changes nothing."""
        with _shared_work(self._translator):
            state: Mapping[str, Any] = self._env.step(command)[0]
        if self._plan[:1] == (command,):
            self._plan = self._plan[1:]  # the rest of a valid plan is valid; planning is slow
        else:
            self._plan = self._replan()
        return state

    def plan(self) -> tuple[str, ...]:
        """The planner's commands from here to the goal; empty if there are none."""
        return self._plan

    def _replan(self) -> tuple[str, ...]:
        if not self._expert:
            return ()
        state = self._base._pddl_state
        if state.check_goal():
            return ()
        found = tuple(state.replan(self._base._entity_infos))
        if found and found[0] in self._base.state["admissible_commands"]:
            return found
        # An object that the goal does not name is in the way, such as one in the agent's hand.
        downward = self._base.downward_lib
        self._translator.whole_problem = True
        try:
            downward.load_sas_replan(self._translator.for_planning())
            return tuple(state.replan(self._base._entity_infos))
        finally:
            self._translator.whole_problem = False
            downward.load_sas_replan(self._translator.for_planning())

    def close(self) -> None:
        """Give the planner's library back; the engine cannot be used afterwards."""
        if not self._closed:
            self._closed = True
            _IDLE.append(self._base)


def admissible(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Every command that the game accepts but `help`, sorted."""
    return tuple(c for c in state["admissible_commands"] if c != _HIDDEN_COMMAND)


def _check_game_file(game: Path) -> None:
    fix = "Remove the game or get a fresh copy of it"
    try:
        data = json.loads(game.read_text(encoding="utf-8"))
        missing = [k for k in ("pddl_domain", "grammar", "pddl_problem") if k not in data]
    except FileNotFoundError as error:
        raise InputError("no such game file", where=str(game), fix=fix) from error
    except (ValueError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError("not a game file", where=str(game), why=why, fix=fix) from error
    if missing:
        raise InputError(f"not a game file: no {', '.join(missing)}", where=str(game), fix=fix)
    if data.get("solvable") is False:
        raise InputError("the game is marked as unsolvable", where=str(game), fix="Leave it out")


class _Translator:
    """PDDL to the planner's format, once per problem and form instead of twice.

    The engine asks for two forms of each problem: the full one, which is played, and an optimised
    one, in which plans are searched. The second is translated here from a smaller problem, that
    of the objects the goal speaks of: its plans are plans of the full problem, found much sooner.
    """

    def __init__(self) -> None:
        self.whole_problem = False  # plan in the full problem
        self._domain = self._problem = ""
        self._results: dict[tuple[bool, bool], tuple[Any, str]] = {}

    def __call__(
        self, domain: str, problem: str, verbose: bool = False, optimize: bool = False
    ) -> tuple[Any, str]:
        """The task and its text; the same signature as `fast_downward.pddl2sas`."""
        if (self._domain, self._problem) != (domain, problem):
            self._domain, self._problem, self._results = domain, problem, {}
        key = (optimize, optimize and not self.whole_problem)
        if key not in self._results:
            self._results[key] = self._translate(optimize=key[0], reduce=key[1])
        return self._results[key]

    def for_planning(self) -> bytes:
        """The form in which plans are searched."""
        return self(self._domain, self._problem, optimize=True)[1].encode()

    def _translate(self, *, optimize: bool, reduce: bool) -> tuple[Any, str]:
        from fast_downward.translate import normalize, options, translate
        from fast_downward.translate.pddl_parser import lisp_parser, parsing_functions

        options.filter_unimportant_vars = optimize
        options.filter_unreachable_facts = optimize
        options.use_partial_encoding = optimize
        options.skip_variable_reordering = not optimize
        options.add_implied_preconditions = optimize
        options.invariant_generation_max_candidates = 0
        with contextlib.redirect_stdout(io.StringIO()):  # the translator reports its progress
            task = parsing_functions.parse_task(
                lisp_parser.parse_nested_list(self._domain.split("\n")),
                lisp_parser.parse_nested_list(self._problem.split("\n")),
            )
            if reduce:
                _keep_goal_objects(task, self._problem)
            normalize.normalize(task)
            sas = io.StringIO()
            translate.pddl_to_sas(task).output(sas)
        text = sas.getvalue()
        if _TRIVIAL_TASK in text and not optimize:
            # Reading that stand-in back, the engine would fail with KeyError: 'val1'.
            raise InputError(
                "the game cannot be solved",
                why="No sequence of actions reaches its goal",
                fix="Leave it out",
            )
        return task, text


def _keep_goal_objects(task: Any, problem: str) -> None:
    """Drop every object of a type that the goal does not name, with the facts about it."""
    goal = problem[problem.rfind("(:goal") :]
    wanted = {name.lower() for name in re.findall(r"\(objectType \?\w+ (\w+)\)", goal)}
    if not wanted:
        return
    facts = [(f, f.args if hasattr(f, "args") else f.fluent.args) for f in task.init]
    kept = {
        a[0] for f, a in facts if getattr(f, "predicate", "") == "objecttype" and a[1] in wanted
    }
    gone = {o.name for o in task.objects if o.type_name == "object"} - kept
    task.objects = [o for o in task.objects if o.name not in gone]
    task.init = [f for f, args in facts if gone.isdisjoint(args)]


@functools.lru_cache(maxsize=1024)  # bounded: each game brings a text of its own, its task
def _symbols(text: str, rule_name: str) -> Any:
    textgen = importlib.import_module("textworld.envs.pddl.textgen")
    model = textgen._PARSER.parse(text, rule_name=rule_name)
    return textgen._Converter().walk(model)


def _parsed_rule(text: str, *, rule_name: str, trace: bool = False) -> Any:
    """TextWorld's `_parse_and_convert`, each text parsed once; callers write into the result."""
    return copy.deepcopy(_symbols(text, rule_name))


def _shallow_context(context: Mapping[str, Any]) -> dict[str, Any]:
    """TextWorld's `copy_context` without copying the entities, which nobody writes to."""
    both = {"variables": dict(context["variables"]), "mapping": dict(context["mapping"])}
    return {**context, **both}


class _Rules:
    """Stands in for TextWorld's `Rule` where the text generator parses its conditions."""

    @staticmethod
    @functools.cache
    def parse_conjunctive_query(expression: str) -> Any:
        """The rule for a condition; rules are only read, so one object serves all."""
        return importlib.import_module("textworld.logic").Rule.parse_conjunctive_query(expression)


@contextlib.contextmanager
def _shared_work(translator: _Translator) -> Iterator[None]:
    """Let the engine use `translator` and the parsed rules, and keep its hands off `sys.argv`."""
    textgen = importlib.import_module("textworld.envs.pddl.textgen")
    downward = importlib.import_module("fast_downward")
    argv = list(sys.argv)
    # The translator's options module parses sys.argv when it is imported.
    sys.argv[:] = ["translate.py", "domain", "task"]
    try:
        with (
            _replaced(downward, "pddl2sas", translator),
            _replaced(textgen, "_parse_and_convert", _parsed_rule),
            _replaced(textgen, "copy_context", _shallow_context),
            _replaced(textgen, "Rule", _Rules),
        ):
            yield
    finally:
        sys.argv[:] = argv


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
