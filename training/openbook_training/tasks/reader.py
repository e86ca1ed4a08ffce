"""`openbook train reader`: an extractive reader trained on passages as retrieval returns them.

Each question comes with its own passage and hard negatives of the same corpus; a share of them comes without its own
passage and learns to abstain. Questions are set aside by whole passages to choose the best epoch, so that the dev set
is only ever reported.
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
from rich.console import Console
from torch import Tensor, nn

from openbook_training.adapters import save_adapter
from openbook_training.checkpoint import DEFAULT_CHECKPOINT, Checkpoint, resolve_checkpoint
from openbook_training.config import LoopConfig
from openbook_training.errors import InvalidData
from openbook_training.loop import length_grouped
from openbook_training.negatives import draw, embed_once, mine
from openbook_training.objectives import multi_passage_span_loss, null_scores, span_scores
from openbook_training.pretrained import best_device
from openbook_training.reader import PairEncoder, build_reader, forward, predict
from openbook_training.squad import Question, answer_scores, hold_out, load_questions, occurrences, spread


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderConfig:
    """Settings of `openbook train reader`."""

    output: str = "runs/reader"  # run folder: config, metrics, checkpoints, the adapter
    checkpoint: str = DEFAULT_CHECKPOINT  # backbone: package:NAME, folder or hub id
    train: str  # questions: .jsonl/.json file or NAME:SPLIT of a Hugging Face dataset
    dev: str = ""  # questions for the report after each epoch; empty: only the held-out ones
    dev_questions: int = 1000  # at most N of them, evenly spread, for the report during training; 0 = all
    held_out: int = 300  # training questions set aside (whole passages) to choose the best epoch
    max_tokens: int = 384  # question + passage + special tokens; longer passages are read in windows
    stride: int = 128  # tokens that neighbouring windows share
    max_question_tokens: int = 64  # the rest of a longer question is cut
    max_answer_tokens: int = 30  # longest span considered
    negatives: tuple[int, ...] = (2,)  # hard negatives beside the gold passage, by epoch; the last value repeats
    mined: int = 20  # depth of the ranking that negatives are drawn from
    no_answer_share: float = 0.1  # questions whose gold passage is taken away; they learn to abstain
    lora_rank: int = 64
    lora_alpha: int = 64  # update is scaled by alpha / rank
    initial_adapter: str = ""  # go on from this adapter folder instead of a fresh one
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True, slots=True)
class Example:
    """A training question with the passages it is read beside."""

    question: Question
    passages: list[str]


class ReaderTask:
    """Gives the loop its batches, loss and metrics."""

    compares_examples: ClassVar[bool] = False

    def __init__(self, config: ReaderConfig, console: Console) -> None:
        self._config = config
        self.checkpoint = resolve_checkpoint(config.checkpoint)
        self.encoder = PairEncoder(
            self.checkpoint, max_tokens=config.max_tokens, stride=config.stride, max_question_tokens=config.max_question_tokens
        )
        usable, dropped = _usable(load_questions(config.train, console))
        if dropped:
            console.print(
                f"{len(dropped)} of {len(dropped) + len(usable)} questions left out, their answer is not in their passage: {dropped[:5]}"
            )
        self.train, self.held_out = hold_out(usable, config.held_out)
        self.dev = spread(load_questions(config.dev, console), config.dev_questions) if config.dev else []
        self.passages = sorted({question.context for question in usable})
        everything = [*self.train, *self.held_out]
        mined = _mined_negatives(self.checkpoint, everything, self.passages, config, console) if max(config.negatives) else []
        self._mined = {question.id: found for question, found in zip(everything, mined, strict=False)}
        self.model: nn.Module = build_reader(
            self.checkpoint, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha, adapter=config.initial_adapter
        )
        self._device = best_device()

    def summary(self) -> str:
        return (
            f"{len(self.train)} training questions over {len(self.passages)} passages, {len(self.held_out)} held out, {len(self.dev)} dev"
        )

    def batches(self, epoch: int) -> list[list[Example]]:
        config = self._config
        rng = random.Random(f"{config.loop.seed}/{epoch}")
        count = config.negatives[min(epoch, len(config.negatives) - 1)]
        examples = []
        for question in self.train:
            absent = bool(self._mined) and rng.random() < config.no_answer_share
            drawn = draw(self._mined.get(question.id, []), max(count, 1) if absent else count, rng)
            others = [self.passages[z] for z in drawn]
            examples.append(Example(question, others if absent and others else [question.context, *others]))
        lengths = [sum(len(passage) for passage in example.passages) for example in examples]
        return [[examples[i] for i in rows] for rows in length_grouped(lengths, config.loop.batch_examples, rng)]

    def loss(self, model: nn.Module, batch: list[Example], rng: random.Random) -> Tensor:
        limit = self._config.max_answer_tokens
        pairs = [pair for row, example in enumerate(batch) for pair in self.encoder.pairs(example.question.text, example.passages, row)]
        start, end, context = forward(model, pairs, self.encoder.pad, self._device)
        spans = span_scores(start, end, context, limit)
        gold = torch.zeros(spans.shape, dtype=torch.bool)
        for number, pair in enumerate(pairs):
            example = batch[pair.question]
            where = occurrences(example.passages[pair.passage], example.question.answers)
            for token, extra in pair.gold(where, limit):
                gold[number, token, extra] = True
        owner = torch.tensor([pair.question for pair in pairs], device=self._device)
        return multi_passage_span_loss(spans, null_scores(start, end), gold.to(self._device), owner, len(batch))

    def describe(self, batch: list[Example]) -> str:
        return ", ".join(example.question.id for example in batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Dev questions are read beside their own passage alone, as SQuAD does; held-out ones in the company retrieval gives them."""
        metrics = self._score(model, self.held_out, "held_out", company=max(self._config.negatives)) if self.held_out else {}
        metrics |= self._score(model, self.dev, "dev") if self.dev else {}
        metrics["score"] = metrics.get("held_out_f1", metrics.get("dev_f1", 0.0))
        return metrics

    def _score(self, model: nn.Module, questions: list[Question], name: str, company: int = 0) -> dict[str, float]:
        read = [
            (question.text, [question.context, *(self.passages[z] for z in self._mined.get(question.id, [])[:company])])
            for question in questions
        ]
        predictions = answer_all(model, self.encoder, read, self._config.max_answer_tokens, self._device, self._config.loop.precision)
        scores = answer_scores(predictions, [question.answers for question in questions])
        return {f"{name}_{what}": 100 * float(np.mean(values)) for what, values in scores.items()}

    def save(self, model: nn.Module, folder: Path) -> None:
        save_adapter(cast(PeftModel, model), folder, self.checkpoint)
        reader = {
            "base_checkpoint": self.checkpoint.name,
            "base_digest": self.checkpoint.digest(),
            "one_segment": True,
            "max_tokens": self._config.max_tokens,
            "max_question_tokens": self._config.max_question_tokens,
            "max_answer_tokens": self._config.max_answer_tokens,
        }
        (folder / "reader.json").write_text(json.dumps(reader, indent=2) + "\n")


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


def _usable(questions: list[Question]) -> tuple[list[Question], list[str]]:
    usable = [question for question in questions if not question.answers or question.gold_spans()]
    if not usable:
        raise InvalidData("no training question has its answer in its passage")
    kept = {question.id for question in usable}
    return usable, [question.id for question in questions if question.id not in kept]


def _mined_negatives(
    checkpoint: Checkpoint, questions: list[Question], passages: list[str], config: ReaderConfig, console: Console
) -> list[list[int]]:
    texts = [*passages, *(question.text for question in questions)]
    vectors = embed_once(
        checkpoint, texts, Path(config.output), precision=config.loop.precision, console=console, purpose="mine hard negatives"
    )
    answers, gold = [question.answers for question in questions], [{question.context} for question in questions]
    return mine(answers, gold, vectors[len(passages) :], passages, vectors[: len(passages)], config.mined)
