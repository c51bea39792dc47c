"""Messages -> token ids and weights: exact, or refused with a reason.

The training text is the chat template's output for a whole conversation. Where the template
rewrites history (drops old thoughts), the conversation becomes several views: each is what
inference would see when it comes to the turns learned in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite

from verl_sft.data.messages import Refused, prepare
from verl_sft.data.template import ChatTemplate, TemplateFailure
from verl_sft.data.truncate import cut, window_start
from verl_sft.data.turns import Conversation, Turn
from verl_sft.data.view import RenderOptions, View, make_view
from verl_sft.types import JSON, Message


def render(
    messages: Sequence[Message],
    *,
    template: ChatTemplate,
    tools: Sequence[JSON] | None = None,
    supervise: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    options: RenderOptions | None = None,
) -> list[View]:
    r"""Render a conversation into as few views as its template allows.

    Args:
        messages: the whole conversation.
        template: chat template and tokenizer.
        tools: OpenAI tool schemas.
        supervise: indices of the learned assistant messages; None: all.
        weights: one for each of these; None: 1. A message of weight 0 is context.
        options: see `RenderOptions`.

    Raises:
        Refused: exact masks cannot be proven, or nothing is left to learn; says why.

    Example (ChatML; learned text in brackets):
        <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[4<|im_end|>\n]
    """
    options = options or RenderOptions()
    learned = _learned_turns(messages, supervise=supervise, weights=weights, options=options)
    try:
        rows, escaped = prepare(
            messages, template=template, control_text=options.special_tokens_in_content
        )
        conversation = Conversation(
            rows=rows,
            tools=tools,
            template=template,
            template_kwargs=options.template_kwargs,
            history_thinking=options.history_thinking,
            needs_thoughts=options.reasoning_weight != 0,
        )
        views = _views(conversation, learned=learned, options=options)
    except TemplateFailure as error:  # already when it was asked what contents it takes
        raise Refused("template_error", f"the chat template fails: {error}") from error
    except UnicodeError as error:
        raise Refused("bad_unicode", f"the text cannot be encoded as UTF-8: {error}") from error
    return [replace(view, escaped=escaped) for view in views]


def _learned_turns(
    messages: Sequence[Message],
    *,
    supervise: Sequence[int] | None,
    weights: Sequence[float] | None,
    options: RenderOptions,
) -> dict[int, float]:
    """Message index -> weight, without those of weight 0."""
    if supervise is None:
        if options.turn_view == "indices":
            raise Refused("no_indices", "the row does not say which messages are learned")
        supervise = [i for i, m in enumerate(messages) if m.role == "assistant"]
    for index in supervise:
        if not 0 <= index < len(messages) or messages[index].role != "assistant":
            raise Refused("bad_supervise", f"message {index} is not an assistant message")
    values = [1.0] * len(supervise) if weights is None else list(weights)
    if len(values) != len(supervise):
        raise Refused("bad_weights", f"{len(values)} weights for {len(supervise)} messages")
    if not all(map(isfinite, values)):
        raise Refused("bad_weights", "a weight is not a finite number")
    turns = {i: w for i, w in sorted(zip(supervise, values, strict=True)) if w != 0}
    if not turns:
        raise Refused("nothing_to_learn", "no assistant message has a weight other than 0")
    if options.turn_view == "last":
        last = max(turns)
        return {last: turns[last]}
    return turns


def _views(
    conversation: Conversation, *, learned: Mapping[int, float], options: RenderOptions
) -> list[View]:
    """From the last turn backwards: each view learns every turn that it shows unchanged."""
    remaining = sorted(learned)
    views: list[View] = []
    while remaining:
        view = _view_of_last(conversation, remaining, learned=learned, options=options)
        if options.turn_view == "single_pass" and len(view.turns) < len(remaining):
            broken = max(set(remaining) - set(view.turns))
            raise Refused(
                "history_rewritten",
                f"the chat template prints message {broken} differently once others follow",
                fix="Set data.turn_view=auto",
            )
        if options.max_length is not None and len(view.token_ids) > options.max_length:
            if options.truncation == "oldest_turns":
                start = window_start(conversation, last=remaining[-1], options=options)
                view = _view_of_last(
                    conversation.window(start),
                    [i for i in remaining if i >= start],
                    learned=learned,
                    options=options,
                )
                view = replace(view, truncated=True)
            else:
                view = cut(view, conversation=conversation, options=options)
        if not view.weights[1:].any():
            raise Refused("zero_learned", "no learned token is left")
        views.append(view)
        remaining = [i for i in remaining if i not in view.turns]
    return views[::-1]


def _view_of_last(
    conversation: Conversation,
    remaining: Sequence[int],
    *,
    learned: Mapping[int, float],
    options: RenderOptions,
) -> View:
    last = conversation.turn(remaining[-1])
    turns = [last]
    if options.turn_view != "per_turn":
        earlier = [conversation.turn(i) for i in remaining[:-1]]
        turns = [t for t in earlier if last.text.startswith(t.text[: t.end])] + turns
    context = _unlearned(conversation, turns=turns) if options.prompt_weight else []
    return make_view(conversation, turns=turns, weights=learned, options=options, context=context)


def _unlearned(conversation: Conversation, *, turns: Sequence[Turn]) -> list[Turn]:
    """The assistant turns of a view that it does not learn."""
    last = turns[-1]
    learned = {turn.index for turn in turns}
    found = [
        conversation.turn(index)
        for index, row in enumerate(conversation.rows[: last.index])
        if row["role"] == "assistant" and index not in learned
    ]
    for turn in found:
        if not last.text.startswith(turn.text[: turn.end]):
            raise Refused(
                "history_rewritten",
                f"the chat template prints message {turn.index} differently once others follow",
                fix="Set data.prompt_weight=0",
            )
    return found
