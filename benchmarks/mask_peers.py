"""Public ways to ids and masks of a chat, rebuilt step by step from what their sources do.

Each takes a transformers tokenizer and a chat as dicts, and gives tensors of ids and of the mask.
Padding, reading of files and messages for the log are left out.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

Chat = list[dict[str, Any]]
Masked = tuple[torch.Tensor, torch.Tensor]


def verl_prefixes(tokenizer: Any, chat: Chat) -> Masked:
    """The first form of verl's `MultiTurnSFTDataset` (as in 034cb42).

    The whole chat is tokenised, then for each message the chat up to it and the chat with it; the
    two lengths say where it stands.
    """

    def tokens(rows: Chat) -> torch.Tensor:
        found = tokenizer.apply_chat_template(rows, return_dict=False, return_tensors="pt")
        return found[0]  # type: ignore[no-any-return]

    ids = tokens(chat)
    mask = torch.zeros_like(ids)
    for index, message in enumerate(chat):
        end = len(tokens(chat[: index + 1]))
        start = len(tokens(chat[:index])) if index else 0
        if message["role"] == "assistant":
            mask[start:end] = 1
    return ids, mask


def verl_texts(tokenizer: Any, chat: Chat) -> Masked:
    """The second form of verl, with `_process_message_tokens`.

    For each message the chat is rendered up to it, with it, and for an answer with the prompt;
    what each adds is tokenised on its own. The joined ids are compared with those of the whole.
    """
    whole = tokenizer.apply_chat_template(
        chat, return_dict=False, return_tensors="pt", enable_thinking=None
    )

    def text(rows: Chat, *, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            rows, tokenize=False, add_generation_prompt=prompt, enable_thinking=None
        )

    ids: list[int] = []
    mask: list[int] = []
    attention: list[int] = []
    for index, message in enumerate(chat):
        learned = message["role"] == "assistant"
        before = text(chat[:index]) if index else ""
        prompt = text(chat[:index], prompt=True) if index and learned else before
        current = text(chat[: index + 1])
        header = (
            tokenizer.encode(prompt[len(before) :], add_special_tokens=False) if learned else []
        )
        body = tokenizer.encode(current[len(prompt) :], add_special_tokens=False)
        ids += header + body
        mask += [0] * len(header) + [int(learned)] * len(body)
        attention += [1] * (len(header) + len(body))
    expected = whole[0].tolist()
    assert len(ids) == len(expected)
    assert all(a == b for a, b in zip(ids, expected, strict=True))
    _, found = torch.tensor(attention), torch.tensor(mask)
    return whole[0], found


def verl_messages(tokenizer: Any, chat: Chat, *, lengths: tuple[int, int]) -> Masked:
    """The present form of verl, with `_process_single_message` and `sanity_check` (c33321b).

    Each message is rendered and tokenised alone; a system prompt that the template adds is cut off,
    an answer's header is masked. The joined ids must be those of the whole chat.

    Args:
        tokenizer: of transformers.
        chat: the messages.
        lengths: from `verl_lengths`, found once for a data set.
    """
    system, prompt = lengths
    parts = []
    for index, message in enumerate(chat):
        found = dict(
            tokenizer.apply_chat_template(
                [message], tools=None, tokenize=True, return_dict=True, return_tensors="pt"
            )
        )
        ids, attention = found["input_ids"][0], found["attention_mask"][0]
        if index and message["role"] != "system":
            ids, attention = ids[system:], attention[system:]
        if message["role"] == "assistant":
            mask = torch.ones_like(attention)
            mask[:prompt] = 0
        else:
            mask = torch.zeros_like(attention)
        parts.append((ids, mask, attention))
    joined, learned, _ = (torch.cat(part) for part in zip(*parts, strict=True))
    whole = tokenizer.apply_chat_template(
        chat, tools=None, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(joined, whole["input_ids"].squeeze(0))
    return joined, learned


def verl_lengths(tokenizer: Any) -> tuple[int, int]:
    """Tokens of the system prompt that a template adds, and of its generation prompt."""
    user = {"role": "user", "content": ""}
    one, two = (len(_ids(tokenizer, [user] * count)) for count in (1, 2))
    return one - (two - one), len(_ids(tokenizer, [user], add_generation_prompt=True)) - one


def _ids(tokenizer: Any, chat: Chat, **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(chat, return_dict=False, **options)  # type: ignore[no-any-return]


def trl_prepare(tokenizer: Any, chats: list[Chat]) -> Any:
    """TRL's own preparation of a data set with assistant_only_loss; its import may fail."""
    import datasets
    import trl

    datasets.disable_progress_bars()
    given = trl.SFTConfig(
        assistant_only_loss=True, max_length=None, bf16=False, use_cpu=True, output_dir="unused"
    )
    holder = SimpleNamespace(chat_template=tokenizer.chat_template, completion_only_loss=False)
    data = datasets.Dataset.from_list([{"messages": chat} for chat in chats])
    return trl.SFTTrainer._prepare_dataset(holder, data, tokenizer, given, False, None, "train")
