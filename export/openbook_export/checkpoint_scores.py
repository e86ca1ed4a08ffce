"""How good a checkpoint is, in PyTorch and without a server: its retriever on a corpus, its reader on passages that are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from openbook_training.bootstrap import interval, paired_difference
from openbook_training.checkpoint import Checkpoint
from openbook_training.embedding import TextEncoder, encode
from openbook_training.pretrained import best_device
from openbook_training.progress import progress
from openbook_training.retrieval import RetrievalSet
from openbook_training.retrieval_metrics import answer_hits, score_retrieval
from openbook_training.squad import Question, answer_scores
from rich.console import Console

from openbook_export.abstention import Scores, abstention_scores
from openbook_export.models import load_embedder, load_reader
from openbook_export.quality import pair_encoder, pytorch_predictions

BASELINE = "--baseline"


def measure_retrievers(checkpoint: Checkpoint, adapters: Sequence[Path | None], data: RetrievalSet, console: Console) -> dict[str, Any]:
    """Recall, MRR, nDCG and answer hits of exact search over the corpus, whole texts embedded as the server embeds them.

    Vectors cut to one of the dimensions that the first adapter was trained for are scored under "dim<N>/".

    Args:
        adapters: the one that is measured and, where there are two, the baseline; None = the untouched checkpoint.

    Returns:
        See `compared`.

    Raises:
        CheckpointUnsupported: see `load_embedder`; nothing has been measured yet.
    """
    embedders = [load_embedder(checkpoint, adapter, flag) for adapter, flag in zip(adapters, ("--embedder", BASELINE), strict=False)]
    encoder, device = TextEncoder(checkpoint), best_device()
    texts = [encoder.passage_text(passage.title, passage.text) for passage in data.passages]
    texts += [question.text for question in data.questions]
    measured = []
    for adapter, embedder in zip(adapters, embedders, strict=True):
        rows = encoder.rows(texts, embedder.max_tokens)
        with progress(console, f"embedding with {adapter or 'the untouched checkpoint'}", len(rows)) as update, torch.inference_mode():
            encoded = encode(
                embedder.model.to(device),
                rows,
                pooling=checkpoint.pooling,
                pad=encoder.pad,
                device=device,
                report=update,
            )
        measured.append(_retrieval_scores(encoded.cpu().numpy(), data, embedders[0].dims))
    return compared(*measured)


def _retrieval_scores(vectors: NDArray[np.float32], data: RetrievalSet, dims: Sequence[int]) -> Scores:
    """Of (passages + questions, d) vectors."""
    passages, questions = vectors[: len(data.passages)], vectors[len(data.passages) :]
    grades = [question.gold for question in data.questions]
    scores = score_retrieval(questions, passages, grades)
    answered = [row for row, question in enumerate(data.questions) if question.answers]
    if answered:
        answers = [data.questions[row].answers for row in answered]
        scores |= answer_hits(questions[answered], passages, [passage.text for passage in data.passages], answers)
    for dim in dims:
        if dim < vectors.shape[1]:
            scores |= {f"dim{dim}/{name}": values for name, values in score_retrieval(questions, passages, grades, dim).items()}
    return scores


def measure_readers(checkpoint: Checkpoint, folders: Sequence[Path], questions: Sequence[Question], console: Console) -> dict[str, Any]:
    """EM and F1, each question read beside its own passage, the best span taken whatever "no answer" scores (SQuAD 1.1).

    Where some questions have no accepted answer, EM and F1 are those of the others, and `abstention_scores` are there too.

    Args:
        questions: at least one has an accepted answer.
        folders: of the reader that is measured and, where there are two, of the baseline.

    Returns:
        See `compared`.

    Raises:
        CheckpointUnsupported: see `load_reader`; nothing has been measured yet.
    """
    readers = [load_reader(checkpoint, folder, flag) for folder, flag in zip(folders, ("--reader", BASELINE), strict=False)]
    device = best_device()
    measured: list[Scores] = []
    for folder, reader in zip(folders, readers, strict=True):
        reader.model.to(device)
        with progress(console, f"reading with {folder}", len(questions)) as update:
            predictions = pytorch_predictions(reader, pair_encoder(checkpoint, reader), questions, device=device, report=update)
        answered = [(one.text, question.answers) for one, question in zip(predictions, questions, strict=True) if question.answers]
        scores: Scores = {what: np.array(values) for what, values in answer_scores(*zip(*answered, strict=True)).items()}
        if len(answered) < len(questions):
            scores |= abstention_scores(predictions, questions, reader.null_bias)
        measured.append(scores)
    return compared(*measured)


def compared(scores: Scores, baseline: Scores | None = None) -> dict[str, Any]:
    """Percentages with 95 % intervals, and those of the differences to a baseline, for every metric that both have.

    Returns:
        "metrics" and, with a baseline, "baseline" and "difference": by metric {"mean", "low", "high"}; a difference has
        "better" too, the share of resamples in which the baseline is beaten.
    """

    def intervals(of: Scores) -> dict[str, dict[str, float]]:
        return {name: asdict(interval(100 * values)) for name, values in of.items()}

    if baseline is None:
        return {"metrics": intervals(scores)}
    both = [name for name in scores if name in baseline]
    differences = {name: asdict(paired_difference(100 * scores[name], 100 * baseline[name])) for name in both}
    return {"metrics": intervals(scores), "baseline": intervals(baseline), "difference": differences}


def table(report: Mapping[str, Any]) -> str:
    """What `compared` returned as aligned lines, a metric each."""
    head = ["", "percent", "95 % interval"]
    if "difference" in report:
        head += ["baseline", "difference", "95 % interval", "better"]
    lines = [head]
    for name, found in report["metrics"].items():
        line = [name, f"{found['mean']:.1f}", _range(found)]
        if name in report.get("difference", {}):
            change = report["difference"][name]
            baseline = report["baseline"][name]["mean"]
            line += [f"{baseline:.1f}", f"{change['mean']:+.1f}", _range(change, sign="+"), f"{100 * change['better']:.1f} %"]
        lines.append(line + [""] * (len(head) - len(line)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _range(found: Mapping[str, float], sign: str = "") -> str:
    return f"{found['low']:{sign}.1f} to {found['high']:{sign}.1f}"
