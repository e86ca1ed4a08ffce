"""`openbook train causal_lm`: a GPT-2 style language model that reads retrieved passages before its text.

    -sum over t of log p(x_t | passages, x_<t), x a stretch of the text; passages and what precedes x are read, not predicted

A share of the stretches is read without passages, so that the same weights also are a plain language model, and what
retrieval adds can be measured on identical stretches. The passages are of the training text itself.
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

from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.chunks import length_grouped
from openbook_training.config import MOST_LAYERS, MOST_PIECES, MOST_TOKENS, WIDEST, LoopConfig, no_share, too_high
from openbook_training.language_model import (
    LanguageModel,
    Prompts,
    ReadingConfig,
    check_reading,
    new_model,
    new_tokenizer,
    pretrained_model,
    read,
    retrieve,
    save_language_model,
    targets,
)
from openbook_training.metrics import perplexity
from openbook_training.negatives import embed_once
from openbook_training.pretrained import best_device, fast_tokenizer
from openbook_training.sequence_objectives import sequence_loss, target_log_probabilities
from openbook_training.squad import spread
from openbook_training.streams import Stream, Stretch, load_texts, passages, split_tail, stream, stretches


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalLmConfig(ReadingConfig):
    """Settings of `openbook train causal_lm`."""

    output: str = "runs/causal_lm"  # run folder: config, metrics, checkpoints, model and tokenizer
    checkpoint: str = ""  # a GPT-2 folder or hub id to go on from; empty: random weights, and a tokenizer trained on `train`
    layers: int = 4  # the following four of a model of random weights
    dim: int = 256  # a multiple of heads
    heads: int = 4
    vocabulary: int = 8192  # tokens at most; 257 at least: every byte and the end of a text
    dropout: float = 0.1
    train: str  # text: .txt (a line a row), .csv, .jsonl, or NAME:SPLIT of a Hugging Face dataset; the rows in order are one text
    dev: str = ""  # reported after each epoch, never chosen by
    text_column: str = "text"
    held_out_share: float = 0.1  # of the text, its end: chooses the best epoch and is not among the passages
    evaluated_stretches: int = 500  # at most N of each text, evenly spread, in the reports; 0 = all
    alone_share: float = 0.2  # stretches that are read without passages in training
    loop: LoopConfig = field(default_factory=LoopConfig)

    def problems(self) -> list[str]:
        """What cannot work, whatever the tokenizer."""
        found = [] if 0 < self.held_out_share < 1 else [f"held_out_share: {self.held_out_share} is not in (0, 1)"]
        found += [*no_share(self, "alone_share"), *no_share(self, "dropout", below_one=True)]
        if not self.checkpoint:
            if min(self.layers, self.dim, self.heads) < 1 or self.dim % max(self.heads, 1):
                found.append(f"layers {self.layers}, dim {self.dim}, heads {self.heads}: at least 1 each, dim a multiple of heads")
            if self.vocabulary < 257:
                found.append(f"vocabulary: {self.vocabulary} is below 257, every byte and the end of a text")
            found += too_high(self, layers=MOST_LAYERS, dim=WIDEST, vocabulary=MOST_PIECES)
        if (longest := self.longest(1)) > MOST_TOKENS:
            found.append(
                f"stride_tokens {self.stride_tokens}, context_tokens {self.context_tokens}, "
                f"passages {self.passages} of {self.passage_tokens} tokens: {longest} tokens at once are above {MOST_TOKENS}"
            )
        return found


@dataclass(frozen=True, slots=True)
class Example:
    """A stretch and its passages, best first."""

    stretch: Stretch
    passages: list[list[int]]


class CausalLmTask:
    """Gives the loop stretches of a text, each beside what was retrieved for it."""

    compares_examples: ClassVar[bool] = False

    def __init__(self, config: CausalLmConfig, console: Console) -> None:
        self._config = config
        self._texts, self._tail = split_tail(load_texts(config.train, config.text_column, console), config.held_out_share)
        self._checkpoint = checkpoint = resolve_checkpoint(config.checkpoint) if config.checkpoint else None
        self.prompts = Prompts(fast_tokenizer(checkpoint) if checkpoint else new_tokenizer(self._texts, config.vocabulary))
        positions = config.longest(len(self.prompts.newline))
        own = {"layers": config.layers, "dim": config.dim, "heads": config.heads, "positions": positions}
        model = (
            pretrained_model(checkpoint, dropout=config.dropout)
            if checkpoint
            else new_model(self.prompts.tokenizer, **own, dropout=config.dropout)
        )
        check_reading(config, model, self.prompts)
        self.model: nn.Module = model
        self._device = best_device()
        text = stream(self._texts, self.prompts.tokenizer)

        def cut(of: Stream, name: str) -> list[Stretch]:
            return stretches(of, stride_tokens=config.stride_tokens, context_tokens=config.context_tokens, name=name)

        split = [cut(text, config.train), spread(cut(stream(self._tail, self.prompts.tokenizer), "held out"), config.evaluated_stretches)]
        if config.dev:
            dev = stream(load_texts(config.dev, config.text_column, console), self.prompts.tokenizer)
            split.append(spread(cut(dev, config.dev), config.evaluated_stretches))
        self.memory = passages(text, config.passage_tokens) if config.passages else []

        def embed(wanted: Sequence[str]) -> np.ndarray:
            embedder, folder = resolve_checkpoint(config.embedder), Path(config.output)
            return embed_once(
                embedder, wanted, folder, precision=config.loop.precision, console=console, purpose="find passages for every stretch"
            )

        everything = [stretch for part in split for stretch in part]
        found = iter(retrieve(self.prompts, everything, self.memory, config, embed))
        self.train, self.held_out, *rest = [[Example(stretch, next(found)) for stretch in part] for part in split]
        self.dev = rest[0] if rest else []

    def summary(self) -> str:
        return (
            f"{len(self.train)} training stretches of {self._config.stride_tokens} tokens, {len(self.held_out)} held out, {len(self.dev)} "
            f"dev; {len(self.memory)} passages, {len(self.prompts.tokenizer)} kinds of token"
        )

    def batches(self, epoch: int) -> list[list[Example]]:
        rng = random.Random(f"{self._config.loop.seed}/{epoch}")
        drawn = [
            Example(example.stretch, []) if example.passages and rng.random() < self._config.alone_share else example
            for example in self.train
        ]

        def length(example: Example) -> int:
            return sum(map(len, example.passages)) + len(example.stretch.before)

        return length_grouped(drawn, length, self._config.loop.batch_examples, rng)

    def trains_on(self) -> Mapping[str, Iterable[object]]:
        return {
            "checkpoint": [self._checkpoint.digest()] if self._checkpoint else [],
            "tokenizer": [self.prompts.tokenizer.backend_tokenizer.to_str()],
            "embedder": [resolve_checkpoint(self._config.embedder).digest()] if self.memory else [],
            "training text": self._texts,
            "held-out text": self._tail,
        }

    def loss(self, model: nn.Module, batch: list[Example], rng: random.Random) -> Tensor:
        """A token's share of the sum: stretches are of one length, so that the constant only sets the scale of the number."""
        rows = [self.prompts.row(example.stretch, example.passages) for example in batch]
        stride = self._config.stride_tokens
        _, logits, tokens = targets(model, rows, stride, self._device)
        owner = torch.arange(len(batch), device=self._device).repeat_interleave(stride)
        return sequence_loss(target_log_probabilities(logits.flatten(0, 1), tokens.flatten()), owner, len(batch)) / stride

    def describe(self, batch: list[Example]) -> str:
        return ", ".join(example.stretch.place for example in batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity a token of the same stretches with their passages and, as "alone", without."""
        metrics: dict[str, float] = {}
        for name, examples in (("held_out", self.held_out), ("dev", self.dev)):
            if examples:
                alone = [Example(example.stretch, []) for example in examples]
                metrics[f"{name}_perplexity"] = self._perplexity(model, examples)
                metrics |= {f"{name}_alone_perplexity": self._perplexity(model, alone)} if self.memory else {}
        return metrics | {"score": -metrics["held_out_perplexity"]}

    def _perplexity(self, model: nn.Module, examples: Sequence[Example]) -> float:
        rows = [self.prompts.row(example.stretch, example.passages) for example in examples]
        read_ = read(model, rows, self._config.stride_tokens, self._device, self._config.loop.precision)
        total = sum(float(log_probabilities.sum()) for _, _, log_probabilities, _ in read_)
        return perplexity(-total / (len(rows) * self._config.stride_tokens))

    def save(self, model: nn.Module, folder: Path) -> None:
        save_language_model(cast(LanguageModel, model), self.prompts, self._config, folder)
