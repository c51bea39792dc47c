"""Tokenising and masking: rate against verl's and TRL's ways, and cold and warm starts.

Goals: three times the rate of masking message by message, at least the rate of TRL's preparation,
on 20-message conversations and one core; a warm start of 100k rows within 5 s.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import row
from tests.chat_templates import byte_level_bpe, read_template, template_for
from verl_sft.config.train import DataConfig, MultiturnConfig
from verl_sft.data.load import load_samples
from verl_sft.data.render import render
from verl_sft.data.template import ChatTemplate
from verl_sft.records.io import write_parquet
from verl_sft.records.read import read_records
from verl_sft.records.schema import SFTRecord
from verl_sft.types import Message

ROUNDS, CHATS = 3, 100
_NOUNS = ("shelf", "drawer", "fridge", "cabinet", "plate", "cup", "apple", "knife", "the", "you")


def main() -> None:
    """Rates first, then whole starts."""
    rates("random text", [conversation(random.Random(n), turns=10) for n in range(ROUNDS * CHATS)])
    rates("ALFWorld", sample_chats(ROUNDS * CHATS))
    starts()


def rates(name: str, chats: list[list[Message]]) -> None:
    """Every way to ids and masks over the same chats, in turns: all of them meet the same noise."""
    import torch  # here, so that those who import this module do not pay for it

    from benchmarks.mask_peers import (
        trl_prepare,
        verl_lengths,
        verl_messages,
        verl_prefixes,
        verl_texts,
    )

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    template = make_template("qwen2_5", chats)
    tokenizer = transformers_tokenizer(template)
    marked = transformers_tokenizer(make_template("qwen2_5_training", chats))
    lengths = verl_lengths(tokenizer)
    rows = [[m.to_json() for m in chat] for chat in chats]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in rows]
    backend = tokenizer.backend_tokenizer
    masks = {
        "ours": lambda n: render(chats[n], template=template),
        "verl, prefixes": lambda n: verl_prefixes(tokenizer, rows[n]),
        "verl, added texts": lambda n: verl_texts(tokenizer, rows[n]),
        "verl, message by message": lambda n: verl_messages(tokenizer, rows[n], lengths=lengths),
        "plain tokenising": lambda n: backend.encode(texts[n], add_special_tokens=False).ids,
    }
    spent = dict.fromkeys(masks, 0.0)
    for run in masks.values():  # imports and first calls are not counted
        run(0)
    try:
        trl_prepare(marked, rows[:1])
        spent["TRL"] = 0.0
    except ImportError:
        pass
    for begin in range(0, len(chats), CHATS):
        for key, run in masks.items():
            started = time.process_time()
            for number in range(begin, begin + CHATS):
                run(number)
            spent[key] += time.process_time() - started
        if "TRL" in spent:
            started = time.process_time()
            trl_prepare(marked, rows[begin : begin + CHATS])
            spent["TRL"] += time.process_time() - started
    tokens = sum(len(v.token_ids) for c in chats[:20] for v in render(c, template=template)) / 20
    ours = spent.pop("ours")
    note = f"20 messages, {tokens:.0f} tokens, {1e3 * ours / len(chats):.1f} ms, one core"
    row(f"masks, {name}", f"{len(chats) / ours:.0f} chats/s", note)
    for key, theirs in spent.items():
        note = f"ours is {theirs / ours:.1f} times as fast"
        row(f"masks, {name}: {key}", f"{len(chats) / theirs:.0f} chats/s", note)


def sample_chats(count: int) -> list[list[Message]]:
    """Chats of 20 messages out of the steps in `data/sample`: real texts, which repeat."""
    steps = [r.messages for r in read_records(Path("data/sample/train.parquet"))]
    rng = random.Random(0)
    return [[m for step in rng.choices(steps, k=10) for m in step[-2:]] for _ in range(count)]


def make_template(name: str, chats: list[list[Message]] | None = None) -> ChatTemplate:
    """A template of the trl wheel over a tokenizer that, like real ones, has whole words."""
    chats = chats or [conversation(random.Random(n), turns=10) for n in range(30)]
    texts = tuple(str(m.content) for chat in chats[:30] for m in chat)
    return template_for(read_template(f"{name}.jinja"), name=name, base=byte_level_bpe(texts, 3000))


def starts() -> None:
    """Cold and warm loading of step rows, the costliest form: each row repeats its history."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.parquet"
        write_parquet(path, step_rows(episodes=667, steps=15))
        for name in ("qwen2_5", "qwen3"):
            template = make_template(name)
            config = DataConfig(multiturn=MultiturnConfig(enable=True), max_length=65536)

            def load(spec: Any = template.spec, config: DataConfig = config) -> float:
                started = time.perf_counter()
                load_samples(
                    [path], tokenizer=spec, config=config, cache_dir=Path(folder), num_workers=1
                )
                return time.perf_counter() - started

            cold, warm = load(), load()
            note = "10,005 step rows of 15-step episodes with thoughts, one process"
            row(f"cold start, {name}", f"{cold:.1f} s", note)
            row(f"warm start, {name}", f"{warm:.2f} s", f"file of {path.stat().st_size >> 20} MiB")


def step_rows(*, episodes: int, steps: int) -> list[SFTRecord]:
    """Step rows as the collector writes them."""
    rows = []
    for episode in range(episodes):
        chat = conversation(random.Random(episode), turns=steps)
        for step in range(steps):
            messages = tuple(chat[: 2 * step + 2])
            rows.append(
                SFTRecord(
                    messages=messages,
                    record_id=f"{episode}-{step}",
                    episode_id=str(episode),
                    step=step,
                    supervise=(2 * step + 1,),
                )
            )
    return rows


def conversation(rng: random.Random, *, turns: int) -> list[Message]:
    """A chat like an agent's: an observation with a list of actions, a thought and an action."""

    def words(count: int) -> str:
        return " ".join(f"{w} {rng.randrange(20)}" for w in rng.choices(_NOUNS, k=count))

    chat = []
    for _ in range(turns):
        chat.append(Message("user", f"You see {words(25)}.\nYour admissible actions: {words(25)}."))
        answer = f"<think>I need {words(8)}.</think>\n<action>go to {words(2)}</action>"
        chat.append(Message("assistant", answer))
    return chat


def transformers_tokenizer(template: ChatTemplate) -> Any:
    """The same tokenizer as transformers loads it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    spec = template.spec
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(spec.backend_json),
        chat_template=spec.chat_template,
        **{k: spec.special_tokens[k] for k in ("bos_token", "eos_token", "pad_token")},
    )


if __name__ == "__main__":
    main()
