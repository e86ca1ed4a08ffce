"""The extractive reader: features of (question, passage) pairs, the model, and its predictions.

A passage longer than the reader's window is read in overlapping windows; every window of every passage of a question
shares one normaliser (see `objectives`). The template is that of all pairs (`pair_template`): [CLS] question [SEP] passage [SEP].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForQuestionAnswering, PreTrainedModel

from openbook_training.adapters import add_adapter, load_adapter, stated_settings
from openbook_training.checkpoint import Checkpoint
from openbook_training.chunks import length_chunks, restored
from openbook_training.errors import InvalidConfig
from openbook_training.objectives import null_scores, span_scores
from openbook_training.pretrained import check_length, fast_tokenizer, load_model, model_inputs, read_in_one_segment

READER_SETTINGS = "reader.json"  # beside a reader's adapter
STRIDE = 64  # tokens that neighbouring windows of a long passage share, where there is room; twice the longest answer


@dataclass(frozen=True, slots=True)
class Pair:
    """One window of one passage beside its question, as token ids."""

    question: int  # row of the question in its batch
    passage: int  # row of the passage among the question's passages
    ids: list[int]
    first: int  # index of the passage's first token in `ids`
    offsets: list[tuple[int, int]]  # characters of each passage token, in the passage

    def gold(self, spans: Sequence[tuple[int, int]], max_answer_tokens: int) -> Iterator[tuple[int, int]]:
        """(start token, tokens after it) of each character span that lies whole in this window."""
        for start, end in spans:
            inside = [i for i, (a, b) in enumerate(self.offsets) if a < end and b > start]
            if not inside or inside[-1] - inside[0] >= max_answer_tokens:
                continue
            if self.offsets[inside[0]][0] <= start and self.offsets[inside[-1]][1] >= end:
                yield self.first + inside[0], inside[-1] - inside[0]


class PairEncoder:
    """Turns questions and passages into windows; remembers what it tokenised, for a corpus is read many times."""

    def __init__(self, checkpoint: Checkpoint, *, max_tokens: int, stride: int, max_question_tokens: int, separators: int = 1) -> None:
        """`separators` stand between question and passage; other than one only before a reader that was trained so elsewhere."""
        check_length(checkpoint, "max_tokens", max_tokens)
        tokenizer = fast_tokenizer(checkpoint)
        self._tokenizer = tokenizer.backend_tokenizer
        self.cls, self.sep, self.pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id or 0
        self.config = AutoConfig.from_pretrained(checkpoint.folder)  # of the model that reads the pairs
        if max_tokens - max_question_tokens - 2 - separators <= stride:
            raise InvalidConfig(f"max_tokens {max_tokens} leaves no room for a window beside the question; lower stride {stride}")
        self._max_tokens, self._stride, self._max_question_tokens = max_tokens, stride, max_question_tokens
        self._separators = separators
        self._known: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}

    def tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if text not in self._known:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            self._known[text] = (encoding.ids, encoding.offsets)
        return self._known[text]

    def pairs(self, question: str, passages: Sequence[str], row: int) -> Iterator[Pair]:
        """All windows of all passages; every passage token is in at least one."""
        head = [self.cls, *self.tokens(question)[0][: self._max_question_tokens], *[self.sep] * self._separators]
        room = self._max_tokens - len(head) - 1
        for number, passage in enumerate(passages):
            ids, offsets = self.tokens(passage)
            windows = max(1, math.ceil((len(ids) - self._stride) / (room - self._stride)))
            for at in range(0, windows * (room - self._stride), room - self._stride):
                yield Pair(row, number, [*head, *ids[at : at + room], self.sep], len(head), offsets[at : at + room])


def stated_windows(checkpoint: Checkpoint, *, max_tokens: int, max_question_tokens: int, separators: int = 1) -> PairEncoder:
    """Windows for a reader that states its limits, as its reader.json does, outside of the run that trained it.

    Args:
        max_tokens: of a window; more than `max_question_tokens` and the special ones.
    """
    stride = min(STRIDE, (max_tokens - max_question_tokens - 2 - separators) // 2)
    return PairEncoder(checkpoint, max_tokens=max_tokens, stride=stride, max_question_tokens=max_question_tokens, separators=separators)


def build_reader(checkpoint: Checkpoint, *, lora_rank: int, lora_alpha: int) -> PeftModel:
    """The backbone with a span head and trainable low-rank updates (Hu et al. 2021) on every linear layer."""
    model = _span_model(checkpoint, dropout=0.1)
    return add_adapter(model, model.base_model, rank=lora_rank, alpha=lora_alpha, heads=["qa_outputs"])


def trained_reader(checkpoint: Checkpoint, folder: str, *, dropout: float = 0.1) -> PeftModel:
    """The reader whose adapter is in `folder`, to be trained further.

    Raises:
        CheckpointNotFound: there is none, it is damaged, or it is not one of this checkpoint.
    """
    model = load_adapter(_span_model(checkpoint, dropout=dropout), folder)
    stated_settings(Path(folder), READER_SETTINGS, checkpoint)
    return model


def _span_model(checkpoint: Checkpoint, *, dropout: float) -> PreTrainedModel:
    model: PreTrainedModel = load_model(AutoModelForQuestionAnswering, checkpoint, dropout=dropout, new=["qa_outputs"])
    read_in_one_segment(model)
    return model


def forward(model: nn.Module, pairs: Sequence[Pair], encoder: PairEncoder, device: torch.device) -> tuple[Tensor, Tensor]:
    """Run the reader over pairs in chunks of similar length, so that little is padded.

    Args:
        encoder: the one that made the pairs.

    Returns:
        Start and end logits, each (pairs, length) float32, padded to the longest pair.
    """
    longest = max(len(pair.ids) for pair in pairs)
    chunks = length_chunks([len(pair.ids) for pair in pairs])
    parts: list[Tensor] = []
    for chunk in chunks:
        rows = [pairs[i] for i in chunk]
        width = len(rows[-1].ids)
        ids = torch.tensor([pair.ids + [encoder.pad] * (width - len(pair.ids)) for pair in rows], device=device)
        mask = torch.tensor([[int(i < len(pair.ids)) for i in range(width)] for pair in rows], device=device)
        types = torch.tensor([[int(i >= pair.first) for i in range(width)] for pair in rows], device=device) * mask
        output = model(**model_inputs(encoder.config, ids, mask, types))
        logits = torch.stack([output.start_logits, output.end_logits]).float()
        parts.append(nn.functional.pad(logits, (0, longest - width)))
    start, end = torch.cat(parts, dim=1)[:, torch.tensor(restored(chunks), device=device)]
    return start, end


def passage_tokens(pairs: Sequence[Pair], length: int) -> Tensor:
    """(pairs, length) bool, True where a token belongs to the passage."""
    context = torch.zeros((len(pairs), length), dtype=torch.bool)
    for row, pair in enumerate(pairs):
        context[row, pair.first : pair.first + len(pair.offsets)] = True
    return context


@dataclass(frozen=True, slots=True)
class Prediction:
    """The best span for one question over all its passages."""

    text: str
    score: float  # its log-probability
    null: float  # log-probability of "no answer"


@torch.inference_mode()
def predict(
    model: nn.Module,
    encoder: PairEncoder,
    questions: Sequence[tuple[str, Sequence[str]]],
    *,
    max_answer_tokens: int,
    device: torch.device,
    autocast: Any,
) -> list[Prediction]:
    """Answer each (question, passages) with its most probable span; with "" where its tokenizer makes nothing of any passage."""
    pairs = [pair for row, (text, passages) in enumerate(questions) for pair in encoder.pairs(text, passages, row)]
    with autocast():
        start, end = forward(model, pairs, encoder, device)
    context = passage_tokens(pairs, start.shape[1]).to(device)
    spans = span_scores(start, end, context, max_answer_tokens).flatten(1)
    null = null_scores(start, end)
    totals = torch.logaddexp(torch.logsumexp(spans, dim=1), null).tolist()
    best, where = spans.max(dim=1)
    predictions = []
    for row, (_, passages) in enumerate(questions):
        mine = [i for i, pair in enumerate(pairs) if pair.question == row]
        total = float(torch.logsumexp(torch.tensor([totals[i] for i in mine]), dim=0))
        chosen = max(mine, key=lambda i: float(best[i]))
        pair = pairs[chosen]
        first, extra = divmod(int(where[chosen]), max_answer_tokens)
        inside = pair.offsets[first - pair.first :][: extra + 1] or [(0, 0)]
        text = passages[pair.passage][inside[0][0] : inside[-1][1]]
        nothing = float(torch.logsumexp(null[mine], dim=0)) - total
        predictions.append(Prediction(text, float(best[chosen]) - total, nothing))
    return predictions
