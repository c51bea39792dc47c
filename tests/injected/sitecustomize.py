"""Faults in processes that a test starts: a function fails, waits or sleeps at its n-th call.

Python imports this file at start-up where its folder is on PYTHONPATH. `TEST_FAULTS` holds JSON,
a list of `{"call": "module:Class.name", "do": "raise" | "wait" | "sleep" | "mark", "nth": 2}` with
`"rank": "1"` for that rank alone, or `"everywhere": true` for processes that are no ranks.
"""

import functools
import importlib.abc
import importlib.util
import json
import os
import select
import signal
import sys
import time

WAIT_S = 30.0


def wait():
    """Until a signal comes; its handler then runs, and may raise."""
    told, tell = os.pipe2(os.O_NONBLOCK)
    before = signal.set_wakeup_fd(tell)
    try:
        select.select([told], [], [], WAIT_S)
    finally:
        signal.set_wakeup_fd(before)


def act(fault):
    with open(fault["mark"] + "." + os.environ.get("RANK", "0"), "a") as stream:
        stream.write(fault["call"])
    if fault["do"] == "wait":
        wait()
    elif fault["do"] == "sleep":
        time.sleep(WAIT_S)
    elif fault["do"] == "raise":
        raise {"bug": RuntimeError, "memory": MemoryError}[fault["kind"]]("the injected fault")


def patch(module, fault):
    holder, names = module, fault["call"].partition(":")[2].split(".")
    for name in names[:-1]:
        holder = getattr(holder, name)
    original, calls = getattr(holder, names[-1]), []

    @functools.wraps(original)
    def faulty(*args, **kwargs):
        calls.append(None)
        if len(calls) == fault.get("nth", 1):
            act(fault)
        return original(*args, **kwargs)

    setattr(holder, names[-1], faulty)


class Finder(importlib.abc.MetaPathFinder):
    """Patches modules once they are imported."""

    def __init__(self, faults):
        self.faults = faults

    def find_spec(self, name, path, target=None):
        mine = [fault for fault in self.faults if fault["call"].partition(":")[0] == name]
        if not mine:
            return None
        self.faults = [fault for fault in self.faults if fault not in mine]
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for fault in mine:
                patch(module, fault)

        spec.loader.exec_module = exec_module
        return spec


def mine(fault):
    rank = os.environ.get("RANK")
    return fault.get("everywhere") if rank is None else fault.get("rank") in (None, rank)


if faults := [fault for fault in json.loads(os.environ["TEST_FAULTS"]) if mine(fault)]:
    sys.meta_path.insert(0, Finder(faults))
