"""`openbook train retriever`: the embedder, fine-tuned on questions with the passages that answer them.

Each question is set against all passages of its batch: its own, the other questions' own, and mined hard negatives.
Every text is also held to the vector that the untouched embedder gives it, so that what the data say nothing about
stays where it is. Questions are held out by whole passages, and searched for among all passages after each epoch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn

from openbook_training.checkpoint import DEFAULT_CHECKPOINT, resolve_checkpoint
from openbook_training.chunks import CHUNK_TOKENS
from openbook_training.config import LoopConfig
from openbook_training.embedding import TextEncoder, cut, encode
from openbook_training.errors import InvalidConfig, InvalidData
from openbook_training.negatives import draw, embed_once, mine
from openbook_training.objectives import anchor_loss, matryoshka_loss
from openbook_training.pretrained import best_device
from openbook_training.record import metric_lines
from openbook_training.retrieval import Asked, hold_out_passages, load_retrieval
from openbook_training.retrieval_metrics import score_retrieval
from openbook_training.retriever import build_retriever, save_retriever


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrieverConfig:
    """Settings of `openbook train retriever`. A large `loop.batch_examples` is what makes the negatives hard."""

    output: str = "runs/retriever"  # run folder: config, metrics, checkpoints, the adapter
    checkpoint: str = DEFAULT_CHECKPOINT  # embedder: package:NAME, folder or hub id
    train: str  # folder in BEIR's layout, SQuAD-shaped .jsonl/.json file, or NAME:SPLIT of a Hugging Face dataset
    held_out: int = 300  # training questions set aside (whole passages) to choose the best epoch
    train_max_tokens: int = 128  # of a text in training, the rest is cut; evaluation embeds whole texts, as the server does
    negatives: tuple[int, ...] = (1,)  # hard negatives of each question, by epoch; the last value repeats
    mined: int = 20  # depth of the ranking that negatives are drawn from
    temperature: float = 0.05  # cosines are divided by it; lower looks at the hardest negatives only
    matryoshka_dims: tuple[int, ...] = (384, 256, 128, 64)  # lengths that vectors may be cut to; the first is the full one
    matryoshka_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)  # of each of them in the loss, relative to one another
    anchor_weight: float = 1.0  # of 1 - cosine to the untouched embedder's vectors; raise it when other domains suffer, 0 = off
    lora_rank: int = 16
    lora_alpha: int = 16  # update is scaled by alpha / rank
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True, slots=True)
class Example:
    """A question of a batch, as rows of the task's tables."""

    question: int
    gold: int  # one of its gold passages
    negatives: tuple[int, ...]  # passages


class RetrieverTask:
    """Gives the loop its batches, loss and metrics."""

    compares_examples: ClassVar[bool] = True  # each question's negatives are the other questions' passages

    def __init__(self, config: RetrieverConfig, console: Console) -> None:
        self._config = config
        self.checkpoint = resolve_checkpoint(config.checkpoint)
        model = build_retriever(self.checkpoint, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha)
        self.model: nn.Module = model
        _check(config, int(model.config.hidden_size))
        data = load_retrieval(config.train, console)
        self.train, self.held_out = hold_out_passages(data, config.held_out)
        if not self.train:
            raise InvalidData(f"{config.train}: {config.held_out} questions held out leave none to train on; lower held_out")
        encoder = TextEncoder(self.checkpoint)
        self._pad = encoder.pad
        passages = [encoder.passage_text(passage.title, passage.text) for passage in data.passages]
        questions = [*self.train, *self.held_out]
        texts = [*passages, *(question.text for question in questions)]
        vectors = embed_once(
            self.checkpoint, texts, Path(config.output), precision=config.loop.precision, console=console, purpose="mine hard negatives"
        )
        rows = encoder.rows(texts, self.checkpoint.max_tokens)
        self._passages, self._questions = rows[: len(passages)], rows[len(passages) :]
        self._anchors = vectors[: len(passages)], vectors[len(passages) :]
        self._same = _first_of_each(passages)
        self._mined = self._mine(questions, [passage.text for passage in data.passages]) if max(config.negatives) else [[] for _ in texts]
        self._device = best_device()
        self._untouched = self._metrics(self._anchors[0], self._anchors[1][len(self.train) :])
        console.print("untouched embedder: " + "\n  ".join(metric_lines(self._untouched)), soft_wrap=True, highlight=False)

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

    def loss(self, model: nn.Module, batch: list[Example], rng: random.Random) -> Tensor:
        config = self._config
        columns = list(dict.fromkeys(self._same[row] for example in batch for row in (example.gold, *example.negatives)))
        column_of = {row: column for column, row in enumerate(columns)}
        questions = [self._questions[example.question] for example in batch]
        vectors = self._encode(model, [*questions, *(self._passages[row] for row in columns)])
        with torch.autocast(self._device.type, enabled=False):  # bf16 would leave a cosine two digits
            gold = torch.tensor([column_of[self._same[example.gold]] for example in batch], device=self._device)
            masked = torch.zeros((len(batch), len(columns)), dtype=torch.bool, device=self._device)
            for number, example in enumerate(batch):
                others = {self._same[row] for row in self.train[example.question].gold} - {self._same[example.gold]}
                masked[number, [column_of[row] for row in others if row in column_of]] = True
            loss = matryoshka_loss(
                vectors[: len(batch)],
                vectors[len(batch) :],
                gold,
                masked,
                dims=config.matryoshka_dims,
                weights=config.matryoshka_weights,
                temperature=config.temperature,
            )
            if config.anchor_weight:
                passage_anchors, question_anchors = self._anchors
                untouched = np.concatenate([question_anchors[[example.question for example in batch]], passage_anchors[columns]])
                loss = loss + config.anchor_weight * anchor_loss(vectors, torch.from_numpy(untouched).to(self._device))
        return loss

    def _encode(self, model: nn.Module, rows: Sequence[list[int]]) -> Tensor:
        limit, loop = self._config.train_max_tokens, self._config.loop
        return encode(
            model,
            [cut(row, limit) for row in rows],
            pooling=self.checkpoint.pooling,
            pad=self._pad,
            device=self._device,
            chunk_tokens=min(CHUNK_TOKENS, loop.micro_batch_examples * limit),
            recompute=loop.micro_batch_examples < loop.batch_examples,
        )

    def describe(self, batch: list[Example]) -> str:
        return ", ".join(self.train[example.question].id for example in batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out questions searched for among all passages, in percent, and how far texts moved from their untouched vectors."""
        held = self._questions[len(self.train) :]
        device, bf16 = self._device, self._config.loop.precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            encoded = encode(model, [*self._passages, *held], pooling=self.checkpoint.pooling, pad=self._pad, device=device)
        vectors = encoded.cpu().numpy()
        untouched = np.concatenate([self._anchors[0], self._anchors[1][len(self.train) :]])
        metrics = self._metrics(vectors[: len(self._passages)], vectors[len(self._passages) :])
        metrics["untouched_ndcg@10"] = self._untouched.get("held_out_ndcg@10", 0.0)
        drift = 100 * (1 - float((vectors * untouched).sum(axis=1).mean()))
        return metrics | {"drift/one_minus_cosine": drift, "score": metrics.get("held_out_ndcg@10", -drift)}

    def _metrics(self, passages: np.ndarray, questions: np.ndarray) -> dict[str, float]:
        """In percent; of vectors cut to a Matryoshka dimension under "dim<N>/"."""
        if not self.held_out:
            return {}
        grades = [question.gold for question in self.held_out]
        metrics: dict[str, float] = {}
        for dim in self._config.matryoshka_dims:
            prefix = "" if dim == self._config.matryoshka_dims[0] else f"dim{dim}/"
            scores = score_retrieval(questions, passages, grades, dim)
            metrics |= {f"{prefix}held_out_{name}": 100 * float(values.mean()) for name, values in scores.items()}
        return metrics

    def save(self, model: nn.Module, folder: Path) -> None:
        save_retriever(cast(PeftModel, model), folder, self.checkpoint, self._config.matryoshka_dims)

    def _mine(self, questions: list[Asked], passages: list[str]) -> list[list[int]]:
        gold = [{passages[row] for row in question.gold} for question in questions]
        return mine([question.answers for question in questions], gold, self._anchors[1], passages, self._anchors[0], self._config.mined)


def _check(config: RetrieverConfig, dim: int) -> None:
    problems = []
    dims, weights = config.matryoshka_dims, config.matryoshka_weights
    if dims[0] != dim or any(not 0 < other < dim for other in dims[1:]):
        problems.append(f"matryoshka_dims: {list(dims)} should begin with the checkpoint's {dim} and go on with smaller ones")
    if len(weights) != len(dims) or min(weights) < 0 or sum(weights) <= 0:
        problems.append(f"matryoshka_weights: {list(weights)} should hold one weight >= 0, and one above it, for each of {list(dims)}")
    if config.temperature <= 0:
        problems.append(f"temperature: {config.temperature} is not above 0")
    if config.anchor_weight < 0:
        problems.append(f"anchor_weight: {config.anchor_weight} is below 0")
    for name, least in (("train_max_tokens", 3), ("mined", 1), ("lora_rank", 1)):
        if getattr(config, name) < least:
            problems.append(f"{name}: {getattr(config, name)} is below {least}")
    if problems:
        raise InvalidConfig("\n".join(problems))


def _first_of_each(texts: Sequence[str]) -> list[int]:
    """For each text the row at which it first stands: one passage under two ids is one column of a batch."""
    first: dict[str, int] = {}
    return [first.setdefault(text, row) for row, text in enumerate(texts)]
