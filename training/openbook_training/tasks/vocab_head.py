"""`openbook train vocab_head`: a distribution over the vocabulary from the pooled vector of a text.

The target is the bag of the text's masked content words: a share of them is replaced by [MASK], all pieces of a word
together, and the one pooled vector of what is left must make those pieces probable. One vector cannot say which mask
hides which word, so position plays no part; where `masked_share` leaves one word of one piece, this is the prediction of
the token at one [MASK] from the pooled output. A content word has a letter or digit and stands in few of the texts.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from openbook_training.checkpoint import DEFAULT_CHECKPOINT, resolve_checkpoint
from openbook_training.chunks import length_chunks, length_grouped
from openbook_training.config import LoopConfig, no_rank, no_share, too_low
from openbook_training.errors import InvalidConfig, InvalidData
from openbook_training.heads import HeadModel, RowEncoder, TokenRow, VocabHead, build_head_model
from openbook_training.masking import Text, Word, log_frequencies, words_of
from openbook_training.metrics import perplexity
from openbook_training.objectives import bag_of_words_loss
from openbook_training.pretrained import best_device, load_backbone
from openbook_training.rows import build_rows, column_text, read_rows, report_left_out


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabHeadConfig:
    """Settings of `openbook train vocab_head`."""

    output: str = "runs/vocab_head"  # run folder: config, metrics, checkpoints, adapter and head
    checkpoint: str = DEFAULT_CHECKPOINT  # backbone: package:NAME, folder or hub id
    train: str  # texts: .txt (one a line), .csv, .jsonl, or NAME:SPLIT of a Hugging Face dataset
    dev: str = ""  # reported after each epoch, never chosen by
    text_column: str = "text"
    held_out: int = 200  # texts set aside to choose the best epoch by
    max_tokens: int = 128  # special tokens included; the rest of a longer text is cut
    masked_share: float = 0.3  # of a text's content words; at least one is masked
    common_share: float = 0.1  # words that stand in more of the training texts than this are no content words
    tied: bool = True  # the last layer is the token embeddings; false: a copy of them, trained
    lora_rank: int = 16
    lora_alpha: int = 16  # update is scaled by alpha / rank
    loop: LoopConfig = field(default_factory=LoopConfig)

    def problems(self) -> list[str]:
        """What cannot work."""
        found = [] if 0 < self.masked_share <= 1 else [f"masked_share: {self.masked_share} is not in (0, 1]"]
        return [*found, *no_share(self, "common_share"), *too_low(self, held_out=1, max_tokens=3), *no_rank(self)]


class VocabHeadTask:
    """Gives the loop its batches, loss and metrics."""

    compares_examples: ClassVar[bool] = False

    def __init__(self, config: VocabHeadConfig, console: Console) -> None:
        self._config = config
        self.checkpoint = resolve_checkpoint(config.checkpoint)
        self.encoder = RowEncoder(self.checkpoint, max_tokens=config.max_tokens)
        if self.encoder.mask is None:
            raise InvalidConfig(f"checkpoint {config.checkpoint!r}: its tokenizer has no [MASK] token")
        self._mask = self.encoder.mask
        rows, problems = _load(config.train, config.text_column)
        encoded = self._encode(rows)
        occurrences = Counter(pieces for _, words in encoded for pieces in {pieces for pieces, _ in words})
        self._common = {pieces for pieces, count in occurrences.items() if count > config.common_share * len(rows)}
        texts = self._texts(rows, encoded, problems)
        report_left_out(console, config.train, len(texts), problems)
        order = sorted(texts, key=lambda text: hashlib.sha256(str(text.ids).encode()).digest())  # the same on every machine
        self.held_out, self.train = order[: config.held_out], order[config.held_out :]
        if not self.train:
            raise InvalidData(f"{config.train}: {len(texts)} usable texts, and held_out takes {config.held_out} of them")
        self.dev: list[Text] = []
        if config.dev:
            rows, problems = _load(config.dev, config.text_column)
            self.dev = self._texts(rows, self._encode(rows), problems)
            report_left_out(console, config.dev, len(self.dev), problems)
        self._device = best_device()
        backbone = load_backbone(self.checkpoint)
        head = VocabHead(backbone.embeddings.word_embeddings.weight, tied=config.tied)
        self.unigram = log_frequencies(self.train, len(head.output.bias))
        with torch.no_grad():
            head.output.bias.copy_(self.unigram)
        self.model: nn.Module = build_head_model(self.checkpoint, head, backbone, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha)

    def _encode(self, rows: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[Word]]]:
        return words_of(self.encoder, [text for _, text in rows])

    def _texts(self, rows: Sequence[tuple[str, str]], encoded: Sequence[tuple[list[int], list[Word]]], problems: list[str]) -> list[Text]:
        texts = []
        for (place, _), (ids, words) in zip(rows, encoded, strict=True):
            content = [positions for pieces, positions in words if pieces not in self._common]
            if content:
                texts.append(Text(place, ids, content))
            else:
                problems.append(f"{place}: no content word")
        return texts

    def summary(self) -> str:
        return f"{len(self.train)} training texts, {len(self.held_out)} held out, {len(self.dev)} dev"

    def batches(self, epoch: int) -> list[list[Text]]:
        rng = random.Random(f"{self._config.loop.seed}/{epoch}")
        return length_grouped(self.train, lambda text: len(text.ids), self._config.loop.batch_examples, rng)

    def trains_on(self) -> Mapping[str, Iterable[object]]:
        parts = (("training texts", self.train), ("held-out texts", self.held_out))
        return {"checkpoint": [self.checkpoint.digest()], **{name: [(text.ids, text.words) for text in texts] for name, texts in parts}}

    def masked(self, text: Text, rng: random.Random) -> tuple[TokenRow, list[int]]:
        """The text with some content words masked, and their pieces."""
        ids, hidden = text.hide(self._config.masked_share, self._mask, rng)
        return (ids, [0] * len(ids)), [text.ids[at] for at in hidden]

    def loss(self, model: nn.Module, batch: list[Text], rng: random.Random) -> Tensor:
        pairs = [self.masked(text, rng) for text in batch]
        log_probabilities = model(self.encoder.batch([row for row, _ in pairs], self._device))
        texts, tokens = self._targets([bag for _, bag in pairs])
        return bag_of_words_loss(log_probabilities, texts, tokens)

    def describe(self, batch: list[Text]) -> str:
        return ", ".join(text.place for text in batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity of masked pieces, beside that of their frequencies, and how many are among the most probable 1 and 10."""
        metrics = self._score(model, self.held_out, "held_out")
        metrics |= self._score(model, self.dev, "dev") if self.dev else {}
        return metrics | {"score": -metrics["held_out_perplexity"]}

    def _score(self, model: nn.Module, texts: Sequence[Text], name: str) -> dict[str, float]:
        """The same words are masked after every epoch."""
        pairs = [self.masked(text, random.Random(f"{self._config.loop.seed}/{row}")) for row, text in enumerate(texts)]
        surprise = unigram = 0.0
        first = ten = total = 0
        for chunk in length_chunks([len(ids) for (ids, _), _ in pairs]):
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._config.loop.precision == "bf16"):
                log_probabilities = model(self.encoder.batch([pairs[i][0] for i in chunk], self._device))
            owner, tokens = self._targets([pairs[i][1] for i in chunk])
            ranked = log_probabilities.topk(10, dim=1).indices[owner] == tokens[:, None]
            surprise -= float(log_probabilities[owner, tokens].sum())
            unigram -= float(self.unigram.to(self._device)[tokens].sum())
            first, ten, total = first + int(ranked[:, 0].sum()), ten + int(ranked.sum()), total + len(tokens)
        return {
            f"{name}_perplexity": perplexity(surprise / total),
            f"{name}_unigram_perplexity": perplexity(unigram / total),
            f"{name}_top1": 100 * first / total,
            f"{name}_top10": 100 * ten / total,
        }

    def _targets(self, bags: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        owner = torch.tensor([row for row, bag in enumerate(bags) for _ in bag], device=self._device)
        return owner, torch.tensor([piece for bag in bags for piece in bag], device=self._device)

    def save(self, model: nn.Module, folder: Path) -> None:
        settings = {"objective": "vocab_head", "pair": False, "max_tokens": self._config.max_tokens, "tied": self._config.tied}
        cast(HeadModel, model).save(folder, self.checkpoint, settings)


def _load(source: str, column: str) -> tuple[list[tuple[str, str]], list[str]]:
    """(place, text) of every usable row, and what is wrong with the others."""
    return build_rows(read_rows(source), lambda row: (row.place, column_text(row, column)))
