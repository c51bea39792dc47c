"""Token ids back to text: token by token, and the learned spans of a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from verl_sft.data.sample import Int32Array, TokenizedSample
from verl_sft.data.template import TokenizerSpec

_BROKEN = "\ufffd"  # what an incomplete character decodes to
_MOST_PIECES = 8  # tokens that one character may be cut into
_SHOWN_CHARS = 160


class Speller:
    """Decodes with the tokenizer itself, control tokens included."""

    def __init__(self, spec: TokenizerSpec) -> None:
        backend = json.loads(spec.backend_json)
        backend.update(truncation=None, padding=None)
        self._tokenizer = Tokenizer.from_str(json.dumps(backend))

    def text(self, ids: Sequence[int] | Int32Array) -> str:
        """The text of tokens that stand behind one another."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text per token; a character of several tokens belongs to the first of them.

        Each is decoded behind the token before it: many decoders treat the first one differently.
        """
        found: list[str] = []
        before: list[int] = []
        at = 0
        while at < len(ids):
            size = 1
            whole, head = "", self.text(before)
            while True:
                group = [int(i) for i in ids[at : at + size]]
                whole = self.text([*before, *group])
                complete = not whole.endswith(_BROKEN) or size >= _MOST_PIECES
                if complete or at + size >= len(ids):
                    break
                size += 1
            found += [whole.removeprefix(head)] + [""] * (len(group) - 1)
            before = group
            at += size
        return found

    def learned_text(self, sample: TokenizedSample) -> str:
        """What the model must produce: the text of the learned spans, one behind the other."""
        return "".join(self.text(sample.target_ids[a:b]) for a, b in sample.spans)

    def compressed(self, sample: TokenizedSample) -> Iterator[str]:
        """One line per learned span: `[-100 x 195] It is 4.<|im_end|>`, context as its length."""
        at = 0
        for start, stop in sample.spans:
            text = json.dumps(self.text(sample.target_ids[start:stop]), ensure_ascii=True)[1:-1]
            if len(text) > _SHOWN_CHARS:
                text = f"{text[: _SHOWN_CHARS - 40]} ... {text[-40:]}"
            weights = np.unique(sample.weights[start:stop])
            shown = "" if weights.tolist() == [1.0] else f" weights {weights.tolist()}"
            # The first token is read, never said: it counts as context.
            yield f"[-100 x {start - at + (at == 0)}] {text}{shown}"
            at = stop
        if at < len(sample):
            yield f"[-100 x {len(sample) - at}]"
