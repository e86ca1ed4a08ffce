"""`openbook train verification`: is a claim supported or refuted by the evidence beside it?

A claim and its evidence are one pair, [CLS] claim [SEP] evidence [SEP], read in one segment as the reader's are. Reported
beside each other are `model`, which reads both, and `claim_only`, the same weights on the claim without any evidence, trained
so in a share of the examples: claims give away more than they should (Schuster et al. 2019), and a verifier is worth what it
gains over that. With `alone_share = 1.0` a run trains nothing but the claim-only baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import nn

from openbook_training.config import too_low
from openbook_training.label_readings import Found, Probabilities, beside_evidence, evidence_readings
from openbook_training.labelled import Columns
from openbook_training.tasks.labels import LabelConfig, LabelTask


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationConfig(LabelConfig):
    """Settings of `openbook train verification`."""

    output: str = "runs/verification"  # run folder: config, metrics, checkpoints, adapter and head
    text_column: str = "claim"
    evidence_column: str = "evidence"  # a text, or a list of sentences
    max_tokens: int = 192  # claim, evidence and special tokens; the longer of the two is cut

    def problems(self) -> list[str]:
        """What cannot work."""
        return [*LabelConfig.problems(self), *too_low(self, max_tokens=5)]


class VerificationTask(LabelTask):
    def __init__(self, config: VerificationConfig, console: Console) -> None:
        self.chosen_by = "claim_only" if config.alone_share == 1 else "model"  # which then is never trained
        columns = Columns(text=config.text_column, label=config.label_column, evidence=config.evidence_column)
        super().__init__(config, console, columns, max_tokens=config.max_tokens)

    def found(self, numbers: Sequence[int], alone: Sequence[bool]) -> Found:
        return beside_evidence([self.rows[number] for number in numbers], alone)

    def readings(self, model: nn.Module, numbers: Sequence[int], *, choose: bool) -> dict[str, Probabilities]:
        return evidence_readings(
            claim_only=self.probabilities(model, numbers, alone=True), model=self.probabilities(model, numbers, alone=False)
        )

    def settings(self) -> dict[str, Any]:
        return {"objective": "verification", "pair": True}
