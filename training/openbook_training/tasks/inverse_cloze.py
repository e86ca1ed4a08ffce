"""`openbook train inverse_cloze`: the embedder's pre-training, on passages that nobody has asked about.

    -1/B sum over i of log e^s(x_i, z_i) / sum over j of e^s(x_i, z_j)

x_i is a sentence of a passage, z_i the rest of it (`inverse_cloze.py`), and the blocks of the other passages of the batch are the
negatives. What is left is a retriever's adapter: for `openbook export --embedder`, to go on from with the key
`initial_adapter` of `retriever`, or with the key `retriever` of `realm`.
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

from openbook_training.config import no_share, too_low
from openbook_training.contrastive import ContrastiveConfig, ContrastiveTask, first_of_each
from openbook_training.errors import InvalidData
from openbook_training.inverse_cloze import also_right, block, folded, query_spans
from openbook_training.negatives import embed_once
from openbook_training.record import metric_lines
from openbook_training.retrieval import load_unlabelled
from openbook_training.retrieval_metrics import score_retrieval
from openbook_training.squad import held_out_rows, spread


@dataclass(frozen=True, kw_only=True, slots=True)
class InverseClozeConfig(ContrastiveConfig):
    """Settings of `openbook train inverse_cloze`."""

    output: str = "runs/inverse_cloze"  # run folder: config, metrics, checkpoints, the adapter
    train: str  # passages: a folder in BEIR's layout, texts (.txt, .csv, .jsonl with "text"), or the contexts of SQuAD-shaped questions
    held_out: int = 300  # passages set aside to choose the best epoch by, each asked for by one of its sentences
    kept_share: float = 0.1  # of the queries whose sentence stays in its block: a little of what retrieval by shared words is good for
    evaluated_questions: int = 500  # of those that the data carry, evenly spread, searched for too, never chosen by; 0 = all

    def problems(self) -> list[str]:
        """What cannot work."""
        found = [*ContrastiveConfig.problems(self), *too_low(self, held_out=1), *no_share(self, "kept_share")]
        if self.loop.batch_examples == 1:
            found.append("loop.batch_examples: 1 leaves a query no other passage to be told from; give 2 or more")
        return found


@dataclass(frozen=True, slots=True)
class Example:
    """A sentence of a passage, and whether it is kept in its block."""

    passage: int
    span: tuple[int, int]
    kept: bool


class InverseClozeTask(ContrastiveTask):
    """Gives the loop its batches, loss and metrics."""

    def __init__(self, config: InverseClozeConfig, console: Console) -> None:
        self._config = config
        super().__init__(config)
        data = load_unlabelled(config.train, console)
        self._titles, self._texts = [passage.title for passage in data.passages], [passage.text for passage in data.passages]
        self._folded = [folded(text) for text in self._texts]
        self._spans = [query_spans(text) for text in self._texts]
        first = first_of_each(self._folded)
        usable = [row for row, spans in enumerate(self._spans) if spans and first[row] == row]
        held = held_out_rows([[self._texts[row]] for row in usable], str, config.held_out)
        self.train = [row for number, row in enumerate(usable) if number not in held]
        if len(self.train) < 2:
            raise InvalidData(
                f"{config.train}: {len(usable)} of {len(self._texts)} passages have two sentences, and held_out takes {len(held)} of them; "
                "two at least must be left to be told apart"
            )
        rng = random.Random(config.loop.seed)
        self.held_out = [Example(usable[number], rng.choice(self._spans[usable[number]]), False) for number in sorted(held)]
        self.questions = spread(data.questions, config.evaluated_questions)
        self._measure_on(console)

    def _measure_on(self, console: Console) -> None:
        """Everything that an evaluation embeds, its vectors by the untouched embedder, and what those find."""
        whole = [self.encoder.passage_text(title, text) for title, text in zip(self._titles, self._texts, strict=True)]
        queries, blocks = self._query_texts(self.held_out), self._block_texts(self.held_out)
        texts = [*whole, *blocks, *queries, *(question.text for question in self.questions)]
        self._rows = self.encoder.rows(texts, self.checkpoint.max_tokens)
        wanted = map(folded, queries)
        self._grades = [{row: 1.0 for row, text in enumerate(self._folded) if query in text} for query in wanted]
        config = self._config
        self._untouched = embed_once(
            self.checkpoint, texts, Path(config.output), precision=config.loop.precision, console=console, purpose="measure from"
        )
        self._before = self._metrics(self._untouched)
        console.print("untouched embedder: " + "\n  ".join(metric_lines(self._before)), soft_wrap=True, highlight=False)

    def summary(self) -> str:
        rest = len(self._texts) - len(self.train) - len(self.held_out)
        return (
            f"{len(self.train)} training passages, {len(self.held_out)} held out, {len(self.questions)} questions to measure on; {rest} "
            "passages are of one sentence, or stand twice"
        )

    def batches(self, epoch: int) -> list[list[Example]]:
        """One sentence of every passage, drawn anew in each epoch; a last batch of one example, which has no negative, is left out."""
        rng = random.Random(f"{self._config.loop.seed}/{epoch}")
        examples = [Example(row, rng.choice(self._spans[row]), rng.random() < self._config.kept_share) for row in self.train]
        rng.shuffle(examples)
        size = self._config.loop.batch_examples
        return [batch for at in range(0, len(examples), size) if len(batch := examples[at : at + size]) > 1]

    def trains_on(self) -> Mapping[str, Iterable[object]]:
        return {"checkpoint": [self.checkpoint.digest()], "passages": zip(self._titles, self._texts, strict=True)}

    def loss(self, model: nn.Module, batch: list[Example], rng: random.Random) -> Tensor:
        queries, blocks = self._query_texts(batch), self._block_texts(batch)
        rows = self.encoder.rows([*queries, *blocks], self._config.train_max_tokens)
        vectors = self.training_vectors(model, rows)
        right = also_right(
            [folded(query) for query in queries],
            [folded(self._block(example)) for example in batch],
            [self._folded[example.passage] for example in batch],
        )
        with torch.autocast(self._device.type, enabled=False):  # bf16 would leave a cosine two digits
            masked = torch.zeros((len(batch), len(batch)), dtype=torch.bool, device=self._device)
            for i, j in right:
                masked[i, j] = True
            return self.contrast(vectors[: len(batch)], vectors[len(batch) :], range(len(batch)), masked)

    def _query_texts(self, examples: Sequence[Example]) -> list[str]:
        return [self._texts[example.passage][slice(*example.span)].strip() for example in examples]

    def _block(self, example: Example) -> str:
        text = self._texts[example.passage]
        return text if example.kept else block(text, example.span)

    def _block_texts(self, examples: Sequence[Example]) -> list[str]:
        return [self.encoder.passage_text(self._titles[example.passage], self._block(example)) for example in examples]

    def describe(self, batch: list[Example]) -> str:
        return ", ".join(f"passage {example.passage + 1}" for example in batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out sentences searched for among all passages, in percent; and questions, where the data carry some."""
        vectors = self.vectors(model, self._rows)
        metrics = self._metrics(vectors)
        metrics["untouched_ndcg@10"] = self._before["held_out_ndcg@10"]
        if self.questions:
            metrics["questions/untouched_ndcg@10"] = self._before["questions/ndcg@10"]
        drift = 100 * (1 - float((vectors * self._untouched).sum(axis=1).mean()))
        return metrics | {"drift/one_minus_cosine": drift, "score": metrics["held_out_ndcg@10"]}

    def _metrics(self, vectors: np.ndarray) -> dict[str, float]:
        """Sentences find their passage without themselves in it, among all other passages whole; questions find whole passages."""
        count, held = len(self._texts), len(self.held_out)
        passages, blocks, queries, questions = np.split(vectors, [count, count + held, count + 2 * held])
        without = passages.copy()
        without[[example.passage for example in self.held_out]] = blocks
        metrics = self.ranking_metrics(queries, without, self._grades)
        if self.questions:
            scores = score_retrieval(questions, passages, [question.gold for question in self.questions])
            metrics |= {f"questions/{name}": 100 * float(values.mean()) for name, values in scores.items()}
        return metrics
