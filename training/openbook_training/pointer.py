"""A decoder that can point (See et al. 2017): a token is written from the vocabulary, or copied from where it stands in what was read.

    p(y_t) = (1 - g_t) softmax(vocabulary) + g_t · sum of a_tj over all j where x_j = y_t
    a_t = softmax over j of q(s_t)·k(h_j-1, h_j) / sqrt(d),   g_t = sigmoid(w·s_t)

x_j are the tokens that were read, h_j the encoder's states of them, s_t the decoder's. A key knows the token to its left, and of a decoder
begins as nothing but that: since both halves of the network begin as one encoder, the state of what was written last is most like the
state of the same token where it was read, and what stands to the right of it there is what goes on.

A masked language model that reads a passage points into it in the same way (realm.py). There s_t is the state of a hidden token, and keys
begin as the states themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput

from openbook_training.errors import CheckpointNotFound
from openbook_training.objectives import NEGATIVE
from openbook_training.sequence_objectives import pointer_log_probabilities

POINTER = "pointer.safetensors"


@dataclass
class Source(BaseModelOutput):
    """An encoder's states, with what a pointer needs of them."""

    pointer_keys: torch.FloatTensor | None = None  # (B, S, d)
    pointer_ids: torch.LongTensor | None = None  # (B, S) the tokens that were read


class Pointer(nn.Module):
    """What a state is most like in what was read, and whether it is copied from there."""

    def __init__(self, dim: int, *, to_the_right: bool, copied: float) -> None:
        """Args:
        to_the_right: whether it begins to the right of what is alike, or there.
        copied: g in the beginning, in (0, 1).
        """
        super().__init__()
        self.query, self.left, self.here, self.gate = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        for alike in (self.query, self.left if to_the_right else self.here):
            nn.init.eye_(alike.weight)
        nn.init.constant_(self.gate.bias, math.log(copied / (1 - copied)))

    def keys(self, states: Tensor) -> Tensor:
        """(pairs, L, d) keys of the encoder's states of pairs; the first token of a pair is to its own left."""
        before = torch.cat([states[:, :1], states[:, :-1]], dim=1)
        keys: Tensor = self.left(before) + self.here(states)
        return keys

    def forward(self, logits: Tensor, states: Tensor, keys: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T, V) logits and (B, T, d) states of what is written, beside (B, S) tokens, to (B, T, V) float32 log-probabilities.

        Args:
            mask: (B, S) 0 where nothing may be copied from; a row of zeros copies nothing.
        """
        scores = (self.query(states) @ keys.transpose(1, 2)).float() / states.shape[2] ** 0.5
        scores = scores.masked_fill(mask[:, None] == 0, NEGATIVE)
        gate = self.gate(states).float().masked_fill((mask.sum(dim=1) == 0)[:, None, None], NEGATIVE)
        return pointer_log_probabilities(logits.float(), scores, gate, ids)

    def save(self, folder: Path) -> None:
        """Write the file that `load` reads."""
        save_file({name: value.detach().contiguous() for name, value in self.state_dict().items()}, folder / POINTER)

    def load(self, folder: Path) -> None:
        """Take the weights in `folder`; stay as it is where none are.

        Raises:
            CheckpointNotFound: they are damaged, or of another size.
        """
        if not (folder / POINTER).exists():
            return
        try:
            self.load_state_dict(load_file(folder / POINTER))
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise CheckpointNotFound(f"{folder}: {POINTER} does not load ({reason}); copy the whole folder that was written") from error


class PointerGenerator(EncoderDecoderModel):
    """An encoder and a decoder of transformers, and a pointer from the one into the other."""

    def __init__(self, config: Any = None, encoder: Any = None, decoder: Any = None) -> None:
        super().__init__(config, encoder, decoder)
        self.pointer = Pointer(self.config.decoder.hidden_size, to_the_right=True, copied=0.5)

    def forward(self, encoder_outputs: Source, attention_mask: Tensor, **settings: Any) -> Any:
        """As `EncoderDecoderModel`, of a `Source` only; `logits` are log-probabilities."""
        output: Any = super().forward(
            encoder_outputs=encoder_outputs,
            attention_mask=attention_mask,
            output_hidden_states=True,
            **settings,
        )
        states = output.decoder_hidden_states[-1]
        output.logits = self.pointer(output.logits, states, encoder_outputs.pointer_keys, encoder_outputs.pointer_ids, attention_mask)
        return output
