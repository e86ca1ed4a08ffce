"""What the objectives of the embedder share: model, loss over the passages of a batch, ranking metrics, the adapter that is kept.

They differ in where queries and their passages come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from openbook_training.adapters import require_trained
from openbook_training.checkpoint import DEFAULT_CHECKPOINT, resolve_checkpoint
from openbook_training.chunks import CHUNK_TOKENS
from openbook_training.config import LoopConfig, no_rank, no_temperature, too_low
from openbook_training.embedding import TextEncoder, cut, encode
from openbook_training.errors import InvalidConfig
from openbook_training.objectives import matryoshka_loss
from openbook_training.pretrained import best_device, check_length
from openbook_training.retrieval_metrics import score_retrieval
from openbook_training.retriever import build_retriever, save_retriever


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveConfig:
    """Settings of every objective that trains the embedder. A large `loop.batch_examples` is what makes the negatives hard."""

    checkpoint: str = DEFAULT_CHECKPOINT  # embedder: package:NAME, folder or hub id
    initial_adapter: str = ""  # go on from this adapter folder, of a retriever, instead of a fresh one
    train_max_tokens: int = 128  # of a text in training, the rest is cut; evaluation embeds whole texts, as the server does
    temperature: float = 0.05  # cosines are divided by it; lower looks at the hardest negatives only
    matryoshka_dims: tuple[int, ...] = (384, 256, 128, 64)  # lengths that vectors may be cut to; the first is the full one
    matryoshka_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)  # of each of them in the loss, relative to one another
    lora_rank: int = 16
    lora_alpha: int = 16  # update is scaled by alpha / rank
    loop: LoopConfig = field(default_factory=LoopConfig)

    def problems(self) -> list[str]:
        """What cannot work, whatever the length of the checkpoint's vectors."""
        found = [*no_temperature(self, "temperature"), *too_low(self, train_max_tokens=3), *no_rank(self)]
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if len(weights) != len(dims) or min(weights) < 0 or sum(weights) <= 0:
            found.append(f"matryoshka_weights: {list(weights)} should hold one weight >= 0, and one above it, for each of {list(dims)}")
        return found


class ContrastiveTask:
    """The half of a task that does not depend on where its texts come from; `config` is what the constructor was given."""

    compares_examples: ClassVar[bool] = True  # each query's negatives are the other queries' passages

    def __init__(self, config: ContrastiveConfig) -> None:
        self._settings = config
        self.checkpoint = resolve_checkpoint(config.checkpoint)
        check_length(self.checkpoint, "train_max_tokens", config.train_max_tokens)
        require_trained("initial_adapter", config.initial_adapter)
        model = build_retriever(self.checkpoint, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha, folder=config.initial_adapter)
        dim, dims = int(model.config.hidden_size), config.matryoshka_dims
        if dims[0] != dim or any(not 0 < other < dim for other in dims[1:]):
            raise InvalidConfig(f"matryoshka_dims: {list(dims)} should begin with the checkpoint's {dim} and go on with smaller ones")
        self.model: nn.Module = model
        self.encoder = TextEncoder(self.checkpoint)
        self._device = best_device()

    def training_vectors(self, model: nn.Module, rows: Sequence[list[int]]) -> Tensor:
        """(len(rows), d) of rows of token ids, cut to `train_max_tokens`, with the activations of a micro-batch at a time."""
        limit, loop = self._settings.train_max_tokens, self._settings.loop
        return encode(
            model,
            [cut(row, limit) for row in rows],
            pooling=self.checkpoint.pooling,
            pad=self.encoder.pad,
            device=self._device,
            chunk_tokens=min(CHUNK_TOKENS, loop.micro_batch_examples * limit),
            recompute=loop.micro_batch_examples < loop.batch_examples,
        )

    def vectors(self, model: nn.Module, rows: Sequence[list[int]]) -> np.ndarray:
        """(len(rows), d) float32 of whole texts, to measure with."""
        bf16 = self._settings.loop.precision == "bf16"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=bf16):
            encoded = encode(model, rows, pooling=self.checkpoint.pooling, pad=self.encoder.pad, device=self._device)
        return encoded.cpu().numpy()

    def contrast(self, queries: Tensor, passages: Tensor, gold: Sequence[int], masked: Tensor) -> Tensor:
        """The loss of (B, d) queries against (P, d) passages; `gold` and `masked` as for `objectives.contrastive_loss`."""
        return matryoshka_loss(
            queries,
            passages,
            torch.tensor(gold, device=self._device),
            masked,
            dims=self._settings.matryoshka_dims,
            weights=self._settings.matryoshka_weights,
            temperature=self._settings.temperature,
        )

    def ranking_metrics(self, queries: np.ndarray, passages: np.ndarray, grades: Sequence[Mapping[int, float]]) -> dict[str, float]:
        """In percent, under "held_out_"; of vectors cut to a Matryoshka dimension under "dim<N>/". Nothing where there is no query."""
        metrics: dict[str, float] = {}
        for dim in self._settings.matryoshka_dims if grades else ():
            prefix = "" if dim == self._settings.matryoshka_dims[0] else f"dim{dim}/"
            scores = score_retrieval(queries, passages, grades, dim)
            metrics |= {f"{prefix}held_out_{name}": 100 * float(values.mean()) for name, values in scores.items()}
        return metrics

    def save(self, model: nn.Module, folder: Path) -> None:
        save_retriever(cast(PeftModel, model), folder, self.checkpoint, self._settings.matryoshka_dims)


def first_of_each(texts: Sequence[str]) -> list[int]:
    """For each text the row at which it first stands: by it one text is known as itself, however often it stands."""
    first: dict[str, int] = {}
    return [first.setdefault(text, row) for row, text in enumerate(texts)]
