"""Does the exported reader still answer as well? EM and F1 on a SQuAD-shaped file, beside PyTorch's on the same windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from openbook_server.runtime import Graph, build_device
from openbook_training.checkpoint import Checkpoint
from openbook_training.reader import Pair, PairEncoder, Prediction, predict, stated_windows
from openbook_training.squad import Question, answer_scores

from openbook_export.errors import ExportFailed
from openbook_export.models import ReaderModel

BATCH = 16  # pairs a run
CPU = torch.device("cpu")

Scores = dict[str, float]


def pair_encoder(checkpoint: Checkpoint, reader: ReaderModel) -> PairEncoder:
    """The windows that both sides read."""
    limits = {"max_tokens": reader.max_tokens, "max_question_tokens": reader.max_question_tokens}
    return stated_windows(checkpoint, **limits, separators=reader.separators)


def pytorch_predictions(
    reader: ReaderModel,
    encoder: PairEncoder,
    questions: Sequence[Question],
    *,
    device: torch.device = CPU,
    report: Callable[[int], None] = lambda done: None,
) -> list[Prediction]:
    """What the PyTorch model answers, each question read beside its own passage; `report` is told how many are done."""
    predictions: list[Prediction] = []
    for at in range(0, len(questions), BATCH):
        batch = [(question.text, [question.context]) for question in questions[at : at + BATCH]]
        limit = reader.max_answer_tokens
        predictions += predict(reader.model, encoder, batch, max_answer_tokens=limit, device=device, autocast=nullcontext)
        report(len(predictions))
    return predictions


def pytorch_scores(reader: ReaderModel, encoder: PairEncoder, questions: Sequence[Question]) -> Scores:
    """EM and F1 (0 to 100) of the PyTorch model, each question read beside its own passage."""
    return _scores([prediction.text for prediction in pytorch_predictions(reader, encoder, questions)], questions)


def graph_scores(file: Path, precision: str, encoder: PairEncoder, questions: Sequence[Question]) -> Scores:
    """EM and F1 (0 to 100) of the exported graph, on the same windows."""
    graph = Graph(file, build_device("cpu", precision))
    pairs = [pair for row, question in enumerate(questions) for pair in encoder.pairs(question.text, [question.context], row)]
    best: dict[int, tuple[float, str]] = {}
    # A passage of which the tokenizer makes nothing has no span, and is answered as `predict` answers it.
    order = sorted((pair for pair in pairs if pair.offsets), key=lambda pair: len(pair.ids))
    for at in range(0, len(order), BATCH):
        rows = order[at : at + BATCH]
        outputs = graph.run(_batch(rows, encoder.pad))
        for pair, start, end, score in zip(
            rows, outputs["span_start"][:, 0], outputs["span_end"][:, 0], outputs["span_score"][:, 0].tolist(), strict=True
        ):
            first, last = pair.offsets[int(start) - pair.first], pair.offsets[int(end) - pair.first]
            found = (score, questions[pair.question].context[first[0] : last[1]])
            best[pair.question] = max(best.get(pair.question, found), found)
    return _scores([best.get(row, (0.0, ""))[1] for row in range(len(questions))], questions)


def check_quality(
    file: Path, precision: str, reference: Scores, encoder: PairEncoder, questions: Sequence[Question], budget: float
) -> Scores:
    """`graph_scores`, refused when F1 lost more than `budget` points against `reference`.

    Raises:
        ExportFailed: it did.
    """
    scores = graph_scores(file, precision, encoder, questions)
    if reference["f1"] - scores["f1"] > budget:
        raise ExportFailed(
            f"{file.name} answers worse than PyTorch: F1 {scores['f1']:.2f} against {reference['f1']:.2f} on {len(questions)} questions; "
            f"--quality-budget allows a loss of {budget}"
        )
    return scores


def _batch(pairs: Sequence[Pair], pad: int) -> dict[str, np.ndarray]:
    length = max(len(pair.ids) for pair in pairs)
    ids = np.full((len(pairs), length), pad, np.int64)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for row, pair in enumerate(pairs):
        ids[row, : len(pair.ids)] = pair.ids
        mask[row, : len(pair.ids)] = 1
        types[row, pair.first : len(pair.ids)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _scores(answers: Sequence[str], questions: Sequence[Question]) -> Scores:
    scores = answer_scores(answers, [question.answers for question in questions])
    return {what: 100 * sum(values) / len(values) for what, values in scores.items()}
