"""EM and F1 of a generator's answers in PyTorch: beside what retrieval returns, and closed-book by the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from openbook_training.beir import EVALUATION
from openbook_training.errors import InvalidData
from openbook_training.generator import answer_all, load_generator
from openbook_training.language_model import embed_with
from openbook_training.negatives import ranked
from openbook_training.pretrained import best_device
from openbook_training.retrieval import load_retrieval
from openbook_training.squad import answer_scores, spread
from rich.console import Console

from openbook_export.checkpoint_scores import compared


def measure_generator(name: str, data: str, *, limit: int, console: Console) -> dict[str, Any]:
    """Questions that have answers, each beside the best passages of the whole corpus; the baseline reads none.

    Args:
        name: folder that `openbook train generator` wrote.
        data: folder in BEIR's layout, or SQuAD-shaped questions, whose contexts are the corpus.
        limit: questions at most, evenly spread; 0 = all.

    Returns:
        "questions", "passages", "retrieved" (how many a question), and what `compared` returns.

    Raises:
        InvalidData: the data are missing, or no question has an answer.
        CheckpointNotFound: no generator in the folder.
    """
    model, encoder, settings = load_generator(name)
    device = best_device()
    model.to(device)
    corpus = load_retrieval(data, console, EVALUATION)
    asked = spread([question for question in corpus.questions if question.answers], limit)
    if not asked:
        raise InvalidData(f"{data}: no question has an answer")
    texts = [passage.text for passage in corpus.passages]
    vectors = embed_with(settings.embedder, console, "find passages")([*texts, *(question.text for question in asked)])
    rankings = ranked(vectors[len(texts) :], vectors[: len(texts)], settings.passages)
    beside = [[texts[z] for z in ranking] for ranking in rankings]
    scores = []
    closed: list[list[str]] = [[] for _ in asked]
    for passages in (beside, closed):
        read = [(question.text, found) for question, found in zip(asked, passages, strict=True)]
        written = answer_all(model, encoder, read, settings, device)
        measured = answer_scores(written, [question.answers for question in asked])
        scores.append({what: np.array(values) for what, values in measured.items()})
    return {"questions": len(asked), "passages": len(texts), "retrieved": settings.passages} | compared(*scores)
