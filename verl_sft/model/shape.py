"""The dimensions of a decoder, read from its config.json: parameters and work without weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from verl_sft.errors import UsageError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What parameters, memory and work depend on.

    Attributes:
        hidden: width of the residual stream.
        layers: decoder layers.
        intermediate: width of one MLP (of one expert, where there are experts).
        heads: of the queries.
        query: heads * head dimension of the queries.
        key_value: the same of keys, and of values.
        vocab: rows of the embedding.
        tied: whether the head is the embedding.
        attention_bias: of the query, key and value projections.
        head_norm: whether queries and keys are normalised, over this many numbers each (else 0).
        experts: MLPs of a layer; 1 where there is no router.
        active_experts: of them, those that a token runs through.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int
    query: int
    key_value: int
    vocab: int
    tied: bool = False
    attention_bias: bool = False
    head_norm: int = 0
    experts: int = 1
    active_experts: int = 1

    def linears(self) -> dict[str, tuple[int, int, int]]:
        """Of each matrix of a layer, by the name that adapters use: inputs, outputs, copies."""
        hidden, wide, copies = self.hidden, self.intermediate, self.experts
        return {
            "q_proj": (hidden, self.query, 1),
            "k_proj": (hidden, self.key_value, 1),
            "v_proj": (hidden, self.key_value, 1),
            "o_proj": (self.query, hidden, 1),
            "gate_proj": (hidden, wide, copies),
            "up_proj": (hidden, wide, copies),
            "down_proj": (wide, hidden, copies),
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        count = sum(rows * columns * copies for rows, columns, copies in self.linears().values())
        count += 2 * self.hidden + 2 * self.head_norm
        count += self.attention_bias * (self.query + 2 * self.key_value)
        return count + (self.hidden * self.experts if self.experts > 1 else 0)

    @property
    def root_parameters(self) -> int:
        """Parameters outside the layers: embedding, last norm, and the head if it is its own."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layers * self.layer_parameters + self.root_parameters

    def lora_parameters(
        self, *, rank: int, targets: str | Collection[str], dora: bool = False
    ) -> int:
        """Parameters of adapters of `rank` on `targets` (`all-linear`, or names)."""
        return self.layers * sum(
            (rank * (rows + columns) + dora * columns) * copies
            for name, (rows, columns, copies) in self.linears().items()
            if targets == "all-linear" or (not isinstance(targets, str) and name in targets)
        )

    def quadratic_cost(self, *, learned_share: float = 1.0) -> float:
        """Work of one attended token pair over the work of one token in all matrices.

        Args:
            learned_share: of the tokens; the others do not reach the head.
        """
        share = self.active_experts / self.experts
        matrices = sum(
            rows * columns * (share * copies if copies > 1 else 1)
            for rows, columns, copies in self.linears().values()
        )
        head = self.vocab * self.hidden * learned_share / self.layers
        # Causal: a document of L tokens has L * L / 2 pairs, each a product in QK and one in AV.
        return self.query / (matrices + head)


def read_shape(config: Mapping[str, Any], *, where: str = "config.json") -> ModelShape:
    """The shape that a `config.json` of transformers describes.

    Raises:
        UsageError: it names no dimensions of a decoder.
    """
    found = config.get("text_config") or config
    try:
        hidden, heads = int(found["hidden_size"]), int(found["num_attention_heads"])
        layers, vocab = int(found["num_hidden_layers"]), int(found["vocab_size"])
        head_dim = int(found.get("head_dim") or hidden // heads)
        kind = str(found.get("model_type", ""))
        experts = int(found.get("num_experts") or found.get("num_local_experts") or 1)
        wide = found.get("moe_intermediate_size") if experts > 1 else None
        return ModelShape(
            hidden=hidden,
            layers=layers,
            intermediate=int(wide or found["intermediate_size"]),
            heads=heads,
            query=heads * head_dim,
            key_value=int(found.get("num_key_value_heads") or heads) * head_dim,
            vocab=vocab,
            tied=bool(found.get("tie_word_embeddings", kind.startswith("gemma"))),
            attention_bias=bool(found.get("attention_bias", False)) or kind.startswith("qwen2"),
            head_norm=head_dim if kind.startswith("qwen3") else 0,
            experts=experts,
            active_experts=int(found.get("num_experts_per_tok") or 1) if experts > 1 else 1,
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"the dimensions of the model cannot be read ({type(error).__name__}: {error})",
            where=where,
            fix="Use a decoder of transformers with hidden_size, num_hidden_layers and the like",
        ) from error
