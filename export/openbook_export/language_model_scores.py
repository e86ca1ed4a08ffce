"""Perplexity of a language model in PyTorch: alone, with retrieved passages, with kNN-LM and with both, on identical stretches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from openbook_training.bootstrap import interval, paired_difference
from openbook_training.errors import InvalidData
from openbook_training.knn_lm import Datastore, Mixture, build_datastore, mixed, neighbours, tune
from openbook_training.language_model import LanguageModel, embed_with, load_language_model, read, retrieve
from openbook_training.metrics import perplexity
from openbook_training.pretrained import best_device
from openbook_training.progress import progress
from openbook_training.squad import spread
from openbook_training.streams import Stream, Stretch, load_texts, passages, split_tail, stream, stretches
from rich.console import Console
from torch import Tensor

TUNED_SHARE = 0.1  # of the memory, its end, where no text to tune on is given
TUNED_STRETCHES = 400  # at most: their neighbours are held at once

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Sources, each a file of texts or a Hugging Face dataset."""

    measured: str
    memory: str  # passages are retrieved from it, and the datastore is made of it
    tuned: str = ""  # lambda and temperature are chosen on it; empty: the memory's end, which then is no memory
    column: str = "text"


@dataclass(frozen=True, slots=True)
class _Search:
    """What it takes to ask the datastore."""

    model: LanguageModel
    stride: int
    device: torch.device
    datastore: Datastore
    k: int

    def found(self, rows: Rows) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor, Tensor]]:
        """By chunk: which rows, log p of their targets, neighbours' distances and tokens, targets; all but the first are flat."""
        for chunk, states, log_probabilities, targets in read(self.model, rows, self.stride, self.device, "fp32"):
            distances, followed = neighbours(states.flatten(0, 1), self.datastore, self.k)
            yield chunk, log_probabilities.flatten(), distances, followed, targets.flatten()


def measure_language_model(name: str, texts: Texts, *, neighbours_read: int, limit: int, console: Console) -> dict[str, Any]:
    """Every reading on the same stretches, so that differences are paired; each stretch weighs the same and is of equal length.

    Args:
        name: folder that `openbook train causal_lm` wrote, or a GPT-2 checkpoint.
        neighbours_read: contexts of the datastore that a prediction is mixed with.
        limit: stretches measured at most, evenly spread; 0 = all.

    Returns:
        "stretches", "tokens", "passages", "datastore_tokens"; "readings": by name {"perplexity": {mean, low, high}, "word_perplexity"},
        with kNN also {"share", "temperature"}, and except for "alone" {"ratio": {mean, low, high}, "better"}, its perplexity over that
        of "alone" and the share of resamples in which it is the lower.

    Raises:
        InvalidData: a text is missing or too short, or the memory is the text itself.
        CheckpointNotFound: no language model under that name.
    """
    model, prompts, settings = load_language_model(name)
    device = best_device()
    model.to(device)
    memory_texts, tuned_texts = load_texts(texts.memory, texts.column, console), []
    measured_texts = load_texts(texts.measured, texts.column, console)
    if memory_texts == measured_texts:
        raise InvalidData(f"{texts.memory}: the memory is the text that is measured; every token would be found in it")
    if texts.tuned:
        tuned_texts = load_texts(texts.tuned, texts.column, console)
    else:
        memory_texts, tuned_texts = split_tail(memory_texts, TUNED_SHARE)

    def cut(of: Stream, source: str) -> list[Stretch]:
        return stretches(of, stride_tokens=settings.stride_tokens, context_tokens=settings.context_tokens, name=source)

    memory = stream(memory_texts, prompts.tokenizer)
    measured = spread(cut(stream(measured_texts, prompts.tokenizer), texts.measured), limit)
    tuning = spread(cut(stream(tuned_texts, prompts.tokenizer), texts.tuned or f"end of {texts.memory}"), TUNED_STRETCHES)
    kept = passages(memory, settings.passage_tokens) if settings.passages else []
    everything = [*tuning, *measured]
    beside = retrieve(prompts, everything, kept, settings, embed_with(settings.embedder, console, "find passages for every stretch"))
    datastore = build_datastore(model, prompts, cut(memory, texts.memory), device)
    search = _Search(model, settings.stride_tokens, device, datastore, neighbours_read)
    readings: dict[str, list[list[list[int]]]] = {"alone": [[] for _ in everything]}
    if kept:
        readings["retrieval"] = beside
    losses: dict[str, NDArray[np.float64]] = {}
    mixtures: dict[str, Mixture] = {}
    for reading, read_beside in readings.items():
        rows = [prompts.row(stretch, found) for stretch, found in zip(everything, read_beside, strict=True)]
        mixtures[f"{reading}+knn"] = _tuned(search, rows[: len(tuning)])
        with progress(console, f"reading {reading}", len(measured)) as update:
            losses |= _measured(search, rows[len(tuning) :], reading, mixtures[f"{reading}+knn"], update)
    words = sum(stretch.words for stretch in measured) / len(measured)  # of a stretch
    return {
        "stretches": len(measured),
        "tokens": len(measured) * settings.stride_tokens,
        "passages": len(kept),
        "datastore_tokens": len(datastore.tokens),
        "readings": _compared(losses, mixtures, settings.stride_tokens / words if words else math.nan),
    }


def _tuned(search: _Search, rows: Rows) -> Mixture:
    parts = [part[1:] for part in search.found(rows)]
    return tune(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _measured(search: _Search, rows: Rows, reading: str, mixture: Mixture, update: Any) -> dict[str, NDArray[np.float64]]:
    """(stretches,) mean -log p of a token, by the model and by the mixture."""
    alone, both = np.zeros(len(rows)), np.zeros(len(rows))
    done = 0
    for chunk, model, distances, followed, targets in search.found(rows):
        for losses, values in ((alone, model), (both, mixed(model, distances, followed, targets, mixture))):
            losses[chunk] = -values.double().view(len(chunk), search.stride).mean(dim=1).cpu().numpy()
        done += len(chunk)
        update(done)
    return {reading: alone, f"{reading}+knn": both}


def _compared(losses: Mapping[str, NDArray[np.float64]], mixtures: Mapping[str, Mixture], tokens_a_word: float) -> dict[str, Any]:
    """Perplexity is the exponential of a mean: its interval is that of the mean, and a ratio's that of the mean difference."""
    rows: dict[str, Any] = {}
    for name, values in losses.items():
        rows[name] = {"perplexity": _exponential(asdict(interval(values)))}
        rows[name]["word_perplexity"] = _finite(perplexity(float(values.mean()) * tokens_a_word))  # none of a text of few spaces
        rows[name] |= asdict(mixtures[name]) if name in mixtures else {}
        if name != "alone":
            change = asdict(paired_difference(values, losses["alone"]))
            rows[name] |= {"better": 1 - change.pop("better"), "ratio": _exponential(change)}
    return rows


def _exponential(found: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _finite(perplexity(value)) for name, value in found.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def perplexity_table(report: Mapping[str, Any]) -> str:
    """The readings as aligned lines."""
    lines = [["", "perplexity", "95 % interval", "of a word", "ratio to alone", "95 % interval", "better", "lambda"]]
    for name, row in report["readings"].items():
        own, ratio = row["perplexity"], row.get("ratio")
        line = [
            name,
            _cell(own["mean"], 2),
            f"{_cell(own['low'], 2)} to {_cell(own['high'], 2)}",
            _cell(row["word_perplexity"], 1),
        ]
        line += (
            [_cell(ratio["mean"], 3), f"{_cell(ratio['low'], 3)} to {_cell(ratio['high'], 3)}", f"{100 * row['better']:.1f} %"]
            if ratio
            else [""] * 3
        )
        lines.append([*line, f"{row['share']:.2f}" if "share" in row else ""])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
