"""A local Hugging Face model as a policy: batched generation that keeps the chats' key-value cache.

An episode's prompt grows by one turn per step. The cache of what was already read is kept between
calls and only the new tokens are computed; a prompt that is not a continuation (a windowed one, or
a template that rewrites history) is cut back to the common prefix, so reuse never changes what the
model sees.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_sft.config.checks import model_folder
from verl_sft.config.collect import PolicyConfig
from verl_sft.errors import InputError, UsageError
from verl_sft.policies.base import PolicyRequest
from verl_sft.policies.constraint import CLOSE_TAG, OPEN_TAG, TokenTrie
from verl_sft.types import Completion, Message

if TYPE_CHECKING:
    import torch


def make_hf_policy(config: PolicyConfig) -> HFPolicy:
    """Load the model and tokenizer of `policy.model` on the best device there is.

    Raises:
        UsageError: no model was named, or the path is not a model folder.
        InputError: the model there cannot be loaded.
    """
    if not config.model:
        raise UsageError("no model is named", fix="Set model=HF_DIR (or policy.model=HF_DIR)")
    folder = model_folder("policy.model", config.model)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"cannot load the model: {str(error).splitlines()[0]}",
            where=config.model,
            fix="Name a folder with config.json, weights and a tokenizer",
        ) from error
    if tokenizer.chat_template is None:
        raise InputError(
            "the tokenizer has no chat template",
            where=config.model,
            fix="Evaluate an exported model, which carries the template it was trained with",
        )
    return HFPolicy(model.to(device).eval(), tokenizer, config)


def prompt_of_model(folder: str) -> dict[str, Any]:
    """The prompt template and history style that an exported model was trained with, if it says."""
    path = Path(folder).expanduser() / "verl_sft.json"
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@dataclass(slots=True)
class _Chat:
    """One row of the batch while its answer is being generated."""

    request: PolicyRequest
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    text: str = ""
    trie: TokenTrie | None = None
    done: str = ""  # finish reason


class HFPolicy:
    """Greedy or sampled answers; a pure function of each request up to float rounding."""

    def __init__(self, model: Any, tokenizer: Any, config: PolicyConfig) -> None:
        from verl_sft.policies.kv_cache import KVRows

        self.name = f"hf-{Path(config.model or 'model').name}"
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._limit = int(getattr(model.config, "max_position_embeddings", 1 << 30))
        self._stop = _stop_tokens(model, tokenizer)
        self._cache = KVRows(model)

    def complete(self, requests: Sequence[PolicyRequest]) -> list[Completion]:
        """One completion per request; a prompt too long for the model is an error on its own."""
        import torch

        chats = [_Chat(r, self._prompt_ids(r)) for r in requests]
        fits = [c for c in chats if len(c.prompt) + self._config.max_new_tokens <= self._limit]
        if fits:
            with torch.inference_mode():
                self._generate(fits)
        return [self._completion(chat) for chat in chats]

    def _prompt_ids(self, request: PolicyRequest) -> list[int]:
        tools = request.observation.tools
        ids = self._tokenizer.apply_chat_template(
            [m.to_json() for m in request.messages],
            tools=list(tools) if tools else None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        return [int(i) for i in ids]

    def _generate(self, chats: list[_Chat]) -> None:
        import torch

        cache = self._cache
        kept = cache.select([c.request.episode_id for c in chats], [c.prompt for c in chats])
        generators = [
            torch.Generator().manual_seed(hash_seed(c.request.seed, len(c.request.steps)))
            for c in chats
        ]
        feed = [chat.prompt[count:] for chat, count in zip(chats, kept, strict=True)]
        for _ in range(self._config.max_new_tokens):
            logits = cache.forward(feed)
            feed = []
            for row, (chat, generator) in enumerate(zip(chats, generators, strict=True)):
                feed.append([] if chat.done else self._pick(chat, logits[row], generator))
            if all(chat.done for chat in chats):
                break
        for chat in chats:
            chat.done = chat.done or "length"

    def _pick(self, chat: _Chat, logits: torch.Tensor, generator: torch.Generator) -> list[int]:
        """Choose the next token of one chat; returns what to feed next (nothing when done)."""
        token = self._choose(chat, logits, generator)
        if token in self._stop and chat.trie is None:
            chat.done = "stop"
            return []
        chat.output.append(token)
        chat.text = self._tokenizer.decode(chat.output)
        if chat.trie is not None and not chat.trie.allowed:
            chat.done = "stop"
            return []
        return [token]

    def _choose(self, chat: _Chat, logits: torch.Tensor, generator: torch.Generator) -> int:
        if chat.trie is None:
            token = self._sample(logits, generator)
            opened = self._opened(chat, token)
            if not opened:
                return token
            chat.trie = self._action_trie(chat, opened)
        allowed = chat.trie.allowed
        token = allowed[self._sample(logits[allowed], generator)]
        chat.trie = chat.trie.advance(token)
        return token

    def _opened(self, chat: _Chat, token: int) -> str:
        """The text up to `<action>` if `token` would go beyond the tag or complete it, else "".

        A token may hold the end of the tag and the first letters of the action (">go"): it is
        chosen anew among the tokens of the admissible actions.
        """
        admissible = chat.request.observation.admissible_actions
        if self._config.constrain != "admissible" or not admissible or token in self._stop:
            return ""
        text = self._tokenizer.decode([*chat.output, token])
        at = text.find(OPEN_TAG)
        return text[: at + len(OPEN_TAG)] if at >= 0 else ""

    def _sample(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        import torch

        if self._config.temperature == 0:
            return int(logits.argmax())
        chances = torch.softmax(logits.float().cpu() / self._config.temperature, dim=-1)
        if self._config.top_p < 1:
            ordered, order = chances.sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered > self._config.top_p
            chances = torch.zeros_like(chances).scatter(0, order, ordered.masked_fill(beyond, 0))
        return int(torch.multinomial(chances, 1, generator=generator))

    def _action_trie(self, chat: _Chat, opened: str) -> TokenTrie:
        """The tokens of every admissible action behind `opened`, as they continue the output."""
        tails = []
        for action in chat.request.observation.admissible_actions:
            whole = self._encode(opened + action + CLOSE_TAG)
            if whole[: len(chat.output)] == chat.output:
                tails.append(whole[len(chat.output) :])
            else:  # the model spelled its text in other tokens: spell the rest on its own
                rest = opened[len(self._tokenizer.decode(chat.output)) :]
                tails.append(self._encode(rest + action + CLOSE_TAG))
        return TokenTrie.of(tails)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _completion(self, chat: _Chat) -> Completion:
        if not chat.done:
            return Completion(
                error=f"the prompt has {len(chat.prompt)} tokens; with policy.max_new_tokens="
                f"{self._config.max_new_tokens} that is more than the model's {self._limit}"
            )
        return Completion(
            Message("assistant", chat.text),
            finish_reason=chat.done,
            prompt_tokens=len(chat.prompt),
            completion_tokens=len(chat.output),
        )


def hash_seed(seed: int, step: int) -> int:
    """A generator seed for one step of one episode."""
    return (seed * 1_000_003 + step) % 2**63


def _stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    stop = model.generation_config.eos_token_id
    tokens = set(stop if isinstance(stop, list) else [stop])
    tokens.add(tokenizer.eos_token_id)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eot_id|>", "<end_of_turn>"])
    known = [i for i in ends if i is not None and i != tokenizer.unk_token_id]
    return {int(t) for t in (*tokens, *known) if t is not None}
