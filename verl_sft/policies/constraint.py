"""Generation that may only spell one of the admissible actions: a trie over their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

OPEN_TAG, CLOSE_TAG = "<action>", "</action>"


@dataclass(slots=True)
class TokenTrie:
    """The next tokens allowed after each prefix of a set of token sequences.

    >>> trie = TokenTrie.of([[1, 2], [1, 3]])
    >>> trie.allowed, trie.advance(1).allowed
    ([1], [2, 3])
    """

    children: dict[int, TokenTrie] = field(default_factory=dict)

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> TokenTrie:
        """The trie of `sequences`."""
        root = cls()
        for sequence in sequences:
            node = root
            for token in sequence:
                node = node.children.setdefault(token, cls())
        return root

    @property
    def allowed(self) -> list[int]:
        """Tokens that may come next; none at the end of a sequence."""
        return list(self.children)

    def advance(self, token: int) -> TokenTrie:
        """The node behind `token`."""
        return self.children[token]
