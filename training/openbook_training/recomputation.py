"""Gradient checkpointing (Chen et al. 2016) of whatever a model is made of: activations are computed again in the backward pass, not held.

It is layers of transformers that are recomputed; heads and pointers, which are ours, are small and keep what they computed.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from openbook_training.errors import InvalidConfig


def recompute_activations(model: nn.Module) -> None:
    """Let every layer of every network in `model` recompute its activations while it is in training.

    Raises:
        InvalidConfig: there is no network of transformers in it, or one that cannot.
    """
    found = list(_networks(model))
    kinds = [type(network).__name__ for network in found if not network.supports_gradient_checkpointing]
    if kinds or not found:
        what = ", ".join(kinds) or type(model).__name__
        raise InvalidConfig(f"loop.gradient_checkpointing: {what} cannot recompute its layers; leave it false")
    for network in found:
        # The reentrant kind wants inputs with gradients, and under low-rank updates the embeddings that enter have none.
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _networks(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Those of transformers, without the ones inside them."""
    if isinstance(module, PreTrainedModel):
        yield module
    else:
        for child in module.children():
            yield from _networks(child)
