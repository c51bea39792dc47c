"""Drawing one task: a pure function of its random generator, the room and the size."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from verl_sft.envs.alfworld_problem import LAMP, Task
from verl_sft.envs.alfworld_rooms import Receptacle, Room, position, room_kind, tables

# size -> (receptacles, loose objects), each from .. to; "full" takes the whole room
SIZES = {
    "tiny": ((3, 5), (4, 7)),
    "small": ((6, 9), (8, 14)),
    "medium": ((12, 18), (16, 28)),
    "full": ((99, 99), (26, 46)),
}
_MOST_OF_A_TYPE = 3
_ROOMY = ("CounterTop", "DiningTable", "Desk", "Bed", "Fridge", "SideTable", "CoffeeTable", "Sofa")
_LAMP_STANDS = ("Desk", "SideTable", "Dresser", "CoffeeTable", "DiningTable", "Shelf", "TVStand")
_TOOL_OF_TASK = {
    "pick_clean_then_place_in_recep": ("SinkBasin", "Cleanable"),
    "pick_heat_then_place_in_recep": ("Microwave", "Heatable"),
    "pick_cool_then_place_in_recep": ("Fridge", "Coolable"),
}


def goals_in(room: Room, *, task_type: str) -> list[tuple[str, str]]:
    """Every (object type, target kind) that makes sense in a room; the kind is "" for the lamp.

    The object can lie somewhere that is not yet its target, and the tool of the task is there.
    """
    known = tables()
    kinds = {r.kind for r in room.receptacles}
    tool, action = _TOOL_OF_TASK.get(task_type, ("", ""))
    if room.kind not in known.rooms_of_task[task_type] or (tool and tool not in kinds):
        return []
    if task_type == "look_at_obj_in_light":
        if not room.has_desk_lamp or kinds.isdisjoint(_LAMP_STANDS):
            return []
        return [(o, "") for o in room.object_types if _holders(room.receptacles, o)]
    return [
        (name, kind)
        for name in room.object_types
        if not action or name in known.actions[action]
        for kind in sorted(kinds - {tool})
        if name in known.contains[kind] and _holders(room.receptacles, name, besides=kind)
    ]


def scenes_for(task_type: str, *, scenes: Sequence[int]) -> list[int]:
    """The scenes whose kind of room suits a task type."""
    return [s for s in scenes if room_kind(s) in tables().rooms_of_task[task_type]]


def draw_task(room: Room, *, task_type: str, size: str, rng: random.Random) -> Task:
    """One task in `room`; the caller made sure that `goals_in` has some."""
    goals = goals_in(room, task_type=task_type)
    name = rng.choice(sorted({goal[0] for goal in goals}))
    target = rng.choice([kind for other, kind in goals if other == name])
    tool = _TOOL_OF_TASK.get(task_type, ("", ""))[0]
    stands = [r for r in room.receptacles if r.kind in _LAMP_STANDS]
    holders = _holders(room.receptacles, name, besides=target)
    needed = [rng.choice(holders)]
    needed += [rng.choice([r for r in room.receptacles if r.kind in (target,)])] if target else []
    needed += [rng.choice([r for r in room.receptacles if r.kind == tool])] if tool else []
    lamp_stand = rng.choice(stands) if not target else None
    needed += [lamp_stand] if lamp_stand else []
    (low, high), (few, many) = SIZES[size]
    receptacles = _some_receptacles(room, needed, count=rng.randint(low, high), rng=rng)
    count = 2 if task_type == "pick_two_obj_and_place" else 1
    holders = _holders(receptacles, name, besides=target)
    placed = [(name, rng.choice(holders)) for _ in range(count)]
    placed += [(LAMP, lamp_stand)] if lamp_stand else []
    others = [o for o in room.object_types if o != name]
    placed += _filling(receptacles, placed, others=others, count=rng.randint(few, many), rng=rng)
    template = rng.choice(tables().templates[task_type])
    words = template.format(obj=name.lower(), recep=target.lower(), toggle=LAMP.lower(), mrecep="")
    taken = {r.location for r in receptacles}
    return Task(
        task_type=task_type,
        object_type=name,
        target_kind=target,
        scene=room.scene,
        receptacles=tuple(receptacles),
        placed=_with_ids(placed, rng),
        # Away from every receptacle: the first text is then the overview of the room.
        start=rng.choice([point for point in room.locations if point not in taken]),
        words=words,
    )


def _holders(
    receptacles: Sequence[Receptacle], name: str, *, besides: str = ""
) -> list[Receptacle]:
    contains = tables().contains
    return [r for r in receptacles if r.kind != besides and name in contains[r.kind]]


def _some_receptacles(
    room: Room, needed: Sequence[Receptacle], *, count: int, rng: random.Random
) -> list[Receptacle]:
    """`needed` and others up to `count`, a new kind before a second of the same, in room order."""
    chosen = set(needed)
    rest = [r for r in room.receptacles if r not in chosen]
    rng.shuffle(rest)
    while rest and len(chosen) < count:
        kinds = {r.kind for r in chosen}
        pick = next((r for r in rest if r.kind not in kinds), rest[0])
        if rng.random() < 0.5:
            pick = rest[0]  # not one of each: real rooms have rows of drawers and cabinets
        rest.remove(pick)
        chosen.add(pick)
    return [r for r in room.receptacles if r in chosen]


def _filling(
    receptacles: Sequence[Receptacle],
    placed: Sequence[tuple[str, Receptacle]],
    *,
    others: Sequence[str],
    count: int,
    rng: random.Random,
) -> list[tuple[str, Receptacle]]:
    """Objects that have nothing to do with the task, where such things lie."""
    load = Counter(r.id for _, r in placed)
    number: Counter[str] = Counter()
    filling: list[tuple[str, Receptacle]] = []
    candidates = [o for o in others if _holders(receptacles, o)]
    for _ in range(count * 2):
        free = [o for o in candidates if number[o] < _MOST_OF_A_TYPE]
        if not free or len(filling) == count:
            break
        name = rng.choice(free)
        place = rng.choice(_holders(receptacles, name))
        if load[place.id] < (8 if place.kind in _ROOMY else 3):
            filling.append((name, place))
            load[place.id] += 1
            number[name] += 1
    return filling


def _with_ids(
    placed: Sequence[tuple[str, Receptacle]], rng: random.Random
) -> tuple[tuple[str, str], ...]:
    """Public object ids (`Apple|+00.78|+01.45|+01.25`), no two alike."""
    used: set[str] = set()
    result = []
    for name, receptacle in placed:
        identity = f"{name}|{position(rng)}"
        while identity in used:
            identity = f"{name}|{position(rng)}"
        used.add(identity)
        result.append((identity, receptacle.id))
    return tuple(sorted(result))
