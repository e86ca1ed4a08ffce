"""`openbook train realm`: masked language modelling with retrieval, the retriever learning from what helps the model (Guu et al. 2020).

    token     -1/|Y| sum over j of log sum over z of p(z|x) p(y_j|x, z)
    sequence  -log sum over z of p(z|x) prod over j of p(y_j|x, z)

x is a sentence with one salient span y hidden (`salient.py`), z one of its k best passages, without those that hold x, or the null
passage. In a share of the examples x is read alone, which the paper does not do: so that what retrieval adds is measured against a
model that has learned to do without. What is left is a retriever's adapter and a masked language model's folder (`realm.py`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from openbook_training.adapters import require_trained
from openbook_training.checkpoint import DEFAULT_CHECKPOINT, resolve_checkpoint
from openbook_training.config import LoopConfig, no_rank, no_share, no_temperature, too_low
from openbook_training.contrastive import first_of_each
from openbook_training.embedding import TextEncoder
from openbook_training.errors import InvalidConfig, InvalidData
from openbook_training.heads import TASK, RowEncoder
from openbook_training.index_refresh import IndexConfig, IndexKeeper, overlap
from openbook_training.inverse_cloze import folded
from openbook_training.loop import Staged
from openbook_training.masked_language_model import SETTINGS, build_masked_lm
from openbook_training.masked_sentences import MaskableSentence, maskable_sentences
from openbook_training.masking import log_frequencies
from openbook_training.objectives import marginal_sequence_loss, marginal_token_loss, retrieval_utility
from openbook_training.passage_index import Allowed, texts_digest
from openbook_training.pretrained import best_device, check_length
from openbook_training.realm import Masked, PassageRows, Propose, Reading, Realm
from openbook_training.retrieval import load_unlabelled
from openbook_training.retrieval_metrics import score_retrieval
from openbook_training.retriever import build_retriever
from openbook_training.squad import held_out_rows, spread

LOSSES = {"token": marginal_token_loss, "sequence": marginal_sequence_loss}


@dataclass(frozen=True, kw_only=True, slots=True)
class RealmConfig:
    """Settings of `openbook train realm`."""

    output: str = "runs/realm"  # run folder: config, metrics, checkpoints, index, both models
    checkpoint: str = DEFAULT_CHECKPOINT  # of both models: package:NAME, folder or hub id
    language_model: str = ""  # warm start: <output>/best of a masked_lm or a tied vocab_head run; empty: a head at the spans' frequencies
    retriever: str = ""  # warm start: <output>/best of an inverse_cloze or retriever run; empty: the checkpoint as it is
    train: str  # passages: a folder in BEIR's layout, texts (.txt, .csv, .jsonl with "text"), or the contexts of SQuAD-shaped questions
    held_out: int = 300  # passages no sentence of which is trained on; they stay in the index, as all do
    query_tokens: int = 64  # of a sentence, special tokens included; the rest is cut
    passage_tokens: int = 128  # of a passage, embedded or read, special tokens included; the rest is cut
    passages: int = 4  # that a text is read beside, one at a time; the null passage comes on top
    temperature: float = 0.05  # cosines are divided by it
    null_score: float = 0.4  # cosine at which a passage and the null passage begin as equals; trained
    loss: str = "sequence"  # how passages are summed out: "sequence", the paper's, or "token"
    alone_share: float = 0.2  # examples that are read without passages
    evaluated_questions: int = 500  # of those that the data carry, evenly spread, searched for, never chosen by; 0 = all
    lora_rank: int = 16  # of updates that do not come from a warm start
    lora_alpha: int = 16  # update is scaled by alpha / rank
    index: IndexConfig = field(default_factory=IndexConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def problems(self) -> list[str]:
        """What cannot work."""
        found = [] if self.loss in LOSSES else [f"loss: {self.loss!r} is neither of {', '.join(LOSSES)}"]
        found += [*no_temperature(self, "temperature"), *no_share(self, "alone_share", below_one=True)]
        found += [*too_low(self, held_out=1, passages=1, query_tokens=8, passage_tokens=8), *no_rank(self)]
        if self.index.refresh == "rerank" and self.index.proposed < self.passages:
            found.append(f"index.proposed: {self.index.proposed} are fewer than the {self.passages} passages to be read")
        return found


class RealmTask(Staged):
    """Gives the loop sentences with a hidden span, each beside what the index holds for it."""

    compares_examples: ClassVar[bool] = False

    def __init__(self, config: RealmConfig, console: Console) -> None:
        self._config, self._console = config, console
        self.checkpoint = resolve_checkpoint(config.checkpoint)
        self.encoder = RowEncoder(self.checkpoint, max_tokens=config.query_tokens)
        if self.encoder.mask is None:
            raise InvalidConfig(f"checkpoint {config.checkpoint!r}: its tokenizer has no [MASK] token")
        self._mask = self.encoder.mask
        data = load_unlabelled(config.train, console)
        texts = [passage.text for passage in data.passages]
        self._folded = [folded(text) for text in texts]
        first = first_of_each(self._folded)
        found = maskable_sentences(self.encoder, [text if first[row] == row else "" for row, text in enumerate(texts)])
        usable = [row for row, sentences in enumerate(found) if sentences]
        held = held_out_rows([[texts[row]] for row in usable], str, config.held_out)
        self.train = [found[row] for number, row in enumerate(usable) if number not in held]
        if not self.train or not held:
            raise InvalidData(f"{config.train}: {len(usable)} passages have a salient span, and held_out takes {config.held_out} of them")
        rng = random.Random(config.loop.seed)
        self.held_out = [rng.choice(found[usable[number]]) for number in sorted(held)]
        self._masked = [self._hide(sentence, random.Random(f"{config.loop.seed}/{row}")) for row, sentence in enumerate(self.held_out)]
        self._grades = [{z: 1.0 for z, text in enumerate(self._folded) if sentence.folded in text} for sentence in self.held_out]
        self.questions = spread(data.questions, config.evaluated_questions)
        self._passages, self._questions = self._rows([(passage.title, passage.text) for passage in data.passages])
        self.model: nn.Module = self._build()
        self._device = best_device()
        whole = [f"{passage.title}\n{passage.text}" for passage in data.passages]
        self._digest = texts_digest([f"{config.passage_tokens}", *whole])
        self._keeper = IndexKeeper(
            config.index,
            Path(config.output),
            self._passages.embedded,
            [text.ids for text in self._masked],
            k=config.passages,
            base=self.checkpoint.digest(),
            passages=self._digest,
            precision=config.loop.precision,
            console=console,
        )
        self._warm_up: dict[str, float] = {}  # recall of the run's beginning
        self._seen: list[tuple[float, float, int]] = []  # of the parts of a step: sums of utility and of p(null|x), texts

    def _rows(self, passages: Sequence[tuple[str, str]]) -> tuple[PassageRows, list[list[int]]]:
        """Of passages, and of the questions to measure on."""
        limit, encoder = self._config.passage_tokens, TextEncoder(self.checkpoint)
        embedded = encoder.rows([encoder.passage_text(title, text) for title, text in passages], limit)
        read = [row[1:-1] for row in encoder.rows([text for _, text in passages], limit)]
        return PassageRows(embedded, read), encoder.rows([question.text for question in self.questions], limit)

    def _build(self) -> Realm:
        require_trained("language_model", self._config.language_model, SETTINGS, TASK)
        require_trained("retriever", self._config.retriever)
        config, rank = self._config, {"lora_rank": self._config.lora_rank, "lora_alpha": self._config.lora_alpha}
        frequencies = None
        if not config.language_model:
            texts = [sentence.text for sentences in self.train for sentence in sentences]
            frequencies = log_frequencies(texts, self.encoder.tokenizer.get_vocab_size())
        language_model = build_masked_lm(self.checkpoint, **rank, folder=config.language_model, frequencies=frequencies)
        retriever = build_retriever(self.checkpoint, **rank, folder=config.retriever)
        check_length(self.checkpoint, "query_tokens + passage_tokens - 1", config.query_tokens + config.passage_tokens - 1)
        return Realm(
            retriever,
            language_model,
            self.encoder,
            pooling=self.checkpoint.pooling,
            null_score=config.null_score,
            temperature=config.temperature,
            pointer=config.language_model,
        )

    def summary(self) -> str:
        return (
            f"{sum(map(len, self.train))} sentences with a salient span in {len(self.train)} training passages, {len(self.held_out)} held "
            f"out, {len(self.questions)} questions to measure on; {len(self._folded)} passages in the index"
        )

    def batches(self, epoch: int) -> list[list[MaskableSentence]]:
        """One sentence of every passage, drawn anew in each epoch."""
        rng, size = random.Random(f"{self._config.loop.seed}/{epoch}"), self._config.loop.batch_examples
        drawn = [rng.choice(sentences) for sentences in self.train]
        rng.shuffle(drawn)
        return [drawn[at : at + size] for at in range(0, len(drawn), size)]

    def trains_on(self) -> Mapping[str, Iterable[object]]:
        return {"checkpoint": [self.checkpoint.digest()], "passages": [self._digest]}

    def before_step(self, model: nn.Module, step: int, total: int) -> None:
        self._begin(cast(Realm, model))
        self._keeper.before_step(cast(Realm, model), step)

    def _begin(self, model: Realm) -> None:
        if self._keeper.begin(model):
            self._warm_up = self._recall(model, self._keeper.index.vectors)

    def observed(self) -> dict[str, float]:
        seen, self._seen = self._seen, []
        return _means(seen, "training") | self._keeper.observed()

    def state(self) -> dict[str, Any]:
        return self._keeper.state() | {"warm_up": self._warm_up}

    def restore(self, state: dict[str, Any]) -> None:
        self._keeper.restore(state)
        self._warm_up = state["warm_up"]

    def loss(self, model: nn.Module, batch: list[MaskableSentence], rng: random.Random) -> Tensor:
        alone = [rng.random() < self._config.alone_share for _ in batch]
        masked = [self._hide(sentence, rng) for sentence in batch]

        def propose(queries: Tensor) -> list[list[int]]:
            reading = [row for row, without in enumerate(alone) if not without]
            found: list[list[int]] = [[] for _ in batch]
            if reading:
                allowed = self._allowed([batch[row] for row in reading])
                proposed = self._keeper.propose(cast(Realm, self.model), queries[reading].cpu().numpy(), allowed)
                for row, passages in zip(reading, proposed, strict=True):
                    found[row] = passages
            return found

        fixed = torch.from_numpy(self._keeper.index.vectors).to(self._device) if self._keeper.fixed else None
        reading: Reading = model(masked, self._passages, self._config.passages, propose, fixed)
        with torch.autocast(self._device.type, enabled=False):
            self._seen.append(_sums(reading))
            return LOSSES[self._config.loss](reading.prior, reading.given, reading.texts)

    def _hide(self, sentence: MaskableSentence, rng: random.Random) -> Masked:
        ids, hidden = sentence.text.hide(0.0, self._mask, rng)  # one span
        return Masked(ids, hidden, [sentence.text.ids[at] for at in hidden])

    def _allowed(self, sentences: Sequence[MaskableSentence]) -> Allowed:
        """No text sees a passage that holds it: its own, or a copy."""
        return lambda number, z: sentences[number].folded not in self._folded[z]

    def describe(self, batch: list[MaskableSentence]) -> str:
        return ", ".join(f"passage {sentence.passage + 1}" for sentence in batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Of held-out sentences the loss a hidden token, with retrieval and alone, and the retrieval utility; recall; drift.

        The same spans are hidden at every evaluation. Passages are embedded anew for it, as they would be for serving, so that runs
        which refresh their index differently are measured alike; but where d(z) are fixed they are what is measured.
        """
        realm = cast(Realm, model)
        self._begin(realm)
        index = self._keeper.fresh(realm)
        vectors, size = torch.from_numpy(index.vectors).to(self._device), self._config.loop.micro_batch_examples
        surprise, alone, tokens, parts = 0.0, 0.0, 0, []
        for at in range(0, len(self._masked), size):
            allowed = self._allowed(self.held_out[at : at + size])
            propose: Propose = lambda queries: index.search(queries.cpu().numpy(), self._config.passages, allowed)  # noqa: B023, E731
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._config.loop.precision == "bf16"):
                reading: Reading = realm(self._masked[at : at + size], self._passages, self._config.passages, propose, vectors)
            surprise -= float(torch.logsumexp(reading.prior[reading.texts] + reading.given, dim=1).sum())
            alone -= float(reading.given[:, -1].sum())
            tokens += len(reading.given)
            parts.append(_sums(reading))
        metrics = {"masked_token_loss/retrieval": surprise / tokens, "masked_token_loss/alone": alone / tokens}
        metrics |= _means(parts, "held_out") | self._recall(realm, index.vectors)
        metrics |= {name.replace("/", "/warm_up_"): value for name, value in self._warm_up.items()}
        if not self._keeper.fixed:
            old, queries = self._keeper.index.vectors, self._keeper.embed(realm, [text.ids for text in self._masked])
            metrics["drift/cosine"] = 100 * float((old * index.vectors).sum(axis=1).mean())
            metrics[f"drift/overlap@{self._config.passages}"] = 100 * overlap(queries, old, index.vectors, self._config.passages)
        return metrics | {"score": -metrics["masked_token_loss/retrieval"]}

    def _recall(self, model: Realm, passages: np.ndarray) -> dict[str, float]:
        """In percent: held-out sentences find the passages that hold them, which they are not read beside; questions find theirs."""
        queries = self._keeper.embed(model, [*(text.ids for text in self._masked), *self._questions])
        groups: dict[str, Sequence[Mapping[int, float]]] = {
            "own_passage": self._grades,
            "questions": [question.gold for question in self.questions],
        }
        metrics: dict[str, float] = {}
        for name, part in zip(groups, np.split(queries, [len(self._masked)]), strict=True):
            scores = score_retrieval(part, passages, groups[name]) if groups[name] else {}
            metrics |= {f"{name}/{what}": 100 * float(values.mean()) for what, values in scores.items() if what.startswith("recall")}
        return metrics

    def save(self, model: nn.Module, folder: Path) -> None:
        cast(Realm, model).save(folder, self.checkpoint, queries_only=self._keeper.fixed)


def _sums(reading: Reading) -> tuple[float, float, int]:
    """Over the texts that have passages: sum of the retrieval utility, sum of p(null|x), and how many they are."""
    prior, given = reading.prior.detach(), reading.given.detach()
    utility = retrieval_utility(prior, given, reading.texts)
    with_passages = ~utility.isnan()
    return float(utility[with_passages].sum()), float(prior[with_passages, -1].exp().sum()), int(with_passages.sum())


def _means(parts: Sequence[tuple[float, float, int]], name: str) -> dict[str, float]:
    """Retrieval utility (nats) and p(null|x) (percent) of several `_sums`; nothing where no text had a passage."""
    utility, null, texts = (sum(column) for column in zip((0.0, 0.0, 0), *parts, strict=True))
    return {f"retrieval_utility/{name}": utility / texts, f"null_passage/{name}": 100 * null / texts} if texts else {}
