"""`openbook train retriever`: the embedder, fine-tuned on questions with the passages that answer them.

Each question is set against all passages of its batch: its own, the other questions' own, and mined hard negatives.
Every text, cut as in training, is also held to the vector that the untouched embedder gives it, so that what the data say nothing
about stays where it is. A reader may teach in which of a question's own passages and hard negatives it finds an answer.
Questions are held out by whole passages, and searched for among all passages after each epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from openbook_training.adapters import require_trained
from openbook_training.beir import TRAINING
from openbook_training.checkpoint import folder_digest
from openbook_training.config import no_share, no_temperature, too_low
from openbook_training.contrastive import ContrastiveConfig, ContrastiveTask, first_of_each
from openbook_training.errors import InvalidData
from openbook_training.negatives import draw, embed_once, mine
from openbook_training.objectives import anchor_loss, matryoshka_mean, passage_distillation_loss
from openbook_training.passage_teacher import PassageTeacher
from openbook_training.record import metric_lines
from openbook_training.retrieval import Asked, hold_out_passages, load_retrieval


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrieverConfig(ContrastiveConfig):
    """Settings of `openbook train retriever`."""

    output: str = "runs/retriever"  # run folder: config, metrics, checkpoints, the adapter
    train: str  # folder in BEIR's layout, see beir.py, SQuAD-shaped .jsonl/.json file, or NAME:SPLIT of a Hugging Face dataset
    held_out: int = 300  # training questions set aside (whole passages) to choose the best epoch
    negatives: tuple[int, ...] = (1,)  # hard negatives of each question, by epoch; the last value repeats
    mined: int = 20  # depth of the ranking that negatives are drawn from
    anchor_weight: float = 1.0  # of 1 - cosine to the untouched embedder's vectors; raise it when other domains suffer, 0 = off
    reader: str = ""  # adapter folder of a reader of `checkpoint`, whose view of a question's passages is learned beside the gold ones
    reader_weight: float = 0.0  # of the distance to it in the loss; the contrast with the passages of the batch has the rest
    reader_temperature: float = 1.0  # what its spans of a passage weigh, in logs, is divided by it; above 1 the passages weigh more alike

    def problems(self) -> list[str]:
        """What cannot work."""
        found = [] if self.anchor_weight >= 0 else [f"anchor_weight: {self.anchor_weight} is below 0"]
        found += [*no_share(self, "reader_weight"), *no_temperature(self, "reader_temperature")]
        if not self.reader and self.reader_weight:
            found.append(f"reader_weight: {self.reader_weight} is of no reader; give reader, its adapter's folder")
        if self.reader and not self.reader_weight:
            found.append("reader: it teaches nothing while reader_weight is 0; give it a share")
        if self.reader and not max(self.negatives):
            found.append(f"reader: it compares passages of a question, and negatives, {list(self.negatives)}, leave no other than its own")
        return [*ContrastiveConfig.problems(self), *found, *too_low(self, mined=1)]


@dataclass(frozen=True, slots=True)
class Example:
    """A question of a batch, as rows of the task's tables."""

    question: int
    gold: int  # one of its gold passages
    negatives: tuple[int, ...]  # passages


class RetrieverTask(ContrastiveTask):
    """Gives the loop its batches, loss and metrics."""

    def __init__(self, config: RetrieverConfig, console: Console) -> None:
        self._config = config
        super().__init__(config)
        require_trained("reader", config.reader)
        self._teacher = PassageTeacher(self.checkpoint, config.reader, self._device) if config.reader else None
        data = load_retrieval(config.train, console, TRAINING)
        self.train, self.held_out = hold_out_passages(data, config.held_out)
        if not self.train:
            raise InvalidData(f"{config.train}: {config.held_out} questions held out leave none to train on; lower held_out")
        passages = [self.encoder.passage_text(passage.title, passage.text) for passage in data.passages]
        questions = [*self.train, *self.held_out]
        texts = [*passages, *(question.text for question in questions)]
        vectors = self._untouched_vectors(texts, console, "mine hard negatives")
        rows = self.encoder.rows(texts, self.checkpoint.max_tokens)
        self._read = [passage.text for passage in data.passages]  # by a reader: without titles, as it was trained
        self._passages, self._questions = rows[: len(passages)], rows[len(passages) :]
        self._whole = vectors[: len(passages)], vectors[len(passages) :]
        anchors, limit = vectors.copy(), config.train_max_tokens
        longer = [row for row, ids in enumerate(rows) if len(ids) > limit] if config.anchor_weight else []
        if longer:
            anchors[longer] = self._untouched_vectors([texts[row] for row in longer], console, "hold them where they are", limit)
        self._anchors = anchors[: len(passages)], anchors[len(passages) :]
        self._same = first_of_each(passages)
        self._mined = self._mine(questions, self._read) if max(config.negatives) else [[] for _ in texts]
        self._grades = [question.gold for question in self.held_out]
        self._untouched = self.ranking_metrics(self._whole[1][len(self.train) :], self._whole[0], self._grades)
        console.print("untouched embedder: " + "\n  ".join(metric_lines(self._untouched)), soft_wrap=True, highlight=False)

    def _untouched_vectors(self, texts: Sequence[str], console: Console, purpose: str, max_tokens: int = 0) -> np.ndarray:
        """Of whole texts, or of their first `max_tokens`."""
        folder, precision = Path(self._config.output), self._config.loop.precision
        return embed_once(self.checkpoint, texts, folder, precision=precision, console=console, purpose=purpose, max_tokens=max_tokens)

    def summary(self) -> str:
        return f"{len(self.train)} training questions on {len(self._passages)} passages, {len(self.held_out)} held out"

    def batches(self, epoch: int) -> list[list[Example]]:
        config = self._config
        rng = random.Random(f"{config.loop.seed}/{epoch}")
        count = config.negatives[min(epoch, len(config.negatives) - 1)]
        order = list(range(len(self.train)))
        rng.shuffle(order)
        examples = [
            Example(row, rng.choice(list(self.train[row].gold)), tuple(draw(self._mined[row], count, rng)) if count else ())
            for row in order
        ]
        size = config.loop.batch_examples
        return [examples[at : at + size] for at in range(0, len(examples), size)]

    def trains_on(self) -> Mapping[str, Iterable[object]]:
        reader = self._config.reader
        return {
            "checkpoint": [self.checkpoint.digest()],
            "reader": [folder_digest(Path(reader))] if reader else [],
            "passages": zip(self._passages, self._read, strict=True),
            "training questions": self.train,
            "held-out questions": self.held_out,
        }

    def loss(self, model: nn.Module, batch: list[Example], rng: random.Random) -> Tensor:
        config = self._config
        columns = list(dict.fromkeys(self._same[row] for example in batch for row in (example.gold, *example.negatives)))
        column_of = {row: column for column, row in enumerate(columns)}
        questions = [self._questions[example.question] for example in batch]
        vectors = self.training_vectors(model, [*questions, *(self._passages[row] for row in columns)])
        taught = self._taught(self._teacher, batch, column_of) if self._teacher else None
        with torch.autocast(self._device.type, enabled=False):  # bf16 would leave a cosine two digits
            masked = torch.zeros((len(batch), len(columns)), dtype=torch.bool, device=self._device)
            for number, example in enumerate(batch):
                others = {self._same[row] for row in self.train[example.question].gold} - {self._same[example.gold]}
                masked[number, [column_of[row] for row in others if row in column_of]] = True
            gold = [column_of[self._same[example.gold]] for example in batch]
            loss = self.contrast(vectors[: len(batch)], vectors[len(batch) :], gold, masked)
            if taught:
                distance = self._distance(vectors[: len(batch)], vectors[len(batch) :], *taught)
                loss = (1 - config.reader_weight) * loss + config.reader_weight * distance
            if config.anchor_weight:
                passage_anchors, question_anchors = self._anchors
                untouched = np.concatenate([question_anchors[[example.question for example in batch]], passage_anchors[columns]])
                loss = loss + config.anchor_weight * anchor_loss(vectors, torch.from_numpy(untouched).to(self._device))
        return loss

    def _taught(self, teacher: PassageTeacher, batch: list[Example], column_of: Mapping[int, int]) -> tuple[Tensor, Tensor]:
        """What the reader makes of each question's own passages and hard negatives that are in the batch.

        It reads of a passage what the embedder embeds of it at most, which bounds its work.

        Returns:
            (B, P) masses, and (B, P) bool, True where there is one: not where the question has but one such passage.
        """
        read, where = [], []
        for number, example in enumerate(batch):
            question = self.train[example.question]
            ours = dict.fromkeys(self._same[row] for row in (*question.gold, *example.negatives))
            candidates = [row for row in ours if row in column_of]
            if len(candidates) > 1:
                read.append((question.text, [self.encoder.beginning(self._read[row], self.checkpoint.max_tokens) for row in candidates]))
                where += [(number, column_of[row]) for row in candidates]
        masses = torch.zeros((len(batch), len(column_of)), device=self._device)
        present = torch.zeros_like(masses, dtype=torch.bool)
        if where:
            rows, columns = torch.tensor(where, device=self._device).T
            masses[rows, columns], present[rows, columns] = teacher.masses(read), True
        return masses, present

    def _distance(self, questions: Tensor, passages: Tensor, masses: Tensor, candidates: Tensor) -> Tensor:
        """From what the reader makes of the candidates to what (B, d) and (P, d) vectors do, at every Matryoshka length."""
        config = self._config

        def distance(scores: Tensor) -> Tensor:
            return passage_distillation_loss(scores, masses / config.reader_temperature, candidates)

        return matryoshka_mean(
            questions,
            passages,
            distance,
            dims=config.matryoshka_dims,
            weights=config.matryoshka_weights,
            temperature=config.temperature,
        )

    def describe(self, batch: list[Example]) -> str:
        return ", ".join(self.train[example.question].id for example in batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out questions searched for among all passages, in percent, and how far texts moved from their untouched vectors."""
        vectors = self.vectors(model, [*self._passages, *self._questions[len(self.train) :]])
        untouched = np.concatenate([self._whole[0], self._whole[1][len(self.train) :]])
        metrics = self.ranking_metrics(vectors[len(self._passages) :], vectors[: len(self._passages)], self._grades)
        metrics["untouched_ndcg@10"] = self._untouched.get("held_out_ndcg@10", 0.0)
        drift = 100 * (1 - float((vectors * untouched).sum(axis=1).mean()))
        return metrics | {"drift/one_minus_cosine": drift, "score": metrics.get("held_out_ndcg@10", 0.0)}

    def _mine(self, questions: Sequence[Asked], passages: list[str]) -> list[list[int]]:
        gold = [{passages[row] for row in question.gold} for question in questions]
        return mine([question.answers for question in questions], gold, self._whole[1], passages, self._whole[0], self._config.mined)
