"""How token states become the one vector of a text."""

from __future__ import annotations

from torch import Tensor


def pool(states: Tensor, attention_mask: Tensor, kind: str) -> Tensor:
    """(B, L, d) states and (B, L) mask to (B, d): the mean over a text's tokens, or the first token's state where `kind` is "cls"."""
    if kind == "cls":
        return states[:, 0]
    mask = attention_mask[:, :, None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)
