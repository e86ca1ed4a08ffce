"""`openbook train generator`: answers written from retrieved passages, fusion-in-decoder.

    -sum over t of log p(y_t | y_<t, [H_1 .. H_K]), y the first accepted answer

Each question is read beside the passages that retrieval returns; in training, its own passage takes the last place where retrieval has
missed it, for a small corpus has no second passage to learn the answer from. A share of the questions is read without passages, so that
the same weights also answer closed-book, which is reported beside.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from openbook_training.adapters import require_trained
from openbook_training.checkpoint import DEFAULT_CHECKPOINT, resolve_checkpoint
from openbook_training.chunks import length_grouped
from openbook_training.config import LoopConfig, no_share
from openbook_training.errors import InvalidData
from openbook_training.generator import AnswerEncoder, FusionInDecoder, GeneratorSettings, answer_all, build_generator, save_generator
from openbook_training.negatives import embed_once, ranked
from openbook_training.pretrained import best_device
from openbook_training.rows import report_left_out
from openbook_training.sequence_objectives import sequence_loss, target_log_probabilities
from openbook_training.squad import Question, answer_scores, hold_out, load_questions, spread


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorConfig(GeneratorSettings):
    """Settings of `openbook train generator`."""

    output: str = "runs/generator"  # run folder: config, metrics, checkpoints, model and tokenizer
    checkpoint: str = DEFAULT_CHECKPOINT  # an encoder (becomes both halves), T5 or BART: package:NAME, folder or hub id
    initial_adapter: str = ""  # of a reader of this checkpoint; the encoder begins with it
    train: str  # questions: .jsonl/.json file or NAME:SPLIT of a Hugging Face dataset; all contexts are the corpus
    dev: str = ""  # questions for the report after each epoch, never chosen by; their contexts join the corpus
    dev_questions: int = 500  # at most N of them, evenly spread; 0 = all
    held_out: int = 200  # training questions set aside (whole passages) to choose the best epoch
    closed_share: float = 0.2  # questions that are read without passages in training
    dropout: float = 0.1
    loop: LoopConfig = field(default_factory=LoopConfig)

    def problems(self) -> list[str]:
        """What cannot work."""
        shares = [*no_share(self, "closed_share"), *no_share(self, "dropout", below_one=True)]
        return [*GeneratorSettings.problems(self), *shares]


@dataclass(frozen=True, slots=True)
class Example:
    """A question with the passages it is read beside; none = closed-book."""

    question: Question
    passages: list[str]


class GeneratorTask:
    """Gives the loop questions beside what was retrieved for them."""

    compares_examples: ClassVar[bool] = False

    def __init__(self, config: GeneratorConfig, console: Console) -> None:
        self._config = config
        self._checkpoint, self._embedder = resolve_checkpoint(config.checkpoint), resolve_checkpoint(config.embedder)
        self.encoder = AnswerEncoder(self._checkpoint, max_tokens=config.max_tokens, max_answer_tokens=config.max_answer_tokens)
        require_trained("initial_adapter", config.initial_adapter)
        self.model: nn.Module = build_generator(self._checkpoint, self.encoder, dropout=config.dropout, adapter=config.initial_adapter)
        self._device = best_device()
        train, held_out = hold_out(_answered(config.train, console), config.held_out)
        if not train or not held_out:
            raise InvalidData(f"{config.train}: {len(train)} questions to train on and {len(held_out)} held out; change held_out")
        dev = spread(_answered(config.dev, console), config.dev_questions) if config.dev else []
        everything = [*train, *held_out, *dev]
        self.corpus = sorted({question.context for question in everything})
        texts = [*self.corpus, *(question.text for question in everything)]
        folder, precision = Path(config.output), config.loop.precision
        vectors = embed_once(
            self._embedder,
            texts,
            folder,
            precision=precision,
            console=console,
            purpose="find passages for every question",
        )
        rankings = ranked(vectors[len(self.corpus) :], vectors[: len(self.corpus)], config.passages)
        found = iter([[self.corpus[z] for z in ranking] for ranking in rankings])
        parts = [[Example(question, next(found)) for question in part] for part in (train, held_out, dev)]
        self.train, self.held_out, self.dev = parts

    def summary(self) -> str:
        return (
            f"{len(self.train)} training questions, {len(self.held_out)} held out, {len(self.dev)} dev, over {len(self.corpus)} passages; "
            f"retrieval finds that of {np.mean([example.question.context in example.passages for example in self.train]):.0%} in training"
        )

    def batches(self, epoch: int) -> list[list[Example]]:
        rng = random.Random(f"{self._config.loop.seed}/{epoch}")
        drawn = [self._company(example, rng) for example in self.train]
        return length_grouped(drawn, lambda example: max(map(len, example.passages), default=0), self._config.loop.batch_examples, rng)

    def trains_on(self) -> Mapping[str, Iterable[object]]:
        return {
            "checkpoint": [self._checkpoint.digest()],
            "embedder": [self._embedder.digest()],
            "corpus": self.corpus,
            "training questions": [example.question for example in self.train],
            "held-out questions": [example.question for example in self.held_out],
        }

    def _company(self, example: Example, rng: random.Random) -> Example:
        if rng.random() < self._config.closed_share:
            return Example(example.question, [])
        own = example.question.context
        return example if own in example.passages else Example(example.question, [*example.passages[:-1], own])

    def loss(self, model: nn.Module, batch: list[Example], rng: random.Random) -> Tensor:
        answers = [self.encoder.answer(example.question.answers[0]) for example in batch]
        longest = max(map(len, answers))
        # What stands after an answer changes nothing before it; padding there makes transformers warn that it lacks a mask.
        before = [[self.encoder.start, *answer[:-1], *[self.encoder.end] * (longest - len(answer))] for answer in answers]
        inputs = self.encoder.inputs([(example.question.text, example.passages) for example in batch], self._device)
        logits = model(inputs, torch.tensor(before, device=self._device))
        owner = torch.tensor([row for row, answer in enumerate(answers) for _ in answer], device=self._device)
        place = torch.tensor([t for answer in answers for t in range(len(answer))], device=self._device)
        tokens = torch.tensor([token for answer in answers for token in answer], device=self._device)
        return sequence_loss(target_log_probabilities(logits[owner, place], tokens), owner, len(batch))

    def describe(self, batch: list[Example]) -> str:
        return ", ".join(example.question.id for example in batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """EM and F1 in percent beside the retrieved passages and, as "closed", without any."""
        metrics: dict[str, float] = {}
        for name, examples in (("held_out", self.held_out), ("dev", self.dev)):
            for suffix, beside in (("", True), ("_closed", False)):
                if examples:
                    read = [(example.question.text, example.passages if beside else []) for example in examples]
                    written = answer_all(cast(FusionInDecoder, model), self.encoder, read, self._config, self._device)
                    scores = answer_scores(written, [example.question.answers for example in examples])
                    metrics |= {f"{name}{suffix}_{what}": 100 * float(np.mean(values)) for what, values in scores.items()}
        return metrics | {"score": metrics["held_out_f1"]}

    def save(self, model: nn.Module, folder: Path) -> None:
        save_generator(cast(FusionInDecoder, model), self.encoder, self._config, folder)


def _answered(source: str, console: Console) -> list[Question]:
    questions: Sequence[Question] = load_questions(source, console)
    answered = [question for question in questions if question.answers]
    report_left_out(console, source, len(answered), [f"question {one.id}: it has no answer" for one in questions if not one.answers])
    return answered
