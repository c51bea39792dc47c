"""What happens to a conversation that is longer than `data.max_length`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from verl_sft.data.messages import Refused
from verl_sft.data.turns import Conversation
from verl_sft.data.view import RenderOptions, View


def cut(view: View, *, conversation: Conversation, options: RenderOptions) -> View:
    """Shorten the tokens of a view.

    `right` cuts the end off, even inside a learned span, whose stop token is then counted as lost.
    `left` cuts behind the head (system, tools, the first user's header) and never inside a learned
    span: a span that does not fit goes as a whole.

    Raises:
        Refused: too_long (policy `error`), dropped_too_long (`drop`), head_too_long (`left`).
    """
    limit = options.max_length
    assert limit is not None
    size = len(view.token_ids)
    if options.truncation == "right":
        lost = sum(stop > limit for _, stop in view.spans)
        spans = tuple((a, min(b, limit)) for a, b in view.spans if a < limit)
        return replace(
            view,
            token_ids=view.token_ids[:limit],
            weights=view.weights[:limit],
            labels=view.labels[:limit],
            spans=spans,
            truncated=True,
            lost_stops=lost,
        )
    if options.truncation != "left":
        raise Refused(
            "too_long" if options.truncation == "error" else "dropped_too_long",
            f"{size} tokens, more than the {limit} of data.max_length",
            fix="Raise data.max_length, or set data.truncation to left, oldest_turns or right",
        )
    head_text = conversation.turn(view.turns[-1]).text[: conversation.head_chars()]
    head = min(len(conversation.template.encode(head_text).ids), view.spans[0][0])
    start = size - (limit - head)
    if head >= limit or start >= size:
        raise Refused(
            "head_too_long",
            f"system message and tools alone have {head} tokens, data.max_length is {limit}",
            fix="Raise data.max_length",
        )
    for begin, stop in view.spans:
        if begin < start < stop:
            start = stop
    shift = start - head
    return replace(
        view,
        token_ids=np.concatenate((view.token_ids[:head], view.token_ids[start:])),
        weights=np.concatenate((view.weights[:head], view.weights[start:])),
        labels=np.concatenate((view.labels[:head], view.labels[start:])),
        spans=tuple((a - shift, b - shift) for a, b in view.spans if a >= start),
        lost_stops=sum(a < start for a, _ in view.spans),
        truncated=True,
    )


def window_start(conversation: Conversation, *, last: int, options: RenderOptions) -> int:
    """The earliest user message from which everything up to turn `last` fits.

    Raises:
        Refused: too_long, not even the last exchange fits.
    """
    limit = options.max_length
    assert limit is not None
    starts = conversation.group_starts(last)
    low, high = 1, len(starts)
    while low < high:
        middle = (low + high) // 2
        text = conversation.window(starts[middle]).turn(last).text
        if len(conversation.template.encode(text).ids) <= limit:
            high = middle
        else:
            low = middle + 1
    if low < len(starts):
        text = conversation.window(starts[low]).turn(last).text
        if len(conversation.template.encode(text).ids) <= limit:
            return starts[low]
    raise Refused(
        "too_long",
        f"even the last exchange alone has more tokens than data.max_length={limit}",
        fix="Raise data.max_length",
    )
