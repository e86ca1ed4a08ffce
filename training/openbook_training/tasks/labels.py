"""What every objective that labels texts shares: data, batches, loss, metrics and the folder that is left.

A text x is read together with something found for it, z (labelled neighbours, or evidence), and in a share of the
examples alone, so that p(y|x) without z is trained too: it is what the exported graph, or a baseline, computes.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from openbook_training.checkpoint import DEFAULT_CHECKPOINT, resolve_checkpoint
from openbook_training.chunks import length_grouped
from openbook_training.config import LoopConfig, no_rank, no_share
from openbook_training.errors import InvalidData
from openbook_training.heads import HeadModel, LabelHead, RowEncoder, build_head_model
from openbook_training.label_readings import Found, LabelReader, Probabilities
from openbook_training.labelled import Columns, Labelled, draw_shots, hold_out_by_label, load_labelled
from openbook_training.metrics import label_metrics
from openbook_training.objectives import label_loss
from openbook_training.pretrained import best_device, load_backbone
from openbook_training.rows import report_left_out


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelConfig:
    """Settings that the objectives share."""

    checkpoint: str = DEFAULT_CHECKPOINT  # backbone: package:NAME, folder or hub id
    train: str  # labelled texts: .csv, .jsonl, or NAME:SPLIT of a Hugging Face dataset
    dev: str = ""  # reported after each epoch, never chosen by; empty: only the held-out rows are
    label_column: str = "label"
    shots: int = 0  # rows of each label that are used at all, the held-out ones among them, drawn with loop.seed; 0 = all
    held_out: int = 500  # rows set aside, of every label in proportion, to choose the best epoch by
    alone_share: float = 0.3  # examples that are read without what was found for them
    lora_rank: int = 16
    lora_alpha: int = 16  # update is scaled by alpha / rank
    loop: LoopConfig = field(default_factory=LoopConfig)

    def problems(self) -> list[str]:
        """What cannot work."""
        found = [] if self.held_out else ["held_out: 0 leaves nothing to choose the best epoch by; give a number of rows"]
        if self.shots == 1:
            found.append("shots: 1 row of each label leaves none to choose the best epoch by; give at least 2, or 0 for all")
        return [*found, *no_share(self, "alone_share"), *no_rank(self)]


class LabelTask(ABC):
    """Gives the loop its batches, loss and metrics; an objective says what a text is read beside. Examples are numbers of `rows`."""

    compares_examples: ClassVar[bool] = False

    chosen_by: str  # the reading whose accuracy on the held-out rows chooses the best epoch

    def __init__(self, config: Any, console: Console, columns: Columns, *, max_tokens: int, temperature: float = 0.0) -> None:
        self._config, self._columns, self._max_tokens, self._temperature = config, columns, max_tokens, temperature
        self.checkpoint = resolve_checkpoint(config.checkpoint)
        self.encoder = RowEncoder(self.checkpoint, max_tokens=max_tokens)
        rows = _load(config.train, columns, console)
        scarce = [label for label, count in Counter(row.label for row in rows).items() if count < config.shots]
        if scarce:
            console.print(
                f"{config.train}: {len(scarce)} labels have fewer than {config.shots} rows, and give all: {scarce[:5]}",
                soft_wrap=True,
                markup=False,
            )
        train, held_out = hold_out_by_label(draw_shots(rows, config.shots, config.loop.seed), config.held_out)
        self.labels = sorted({row.label for row in train})
        if len(self.labels) < 2 or not held_out:
            raise InvalidData(
                f"{config.train}: {len(rows)} usable rows with {len(self.labels)} labels; at least two labels of two rows needed"
            )
        dev = _load(config.dev, columns, console, self.labels) if config.dev else []
        self.rows = [*train, *held_out, *dev]
        self.train, self.held_out = range(len(train)), range(len(train), len(train) + len(held_out))
        self.dev = range(len(train) + len(held_out), len(self.rows))
        self.gold = np.array([self.labels.index(row.label) for row in self.rows], np.int64)
        self._reader = LabelReader(encoder=self.encoder, device=best_device(), precision=config.loop.precision)
        backbone = load_backbone(self.checkpoint, one_segment=True)
        head = LabelHead(backbone.config.hidden_size, len(self.labels), temperature=temperature)
        self.model: nn.Module = build_head_model(self.checkpoint, head, backbone, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha)

    @abstractmethod
    def found(self, numbers: Sequence[int], alone: Sequence[bool]) -> Found:
        """What each row is read beside; nothing where `alone`."""

    @abstractmethod
    def readings(self, model: nn.Module, numbers: Sequence[int], *, choose: bool) -> dict[str, Probabilities]:
        """(rows, labels) probabilities by the name of each way to come to them; `choose`: settle on constants by these rows."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What task.json states beside labels and limits."""

    def summary(self) -> str:
        return f"{len(self.train)} training texts of {len(self.labels)} labels, {len(self.held_out)} held out, {len(self.dev)} dev"

    def batches(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self._config.loop.seed}/{epoch}")

        def length(number: int) -> int:
            return len(self.rows[number].text) + len(self.rows[number].evidence)

        return length_grouped(self.examples(epoch), length, self._config.loop.batch_examples, rng)

    def examples(self, epoch: int) -> Sequence[int]:
        """What an epoch trains on: the same for the same seed and epoch."""
        return self.train

    def trains_on(self) -> Mapping[str, Iterable[object]]:
        texts, held_out = (
            [(row.text, row.label, row.passages) for row in self.rows[of.start : of.stop]] for of in (self.train, self.held_out)
        )
        return {"checkpoint": [self.checkpoint.digest()], "labels": self.labels, "training texts": texts, "held-out texts": held_out}

    def loss(self, model: nn.Module, batch: list[int], rng: random.Random) -> Tensor:
        found = self.found(batch, [rng.random() < self._config.alone_share for _ in batch])
        log_probabilities = self._reader.forward(model, self.encoder.rows(found.texts), found.neighbours)
        return label_loss(log_probabilities, torch.from_numpy(self.gold[batch]).to(self._reader.device))

    def describe(self, batch: list[int]) -> str:
        return ", ".join(self.rows[number].place for number in batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Every reading of the held-out rows, by which constants and epoch are chosen, and of the dev rows, by which nothing is."""
        metrics: dict[str, float] = {}
        for name, numbers in (("held_out", self.held_out), ("dev", self.dev)):
            if numbers:
                for reading, probabilities in self.readings(model, numbers, choose=name == "held_out").items():
                    measured = label_metrics(probabilities, self.gold[numbers])
                    metrics |= {f"{name}_{reading}_{what}": value for what, value in measured.items()}
        return metrics | {"score": metrics[f"held_out_{self.chosen_by}_accuracy"]}

    def save(self, model: nn.Module, folder: Path) -> None:
        stated = {"max_tokens": self._max_tokens, "labels": self.labels, "temperature": self._temperature, "one_segment": True}
        columns = {f"{what}_column": name for what, name in asdict(self._columns).items() if name}
        cast(HeadModel, model).save(folder, self.checkpoint, stated | columns | self.settings())

    def probabilities(self, model: nn.Module, numbers: Sequence[int], *, alone: bool) -> Probabilities:
        """(rows, labels) p(y|x), with what was found for each text or without."""
        return self._reader.probabilities(model, self.found(numbers, [alone] * len(numbers)))


def _load(source: str, columns: Columns, console: Console, known: Sequence[str] = ()) -> list[Labelled]:
    rows, problems = load_labelled(source, columns, known)
    report_left_out(console, source, len(rows), problems)
    return rows
