"""What makes a built model faster or smaller without changing what it computes."""

from __future__ import annotations

import torch

from verl_sft.config.train import TrainConfig
from verl_sft.model.activations import offload_activations
from verl_sft.model.build import decoder_layers
from verl_sft.model.kernels import compile_layers, use_liger
from verl_sft.model.last_layer import take_learned_rows
from verl_sft.model.loss import LossModel


def apply_levers(model: LossModel, *, config: TrainConfig, device: torch.device) -> None:
    """Prepare the layers as the config asks, before they are sharded.

    Raises:
        UsageError: a lever that this model or this machine does not have.
    """
    layers = decoder_layers(model.causal)
    model.noise_alpha = config.model.neftune_noise_alpha
    if config.model.use_liger:
        use_liger(model.causal, device=device)
    if config.model.learned_rows_only and model.split_head and layers:
        model.last_rows_only = take_learned_rows(layers[-1])
    if config.engine.use_torch_compile:
        # The last layer, where it takes rows, has another shape in every batch behind attention.
        compile_layers(model.causal, layers=layers[: -1 if model.last_rows_only else None])
        model.compiled = True
    if config.model.enable_activation_offload and device.type == "cuda":
        for layer in layers:
            offload_activations(layer, device=device)
