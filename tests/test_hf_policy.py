"""The local model policy: cached generation equals plain generation, constraint, seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.household_world import Household
from verl_sft.collect.rollout import RolloutSettings, plan_episodes, play
from verl_sft.config.collect import (
    CollectConfig,
    PolicyConfig,
    PromptConfig,
    RolloutConfig,
)
from verl_sft.model.tiny import random_model, train_tokenizer
from verl_sft.policies.base import PolicyRequest
from verl_sft.policies.constraint import TokenTrie
from verl_sft.policies.expert import make_expert
from verl_sft.policies.hf_local import HFPolicy
from verl_sft.types import Completion, Episode


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    """A random model with sharp preferences and a tokenizer that knows the household's words."""
    config = CollectConfig()
    texts = [
        str(m.content)
        for e in play(plan_episodes(Household(), config), make_env=Household,
                      policy=make_expert(config.policy),
                      settings=RolloutSettings.from_config(config))
        for s in e.steps for m in (*s.prompt, s.response)
    ]  # fmt: skip
    tokenizer = train_tokenizer(iter(texts), vocab_size=500)
    model = random_model("nano", vocab_size=len(tokenizer), max_positions=4096, seed=3,
                         tokenizer=tokenizer)  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)  # far from ties, so rounding changes no choice
    return model.eval(), tokenizer


def plain(model: Any, tokenizer: Any, request: PolicyRequest, tokens: int) -> str:
    """The reference: no cache, no batch, the whole prompt anew for every token."""
    chat = [m.to_json() for m in request.messages]
    ids = list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    start = len(ids)
    for _ in range(tokens):
        with torch.inference_mode():
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return str(tokenizer.decode(ids[start:]))


@pytest.mark.parametrize("history", ["dialogue", "windowed"])
def test_cached_generation_equals_plain_generation(parts: tuple[Any, Any], history: str) -> None:
    """Over several rounds with episodes of different lengths, ending and joining."""
    model, tokenizer = parts
    policy = HFPolicy(model, tokenizer, PolicyConfig(name="hf", model="m", max_new_tokens=6))
    compared = 0

    class Checked:
        name = "checked"

        def complete(self, requests: list[PolicyRequest]) -> list[Completion]:
            nonlocal compared
            completions = policy.complete(requests)
            for request, completion in zip(requests, completions, strict=True):
                assert completion.message is not None
                assert completion.message.content == plain(model, tokenizer, request, 6)
                compared += 1
            # The expert moves the game on, so that prompts differ in length and content.
            moves = make_expert(PolicyConfig()).complete(requests)
            return [m if i % 2 else c for i, (m, c) in enumerate(zip(moves, completions,
                                                                     strict=True))]  # fmt: skip

    config = CollectConfig(
        policy=PolicyConfig(name="hf", batch_size=3),
        prompt=PromptConfig(history=history),
        rollout=RolloutConfig(max_steps=6),
    )
    settings = RolloutSettings.from_config(config)
    episodes = list(play(plan_episodes(Household(), config), make_env=Household,
                         policy=Checked(), settings=settings))  # fmt: skip
    assert len(episodes) == 6 and compared > 20


def test_constrained_actions_are_admissible_once_the_tag_is_open(parts: tuple[Any, Any]) -> None:
    """From `<action>` on only admissible actions can be spelled, also by a token that goes on."""
    model, tokenizer = parts
    env = Household()
    seen = env.reset("train/pick-0", seed=0)
    policy = HFPolicy(model, tokenizer,
                      PolicyConfig(name="hf", model="m", constrain="admissible"))  # fmt: skip
    from verl_sft.policies.hf_local import _Chat
    from verl_sft.prompts.alfworld import DEFAULT

    request = PolicyRequest("e", 0, (), seen, (), DEFAULT)
    chat = _Chat(request, [1])
    # The model is about to complete the tag with a token that goes on to an action of its own.
    wanted = policy._encode("<think>x</think>\n<action>go to nowhere")
    size = next(n for n in range(len(wanted)) if "<action>" in tokenizer.decode(wanted[:n]))
    chat.output = wanted[: size - 1]
    logits = torch.zeros(len(tokenizer))
    logits[wanted[size - 1]] = 1
    chance = torch.Generator().manual_seed(0)
    policy._pick(chat, logits, chance)
    while not chat.done:
        policy._pick(chat, torch.randn(len(tokenizer), generator=chance), chance)
    parsed = DEFAULT.parse(chat.text, seen.admissible_actions)
    assert parsed.valid, chat.text


def test_trie_spells_exactly_its_sequences() -> None:
    """Every path from the root to a leaf is one of the sequences, and all are there."""
    sequences = [[1, 2, 3], [1, 2, 4], [5]]

    def paths(node: TokenTrie, before: list[int]) -> list[list[int]]:
        if not node.allowed:
            return [before]
        return [p for t in node.allowed for p in paths(node.advance(t), [*before, t])]

    assert sorted(paths(TokenTrie.of(sequences), [])) == sequences


def sampled(parts: tuple[Any, Any], batch_size: int, seed: int) -> dict[str, Episode]:
    config = CollectConfig(
        policy=PolicyConfig(name="hf", batch_size=batch_size),
        rollout=RolloutConfig(max_steps=2, seed=seed),
    )
    policy = HFPolicy(*parts, PolicyConfig(name="hf", model="m", temperature=5.0,
                                           max_new_tokens=5))  # fmt: skip
    return {
        e.task_id: e
        for e in play(plan_episodes(Household(), config), make_env=Household, policy=policy,
                      settings=RolloutSettings.from_config(config))
    }  # fmt: skip


def test_sampling_depends_on_the_episode_not_on_the_batch(parts: tuple[Any, Any]) -> None:
    """Same seed, same answers, alone or side by side; another seed, other answers."""
    alone, together = sampled(parts, 1, seed=0), sampled(parts, 6, seed=0)
    assert alone == together
    other = sampled(parts, 6, seed=1)
    assert any(other[t].steps != together[t].steps for t in together)


def test_a_prompt_that_is_too_long_fails_alone(parts: tuple[Any, Any]) -> None:
    """The model's limit is an error of that episode, with the numbers."""
    from verl_sft.prompts.alfworld import DEFAULT
    from verl_sft.types import Message

    policy = HFPolicy(*parts, PolicyConfig(name="hf", model="m", max_new_tokens=4))
    seen = Household().reset("train/pick-0", seed=0)
    short, long = Message("user", "hi"), Message("user", "apple " * 5000)
    answers = policy.complete([
        PolicyRequest("a", 0, (long,), seen, (), DEFAULT),
        PolicyRequest("b", 0, (short,), seen, (), DEFAULT),
    ])  # fmt: skip
    assert "4096" in answers[0].error and not answers[1].error
