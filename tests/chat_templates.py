"""The chat templates of the installed `trl` wheel and a small tokenizer that knows their tokens."""

from __future__ import annotations

import re
from datetime import date
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from verl_sft.data.template import ChatTemplate, TokenizerSpec

# Tags that models keep as added but not special tokens: they are theirs to write.
_PLAIN_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
               "</tool_response>")  # fmt: skip
_SPECIAL = re.compile(
    r"<[|\uff5c][^<>{}'\" ]{1,40}[|\uff5c]>|\[/?[A-Z_]+\]|</?s>|<bos>|<eos>"
    r"|<(?:start|end)_of_\w+>|<sop>"
    r"|<\|\"\|>|\[gMASK\]|<turn\|>|<\|turn>|<\|\w+>|<\w+\|>"
)
_TEXT = (
    "the quick brown fox is in kitchen 1 and you see a fridge. take the plate, please! go to\n\n"
    'def f(x):\n    return {"name": "get_weather", "arguments": {"city": "Paris"}}\n system user '
    "assistant tool <tag>\n</tag>\n<end>"
)


def template_names() -> list[str]:
    """File names of all templates in the wheel, without importing it."""
    return sorted(p.name for p in _folder().glob("*.jinja"))


@cache
def read_template(name: str) -> str:
    return (_folder() / name).read_text(encoding="utf-8")


@cache
def _folder() -> Path:
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "chat_templates"


@cache
def byte_level_bpe(texts: tuple[str, ...] = (_TEXT,) * 4, size: int = 400) -> str:
    """JSON of a byte-level BPE with a Qwen-like split, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    split = Regex(
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def template_for(
    text: str, *, name: str = "test", eos: str | None = None, base: str | None = None
) -> ChatTemplate:
    """A chat template over a small tokenizer, with every control token that it spells."""
    found = sorted(set(_SPECIAL.findall(text)) - set(_PLAIN_TAGS))
    eos = eos or next(
        (
            t
            for t in (
                "<|im_end|>",
                "<|eot_id|>",
                "<|return|>",
                "<\uff5cend\u2581of\u2581sentence\uff5c>",
            )
            if t in found
        ),
        "<|endoftext|>",
    )
    bos = next((t for t in ("<|begin_of_text|>", "<bos>") if t in found), "<|bos|>")
    tokenizer = Tokenizer.from_str(base or byte_level_bpe())
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in dict.fromkeys([bos, eos, *found])]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in _PLAIN_TAGS if t in text])
    special = {"bos_token": bos, "eos_token": eos, "pad_token": eos, "unk_token": "<unk>"}
    today = date.today().isoformat()  # what transformers' renderer shows
    return ChatTemplate(TokenizerSpec(tokenizer.to_str(), text, name, special, today))
