"""Hard negatives: the passages that retrieval really returns for a question, and that do not answer it."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModel

from openbook_training.checkpoint import Checkpoint
from openbook_training.embedding import TextEncoder, encode
from openbook_training.pretrained import best_device, load_model
from openbook_training.progress import progress
from openbook_training.run_folder import make_folder
from openbook_training.squad import holds_normalised, normalise, occurrences


def embed(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    *,
    precision: str = "fp32",
    max_tokens: int = 0,
    report: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Unit vectors (len(texts), dim) float32 by the untouched checkpoint.

    Args:
        max_tokens: of a text, the rest is cut; 0 = as many as the checkpoint was made for.
        report: told how many texts are done.
    """
    encoder = TextEncoder(checkpoint)
    device = best_device()
    model = load_model(AutoModel, checkpoint, dropout=0.0, new=["pooler"]).eval().to(device)
    rows = encoder.rows(texts, max_tokens or checkpoint.max_tokens)
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        vectors = encode(model, rows, pooling=checkpoint.pooling, pad=encoder.pad, device=device, report=report)
    return vectors.cpu().numpy()


def embed_once(
    checkpoint: Checkpoint, texts: Sequence[str], folder: Path, *, precision: str, console: Console, purpose: str, max_tokens: int = 0
) -> np.ndarray:
    """`embed`, kept in `folder` under a name that changes with checkpoint, texts, precision and limit, so that a resumed run need not wait.

    Args:
        purpose: what the vectors are for, in the words of the progress report.
    """
    made_with = [checkpoint.digest(), f"{precision}/{max_tokens}" if max_tokens else precision]
    digest = hashlib.sha256("\0".join([*made_with, *texts]).encode()).hexdigest()
    file = folder / f"vectors-{digest[:16]}.npy"
    if file.is_file():
        kept: np.ndarray = np.load(file, allow_pickle=False)
        return kept
    make_folder(folder)
    with progress(console, f"embedding texts to {purpose}", len(texts)) as update:
        vectors = embed(checkpoint, texts, precision=precision, max_tokens=max_tokens, report=update)
    aside = file.with_suffix(f".{os.getpid()}.npy")  # of its own for each process of a distributed run
    np.save(aside, vectors, allow_pickle=False)
    aside.replace(file)
    return vectors


def ranked(question_vectors: np.ndarray, passage_vectors: np.ndarray, depth: int) -> Iterator[list[int]]:
    """Of each question the `depth` best-scored rows of `passage_vectors`, best first; all of them where there are fewer."""
    depth = min(depth, len(passage_vectors))
    for at in range(0, len(question_vectors), 1024):
        scores = question_vectors[at : at + 1024] @ passage_vectors.T
        best = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
        for row, columns in zip(scores, best, strict=True):
            yield [int(z) for z in columns[np.argsort(-row[columns], kind="stable")]]


def mine(
    answers: Sequence[Collection[str]],
    gold: Sequence[Collection[str]],
    question_vectors: np.ndarray,
    passages: Sequence[str],
    passage_vectors: np.ndarray,
    depth: int,
) -> list[list[int]]:
    """For each question the best-scored passages that are none of its own and hold none of its answers, best first.

    An answer is held as it is written, be it inside a longer word, or word by word in SQuAD's normal form: in other case, say.

    Args:
        answers: accepted answers of each question; none where only its own passages are known to answer it.
        gold: texts of each question's own passages.
        question_vectors: (questions, dim) unit vectors.
        passage_vectors: (passages, dim) unit vectors.
        depth: how far down the ranking to look; the result is at most that long and may be empty.
    """
    mined: list[list[int]] = []
    known: dict[int, str] = {}  # normal forms: one passage is a candidate of many questions
    for question, best in enumerate(ranked(question_vectors, passage_vectors, depth)):
        own, wanted = gold[question], answers[question]
        normal = [normalise(answer) for answer in wanted]
        others = [z for z in best if passages[z] not in own and not occurrences(passages[z], wanted)]
        if normal:
            known.update((z, normalise(passages[z])) for z in others if z not in known)
            others = [z for z in others if not holds_normalised(known[z], normal)]
        mined.append(others)
    return mined


def draw(mined: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """`count` of the mined passages without repetition, the harder the likelier (rank r weighs 1 / (r + 2))."""
    pool = list(mined)
    drawn: list[int] = []
    while pool and len(drawn) < count:
        chosen = rng.choices(range(len(pool)), weights=[1 / (rank + 2) for rank in range(len(pool))])[0]
        drawn.append(pool.pop(chosen))
    return drawn
