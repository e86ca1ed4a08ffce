"""Hard negatives: the passages that retrieval really returns for a question, and that do not answer it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from openbook_training.checkpoint import Checkpoint
from openbook_training.pooling import pool
from openbook_training.squad import Question, occurrences


def embed(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    *,
    batch: int = 64,
    precision: str = "fp32",
    report: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Unit vectors (len(texts), dim) float32 by the checkpoint in PyTorch: the reference the exported graph must match.

    `report` is told how many texts are done after each batch.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    model = AutoModel.from_pretrained(checkpoint.folder, attn_implementation="eager", dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        inputs = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=checkpoint.max_tokens, return_tensors="pt")
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            states = model(**inputs).last_hidden_state.float()
        vectors[rows] = torch.nn.functional.normalize(pool(states, inputs["attention_mask"], checkpoint.pooling), dim=1).numpy()
        report(at + len(rows))
    return vectors


def mine(
    questions: Sequence[Question],
    question_vectors: np.ndarray,
    passages: Sequence[str],
    passage_vectors: np.ndarray,
    depth: int,
) -> list[list[int]]:
    """For each question the best-scored passages that are not its own and hold none of its answers, best first.

    Args:
        question_vectors: (questions, dim) unit vectors.
        passage_vectors: (passages, dim) unit vectors.
        depth: how far down the ranking to look; the result is at most that long and may be empty.
    """
    depth = min(depth, len(passages))
    mined: list[list[int]] = []
    for at in range(0, len(questions), 1024):
        scores = question_vectors[at : at + 1024] @ passage_vectors.T
        ranking = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
        for question, row, columns in zip(questions[at : at + 1024], scores, ranking, strict=True):
            best = columns[np.argsort(-row[columns], kind="stable")]
            mined.append([int(z) for z in best if passages[z] != question.context and not occurrences(passages[z], question.answers)])
    return mined


def draw(mined: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """`count` of the mined passages without repetition, the harder the likelier (rank r weighs 1 / (r + 2))."""
    pool = list(mined)
    drawn: list[int] = []
    while pool and len(drawn) < count:
        chosen = rng.choices(range(len(pool)), weights=[1 / (rank + 2) for rank in range(len(pool))])[0]
        drawn.append(pool.pop(chosen))
    return drawn
