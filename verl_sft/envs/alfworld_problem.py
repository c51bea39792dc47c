"""A drawn task as a PDDL problem and as the two files of a public game folder. Pure text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from verl_sft.envs.alfworld_rooms import Receptacle, tables
from verl_sft.envs.alfworld_wording import domain, grammar, with_task

_MANGLED = (("|", "_bar_"), ("-", "_minus_"), ("+", "_plus_"), (".", "_dot_"), (",", "_comma_"))
_STATE_OF_TASK = {
    "pick_clean_then_place_in_recep": ("cleanable", "isClean"),
    "pick_heat_then_place_in_recep": ("heatable", "isHot"),
    "pick_cool_then_place_in_recep": ("coolable", "isCool"),
}
LAMP = "DeskLamp"


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be done, and the room in its first state."""

    task_type: str
    object_type: str
    target_kind: str  # receptacle kind; "" for the lamp task
    scene: int
    receptacles: tuple[Receptacle, ...]
    placed: tuple[tuple[str, str], ...]  # (object id, receptacle id)
    start: str  # the agent's location
    words: str  # the task as text

    @property
    def name(self) -> str:
        """The public folder name."""
        target = self.target_kind or LAMP
        return f"{self.task_type}-{self.object_type}-None-{target}-{self.scene}"


def game_text(task: Task, *, trial: str, wording: str) -> str:
    """The content of `game.tw-pddl`."""
    game = {
        "pddl_domain": domain(),
        "grammar": with_task(grammar(wording), task.words),
        "pddl_problem": problem_text(task, trial=trial),
        "solvable": True,  # written only after the engine has played the plan to the win
    }
    return json.dumps(game)


def traj_text(task: Task, *, trial: str) -> str:
    """The content of `traj_data.json`, in the keys that public tools read."""
    row: dict[str, Any] = {
        "task_id": trial,
        "task_type": task.task_type,
        "pddl_params": {
            "mrecep_target": "",
            "object_sliced": False,
            "object_target": task.object_type,
            "parent_target": task.target_kind,
            "toggle_target": "" if task.target_kind else LAMP,
        },
        "scene": {"floor_plan": f"FloorPlan{task.scene}", "scene_num": task.scene},
        "turk_annotations": {"anns": [{"task_desc": task.words, "votes": [1, 1]}]},
    }
    return json.dumps(row, indent=1) + "\n"


def problem_text(task: Task, *, trial: str) -> str:
    """The PDDL problem of a task."""
    known = tables()
    otypes = sorted({name for names in known.contains.values() for name in names} | {LAMP})
    locations = sorted({r.location for r in task.receptacles} | {task.start})
    declared = [
        "agent1 - agent",
        *(f"{name}Type - otype" for name in otypes),
        *(f"{kind}Type - rtype" for kind in known.contains),
        *(f"{mangle(name)} - object" for name, _ in task.placed),
        *(f"{mangle(r.id)} - receptacle" for r in task.receptacles),
        *(f"{mangle(location)} - location" for location in locations),
    ]
    lines = [
        f"(define (problem plan_{trial})",
        "(:domain alfred)",
        "(:objects",
        *(f"    {line}" for line in declared),
        ")",
        "(:init",
        *(f"    ({fact})" for fact in _facts(task)),
        ")",
        f"(:goal\n    {goal_text(task)}\n)",
        ")",
    ]
    return "\n".join(lines) + "\n"


def goal_text(task: Task) -> str:
    """The goal formula of the six task types."""
    wanted = f"(objectType ?o {task.object_type}Type)"
    if task.task_type == "look_at_obj_in_light":
        lit = (
            "(exists (?ot - object ?r - receptacle ?a - agent ?l - location)"
            f" (and (objectType ?ot {LAMP}Type) (toggleable ?ot) (isToggled ?ot)"
            " (receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r)))"
        )
        return f"(and {lit} (exists (?o - object ?a - agent) (and {wanted} (holds ?a ?o))))"
    there = f"(receptacleType ?r {task.target_kind}Type) (inReceptacle ?o ?r)"
    if task.task_type == "pick_two_obj_and_place":
        second = f"{wanted} {there}".replace("?o", "?o2")
        also = f"(exists (?o2 - object) (and (not (= ?o ?o2)) {second}))"
    elif task.task_type in _STATE_OF_TASK:
        also = " ".join(f"({name} ?o)" for name in _STATE_OF_TASK[task.task_type])
    else:
        also = ""
    inner = f"(and {wanted} {there} {also})".replace(" )", ")")
    return f"(and (exists (?r - receptacle) (exists (?o - object) {inner})))"


def mangle(name: str) -> str:
    """A public id as a PDDL name: `Apple|+00.78` is `Apple_bar__plus_00_dot_78`."""
    for char, word in _MANGLED:
        name = name.replace(char, word)
    return name


def object_type(name: str) -> str:
    """The type that an object id begins with."""
    return name.partition("|")[0]


def _facts(task: Task) -> list[str]:
    known = tables()
    place = {r.id: r for r in task.receptacles}
    facts = [f"atLocation agent1 {mangle(task.start)}"]
    for r in task.receptacles:
        facts += [
            f"receptacleType {mangle(r.id)} {r.kind}Type",
            f"receptacleAtLocation {mangle(r.id)} {mangle(r.location)}",
        ]
        facts += [f"openable {mangle(r.id)}"] if r.openable else []
    properties = {p.lower(): set(names) for p, names in known.actions.items()}
    properties["isReceptacleObject"] = set(known.movable_receptacles)
    for name, receptacle in task.placed:
        kind = object_type(name)
        facts += [
            f"objectType {mangle(name)} {kind}Type",
            f"inReceptacle {mangle(name)} {mangle(receptacle)}",
            f"objectAtLocation {mangle(name)} {mangle(place[receptacle].location)}",
        ]
        facts += [f"{p} {mangle(name)}" for p, names in properties.items() if kind in names]
        facts += [f"pickupable {mangle(name)}"] if kind != LAMP else []
    kinds = sorted({r.kind for r in task.receptacles})
    for kind in kinds:
        facts += [f"canContain {kind}Type {name}Type" for name in known.contains[kind]]
    return facts
