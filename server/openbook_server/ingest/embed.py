"""Passages to rows of tokens and to vectors, by the bundle's own tokenizer and graph, which will later embed the questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tokenizers import Tokenizer

from openbook_server.bundle import EmbedderInfo
from openbook_server.engine import Runnable
from openbook_server.errors import PassageTooLong
from openbook_server.knowledge import Passage, PassageVectors
from openbook_server.rows import Row
from openbook_server.runtime import Graph
from openbook_server.states import PassageGraph, vectors_of

TITLE_TOKENS = 32  # of a title that stand before its passage; the rest is cut
SEPARATOR = "\n"


class PassageEncoder:
    """Turns passages into rows of tokens."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, *, whole: bool = False) -> None:
        """`max_tokens` of a row, special tokens included; what is over is cut, or refused where passages must be read `whole`."""
        self._tokenizer, self._max_tokens, self._whole = tokenizer, max_tokens, whole

    def __call__(self, passages: Sequence[Passage]) -> list[Row]:
        """Raises PassageTooLong, see `whole`."""
        beginnings = {title: self._beginning(title) for title in {passage.title for passage in passages}}  # most share theirs
        encodings = self._tokenizer.encode_batch_fast([beginnings[passage.title][0] + passage.text for passage in passages])
        rows = [encoding.ids for encoding in encodings]
        for passage, ids in zip(passages, rows, strict=True) if self._whole else ():
            if len(ids) > self._max_tokens:
                raise PassageTooLong(
                    f"passage {passage.id!r} has {len(ids)} tokens, this bundle's embedder reads {self._max_tokens} whole; documents "
                    f"must be split again: openbook index BUNDLE NEW-KB SOURCES..."
                )
        return [
            Row(
                ids if len(ids) <= self._max_tokens else [*ids[: self._max_tokens - 1], ids[-1]], text_from=1 + beginnings[passage.title][1]
            )
            for passage, ids in zip(passages, rows, strict=True)
        ]

    def _beginning(self, title: str) -> tuple[str, int]:
        """What the embedder reads before a text, and its tokens: the title, so that a passage from the middle of a document says what it
        is about."""
        if not title:
            return "", 0
        encoding = self._tokenizer.encode(title, add_special_tokens=False)
        if len(encoding.ids) > TITLE_TOKENS:
            title = title[: encoding.offsets[TITLE_TOKENS - 1][1]]
        return title + SEPARATOR, min(len(encoding.ids), TITLE_TOKENS)


class PassageEmbedder:
    """Embeds passages in batches of similar length."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        graph: Graph,
        limits: EmbedderInfo,
        *,
        whole: bool = False,
        max_batch_tokens: int = 1_024,
        sessions: int = 1,
    ) -> None:
        """`sessions`: batches that the graph's device runs at once."""
        self._encode, self._graph = PassageEncoder(tokenizer, limits.max_tokens, whole=whole), PassageGraph(graph, limits.token_dims)
        self._dim, self._budget, self._sessions = limits.dim, max_batch_tokens, sessions

    def __call__(self, passages: Sequence[Passage]) -> PassageVectors:
        """What each passage is found by; it depends on that passage alone, never on its neighbours."""
        outputs = outputs_of(self._graph, self._encode(passages), max_batch_tokens=self._budget, sessions=self._sessions)
        return vectors_of(outputs, self._dim)


def outputs_of(graph: Runnable, rows: Sequence[Row], *, max_batch_tokens: int = 1_024, sessions: int = 1) -> list[Mapping[str, Any]]:
    """A graph's outputs row by row, in the order of the rows; for whoever has all of them at hand and no engine.

    Args:
        sessions: batches that the graph's device runs at once.
    """
    outputs: list[Mapping[str, Any]] = [{}] * len(rows)

    def run(batch: Sequence[int]) -> None:
        length = graph.buckets.padded_length(rows[batch[0]].tokens)
        results = graph.run_rows([rows[at] for at in batch], length)
        for place, at in enumerate(batch):
            outputs[at] = {name: values[place] for name, values in results.items()}

    with ThreadPoolExecutor(sessions) as threads:
        list(threads.map(run, graph.buckets.batches([row.tokens for row in rows], max_batch_tokens)))
    return outputs
