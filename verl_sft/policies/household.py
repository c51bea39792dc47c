"""What one can know about a household game from its text alone: the task, and where things are.

`Belief` is folded from the steps of an episode, so an expert that uses it needs no state of its own
and recovers from whatever happened before, its own or a random action.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from verl_sft.types import Step

_THING = re.compile(r"\b(?!loc\b)([a-z]+ \d+)\b")
_SEEN = re.compile(r"\b(?:on|in)(?: the)? ([a-z]+ \d+),(?: you see| there is)? (.*?)\.", re.I)
_SEEN_OPEN = re.compile(r"([a-z]+ \d+) is open\. In it, you see (.*?)\.", re.I)
_CLOSED = re.compile(r"([a-z]+ \d+) is closed", re.I)
_ACTIONS = (
    (re.compile(r"(?:go to|examine) (\w+ \d+)$"), "go"),
    (re.compile(r"open (\w+ \d+)$"), "open"),
    (re.compile(r"close (\w+ \d+)$"), "close"),
    (re.compile(r"take (\w+ \d+) from (\w+ \d+)$"), "take"),
    (re.compile(r"(?:put|move) (\w+ \d+) (?:in/on|in|on|into|to) (\w+ \d+)$"), "put"),
    (re.compile(r"(?:clean|heat|cool) (\w+ \d+) with (\w+ \d+)$"), "change"),
)


class Change(StrEnum):
    """What must be done to the object before it is put down."""

    NONE = "none"
    CLEAN = "clean"
    HEAT = "heat"
    COOL = "cool"
    LIGHT = "light"  # hold it and switch a lamp on


# Where each change is done: receptacle types, or the lamp for LIGHT.
STATIONS = {Change.CLEAN: "sinkbasin", Change.HEAT: "microwave", Change.COOL: "fridge"}


@dataclass(frozen=True, slots=True)
class Goal:
    """A task read from its text: `count` objects of type `thing`, changed, into a `target`."""

    thing: str
    target: str = ""
    change: Change = Change.NONE
    count: int = 1
    lamp: str = "desklamp"


_TASKS: tuple[tuple[re.Pattern[str], Change, int], ...] = (
    (re.compile(r"(?:look at|examine)(?: an?| some| the)? (\w+) (?:under|with) (?:the )?(\w+)"),
     Change.LIGHT, 1),
    (re.compile(r"(?:put|find) two (\w+?)s? (?:and put them )?(?:in|on)(?: the)? (\w+)"),
     Change.NONE, 2),
    (re.compile(r"put (?:a|some|the) clean (\w+) (?:in|on)(?: the)? (\w+)"), Change.CLEAN, 1),
    (re.compile(r"put (?:a|some|the) hot (\w+) (?:in|on)(?: the)? (\w+)"), Change.HEAT, 1),
    (re.compile(r"put (?:a|some|the) (?:cool|cold) (\w+) (?:in|on)(?: the)? (\w+)"),
     Change.COOL, 1),
    (re.compile(r"clean (?:an?|some|the) (\w+) and put it (?:in|on)(?: the)? (\w+)"),
     Change.CLEAN, 1),
    (re.compile(r"heat (?:an?|some|the) (\w+) and put it (?:in|on)(?: the)? (\w+)"),
     Change.HEAT, 1),
    (re.compile(r"cool (?:an?|some|the) (\w+) and put it (?:in|on)(?: the)? (\w+)"),
     Change.COOL, 1),
    (re.compile(r"put (?:an?|some|the) (\w+) (?:in|on)(?: the)? (\w+)"), Change.NONE, 1),
)  # fmt: skip


def read_goal(task: str) -> Goal | None:
    """The goal behind a task's text, or None if it is not one of the six task types.

    >>> read_goal("put a hot egg in garbagecan.")
    Goal(thing='egg', target='garbagecan', change=<Change.HEAT: 'heat'>, count=1, lamp='desklamp')
    """
    for pattern, change, count in _TASKS:
        found = pattern.search(task.lower())
        if found is None:
            continue
        thing, place = found.groups()
        if change is Change.LIGHT:
            return Goal(thing, change=change, lamp=place)
        return Goal(thing, target=place, change=change, count=count)
    return None


@dataclass(slots=True)
class Belief:
    """What is known at the current step.

    `contents` maps each receptacle that was looked into to what was last seen there; `closed` holds
    those last seen closed; `changed` the objects already cleaned, heated or cooled.
    """

    receptacles: tuple[str, ...] = ()
    here: str = ""
    holding: str = ""
    contents: dict[str, set[str]] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, steps: Sequence[Step], observation: str, admissible: Sequence[str]) -> Belief:
        """Fold all steps and the current observation."""
        first = steps[0].observation.text if steps else observation
        listed = _THING.findall(first.lower())
        reachable = [a[len("go to ") :] for a in admissible if a.startswith("go to ")]
        belief = cls(receptacles=tuple(dict.fromkeys([*listed, *reachable])))
        for step in steps:
            belief._update(step.action, step.next_observation)
        return belief

    def where(self, thing: str) -> dict[str, str]:
        """Known objects of a type and the receptacle each is in, in a stable order."""
        found = {
            name: place
            for place in self.receptacles
            for name in self.contents.get(place, ())
            if kind(name) == thing
        }
        return dict(sorted(found.items(), key=lambda item: _order(item[0])))

    def unexplored(self) -> list[str]:
        """Receptacles whose inside was never seen."""
        return [place for place in self.receptacles if place not in self.contents]

    def _update(self, action: str, feedback: str) -> None:
        if feedback.strip().lower().startswith("nothing happens"):
            return
        for pattern, verb in _ACTIONS:
            found = pattern.match(action)
            if found is not None:
                self._apply(verb, found.groups())
                break
        self._see(feedback.lower())

    def _apply(self, verb: str, names: Sequence[str]) -> None:
        thing = names[0]
        if verb == "go" and thing in self.receptacles:
            self.here = thing
        elif verb == "open":
            self.closed.discard(thing)
        elif verb == "close":
            self.closed.add(thing)
        elif verb == "take":
            self.holding = thing
            for place in self.contents.values():
                place.discard(thing)
        elif verb == "put":
            self.holding = ""
            self.contents.setdefault(names[1], set()).add(thing)
        elif verb == "change":
            self.changed.add(thing)

    def _see(self, text: str) -> None:
        for pattern in (_SEEN, _SEEN_OPEN):
            for place, things in pattern.findall(text):
                if place in self.receptacles:
                    self.contents[place] = set(_THING.findall(things))
                    self.closed.discard(place)
        self.closed.update(p for p in _CLOSED.findall(text) if p in self.receptacles)


def kind(name: str) -> str:
    """The type of an instance: "apple 2" is an "apple"."""
    return name.split(" ")[0]


def _order(name: str) -> tuple[str, int]:
    thing, _, number = name.partition(" ")
    return thing, int(number)


def search_order(thing: str, places: Sequence[str]) -> list[str]:
    """Where to look for a type of object: the plausible receptacle types first, then the rest."""
    likely = LIKELY_PLACES.get(thing, ())
    rank = {place: index for index, place in enumerate(likely)}
    return sorted(places, key=lambda p: (rank.get(kind(p), len(rank)), _order(p)))


_KITCHEN = ("countertop", "diningtable", "sinkbasin", "cabinet", "drawer", "shelf", "sidetable")
_FOOD = ("countertop", "fridge", "diningtable", "sinkbasin", "microwave", "garbagecan")
_COOK = ("stoveburner", "countertop", "cabinet", "sinkbasin", "diningtable", "shelf")
_DESK = ("desk", "sidetable", "dresser", "drawer", "shelf", "bed", "coffeetable", "diningtable")
_LOUNGE = ("coffeetable", "sofa", "sidetable", "armchair", "tvstand", "dresser", "diningtable")
_BATH = ("countertop", "sinkbasin", "toilet", "cabinet", "drawer", "shelf", "bathtubbasin", "cart")

# Common sense, not a table of any game: where such a thing is usually kept.
LIKELY_PLACES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("apple", "bread", "egg", "lettuce", "potato", "tomato"), _FOOD),
    **dict.fromkeys(("butterknife", "fork", "knife", "ladle", "spatula", "spoon"), _KITCHEN),
    **dict.fromkeys(("kettle", "pan", "pot"), _COOK),
    **dict.fromkeys(("bowl", "cup", "glassbottle", "plate", "winebottle"), (*_KITCHEN, "fridge")),
    **dict.fromkeys(("peppershaker", "saltshaker"), _KITCHEN),
    **dict.fromkeys(("alarmclock", "book", "cd", "pen", "pencil"), _DESK),
    **dict.fromkeys(("cellphone", "creditcard", "keychain", "laptop", "watch"), _DESK),
    **dict.fromkeys(("box", "newspaper", "remotecontrol", "statue", "tissuebox"), _LOUNGE),
    **dict.fromkeys(("candle", "soapbar", "soapbottle", "spraybottle", "toiletpaper"), _BATH),
    "mug": ("countertop", "coffeemachine", "cabinet", "sinkbasin", "desk", "shelf", "diningtable"),
    "vase": ("shelf", "coffeetable", "countertop", "cabinet", "sidetable", "dresser", "safe"),
    "cloth": ("countertop", "bathtubbasin", "cabinet", "drawer", "sinkbasin", "cart", "toilet"),
    "dishsponge": ("sinkbasin", "countertop", "cabinet", "drawer", "toilet", "cart", "shelf"),
    "handtowel": ("handtowelholder", "towelholder", "countertop", "cabinet", "garbagecan"),
    "towel": ("towelholder", "handtowelholder", "bed", "countertop", "cabinet"),
    "toiletpaperroll": ("toiletpaperhanger", "toilet", "cabinet", "countertop", "drawer"),
    "pillow": ("bed", "sofa", "armchair", "ottoman"),
    "teddybear": ("bed", "desk", "sofa", "armchair"),
    "baseballbat": ("bed", "desk", "dresser"),
    "basketball": ("bed", "desk", "armchair", "sofa"),
    "tennisracket": ("bed", "desk", "dresser"),
    "wateringcan": ("sidetable", "shelf", "coffeetable", "diningtable"),
    "desklamp": ("desk", "sidetable", "dresser", "shelf", "coffeetable", "bed"),
    "floorlamp": ("floor",),
}
