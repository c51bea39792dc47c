"""Experts: `search` knows only what it has seen, `planner` follows the game's own plan.

A student can learn from `search`, because everything it writes follows from the text before it.
With `policy.noise` some steps are random actions of weight 0, so that recovery is learned too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from verl_sft.config.collect import PolicyConfig
from verl_sft.errors import InputError
from verl_sft.policies.base import PolicyRequest
from verl_sft.policies.household import (
    STATIONS,
    Belief,
    Change,
    Goal,
    kind,
    read_goal,
    search_order,
)
from verl_sft.types import Answer, Completion

_MAX_LISTED = 8  # places named in a thought; more would cost tokens and say little


@dataclass(frozen=True, slots=True)
class Expert:
    """A scripted teacher; a decision is a pure function of its request."""

    name: str
    kind: str
    noise: float = 0.0
    listed_order: bool = False

    def complete(self, requests: Sequence[PolicyRequest]) -> list[Completion]:
        """One draft per request; the rollout gives it the template's tags."""
        return [self._decide(request) for request in requests]

    def _decide(self, request: PolicyRequest) -> Completion:
        chance = random.Random(f"{request.seed}:{len(request.steps)}:noise")
        admissible = request.observation.admissible_actions
        if self.noise and chance.random() < self.noise and admissible:
            action = chance.choice(admissible)
            return Completion(draft=Answer(action, f"I try something: {action}."), weight=0.0)
        if self.kind == "planner":
            return Completion(draft=_follow_plan(request))
        return Completion(draft=decide(request, listed_order=self.listed_order))


def make_expert(config: PolicyConfig) -> Expert:
    """The expert that `policy.expert` names."""
    label = f"expert-{config.expert}" + (f"-noise{config.noise:g}" if config.noise else "")
    return Expert(label, config.expert, config.noise, config.search_order == "listed")


def decide(request: PolicyRequest, *, listed_order: bool = False) -> Answer:
    """The next action of a careful player without hidden knowledge, and why.

    Places are looked into in the order of common sense, or in that of the room's description.
    """
    observation = request.observation
    goal = read_goal(observation.task)
    if goal is None:
        raise InputError(
            f"the search expert cannot read the task '{observation.task}'",
            fix="Use policy.expert=planner for this game",
        )
    admissible = observation.admissible_actions
    belief = Belief.of(request.steps, observation.text, admissible)
    action, thought = _Player(goal, belief, tuple(admissible), listed_order).choose()
    if not request.steps:
        thought = f"{_plan_text(goal)} {thought}"
    return Answer(action, thought)


def _follow_plan(request: PolicyRequest) -> Answer:
    action = request.observation.expert_action
    if action is None:
        raise InputError(
            "the game gives no plan for its state",
            why="The planner cannot reach the goal from here",
            fix="Use policy.expert=search, or policy.noise=0",
        )
    goal = read_goal(request.observation.task)
    start = f"{_plan_text(goal)} " if goal is not None and not request.steps else ""
    return Answer(action, f"{start}My next step is: {action}.")


def _plan_text(goal: Goal) -> str:
    if goal.change is Change.LIGHT:
        return f"Plan: find a {goal.thing}, take it, find a {goal.lamp}, use it."
    if goal.count == 2:
        return f"Plan: find two {goal.thing}, put both in the same {goal.target}."
    if goal.change is Change.NONE:
        return f"Plan: find a {goal.thing}, put it in a {goal.target}."
    station = STATIONS[goal.change]
    return (
        f"Plan: find a {goal.thing}, {goal.change} it with a {station}, put it in a {goal.target}."
    )


@dataclass(frozen=True, slots=True)
class _Player:
    """One decision: `choose` returns the action and the thought that leads to it."""

    goal: Goal
    belief: Belief
    admissible: tuple[str, ...]
    listed_order: bool = False

    def choose(self) -> tuple[str, str]:
        goal, belief = self.goal, self.belief
        held = belief.holding
        if held and kind(held) != goal.thing:
            return self._put_away(held)
        if held:
            return self._use(held)
        target = self._target()
        for name, place in belief.where(goal.thing).items():
            if place == target and (goal.count == 2 or name in belief.changed):
                continue  # already where it belongs
            if place == belief.here:
                return self._take(name, place)
            return self._go(place, f"I need {goal.thing}. I saw {name} on {place}.")
        return self._search(goal.thing, f"I need {goal.thing}.")

    def _use(self, held: str) -> tuple[str, str]:
        """Bring what is held to its next station."""
        goal, belief = self.goal, self.belief
        have = f"I have {held}."
        if goal.change is Change.LIGHT:
            for lamp, place in belief.where(goal.lamp).items():
                if place != belief.here:
                    return self._go(place, f"{have} I saw {lamp} on {place}.")
                return f"use {lamp}", f"{have} {lamp} is here. Use {lamp}."
            return self._search(goal.lamp, f"{have} I need {goal.lamp}.")
        station = STATIONS.get(goal.change)
        if station is not None and held not in belief.changed:
            return self._change(held, station)
        target = self._target()
        if target is None:
            return self._search(goal.target, f"{have} I need a {goal.target}.")
        done = f" It is {goal.change}ed." if station is not None else ""
        if target != belief.here:
            return self._go(target, f"{have}{done} It goes to {target}.")
        put = self._put_action(held, target)
        if put is None:
            return self._open(target, f"{have} {target} is closed.")
        return put, f"{have}{done} {target} is here. Put {held} there."

    def _change(self, held: str, station: str) -> tuple[str, str]:
        change, belief = self.goal.change, self.belief
        place = self._nearest(station)
        if place is None:
            return self._search(station, f"I have {held}. I need a {station}.")
        if place != belief.here:
            return self._go(place, f"I have {held}. It must be {change}ed with {place}.")
        how = f"{held} with {place}"
        return f"{change} {how}", f"I have {held}. {place} is here. {change.capitalize()} {how}."

    def _take(self, name: str, place: str) -> tuple[str, str]:
        action = f"take {name} from {place}"
        if action in self.admissible:
            return action, f"I need {self.goal.thing}. {name} is here. Take {name} from {place}."
        return self._open(place, f"{name} is in {place}. {place} is closed.")

    def _put_away(self, held: str) -> tuple[str, str]:
        """Free the hands of something that the task does not need."""
        belief, why = self.belief, f"I have {held}. I do not need it."
        here = self._put_action(held, belief.here) if belief.here else None
        if here is not None:
            return here, f"{why} Put it down."
        if belief.here in belief.closed:
            return self._open(belief.here, f"{why} {belief.here} is closed.")
        open_places = [p for p in belief.receptacles if p in belief.contents and p != belief.here]
        place = (open_places or [p for p in belief.receptacles if p != belief.here])[0]
        return self._go(place, f"{why} {place} is a place for it.")

    def _search(self, thing: str, why: str) -> tuple[str, str]:
        """Look into the next place that was not looked into."""
        belief = self.belief
        if belief.here in belief.closed and belief.here not in belief.contents:
            return self._open(belief.here, f"{why} {belief.here} is closed.")
        left = self._ordered(thing, belief.unexplored())
        if not left:
            left = self._ordered(thing, [p for p in belief.receptacles if p in belief.closed])
            if belief.here in left:
                return self._open(belief.here, f"{why} {belief.here} is closed.")
        if not left:  # everything was seen: go round again
            left = self._ordered(thing, [p for p in belief.receptacles if p != belief.here])
        listed = ", ".join(left[:_MAX_LISTED]) + (" and more" if len(left) > _MAX_LISTED else "")
        here = belief.contents.get(belief.here)
        if here is None:
            none_here = ""
        elif any(kind(name) == thing for name in here):
            none_here = " One more is needed."
        else:
            none_here = f" There is none on {belief.here}."
        return self._go(left[0], f"{why}{none_here} To check: {listed}.")

    def _ordered(self, thing: str, places: list[str]) -> list[str]:
        return places if self.listed_order else search_order(thing, places)

    def _go(self, place: str, why: str) -> tuple[str, str]:
        if f"go to {place}" in self.admissible:
            return f"go to {place}", f"{why} Go to {place}."
        if f"examine {place}" in self.admissible:  # it shares its spot with where we are
            return f"examine {place}", f"{why} Examine {place}."
        away = next(a for a in self.admissible if a.startswith("go to "))
        return away, f"{why} I cannot go there. {away.capitalize()}."

    def _open(self, place: str, why: str) -> tuple[str, str]:
        return f"open {place}", f"{why} Open {place}."

    def _put_action(self, held: str, place: str) -> str | None:
        """The game's own wording of putting `held` down at `place`, if it is possible now."""
        for action in self.admissible:
            if action.startswith((f"put {held} ", f"move {held} ")) and action.endswith(
                f" {place}"
            ):
                return action
        return None

    def _target(self) -> str | None:
        """The receptacle to fill: for two objects the one that already holds one of them."""
        places = [p for p in self.belief.receptacles if kind(p) == self.goal.target]
        if not places:
            return None
        if self.goal.count == 2:
            for place in search_order("", places):
                if any(kind(n) == self.goal.thing for n in self.belief.contents.get(place, ())):
                    return place
        return search_order("", places)[0]

    def _nearest(self, station: str) -> str | None:
        places = [p for p in self.belief.receptacles if kind(p) == station]
        if self.belief.here in places:
            return self.belief.here
        return search_order("", places)[0] if places else None
