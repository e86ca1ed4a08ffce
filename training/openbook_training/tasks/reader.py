"""`openbook train reader`: an extractive reader trained on passages as retrieval returns them.

Each question comes with its own passage and hard negatives of the same corpus; a share of them comes without its own
passage and learns to abstain. Questions are set aside by whole passages to choose the best epoch, so that the dev set
is only ever reported.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from openbook_training.adapters import require_trained
from openbook_training.checkpoint import Checkpoint, folder_digest, resolve_checkpoint
from openbook_training.config import no_share, no_temperature, too_low
from openbook_training.errors import InvalidData
from openbook_training.negatives import draw, embed_once, mine
from openbook_training.objectives import span_distillation_loss
from openbook_training.span_task import Example, SpanConfig, SpanTask
from openbook_training.squad import Question, hold_out, load_questions, spread
from openbook_training.teacher import Teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderConfig(SpanConfig):
    """Settings of `openbook train reader`."""

    output: str = "runs/reader"  # run folder: config, metrics, checkpoints, the adapter
    train: str  # questions: .jsonl/.json file or NAME:SPLIT of a Hugging Face dataset
    dev: str = ""  # questions for the report after each epoch; empty: only the held-out ones
    dev_questions: int = 1000  # at most N of them, evenly spread, for the report during training; 0 = all
    held_out: int = 300  # training questions set aside (whole passages) to choose the best epoch
    negatives: tuple[int, ...] = (2,)  # hard negatives beside the gold passage, by epoch; the last value repeats
    mined: int = 20  # depth of the ranking that negatives are drawn from
    embedder: str = ""  # checkpoint whose ranking that is; empty: `checkpoint`
    teacher: str = ""  # adapter folder of a reader whose probabilities are learned beside the gold answers
    teacher_checkpoint: str = ""  # that it is of, where it is not `checkpoint`; its tokenizer must cut texts in the same places
    teacher_weight: float = 0.5  # of the distance to the teacher in the loss; the gold answers have the rest
    teacher_temperature: float = 2.0  # scores are divided by it in that distance

    def problems(self) -> list[str]:
        """What cannot work."""
        taught = [*no_share(self, "teacher_weight"), *no_temperature(self, "teacher_temperature")]
        return [*SpanConfig.problems(self), *too_low(self, mined=1), *taught]


class ReaderTask(SpanTask):
    """Gives the loop questions that people asked, each with the passages it is read beside."""

    def __init__(self, config: ReaderConfig, console: Console) -> None:
        self._config = config
        super().__init__(config)
        self._teacher = self._load_teacher() if config.teacher else None
        usable = self._usable(load_questions(config.train, console), console)
        self.train, self.held_out = hold_out(usable, config.held_out)
        if not self.train:
            raise InvalidData(f"{config.train}: held_out takes all {len(usable)} usable questions; lower held_out, {config.held_out}")
        self.dev = spread(load_questions(config.dev, console), config.dev_questions) if config.dev else []
        self.passages = sorted({question.context for question in usable})
        everything = [*self.train, *self.held_out]
        self._mines = max(config.negatives) > 0
        self._miner = resolve_checkpoint(config.embedder) if config.embedder else self.checkpoint
        mined = _mined_negatives(self._miner, everything, self.passages, config, console) if self._mines else [[] for _ in everything]
        # By row: ids may be missing, or stand twice.
        self._mined, self._held_out_mined = mined[: len(self.train)], mined[len(self.train) :]

    def _usable(self, questions: list[Question], console: Console) -> list[Question]:
        usable: list[Question] = []
        left_out: dict[str, list[str]] = {}
        for question in questions:
            if reason := self.unlearnable(question):
                left_out.setdefault(reason, []).append(question.id)
            else:
                usable.append(question)
        for reason, ids in left_out.items():
            console.print(f"{len(ids)} of {len(questions)} questions left out, {reason}: {ids[:5]}", soft_wrap=True, markup=False)
        if not usable:
            raise InvalidData(f"{self._config.train}: no question is left to train on; {next(iter(left_out))}")
        return usable

    def summary(self) -> str:
        return (
            f"{len(self.train)} training questions over {len(self.passages)} passages, {len(self.held_out)} held out, {len(self.dev)} dev"
        )

    def batches(self, epoch: int) -> list[list[Example]]:
        config = self._config
        rng = random.Random(f"{config.loop.seed}/{epoch}")
        count = config.negatives[min(epoch, len(config.negatives) - 1)]
        examples = []
        for question, mined in zip(self.train, self._mined, strict=True):
            absent = self._mines and rng.random() < config.no_answer_share
            drawn = draw(mined, max(count, 1) if absent else count, rng)
            others = [self.passages[z] for z in drawn]
            examples.append(Example(question, others if absent and others else [question.context, *others]))
        return self.grouped(examples, rng)

    def trains_on(self) -> Mapping[str, Iterable[object]]:
        teacher = self._config.teacher
        return {
            "checkpoint": [self.checkpoint.digest()],
            "embedder": [self._miner.digest()] if self._mines else [],
            "teacher": [folder_digest(Path(teacher))] if teacher else [],
            "training questions": self.train,
            "held-out questions": self.held_out,
        }

    def loss(self, model: nn.Module, batch: list[Example], rng: random.Random) -> Tensor:
        """Where the own passage was taken away, "no answer" is known to be right, and a teacher need not have learned to abstain: it is
        not asked."""
        if self._teacher is None:
            return self._gold_loss(model, batch)
        beside = [one for one in batch if one.question.context in one.passages]
        without = [one for one in batch if one.question.context not in one.passages]
        losses = [len(part) * loss(model, part) for part, loss in ((beside, self._taught_loss), (without, self._gold_loss)) if part]
        return torch.stack(losses).sum() / len(batch)

    def _gold_loss(self, model: nn.Module, batch: list[Example]) -> Tensor:
        pairs = self.windows(batch)
        return self.gold_loss(self.read(model, pairs), pairs, batch)

    def _taught_loss(self, model: nn.Module, batch: list[Example]) -> Tensor:
        assert self._teacher is not None  # noqa: S101
        pairs = self.windows(batch)
        reading = self.read(model, pairs)
        taught = self.scored(pairs, *self._teacher.logits([(one.question.text, one.passages) for one in batch], pairs))
        distance = span_distillation_loss(
            reading.spans, reading.null, taught.spans, taught.null, reading.owner, len(batch), self._config.teacher_temperature
        )
        weight = self._config.teacher_weight
        return (1 - weight) * self.gold_loss(reading, pairs, batch) + weight * distance

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Dev questions are read beside their own passage alone, as SQuAD does; held-out ones in the company retrieval gives them."""
        most = max(self._config.negatives)
        company = [[self.passages[z] for z in mined[:most]] for mined in self._held_out_mined]
        held_out = [Example(question, [question.context, *beside]) for question, beside in zip(self.held_out, company, strict=True)]
        metrics = self.score(model, held_out, "held_out")
        metrics |= self.score(model, [Example(question, [question.context]) for question in self.dev], "dev")
        metrics["score"] = metrics.get("held_out_f1", 0.0)  # without any the last epoch is kept: dev questions choose nothing
        return metrics

    def _load_teacher(self) -> Teacher:
        require_trained("teacher", self._config.teacher)
        name = self._config.teacher_checkpoint
        checkpoint = resolve_checkpoint(name) if name else self.checkpoint
        return Teacher(checkpoint, self._config.teacher, self.encoder_of(checkpoint), self._device)


def _mined_negatives(
    checkpoint: Checkpoint, questions: list[Question], passages: list[str], config: ReaderConfig, console: Console
) -> list[list[int]]:
    texts = [*passages, *(question.text for question in questions)]
    vectors = embed_once(
        checkpoint, texts, Path(config.output), precision=config.loop.precision, console=console, purpose="mine hard negatives"
    )
    answers, gold = [question.answers for question in questions], [{question.context} for question in questions]
    return mine(answers, gold, vectors[len(passages) :], passages, vectors[: len(passages)], config.mined)
