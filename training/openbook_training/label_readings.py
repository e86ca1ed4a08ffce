"""The ways to come to the label of a text, each a reading: what training reports beside each other and `openbook evaluate` rebuilds.

A classifier reads a text beside labelled neighbours, a verifier a claim beside evidence, chosen for it or found; both read the text
alone too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from openbook_training.chunks import length_chunks, restored
from openbook_training.heads import RowEncoder, TokenRow
from openbook_training.labelled import Labelled
from openbook_training.neighbours import Mixture, Neighbours, knn_probabilities
from openbook_training.objectives import NEGATIVE

Probabilities = NDArray[np.float64]  # (rows, labels)


@dataclass(frozen=True, slots=True)
class Found:
    """What the texts of a batch are read beside: the pairs to encode, and the neighbours that the head takes."""

    texts: list[tuple[str, str]]
    neighbours: Neighbours | None = None


def beside_neighbours(rows: Sequence[Labelled], neighbours: Neighbours, alone: Sequence[bool]) -> Found:
    """Each text with its (rows, k) neighbours; where `alone`, with none that counts."""
    scores = np.where(np.array(alone)[:, None], np.float32(NEGATIVE), neighbours.scores)  # all of p(z|x) on the null passage
    return Found([(row.text, "") for row in rows], Neighbours(scores, neighbours.labels))


def beside_evidence(rows: Sequence[Labelled], alone: Sequence[bool]) -> Found:
    """Each claim with its evidence; where `alone`, without."""
    return Found([(row.text, "" if claim_only else row.evidence) for row, claim_only in zip(rows, alone, strict=True)])


def neighbour_readings(alone: Probabilities, model: Probabilities, neighbours: Neighbours, mixture: Mixture) -> dict[str, Probabilities]:
    """A classifier's four: `alone`, `model` (the sum over neighbours), `knn` (their vote) and `combined`.

    Args:
        alone: of the texts without neighbours.
        model: of the texts beside `neighbours`.
    """
    knn = knn_probabilities(neighbours, model.shape[1], mixture.temperature)
    return {"alone": alone, "model": model, "knn": knn, "combined": mixture.probabilities(model, knn)}


def evidence_readings(claim_only: Probabilities, model: Probabilities, retrieved: Probabilities | None) -> dict[str, Probabilities]:
    """A verifier's three: `claim_only` without evidence, `model` beside the evidence given, `retrieved` beside that found, if any was."""
    return {"claim_only": claim_only, "model": model} | ({} if retrieved is None else {"retrieved": retrieved})


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelReader:
    """Texts, and what was found for them, through a model whose head gives labels."""

    encoder: RowEncoder
    device: torch.device  # where the model is
    precision: str  # of the forward pass where nothing is trained: "bf16" or "fp32"

    def forward(self, model: nn.Module, rows: Sequence[TokenRow], neighbours: Neighbours | None) -> Tensor:
        """(rows, labels) log-probabilities, with their gradient where one is wanted."""
        arrays = (neighbours.scores, neighbours.labels) if neighbours else ()
        tensors = tuple(torch.from_numpy(array).to(self.device) for array in arrays)
        log_probabilities: Tensor = model(self.encoder.batch(rows, self.device), tensors or None)
        return log_probabilities

    def probabilities(self, model: nn.Module, found: Found, report: Callable[[int], None] = lambda done: None) -> Probabilities:
        """p(y|x) of every text; `report` is told how many are done. The caller turns gradients off."""
        encoded = self.encoder.rows(found.texts)
        chunks = length_chunks([len(ids) for ids, _ in encoded])
        parts: list[Probabilities] = []
        done = 0
        for chunk in chunks:
            neighbours = found.neighbours.rows(chunk) if found.neighbours else None
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                log_probabilities = self.forward(model, [encoded[row] for row in chunk], neighbours)
            parts.append(log_probabilities.double().exp().cpu().numpy())
            done += len(chunk)
            report(done)
        return np.concatenate(parts)[restored(chunks)]
