"""`openbook train verification`: is a claim supported or refuted by the evidence beside it?

A claim and its evidence are one pair, [CLS] claim [SEP] evidence [SEP], read in one segment as the reader's are. The evidence is what the
data give with the claim, or, in a share of the examples, what retrieval finds for it, which may say nothing about it: a server reads
either. Reported beside each other are `model`, beside the given evidence, `retrieved`, beside the evidence found, and `claim_only`, the
same weights on the claim without any, trained so in a share of the examples: claims give away more than they should (Schuster et al.
2019), and a verifier is worth what it gains over that. With `alone_share = 1.0` a run trains nothing but the claim-only baseline.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from openbook_training.beir import Passage
from openbook_training.config import no_share, too_low
from openbook_training.evidence import PASSAGES, beside_retrieved, evidence_corpus, evidence_found
from openbook_training.label_readings import Found, Probabilities, beside_evidence, evidence_readings
from openbook_training.labelled import Columns, Labelled
from openbook_training.negatives import embed_once
from openbook_training.tasks.labels import LabelConfig, LabelTask


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationConfig(LabelConfig):
    """Settings of `openbook train verification`."""

    output: str = "runs/verification"  # run folder: config, metrics, checkpoints, adapter and head
    text_column: str = "claim"
    evidence_column: str = "evidence"  # a text, or a list of sentences
    max_tokens: int = 192  # claim, evidence and special tokens; the longer of the two is cut
    retrieved_share: float = 0.5  # examples, of those not read alone, beside evidence found: a server reads given and found evidence alike
    corpus: str = ""  # where it is found: texts, or a folder in BEIR's layout; empty: in the evidence of all claims of the same file
    passages: int = PASSAGES  # that are found for a claim; a server finds as many where `top_k` is left out

    def problems(self) -> list[str]:
        """What cannot work."""
        found = [*LabelConfig.problems(self), *no_share(self, "retrieved_share"), *too_low(self, max_tokens=5, passages=1)]
        if self.corpus and not self.retrieved_share:
            found.append(f"corpus: nothing is looked for in {self.corpus!r} while retrieved_share is 0; give it a share")
        return found


class VerificationTask(LabelTask):
    """Behind the rows of the data stand, in the same order, the same claims beside what was found for them, where that is wanted."""

    def __init__(self, config: VerificationConfig, console: Console) -> None:
        self._retrieves = config.retrieved_share > 0
        # By what a server reads where no evidence is sent; a reading that is never trained chooses nothing.
        self.chosen_by = "claim_only" if config.alone_share == 1 else "retrieved" if self._retrieves else "model"
        columns = Columns(text=config.text_column, label=config.label_column, evidence=config.evidence_column)
        super().__init__(config, console, columns, max_tokens=config.max_tokens)
        self._given = len(self.rows)
        self._corpus: list[Passage] = []  # that evidence for the training claims is found in
        self._evidence_found: dict[str, NDArray[np.float64]] = {}
        if self._retrieves:
            retrieved = self._retrieve(config, console)
            self._evidence_found = evidence_found(self.rows, retrieved, config.passages)
            self.rows += retrieved
            self.gold = np.tile(self.gold, 2)

    def _retrieve(self, config: VerificationConfig, console: Console) -> list[Labelled]:
        """Of the claims of both files; those of a file do not see the evidence of the other, unless a corpus holds both."""

        def embed(texts: Sequence[str]) -> NDArray[np.float32]:
            folder, precision = Path(config.output), config.loop.precision
            return embed_once(self.checkpoint, texts, folder, precision=precision, console=console, purpose="find evidence")

        files = [self.rows] if config.corpus else [self.rows[: self.dev.start], self.rows[self.dev.start :]]
        corpora = [(rows, evidence_corpus(config.corpus, rows, console)) for rows in files if rows]
        self._corpus = corpora[0][1]
        return [row for rows, corpus in corpora for row in beside_retrieved(rows, corpus, config.passages, self.checkpoint, embed)]

    def summary(self) -> str:
        found = ", ".join(f"{name} {share:.0f} %" for name, share in self._shares_found(self.train).items())
        return super().summary() + (f"; evidence found in training: {found}" if found else "")

    def examples(self, epoch: int) -> Sequence[int]:
        if not self._retrieves:
            return self.train
        rng = random.Random(f"{self._config.loop.seed}/{epoch}/retrieved")
        return [number + self._given if rng.random() < self._config.retrieved_share else number for number in self.train]

    def trains_on(self) -> Mapping[str, Iterable[object]]:
        return {**super().trains_on(), "evidence corpus": self._corpus}

    def found(self, numbers: Sequence[int], alone: Sequence[bool]) -> Found:
        return beside_evidence([self.rows[number] for number in numbers], alone)

    def readings(self, model: nn.Module, numbers: Sequence[int], *, choose: bool) -> dict[str, Probabilities]:
        retrieved = [number + self._given for number in numbers]
        return evidence_readings(
            claim_only=self.probabilities(model, numbers, alone=True),
            model=self.probabilities(model, numbers, alone=False),
            retrieved=self.probabilities(model, retrieved, alone=False) if self._retrieves else None,
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        metrics = super().evaluate(model)
        for part, numbers in (("held_out", self.held_out), ("dev", self.dev)):
            if numbers:
                metrics |= {f"evidence/{part}_{name}": share for name, share in self._shares_found(numbers).items()}
        return metrics

    def _shares_found(self, numbers: Sequence[int]) -> dict[str, float]:
        """How often the evidence of these claims was found, in percent; nothing where none was looked for."""
        return {name: 100 * float(values[numbers].mean()) for name, values in self._evidence_found.items()}

    def settings(self) -> dict[str, Any]:
        return {"objective": "verification", "pair": True, "passages": self._config.passages}
