"""Writes while the server answers: split, embed in the engine's background lane, store; durable when a call returns.

    documents -> split (writer thread) -> embedder (background lane) -> store and index (writer thread)

Storing is done by one thread, so writes of one document happen in the order in which they finish; questions go ahead of
them everywhere: in the engine's queue, and in the index.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from openbook_server.backlog import Lane
from openbook_server.bundle import Bundle
from openbook_server.ingest.embed import PassageEncoder
from openbook_server.ingest.preparation import Prepared, Splitting, prepare
from openbook_server.knowledge import Document, KnowledgeBase
from openbook_server.models import Models
from openbook_server.states import PASSAGES, joined, vectors_of
from openbook_server.tokenization import TextEncoder

ROWS_AT_ONCE = 256  # passages in the engine's queue for one write

_T = TypeVar("_T")


class Writer:
    """Writes to one knowledge base from the event loop."""

    def __init__(
        self,
        bundle: Bundle,
        knowledge_base: KnowledgeBase,
        encoder: TextEncoder,
        models: Models,
        splitting: Splitting,
        thread: ThreadPoolExecutor,
    ) -> None:
        """`thread` is the one that writes to this knowledge base, whichever of its generations; the caller closes it."""
        self._knowledge_base, self._encoder, self._models, self._splitting = knowledge_base, encoder, models, splitting
        self._encode = PassageEncoder(encoder.tokenizer, bundle.embedder.max_tokens)
        self._dim = bundle.embedder.dim
        self._thread = thread

    async def upsert(self, documents: Sequence[Document], deadline: float) -> Prepared:
        """Store documents whose ids differ; returns what of them was stored.

        Args:
            deadline: time.monotonic() seconds by which the passages must be embedded.

        Raises:
            Overloaded, DeadlineExceeded, InferenceFailed, NotServing: see `Models.submit`; nothing is stored.
            KnowledgeBaseDamaged: the disk is full or the folder cannot be written; nothing is stored.
        """
        prepared = await self._run(lambda: prepare(documents, self._knowledge_base, self._encoder, self._splitting))
        if not prepared.documents:
            return prepared
        parts = []
        for at in range(0, max(len(prepared.passages), 1), ROWS_AT_ONCE):
            part = prepared.passages[at : at + ROWS_AT_ONCE]
            rows = await self._run(lambda part=part: self._encode(part))  # type: ignore[misc]
            outcome = await self._models.submit(PASSAGES, rows, deadline=deadline, lane=Lane.BACKGROUND)
            parts.append(vectors_of(outcome.rows, self._dim))
        vectors = joined(parts)
        # From here on a caller that hangs up changes nothing: the write happens whole.
        await asyncio.shield(
            self._run(lambda: self._knowledge_base.replace_documents(prepared.documents, prepared.passages, *vectors)),
        )
        return prepared

    async def delete(self, ids: Sequence[str]) -> dict[str, int]:
        """Remove documents; returns how many passages each of those that were stored had."""

        def remove() -> dict[str, int]:
            stored = {id_: len(passages) for id_, passages in self._knowledge_base.documents(ids).items()}
            stored = dict.fromkeys(self._knowledge_base.digests(ids), 0) | stored
            self._knowledge_base.delete_documents(list(stored))
            return stored

        return await asyncio.shield(self._run(remove))

    async def snapshot(self) -> None:
        """Save the index; see `KnowledgeBase.snapshot`."""
        await asyncio.shield(self._run(self._knowledge_base.snapshot))

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
