"""What the objectives of the extractive reader share: model, loss, predictions and the adapter that is kept.

They differ in where questions come from and in what company passages are read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from openbook_training.adapters import require_trained, save_adapter
from openbook_training.checkpoint import DEFAULT_CHECKPOINT, Checkpoint, resolve_checkpoint
from openbook_training.chunks import length_grouped
from openbook_training.config import LoopConfig, no_rank, no_share, too_low
from openbook_training.objectives import multi_passage_span_loss, null_scores, span_scores
from openbook_training.pretrained import best_device
from openbook_training.reader import READER_SETTINGS, Pair, PairEncoder, build_reader, forward, passage_tokens, predict, trained_reader
from openbook_training.squad import Question, answer_scores, occurrences


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanConfig:
    """Settings of every objective that trains a reader."""

    checkpoint: str = DEFAULT_CHECKPOINT  # backbone: package:NAME, folder or hub id
    max_tokens: int = 384  # question + passage + special tokens; longer passages are read in windows
    stride: int = 128  # tokens that neighbouring windows share
    max_question_tokens: int = 64  # the rest of a longer question is cut
    max_answer_tokens: int = 30  # longest span considered
    no_answer_share: float = 0.1  # questions whose gold passage is taken away; they learn to abstain
    lora_rank: int = 64
    lora_alpha: int = 64  # update is scaled by alpha / rank
    initial_adapter: str = ""  # go on from this adapter folder instead of a fresh one
    loop: LoopConfig = field(default_factory=LoopConfig)

    def problems(self) -> list[str]:
        """What cannot work."""
        found = []
        if self.max_tokens - self.max_question_tokens - 3 <= self.stride:
            found.append(f"max_tokens: {self.max_tokens} leaves no room for a window beside the question; lower stride, {self.stride}")
        return [*found, *no_share(self, "no_answer_share"), *too_low(self, max_answer_tokens=1), *no_rank(self)]


@dataclass(frozen=True, slots=True)
class Example:
    """A question with the passages it is read beside."""

    question: Question
    passages: list[str]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader makes of the windows of a batch; the arguments of `multi_passage_span_loss`."""

    spans: Tensor
    null: Tensor
    owner: Tensor


class SpanTask:
    """The half of a task that does not depend on where its questions come from; `config` is what the constructor was given."""

    compares_examples: ClassVar[bool] = False

    def __init__(self, config: SpanConfig) -> None:
        self._settings = config
        self.checkpoint = resolve_checkpoint(config.checkpoint)
        self.encoder = self.encoder_of(self.checkpoint)
        require_trained("initial_adapter", config.initial_adapter)
        self.model: nn.Module = (
            trained_reader(self.checkpoint, config.initial_adapter)
            if config.initial_adapter
            else build_reader(self.checkpoint, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha)
        )
        self._device = best_device()

    def encoder_of(self, checkpoint: Checkpoint) -> PairEncoder:
        """Makes windows with the limits of the settings, by the tokenizer of `checkpoint`."""
        limits = self._settings
        return PairEncoder(checkpoint, max_tokens=limits.max_tokens, stride=limits.stride, max_question_tokens=limits.max_question_tokens)

    def unlearnable(self, question: Question) -> str:
        """Why no span of its own passage can be its gold, "" where one can: beside that passage it would learn to abstain."""
        spans, limit = question.gold_spans(), self._settings.max_answer_tokens
        if question.answers and not spans:
            return "their answer is not in their passage"
        windows = self.encoder.pairs(question.text, [question.context], 0) if spans else ()
        if spans and not any(True for window in windows for _ in window.gold(spans, limit)):
            return f"no window holds an answer of theirs in max_answer_tokens, {limit}"
        return ""

    def grouped(self, examples: Sequence[Example], rng: random.Random) -> list[list[Example]]:
        """Batches of examples that take about as many tokens, in random order."""
        return length_grouped(examples, lambda example: sum(map(len, example.passages)), self._settings.loop.batch_examples, rng)

    def loss(self, model: nn.Module, batch: list[Example], rng: random.Random) -> Tensor:
        pairs = self.windows(batch)
        return self.gold_loss(self.read(model, pairs), pairs, batch)

    def windows(self, batch: Sequence[Example]) -> list[Pair]:
        """Of all passages of all examples."""
        return [pair for row, example in enumerate(batch) for pair in self.encoder.pairs(example.question.text, example.passages, row)]

    def read(self, model: nn.Module, pairs: Sequence[Pair]) -> Reading:
        return self.scored(pairs, *forward(model, pairs, self.encoder, self._device))

    def scored(self, pairs: Sequence[Pair], start: Tensor, end: Tensor) -> Reading:
        """What (pairs, length) logits come to."""
        context = passage_tokens(pairs, start.shape[1]).to(self._device)
        owner = torch.tensor([pair.question for pair in pairs], device=self._device)
        return Reading(span_scores(start, end, context, self._settings.max_answer_tokens), null_scores(start, end), owner)

    def gold_loss(self, reading: Reading, pairs: Sequence[Pair], batch: Sequence[Example]) -> Tensor:
        """Scalar mean of -log p(gold spans) over the examples that `pairs` are the windows of."""
        gold = torch.zeros(reading.spans.shape, dtype=torch.bool)
        for number, pair in enumerate(pairs):
            example = batch[pair.question]
            where = occurrences(example.passages[pair.passage], example.question.answers)
            for token, extra in pair.gold(where, self._settings.max_answer_tokens):
                gold[number, token, extra] = True
        return multi_passage_span_loss(reading.spans, reading.null, gold.to(self._device), reading.owner, len(batch))

    def describe(self, batch: list[Example]) -> str:
        return ", ".join(example.question.id for example in batch)

    def score(self, model: nn.Module, examples: Sequence[Example], name: str) -> dict[str, float]:
        """EM and F1 in percent, named `name`_em and `name`_f1, of the best spans for the examples that have an answer; of none nothing."""
        examples = [example for example in examples if example.question.answers]
        if not examples:
            return {}
        read = [(example.question.text, example.passages) for example in examples]
        limit, precision = self._settings.max_answer_tokens, self._settings.loop.precision
        predictions = answer_all(model, self.encoder, read, limit, self._device, precision)
        scores = answer_scores(predictions, [example.question.answers for example in examples])
        return {f"{name}_{what}": 100 * float(np.mean(values)) for what, values in scores.items()}

    def save(self, model: nn.Module, folder: Path) -> None:
        save_adapter(cast(PeftModel, model), folder, self.checkpoint)
        reader = {
            "base_checkpoint": self.checkpoint.name,
            "base_digest": self.checkpoint.digest(),
            "one_segment": True,
            "max_tokens": self._settings.max_tokens,
            "max_question_tokens": self._settings.max_question_tokens,
            "max_answer_tokens": self._settings.max_answer_tokens,
        }
        (folder / READER_SETTINGS).write_text(json.dumps(reader, indent=2) + "\n")


def answer_all(
    model: nn.Module,
    encoder: PairEncoder,
    questions: Sequence[tuple[str, Sequence[str]]],
    max_answer_tokens: int,
    device: torch.device,
    precision: str,
) -> list[str]:
    """The best span for each (question, passages), never "no answer" (SQuAD 1.1's setting)."""

    def autocast() -> AbstractContextManager[None]:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    texts = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda row: sum(map(len, questions[row][1])))
    for at in range(0, len(order), 32):
        rows = order[at : at + 32]
        batch = [questions[row] for row in rows]
        found = predict(model, encoder, batch, max_answer_tokens=max_answer_tokens, device=device, autocast=autocast)
        for row, prediction in zip(rows, found, strict=True):
            texts[row] = prediction.text
    return texts
