"""Token sequences shaped like ALFWorld dialogues, and models that need no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from verl_sft.data.sample import TokenizedSample, make_sample

# Tokens: the first message, each observation, each answer; turns per episode.
PROMPT, OBSERVATION, ANSWER = (180, 320), (20, 90), (20, 55)
MEDIAN_TURNS, SPREAD, MOST_TURNS = 9.0, 0.6, 50

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "toy": (64, 176, 2, 4, 2, 512, True),
    "cpu": (256, 704, 4, 8, 8, 32_000, True),
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False),
}


def dialogues(
    count: int, *, seed: int, vocabulary: int, longest: int, shortest: int = 0
) -> list[TokenizedSample]:
    """Samples of one prompt and several turns, about a third of their tokens learned.

    A learned token follows from the one before it, so that losses fall.
    """
    rng = np.random.default_rng(seed)
    samples = []
    while len(samples) < count:
        turns = int(np.clip(rng.lognormal(np.log(MEDIAN_TURNS), SPREAD), 2, MOST_TURNS))
        ids = [rng.integers(3, vocabulary, rng.integers(*PROMPT))]
        weights = [np.zeros(len(ids[0]))]
        for turn in range(turns):
            if turn:
                ids.append(rng.integers(3, vocabulary, rng.integers(*OBSERVATION)))
                weights.append(np.zeros(len(ids[-1])))
            size = int(rng.integers(*ANSWER))
            ids.append((rng.integers(3, vocabulary) + 7 * np.arange(size)) % (vocabulary - 3) + 3)
            weights.append(np.ones(size))
        tokens = np.concatenate(ids)[: longest + 1]
        if len(tokens) <= shortest:
            continue
        kept = np.concatenate(weights)[: len(tokens)]
        samples.append(make_sample(tokens, weights=kept, record_id=str(len(samples))))
    return samples


def learned_fraction(samples: list[TokenizedSample]) -> float:
    """Learned tokens over all tokens."""
    return sum(s.num_learned for s in samples) / sum(map(len, samples))


def model_config(name: str, *, positions: int = 4096) -> Any:
    """A Qwen2 configuration of one of `SHAPES`."""
    from transformers import Qwen2Config

    hidden, intermediate, layers, heads, shared, vocabulary, tied = SHAPES[name]
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        use_cache=False,
    )


def write_model(folder: Path, *, shape: str, seed: int = 0) -> Path:
    """A folder with random weights that every contender loads."""
    import torch
    from transformers import Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    Qwen2ForCausalLM(model_config(shape)).save_pretrained(folder)
    pad_tokenizer().save_pretrained(folder)
    return folder


def pad_tokenizer() -> Any:
    """What trainers ask of a tokenizer when the data are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", chat_template="unused"
    )


class MemoryStore:
    """Samples in memory with the interface of the token cache."""

    groups: tuple[str, ...] = ()

    def __init__(self, samples: list[TokenizedSample]) -> None:
        self.samples = samples
        self.lengths = np.array([len(s) for s in samples], dtype=np.int64)

    def units(self) -> np.ndarray[Any, Any]:
        """Every sample is a unit of its own."""
        return np.arange(len(self.samples))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> TokenizedSample:
        return self.samples[index]
