"""Tokenising conversations, here or in worker processes that never import torch."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import numpy as np

from verl_sft.data.fold import Conversation
from verl_sft.data.kinds import with_turn
from verl_sft.data.messages import Refused
from verl_sft.data.render import render
from verl_sft.data.store import LOST_STOP, SPLIT, TRUNCATED, LoadReport
from verl_sft.data.template import ChatTemplate, TokenizerSpec
from verl_sft.data.view import RenderOptions, View
from verl_sft.errors import OutOfMemoryError
from verl_sft.processes import die_with_parent
from verl_sft.types import JSON

_CHUNK = 32  # conversations per task: the sum of their tokens is what a worker holds
_SMALL = 256  # conversations that are not worth starting processes for
_AHEAD = 4  # tasks in flight per worker; bounds memory
# Codes that are what the user asked for, not defects of the data.
_ASKED_FOR = frozenset({"dropped_too_long", "nothing_to_learn"})


@dataclass(slots=True)
class Tokenised:
    """The samples of a few conversations: ids, weights and labels as bytes, unshifted."""

    ids: bytes = b""
    weights: bytes = b""
    labels: bytes = b""
    lengths: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    refused: list[JSON] = field(default_factory=list)
    counts: LoadReport = field(default_factory=LoadReport)


def tokenise_all(
    chats: Iterable[Conversation], *, spec: TokenizerSpec, options: RenderOptions, num_workers: int
) -> Iterator[Tokenised]:
    """Tokenise all conversations in order.

    Raises:
        OutOfMemoryError: a worker process was killed.
    """
    chats = iter(chats)
    first = list(islice(chats, _SMALL + 1))
    chunks = _chunks(chain(first, chats))
    if num_workers <= 1 or len(first) <= _SMALL:
        template = ChatTemplate(spec)
        yield from (tokenise(chunk, template=template, options=options) for chunk in chunks)
        return
    # Not fork: the trainer may hold CUDA and threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start, initargs=(spec, options)
    ) as pool:
        pending: deque[Future[Tokenised]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_work, chunk))
                if len(pending) >= _AHEAD * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise OutOfMemoryError(
                "a tokenising process was killed",
                why="Most often the machine ran out of memory",
                fix="Lower data.num_workers",
            ) from error
        finally:
            for future in pending:
                future.cancel()


def tokenise(
    chats: Sequence[Conversation], *, template: ChatTemplate, options: RenderOptions
) -> Tokenised:
    """Render conversations; a refused one is noted, or tried in the parts it was folded from."""
    done = Tokenised()
    views: list[View] = []
    for chat in chats:
        done.counts.rows += max(len(chat.parts), 1)
        try:
            found = _render(chat, template=template, options=options)
            done.counts.folded += max(len(chat.parts) - 1, 0)
            _take(chat, found, views=views, done=done)
        except Refused as refused:
            for part in chat.parts:
                try:
                    found = _render(part, template=template, options=options)
                    _take(part, found, views=views, done=done)
                except Refused as error:
                    _refuse(part, error, done=done)
            if not chat.parts:
                _refuse(chat, refused, done=done)
    if views:
        done.ids = np.concatenate([view.token_ids for view in views]).tobytes()
        done.weights = np.concatenate([view.weights for view in views]).tobytes()
        done.labels = np.concatenate([view.labels for view in views]).tobytes()
    return done


def _render(chat: Conversation, *, template: ChatTemplate, options: RenderOptions) -> list[View]:
    if chat.template_kwargs:
        options = replace(
            options, template_kwargs={**options.template_kwargs, **chat.template_kwargs}
        )
    if chat.max_length is not None and chat.max_length < (
        options.max_length or chat.max_length + 1
    ):
        options = replace(options, max_length=chat.max_length, truncation="drop")
    weights = None if chat.weights is None else dict(sorted(chat.weights.items()))
    views = render(
        chat.messages,
        template=template,
        tools=chat.tools,
        supervise=None if weights is None else tuple(weights),
        weights=None if weights is None else tuple(weights.values()),
        options=options,
    )
    if chat.sample_weight == 0:
        raise Refused("nothing_to_learn", "its sample_weight is 0")
    if chat.first_turn:
        views = [replace(v, labels=with_turn(v.labels, chat.first_turn)) for v in views]
    if chat.sample_weight != 1:
        scale = np.float32(chat.sample_weight)
        views = [replace(view, weights=view.weights * scale) for view in views]
    return views


def _take(chat: Conversation, found: list[View], *, views: list[View], done: Tokenised) -> None:
    counts = done.counts
    counts.escaped += found[0].escaped
    for view in found:
        size = len(view.token_ids)
        views.append(view)
        done.lengths.append(size)
        done.names.append(f"{chat.record_id}\n{chat.source}")
        done.groups.append(chat.group)
        split = len(found) > 1
        done.flags.append(
            TRUNCATED * view.truncated + LOST_STOP * (view.lost_stops > 0) + SPLIT * split
        )
        counts.samples += 1
        counts.split += split
        counts.turns += len(view.turns)
        counts.tokens += size - 1
        counts.longest = max(counts.longest, size - 1)
        counts.learned_tokens += int(np.count_nonzero(view.weights[1:]))
        counts.truncated += view.truncated
        counts.lost_stops += view.lost_stops
        counts.without_stop += view.without_stop


def _refuse(chat: Conversation, refused: Refused, *, done: Tokenised) -> None:
    counter = done.counts.dropped if refused.code in _ASKED_FOR else done.counts.rejected
    counter[refused.code] += 1
    file, _, row = chat.source.rpartition(":")
    done.refused.append(
        {"file": file, "row": int(row) if row.isdigit() else None, "field": "messages",
         "code": refused.code, "reason": refused.reason, "fix": refused.fix}
    )  # fmt: skip


_template: ChatTemplate | None = None
_options = RenderOptions()


def _start(spec: TokenizerSpec, options: RenderOptions) -> None:
    global _template, _options
    die_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _template, _options = ChatTemplate(spec), options


def _work(chats: Sequence[Conversation]) -> Tokenised:
    assert _template is not None
    return tokenise(chats, template=_template, options=_options)


def _chunks(chats: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    chats = iter(chats)
    while chunk := list(islice(chats, _CHUNK)):
        yield chunk
