"""`openbook train classifier`: topics, intents, sentiment, decided with the help of labelled neighbours.

    p(y|x) = weight · sum over z of p(z|x) p(y|x, z)  +  (1 - weight) · p_kNN(y|x)

The knowledge base is the training set itself, embedded by the untouched backbone; in training a text does not see itself.
Held-out texts see the training texts, dev texts those and the held-out ones: labelled texts go into the knowledge base
without any training. Reported beside each other, always: `alone` (no neighbours: the graph that is exported), `model` (the
latent sum), `knn` (the neighbours' vote) and `combined`. Weight and kNN temperature are chosen on the held-out texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from openbook_training.config import no_temperature, too_low
from openbook_training.contrastive import first_of_each
from openbook_training.label_readings import Found, Probabilities, beside_neighbours, neighbour_readings
from openbook_training.labelled import Columns
from openbook_training.negatives import embed_once
from openbook_training.neighbours import NEIGHBOURS, Mixture, Neighbours, choose_mixture, nearest
from openbook_training.tasks.labels import LabelConfig, LabelTask


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierConfig(LabelConfig):
    """Settings of `openbook train classifier`."""

    output: str = "runs/classifier"  # run folder: config, metrics, checkpoints, adapter and head
    text_column: str = "text"
    max_tokens: int = 128  # special tokens included; the rest of a longer text is cut
    neighbours: int = NEIGHBOURS  # labelled texts that each text is read beside
    temperature: float = 0.05  # of p(z|x), in cosines, at the start; it is trained

    def problems(self) -> list[str]:
        """What cannot work."""
        return [*LabelConfig.problems(self), *too_low(self, neighbours=1, max_tokens=3), *no_temperature(self, "temperature")]


class ClassifierTask(LabelTask):
    chosen_by = "combined"

    def __init__(self, config: ClassifierConfig, console: Console) -> None:
        columns = Columns(text=config.text_column, label=config.label_column)
        super().__init__(config, console, columns, max_tokens=config.max_tokens, temperature=config.temperature)
        self._k = min(config.neighbours, len(self.train) - 1)
        self._neighbours = self._find(self._vectors(config, console), self._k)
        self._mixture = Mixture(1.0, config.temperature)  # until the first evaluation chooses one

    def _vectors(self, config: ClassifierConfig, console: Console) -> NDArray[np.float32]:
        """Unit vectors of all rows; kept in the run folder under a name that changes with checkpoint and texts."""
        texts = [row.text for row in self.rows]
        folder, precision = Path(config.output), config.loop.precision
        return embed_once(self.checkpoint, texts, folder, precision=precision, console=console, purpose="find neighbours")

    def _find(self, vectors: NDArray[np.float32], k: int) -> Neighbours:
        """The neighbours of every row; a training text does not see itself, nor another row of the same words."""
        texts = np.array(first_of_each([row.text for row in self.rows]))
        train, known = slice(0, len(self.train)), slice(0, self.dev.start)
        parts = [
            nearest(vectors[train], vectors[train], self.gold[train], k, (texts[train], texts[train])),
            nearest(vectors[self.held_out.start : self.held_out.stop], vectors[train], self.gold[train], k),
            nearest(vectors[self.dev.start :], vectors[known], self.gold[known], k),
        ]
        return Neighbours(np.concatenate([part.scores for part in parts]), np.concatenate([part.labels for part in parts]))

    def found(self, numbers: Sequence[int], alone: Sequence[bool]) -> Found:
        return beside_neighbours([self.rows[number] for number in numbers], self._neighbours.rows(list(numbers)), alone)

    def readings(self, model: nn.Module, numbers: Sequence[int], *, choose: bool) -> dict[str, Probabilities]:
        latent, neighbours = self.probabilities(model, numbers, alone=False), self._neighbours.rows(list(numbers))
        if choose:
            self._mixture = choose_mixture(latent, neighbours, self.gold[numbers])
        return neighbour_readings(self.probabilities(model, numbers, alone=True), latent, neighbours, self._mixture)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        metrics = super().evaluate(model)
        return metrics | {"model_weight": self._mixture.weight, "knn_temperature": self._mixture.temperature}

    def settings(self) -> dict[str, Any]:
        drawn = {"shots": self._config.shots, "seed": self._config.loop.seed}  # which of the texts are in the knowledge base
        return {"objective": "classifier", "pair": False, "neighbours": self._k, "mixture": asdict(self._mixture)} | drawn
