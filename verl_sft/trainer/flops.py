"""Floating-point operations of a training step, and what the device could do at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Dense bf16 matrix products, FLOP/s, from the makers' data sheets; the first name found counts.
PEAKS: dict[str, float] = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIE": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Operations of a model, by the parameters that tokens run through.

    Attributes:
        body: parameters of all matrices but the embeddings and the head; of experts, as many as
            one token runs through.
        body_trained: those of them that are trained.
        head: parameters of the output matrix, tied to the embeddings or not.
        head_trained: whether the output matrix is trained.
        attention: layers * heads * dimensions of a head.
    """

    body: int
    body_trained: int
    head: int
    head_trained: bool
    attention: int

    @classmethod
    def of(cls, causal: Any) -> ModelFlops:
        """Read off a transformers causal language model, sharded or not."""
        parameters = dict(causal.named_parameters())
        tables = {id(causal.get_input_embeddings().weight)}
        head = getattr(causal.get_output_embeddings(), "weight", None)
        tables |= {id(head)}
        config = causal.config.get_text_config()
        share = _active_share(config)
        body = {
            p: round(p.numel() * (share if ".experts." in name else 1))
            for name, p in parameters.items()
            if id(p) not in tables and p.ndim > 1
        }
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            body=sum(body.values()),
            body_trained=sum(count for p, count in body.items() if p.requires_grad),
            head=0 if head is None else head.numel(),
            head_trained=head is not None and head.requires_grad,
            attention=config.num_hidden_layers * heads * width,
        )

    def six_n(self, tokens: int) -> float:
        """The usual estimate: 6 operations per parameter and token, whatever is learned."""
        return 6.0 * (self.body + self.head) * tokens

    def executed(self, tokens: int, *, learned: int, pairs: float) -> float:
        """What is really computed: no weight gradients of frozen matrices, head on learned rows.

        Recomputed activations are not counted: they are work, but not progress.

        Args:
            tokens: of the documents.
            learned: positions for which logits are formed.
            pairs: sum of squared document lengths; causal attention does half of it.
        """
        body = (4 * (self.body - self.body_trained) + 6 * self.body_trained) * tokens
        head = (6 if self.head_trained else 4) * self.head * learned
        return float(body + head + 6 * self.attention * pairs)


def _active_share(config: Any) -> float:
    """Experts that a token runs through over all experts of a layer; 1 where there are none."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), 0)
    return (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0


def peak_flops(given: float | None, *, device: torch.device, dtype: str) -> float | None:
    """FLOP/s of one rank's device: as given, or by its name where it computes in bf16.

    Args:
        given: `trainer.peak_flops`.
        device: of the rank.
        dtype: of compute; no peak is known for others than `bfloat16`.
    """
    if given is not None or device.type != "cuda" or dtype != "bfloat16":
        return given
    name = torch.cuda.get_device_name(device).upper()
    return next((peak for part, peak in PEAKS.items() if part in name), None)
