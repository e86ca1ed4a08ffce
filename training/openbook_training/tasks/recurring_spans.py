"""`openbook train recurring_spans`: the reader's own pre-training, on passages that nobody has asked about.

Questions are made of sentences whose spans recur in their passage (`recurring.py`). What it trains is a reader's adapter
with its span head; `initial_adapter` of the objective `reader` goes on from it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.console import Console
from torch import nn

from openbook_training.errors import InvalidData
from openbook_training.pretrained import fast_tokenizer
from openbook_training.recurring import clozes
from openbook_training.retrieval import load_passages
from openbook_training.span_task import Example, SpanConfig, SpanTask
from openbook_training.squad import Question, held_out_rows, holds_answer, load_questions, occurrences, spread


@dataclass(frozen=True, kw_only=True, slots=True)
class RecurringSpansConfig(SpanConfig):
    """Settings of `openbook train recurring_spans`."""

    output: str = "runs/recurring_spans"  # run folder: config, metrics, checkpoints, the adapter
    train: str  # passages: a folder in BEIR's layout, texts (.txt, .csv, .jsonl with "text"), or the contexts of SQuAD-shaped questions
    dev: str = ""  # questions that people asked, for the report after each epoch, never chosen by
    dev_questions: int = 1000  # at most N of them, evenly spread; 0 = all
    held_out: int = 200  # passages set aside to choose the best epoch by
    questions_a_passage: int = 3  # made of each passage in an epoch, drawn anew in each


class RecurringSpansTask(SpanTask):
    """Gives the loop questions made of the passages themselves."""

    def __init__(self, config: RecurringSpansConfig, console: Console) -> None:
        self._config = config
        super().__init__(config)
        mask = fast_tokenizer(self.checkpoint).mask_token
        if not isinstance(mask, str):
            raise InvalidData(f"checkpoint {config.checkpoint!r}: its tokenizer has no mask token to stand for the hidden span")
        passages = load_passages(config.train, console)
        made = [
            [question for question in _questions(row, text, mask) if not self.unlearnable(question)] for row, text in enumerate(passages)
        ]
        usable = [questions for questions in made if questions]
        if not usable:
            raise InvalidData(
                f"{config.train}: no span recurs in two sentences of a passage, within max_answer_tokens, {config.max_answer_tokens}"
            )
        held = held_out_rows([[questions[0].context] for questions in usable], str, config.held_out)
        self.train = [questions for row, questions in enumerate(usable) if row not in held]
        if not self.train:
            raise InvalidData(
                f"{config.train}: spans recur in {len(usable)} passages, and held_out takes {len(held)} of them; lower held_out"
            )
        self.held_out = [questions[0] for row, questions in enumerate(usable) if row in held]
        self.dev = spread(load_questions(config.dev, console), config.dev_questions) if config.dev else []
        self._unused = len(passages) - len(usable)

    def summary(self) -> str:
        questions = sum(map(len, self.train))
        return (
            f"{questions} questions made of {len(self.train)} passages, {len(self.held_out)} passages held out, {len(self.dev)} dev "
            f"questions; in {self._unused} passages no span recurs"
        )

    def batches(self, epoch: int) -> list[list[Example]]:
        rng = random.Random(f"{self._config.loop.seed}/{epoch}")
        drawn = [q for questions in self.train for q in rng.sample(questions, min(self._config.questions_a_passage, len(questions)))]
        return self.grouped([self._example(question, drawn, rng) for question in drawn], rng)

    def trains_on(self) -> Mapping[str, Iterable[object]]:
        return {"checkpoint": [self.checkpoint.digest()], "training questions": self.train, "held-out questions": self.held_out}

    def _example(self, question: Question, others: list[Question], rng: random.Random) -> Example:
        """The question beside its own passage, or, in a share of the cases, beside another one that does not hold the answer."""
        if rng.random() < self._config.no_answer_share:
            other = rng.choice(others).context
            # Neither word by word nor inside a longer word: the loss takes such a place for gold where no better one is.
            if not holds_answer(other, question.answers) and not occurrences(other, question.answers):
                return Example(question, [other])
        return Example(question, [question.context])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Each question is read beside its own passage; the first one of each held-out passage, and the dev questions."""
        metrics: dict[str, float] = {}
        for name, questions in (("held_out", self.held_out), ("dev", self.dev)):
            metrics |= self.score(model, [Example(question, [question.context]) for question in questions], name)
        metrics["score"] = metrics.get("held_out_f1", 0.0)  # without any the last epoch is kept: dev questions choose nothing
        return metrics


def _questions(row: int, passage: str, mask: str) -> list[Question]:
    return [
        Question(id=f"{row}/{number}", text=cloze.question, context=cloze.passage, answers=cloze.answers)
        for number, cloze in enumerate(clozes(passage, mask))
    ]
