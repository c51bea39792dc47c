"""What each learned token is: its kind, its turn and its source, as one integer per token.

    label = kind + 16 * turn + 256 * source

Kinds and turns are found once, while tokenising; 0 is a token outside the learned turns.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from verl_sft.data.encoder import Encoding
from verl_sft.data.messages import Refused
from verl_sft.data.turns import Turn, part_ranges

KINDS = (
    "context",
    "thought",
    "prediction",
    "action",
    "tool_call",
    "content",
    "stop",
    "observation",
)
LAST_TURN = 8  # this one and all behind it count together
TURN, SOURCE = 16, 256  # factors of a label

_KIND = {name: index for index, name in enumerate(KINDS)}
_TAG_KINDS = {"think": "thought"}
_TAGGED = re.compile(r"<(think|prediction|action|observation)>.*?</\1>", re.DOTALL | re.IGNORECASE)

Uint8Array = npt.NDArray[np.uint8]


def turn_labels(
    encoding: Encoding, *, first: int, stop: int, turn: Turn, row: Mapping[str, Any], number: int
) -> Uint8Array:
    """Labels of the tokens `[first, stop)` of a learned turn, uint8 [stop - first].

    A token belongs to the part that it begins in; tags belong to what they enclose.

    Args:
        encoding: of the whole text.
        first: token that the turn begins with.
        stop: token behind its last one.
        turn: where it lies in the text.
        row: its message.
        number: of the assistant turn, from 0.
    """
    kinds = np.full(stop - first, _KIND["content"], dtype=np.uint8)
    places: list[int] = []  # begin and end of each part, in characters
    names: list[str] = []
    for found in _TAGGED.finditer(turn.text, turn.start, turn.end):
        tag = found[1].lower()
        names.append(_TAG_KINDS.get(tag, tag))
        places += found.span()
    # Thoughts and calls are also found where they have fields and marks of their own; where they
    # are not, no row is refused for it: nothing that is trained depends on kinds.
    with contextlib.suppress(Refused):
        parts = part_ranges(turn, row=row)
        for name, kind in (("reasoning", "thought"), ("tool_call", "tool_call")):
            for span in parts[name]:
                names.append(kind)
                places += span
    if turn.stop_start is not None:
        names.append("stop")
        places += (turn.stop_start, turn.newline_end + 1)
    tokens = np.searchsorted(encoding.starts[first:stop], places).tolist()
    for kind, low, high in zip(names, tokens[::2], tokens[1::2], strict=True):
        kinds[low:high] = _KIND[kind]
    return kinds + np.uint8(TURN * min(number, LAST_TURN))


def with_turn(labels: Uint8Array, number: int) -> Uint8Array:
    """The same kinds in another turn: pairs of prompt and response are steps of an episode."""
    moved = labels % TURN + np.uint8(TURN * min(number, LAST_TURN))
    return np.where(labels > 0, moved, 0).astype(np.uint8)
