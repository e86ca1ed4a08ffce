"""A text as one stream of a language model's tokens, cut into stretches that are predicted and passages that are retrieved.

    ... | before, read only | stretch: predicted | ...        the stretch is x, every s tokens a new one
    | passage | passage | passage | ...                       of a memory, which may be another stream or the same

A passage that holds a part of a stretch must never be read beside it (`holds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from openbook_training.errors import InvalidData
from openbook_training.rows import build_rows, column_text, read_rows, report_left_out

# Tokens in a row that a passage and a stretch share only if they are of the same place, or of two copies of it; the length by
# which Brown et al. 2020 (appendix C) find copies of test texts, there in words.
RUN = 13


@dataclass(frozen=True, slots=True)
class Stream:
    """The rows of a source, one after another with a newline between."""

    ids: NDArray[np.int64]  # (tokens,)
    words: NDArray[np.int64]  # (tokens,) how many words, as white space parts them, begin with each


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens that are predicted after those before them."""

    place: str  # for messages
    before: list[int]  # at most as many as asked for; none at the beginning of a stream
    tokens: list[int]
    around: list[int]  # the tokens with up to RUN - 1 more on both sides
    lead: int  # how many of `around` come before the tokens
    words: int  # that begin in the tokens


def load_texts(source: str, column: str, console: Console) -> list[str]:
    """The texts of a .txt file (one a line), a .csv or .jsonl, or of a Hugging Face dataset (`NAME:SPLIT`), in order.

    Raises:
        InvalidData: the source is missing, or holds no text.
    """
    texts, problems = build_rows(read_rows(source), lambda row: column_text(row, column))
    report_left_out(console, source, len(texts), problems)
    return texts


def split_tail(texts: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """The texts without the last ones, and those, which hold about `share` of all characters: a text's own end is held out.

    Raises:
        InvalidData: nothing would be left on one of the two sides.
    """
    ends = np.cumsum([len(text) for text in texts])
    at = int(np.searchsorted(ends, (1 - share) * ends[-1], side="right"))
    if not 0 < at < len(texts):
        raise InvalidData(f"{len(texts)} texts cannot be split so that {share:.0%} are held out; give more of them, or shorter ones")
    return list(texts[:at]), list(texts[at:])


def stream(texts: Sequence[str], tokenizer: Any) -> Stream:
    """Texts by a transformers fast tokenizer, without the special tokens of its template."""
    newline = tokenizer.backend_tokenizer.encode("\n", add_special_tokens=False).ids
    ids: list[int] = []
    words: list[int] = []
    for text, encoding in zip(texts, tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True):
        if ids:
            ids += newline
            words += [0] * len(newline)
        ids += encoding.ids
        counted = 0  # characters; several byte tokens may be of one character
        for start, end in encoding.offsets:
            fresh = range(max(start, counted), end)
            words.append(sum(not text[at].isspace() and (not at or text[at - 1].isspace()) for at in fresh))
            counted = max(counted, end)
    return Stream(np.array(ids, dtype=np.int64), np.array(words, dtype=np.int64))


def stretches(of: Stream, *, stride_tokens: int, context_tokens: int, name: str) -> list[Stretch]:
    """The stream in stretches of `stride_tokens`, each token once; fewer tokens than that at its end are left out.

    Raises:
        InvalidData: there is not one stretch.
    """
    ids = of.ids.tolist()
    made = []
    for start in range(0, len(ids) - stride_tokens + 1, stride_tokens):
        end = start + stride_tokens
        first = max(0, start - RUN + 1)
        made.append(
            Stretch(
                place=f"{name}: tokens {start + 1} to {end}",
                before=ids[max(0, start - context_tokens) : start],
                tokens=ids[start:end],
                around=ids[first : end + RUN - 1],
                lead=start - first,
                words=int(of.words[start:end].sum()),
            )
        )
    if not made:
        raise InvalidData(f"{name}: {len(ids)} tokens, less than one stretch of {stride_tokens}")
    return made


def passages(of: Stream, passage_tokens: int) -> list[list[int]]:
    """The stream cut into passages; a last one that is too short to be told apart by a run is left out."""
    cut = [of.ids[at : at + passage_tokens].tolist() for at in range(0, len(of.ids), passage_tokens)]
    return [passage for passage in cut if len(passage) >= RUN]


def holds(passage: Sequence[int], stretch: Stretch) -> bool:
    """Whether a passage has a run of `RUN` tokens that touches the stretch: it is the stretch's own, or a copy of it.

    A passage that shares only tokens before the stretch is none: those are read anyway.
    """
    end = stretch.lead + len(stretch.tokens)
    around = stretch.around
    own = {tuple(around[at : at + RUN]) for at in range(max(0, stretch.lead - RUN + 1), min(end, len(around) - RUN + 1))}
    return any(tuple(passage[at : at + RUN]) in own for at in range(len(passage) - RUN + 1))
