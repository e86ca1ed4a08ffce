"""A reader that another one learns from: what it makes of the same windows, asked once a window.

It may be of another checkpoint, a larger one, as long as both tokenizers cut texts in the same places.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from openbook_training.checkpoint import Checkpoint
from openbook_training.errors import InvalidConfig
from openbook_training.reader import Pair, PairEncoder, forward, trained_reader

KEPT_BYTES = 2**30  # of logits that are remembered: a teacher of a larger checkpoint takes longer than the reader does


class Teacher:
    """The reader in an adapter's folder, to be asked alone."""

    def __init__(self, checkpoint: Checkpoint, folder: str, encoder: PairEncoder, device: torch.device) -> None:
        """Read the adapter in `folder`, of `checkpoint`.

        Args:
            encoder: makes the windows, of this checkpoint; with the limits of the one whose windows it is asked about.

        Raises:
            CheckpointNotFound: there is no such adapter, or it is of another checkpoint.
        """
        self._model: nn.Module = trained_reader(checkpoint, folder).merge_and_unload().requires_grad_(False).eval().to(device)
        self._name, self._encoder, self._device = checkpoint.name, encoder, device
        self._known: dict[bytes, Tensor] = {}  # (2, tokens) start and end logits of a window
        self._bytes = 0

    def logits(self, read: Iterable[tuple[str, Sequence[str]]], pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Start and end logits, each (pairs, length) float32, padded with zeros to the longest pair.

        Args:
            read: each question with its passages.
            pairs: their windows as the reader that learns sees them.

        Raises:
            InvalidConfig: the teacher's tokenizer cuts them elsewhere.
        """
        own = self.windows(read)
        if [(pair.first, pair.offsets) for pair in own] != [(pair.first, pair.offsets) for pair in pairs]:
            raise InvalidConfig(
                f"teacher_checkpoint: the tokenizer of {self._name!r} cuts texts elsewhere than the reader's; take one with its vocabulary"
            )
        return self.own_logits(own)

    def windows(self, read: Iterable[tuple[str, Sequence[str]]]) -> list[Pair]:
        """Of all passages of all questions, as the teacher sees them."""
        return [pair for row, (question, passages) in enumerate(read) for pair in self._encoder.pairs(question, passages, row)]

    @torch.no_grad()
    def own_logits(self, own: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """As `logits`, of at least one of the teacher's own `windows`."""
        keys = [hashlib.blake2b(array("i", pair.ids).tobytes(), digest_size=16).digest() for pair in own]
        found = {key: self._known[key] for key in keys if key in self._known}
        if new := {key: pair for key, pair in zip(keys, own, strict=True) if key not in found}:
            start, end = forward(self._model, list(new.values()), self._encoder, self._device)
            for (key, pair), row in zip(new.items(), torch.stack([start, end], dim=1).cpu(), strict=True):
                found[key] = row[:, : len(pair.ids)].clone()
                if self._bytes < KEPT_BYTES:
                    self._known[key] = found[key]
                    self._bytes += found[key].nbytes
        logits = torch.zeros((2, len(own), max(len(pair.ids) for pair in own)))
        for row, key in enumerate(keys):
            logits[:, row, : found[key].shape[1]] = found[key]
        start, end = logits.to(self._device)
        return start, end
