"""The 120 rooms that the `alfworld` wheel ships, and what may lie where in them."""

from __future__ import annotations

import functools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_sft.envs.alfworld_engine import import_alfworld

_GRID = 0.25  # metres between two standing points of the agent
_NEVER_OBJECTS = ("PaperTowel", "ToiletPaperRoll")  # in the tables, never in a public game
_SEVERAL = {"StoveBurner": 4, "HandTowelHolder": 2, "TowelHolder": 1}


@dataclass(frozen=True, slots=True)
class Receptacle:
    """A place for objects: its public id (`Cabinet|+00.68|+00.50|-02.20`), kind and view point."""

    id: str
    kind: str
    location: str
    openable: bool


@dataclass(frozen=True, slots=True)
class Room:
    """One layout: its receptacles, the object types seen in it, and where the agent can stand."""

    scene: int
    kind: str  # Kitchen | LivingRoom | Bedroom | Bathroom
    receptacles: tuple[Receptacle, ...]
    object_types: tuple[str, ...]
    locations: tuple[str, ...]
    has_desk_lamp: bool


@dataclass(frozen=True, slots=True)
class Tables:
    """ALFWorld's own knowledge of objects, as sorted tuples."""

    contains: dict[str, tuple[str, ...]]  # receptacle kind -> object types
    actions: dict[str, tuple[str, ...]]  # Heatable, Coolable, Cleanable, ... -> object types
    openable: tuple[str, ...]
    movable_receptacles: tuple[str, ...]
    rooms_of_task: dict[str, tuple[str, ...]]  # task type -> room kinds
    train_scenes: tuple[int, ...]
    unseen_scenes: tuple[int, ...]
    templates: dict[str, tuple[str, ...]]  # task type -> wordings of the task


@functools.cache
def tables() -> Tables:
    """The tables of the installed `alfworld`.

    Raises:
        MissingExtraError: it is not installed.
    """
    constants = import_alfworld("alfworld.gen.constants")
    goals = import_alfworld("alfworld.gen.goal_library").gdict
    movable = tuple(constants.MOVABLE_RECEPTACLES)

    def whole(names: set[str]) -> tuple[str, ...]:
        return tuple(sorted(n for n in names if "Sliced" not in n and n not in _NEVER_OBJECTS))

    contains = {
        kind: whole(names)
        for kind, names in sorted(constants.VAL_RECEPTACLE_OBJECTS.items())
        if kind not in movable and whole(names)
    }
    return Tables(
        contains=contains,
        actions={k: whole(v) for k, v in sorted(constants.VAL_ACTION_OBJECTS.items())},
        openable=tuple(constants.OPENABLE_CLASS_LIST),
        movable_receptacles=movable,
        rooms_of_task={k: tuple(sorted(v)) for k, v in constants.GOALS_VALID.items()},
        train_scenes=tuple(constants.TRAIN_SCENE_NUMBERS),
        unseen_scenes=tuple(constants.TEST_SCENE_NUMBERS),
        templates={k: tuple(v["templates"]) for k, v in goals.items()},
    )


def room_kind(scene: int) -> str:
    """The kind of room that a scene number stands for."""
    return {0: "Kitchen", 2: "LivingRoom", 3: "Bedroom", 4: "Bathroom"}[scene // 100]


@functools.cache
def load_room(scene: int) -> Room:
    """The layout of one scene.

    The layouts give positions for most receptacles only. The rest (stove burners, holders, ...) are
    known by kind alone; they get a made-up position that depends on nothing but the scene.
    """
    import numpy as np

    folder = Path(import_alfworld("alfworld.gen").__path__[0]) / "layouts"
    stem = f"FloorPlan{scene}"
    seen = set(json.loads((folder / f"{stem}-objects.json").read_text()))
    placed: dict[str, Any] = json.loads((folder / f"{stem}-openable.json").read_text())
    points = np.load(folder / f"{stem}-layout.npy", allow_pickle=False).tolist()
    known = tables()
    receptacles = []
    for name, (x, z, rotation, horizon) in sorted(placed.items()):
        kind = name.rpartition("|")[2] if name.endswith("Basin") else name.partition("|")[0]
        if kind in known.contains:
            location = _location(x, z, rotation, horizon)
            receptacles.append(Receptacle(name, kind, location, kind in known.openable))
    there = {r.kind for r in receptacles}
    for kind in sorted(seen & set(known.contains) - there):
        rng = random.Random(f"{scene}/{kind}")
        for _ in range(_SEVERAL.get(kind, 1)):
            receptacles.append(_invented(kind, rng.choice(points), rng))
    holdable = {name for names in known.contains.values() for name in names}
    return Room(
        scene=scene,
        kind=room_kind(scene),
        receptacles=tuple(receptacles),
        object_types=tuple(sorted(seen & holdable)),
        locations=tuple(sorted({_location(x, z, 0, 30) for x, z in points})),
        has_desk_lamp="DeskLamp" in seen,
    )


def position(rng: random.Random) -> str:
    """A position as it stands in public ids, `+01.25|+00.90|-00.40`."""
    return "|".join(f"{rng.uniform(low, high):+06.2f}" for low, high in _EXTENT)


_EXTENT = ((-4.0, 4.0), (0.1, 2.2), (-4.0, 4.0))  # metres: x, height, z


def _invented(kind: str, point: list[float], rng: random.Random) -> Receptacle:
    suffix = f"|{kind}" if kind.endswith("Basin") else ""
    name = f"{kind.removesuffix('Basin')}|{position(rng)}{suffix}"
    location = _location(point[0], point[1], 90 * rng.randrange(4), 45)
    return Receptacle(name, kind, location, kind in tables().openable)


def _location(x: float, z: float, rotation: float, horizon: float) -> str:
    steps = [math.floor(x / _GRID), math.floor(z / _GRID), round(rotation) // 90, round(horizon)]
    return "|".join(["loc", *map(str, steps)])
