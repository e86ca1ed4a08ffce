"""Evidence found for claims, as a server finds it where none is sent, and how much of the evidence that was chosen is in it.

The passages nearest to a claim by the vectors of the untouched embedder, the one that serves, are read as one text, the best first; what
does not fit is cut. Search is exact, and done once: the embedder does not change in training. No label is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from openbook_training.beir import Passage
from openbook_training.checkpoint import Checkpoint
from openbook_training.embedding import TextEncoder
from openbook_training.labelled import Labelled
from openbook_training.negatives import ranked
from openbook_training.retrieval import load_titled

PASSAGES = 5  # that a claim is read beside: as many as a server finds where a request says nothing; a test holds the two together


def evidence_corpus(source: str, rows: Iterable[Labelled], console: Console) -> list[Passage]:
    """Where evidence is looked for: in `source`, or, where that is empty, in what the rows bring, each passage of it once.

    So a claim's own passages stand among those that were chosen for all other claims.

    Raises:
        InvalidData: the source is missing, or holds no usable row.
    """
    if source:
        return load_titled(source, console)
    texts = dict.fromkeys(text for row in rows for text in row.passages)
    return [Passage(id=str(number), text=text) for number, text in enumerate(texts)]


def beside_retrieved(
    rows: Sequence[Labelled],
    corpus: Sequence[Passage],
    count: int,
    checkpoint: Checkpoint,
    embed: Callable[[Sequence[str]], NDArray[np.float32]],
) -> list[Labelled]:
    """The same claims, each with the best `count` passages of the corpus for its evidence, best first.

    Args:
        checkpoint: whose tokenizer cuts titles: they are embedded before their passages, as the server does, and not read.
        embed: texts to (texts, d) unit vectors.
    """
    encoder = TextEncoder(checkpoint)
    texts = [encoder.passage_text(passage.title, passage.text) for passage in corpus]
    vectors = embed([*texts, *(row.text for row in rows)])
    found = ranked(vectors[len(corpus) :], vectors[: len(corpus)], count)
    return [replace(row, passages=tuple(corpus[z].text for z in best)) for row, best in zip(rows, found, strict=True)]


def evidence_found(rows: Sequence[Labelled], retrieved: Sequence[Labelled], count: int) -> dict[str, NDArray[np.float64]]:
    """How often retrieval has found the evidence that was chosen for a claim, before what does not fit is cut.

    Args:
        rows: claims with their own evidence.
        retrieved: what `beside_retrieved` made of them, with `count` passages.

    Returns:
        (rows,) of 0 and 1: "all@<count>", each of the claim's passages was found, and "any@<count>", at least one. One that stands
        within a longer passage, as a sentence does in a paragraph, was.
    """
    found = [
        [any(wanted in text for text in beside.passages) for wanted in row.passages] for row, beside in zip(rows, retrieved, strict=True)
    ]
    return {f"{name}@{count}": np.array([float(which(one)) for one in found]) for name, which in (("all", all), ("any", any))}
