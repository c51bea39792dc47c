"""One token sequence with its weights: character ranges of turns -> tokens, with the proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from verl_sft.config.train import DataConfig
from verl_sft.data.encoder import Encoding
from verl_sft.data.kinds import Uint8Array, turn_labels
from verl_sft.data.messages import Refused
from verl_sft.data.sample import Float32Array, Int32Array
from verl_sft.data.template import ChatTemplate
from verl_sft.data.turns import Conversation, Turn, part_ranges


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """The `data.*` keys that decide ids and weights, with their defaults."""

    max_length: int | None = None
    truncation: str = "error"
    turn_view: str = "auto"
    history_thinking: str = "template"
    train_on_eot_newline: bool = True
    special_tokens_in_content: str = "escape"
    reasoning_weight: float = 1.0
    tool_call_weight: float = 1.0
    content_weight: float = 1.0
    prompt_weight: float = 0.0
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: DataConfig) -> RenderOptions:
        """The options out of the `data` section."""
        return cls(
            max_length=config.max_length,
            truncation=config.truncation,
            turn_view=config.turn_view,
            history_thinking=config.history_thinking,
            train_on_eot_newline=config.train_on_eot_newline,
            special_tokens_in_content=config.special_tokens_in_content,
            reasoning_weight=config.mask.reasoning,
            tool_call_weight=config.mask.tool_call,
            content_weight=config.mask.content,
            prompt_weight=config.prompt_weight,
            template_kwargs=dict(config.apply_chat_template_kwargs),
        )


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """One token sequence, not yet shifted.

    `weights[i]` is for having to produce `token_ids[i]` (int32 [T], float32 [T]). `turns` are the
    indices of the messages learned in it; `lost_stops` counts learned turns whose stop token was
    cut off, `without_stop` those for which the template prints none. `spans` are their half-open
    token ranges; `escaped` counts control-token texts that were made plain text. `labels` say what
    each token is (`data/kinds.py`, uint8 [T]).
    """

    token_ids: Int32Array
    weights: Float32Array
    labels: Uint8Array
    turns: tuple[int, ...]
    truncated: bool = False
    lost_stops: int = 0
    without_stop: int = 0
    escaped: int = 0
    spans: tuple[tuple[int, int], ...] = ()


def make_view(
    conversation: Conversation,
    *,
    turns: Sequence[Turn],
    weights: Mapping[int, float],
    options: RenderOptions,
    context: Sequence[Turn] = (),
) -> View:
    """Tokenise the last turn's rendering once and weigh the tokens of every turn in it.

    `context` are the assistant turns that are not learned; they stay at 0 where
    `options.prompt_weight` gives the tokens of all other messages a weight.

    Raises:
        Refused: merged_boundary (a token crosses the border of a learned span, or the tokens
            before it are not those of the generation prompt alone), context_dropped, tools_dropped.
    """
    text = turns[-1].text
    conversation.check_context(turns[-1].index)
    places = [(max(turn.start - 1, 0), turn.newline_end) for turn in (*turns, *context)]
    encoding = conversation.template.encode(text, places=places)
    values = np.full(len(encoding.ids), options.prompt_weight, dtype=np.float32)
    for turn in context:
        first, stop = np.searchsorted(encoding.ends, (turn.start + 1, turn.newline_end + 1))
        values[first:stop] = 0
    labels = np.zeros(len(encoding.ids), dtype=np.uint8)
    spans = []
    for turn in turns:
        first, stop = _token_range(
            encoding, turn=turn, template=conversation.template, text=text, options=options
        )
        parts = _part_weights(
            encoding, first=first, stop=stop, turn=turn, conversation=conversation, options=options
        )
        values[first:stop] = weights[turn.index] * parts
        labels[first:stop] = turn_labels(
            encoding,
            first=first,
            stop=stop,
            turn=turn,
            row=conversation.row(turn.index),
            number=conversation.number(turn.index),
        )
        spans.append((first, stop))
    return View(
        token_ids=encoding.ids,
        weights=values,
        labels=labels,
        turns=tuple(turn.index for turn in turns),
        without_stop=sum(turn.stop_start is None for turn in turns),
        spans=tuple(spans),
    )


def _token_range(
    encoding: Encoding, *, turn: Turn, template: ChatTemplate, text: str, options: RenderOptions
) -> tuple[int, int]:
    starts, ends = encoding.starts, encoding.ends
    first = int(np.searchsorted(starts, turn.start))
    if (
        first == len(starts)
        or starts[first] != turn.start
        or (first and ends[first - 1] > turn.start)
    ):
        raise _merged(text, at=turn.start, turn=turn)
    _check_prompt_tokens(encoding, first=first, turn=turn, template=template, text=text)
    if turn.stop_start is None:
        stop = int(np.searchsorted(starts, turn.end))
        if ends[stop - 1] > turn.end:
            raise _merged(text, at=turn.end, turn=turn)
        return first, stop
    stop = int(np.searchsorted(starts, turn.stop_start)) + 1
    if starts[stop - 1] != turn.stop_start or not template.is_added[encoding.ids[stop - 1]]:
        raise _merged(text, at=turn.stop_start, turn=turn)
    if options.train_on_eot_newline:
        # A newline that melts into what follows is not the turn's own token.
        while stop < len(starts) and ends[stop] <= turn.newline_end:
            stop += 1
    return first, stop


def _check_prompt_tokens(
    encoding: Encoding, *, first: int, turn: Turn, template: ChatTemplate, text: str
) -> None:
    """The generation prompt alone must give the tokens that stand before the span.

    Control tokens separate text exactly, so only the piece behind the last one needs a look.
    """
    control = np.flatnonzero(template.is_added[encoding.ids[:first]])
    begin = int(control[-1]) if len(control) else 0
    piece = text[int(encoding.starts[begin]) if len(control) else 0 : turn.start]
    if template.encode_short(piece) != tuple(encoding.ids[begin:first].tolist()):
        raise _merged(text, at=turn.start, turn=turn)


def _part_weights(
    encoding: Encoding,
    *,
    first: int,
    stop: int,
    turn: Turn,
    conversation: Conversation,
    options: RenderOptions,
) -> Float32Array:
    """Weight of each token of a turn by the part it begins in; the stop token is content."""
    parts = {"reasoning": options.reasoning_weight, "tool_call": options.tool_call_weight}
    values = np.full(stop - first, options.content_weight, dtype=np.float32)
    if set(parts.values()) == {options.content_weight}:
        return values
    starts = encoding.starts[first:stop]
    for name, ranges in part_ranges(turn, row=conversation.row(turn.index)).items():
        for begin, end in ranges:
            values[(starts >= begin) & (starts < end)] = parts[name]
    return values


def _merged(text: str, *, at: int, turn: Turn) -> Refused:
    return Refused(
        "merged_boundary",
        f"message {turn.index}: a token crosses the border of what is learned, at "
        f"{text[max(at - 20, 0) : at]!r} | {text[at : at + 20]!r}",
        fix="Strip white space at the beginning of the answer",
    )
