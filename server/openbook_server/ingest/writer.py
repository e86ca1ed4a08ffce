"""Writes while the server answers: split, embed in the engine's background lane, store; durable when a call returns.

    documents -> split (a thread for that, part by part) -> embedder (background lane) -> store and index (writer thread)

Storing is done by one thread, so writes of one document happen in the order in which they finish; questions go ahead of
them everywhere: in the engine's queue, and in the index. A large document keeps nobody waiting but itself: parts of others are
split between its own, and none is begun once its caller hung up. Callers wait for their turn at the thread that stores, and nothing is
stored or kept of one that gives up before it has come; after that the write happens whole.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from openbook_server.backlog import Lane
from openbook_server.bundle import Bundle
from openbook_server.ingest.embed import PassageEncoder
from openbook_server.ingest.parts import in_parts
from openbook_server.ingest.preparation import Splitting, digested, passages_of, replaced_sources, unstored
from openbook_server.knowledge import Document, KnowledgeBase, Passage, PassageVectors
from openbook_server.models import Models
from openbook_server.states import PASSAGES, joined, vectors_of
from openbook_server.tokenization import TextEncoder
from openbook_server.unbroken import to_the_end

ROWS_AT_ONCE = 256  # passages in the engine's queue for one write

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Upserted:
    """What became of documents that were to be stored; those that it does not name were stored as they are."""

    passages: Mapping[str, int]  # by the id of each that was written
    replaced: frozenset[str]  # those of them that took the place of another
    replaced_sources: Mapping[str, str]  # by id, where that one came from another source


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
        splitter: ThreadPoolExecutor,
    ) -> None:
        """`thread` is the one that writes to this knowledge base, whichever of its generations, `splitter` the one that makes passages
        and their tokens; the caller closes both."""
        self._knowledge_base, self._encoder, self._models, self._splitting = knowledge_base, encoder, models, splitting
        self._encode = PassageEncoder(encoder.tokenizer, bundle.embedder.max_tokens)
        self._dim = bundle.embedder.dim
        self._thread, self._splitter = thread, splitter
        self._turn = asyncio.Lock()  # of those that wait for the thread

    async def upsert(self, documents: Sequence[Document], deadline: float) -> Upserted:
        """Store documents whose ids differ.

        Args:
            deadline: time.monotonic() seconds by which the passages must be embedded.

        Raises:
            Overloaded, DeadlineExceeded, InferenceFailed, NotServing: see `Models.submit`; nothing is stored.
            KnowledgeBaseDamaged: the disk is full or the folder cannot be written; nothing is stored.
        """
        changed = await asyncio.to_thread(self._changed, documents)
        if not changed:
            return Upserted({}, frozenset(), {})
        passages = await in_parts(
            passages_of([document for document, _ in changed], self._encoder, self._splitting), self._splitter, deadline
        )
        parts = []
        for at in range(0, max(len(passages), 1), ROWS_AT_ONCE):
            part = passages[at : at + ROWS_AT_ONCE]
            rows = await self._run(lambda part=part: self._encode(part), self._splitter)  # type: ignore[misc]
            outcome = await self._models.submit(PASSAGES, rows, deadline=deadline, lane=Lane.BACKGROUND)
            parts.append(vectors_of(outcome.rows, self._dim))
        vectors = joined(parts)
        return await self._write(lambda: self._store(changed, passages, vectors))

    def _changed(self, documents: Sequence[Document]) -> list[tuple[Document, str]]:
        stored = self._knowledge_base.digests([document.id for document in documents])
        return unstored(digested(documents, self._splitting), stored)

    def _store(self, documents: Sequence[tuple[Document, str]], passages: Sequence[Passage], vectors: PassageVectors) -> Upserted:
        """Of what is stored by now: others may have written the same documents while these were embedded."""
        stored = self._knowledge_base.digests([document.id for document, _ in documents])
        changed = unstored(documents, stored)
        replaced = [document for document, _ in changed if document.id in stored]
        sources = replaced_sources(replaced, self._knowledge_base)
        ids = {document.id for document, _ in changed}
        rows = [row for row, passage in enumerate(passages) if passage.document_id in ids]
        passages = [passages[row] for row in rows]
        if changed:
            windows = [vectors.windows[row] for row in rows]
            self._knowledge_base.replace_documents(changed, passages, vectors.whole[rows], windows)
        counts = Counter(passage.document_id for passage in passages)
        return Upserted({id_: counts[id_] for id_ in ids}, frozenset(document.id for document in replaced), sources)

    async def delete(self, ids: Sequence[str]) -> dict[str, int]:
        """Remove documents; returns how many passages each of those that were stored had."""

        def remove() -> dict[str, int]:
            stored = {id_: len(passages) for id_, passages in self._knowledge_base.documents(ids).items()}
            stored = dict.fromkeys(self._knowledge_base.digests(ids), 0) | stored
            self._knowledge_base.delete_documents(ids)  # also of what is not stored: a write that was stopped may have left something
            return stored

        return await self._write(remove)

    async def snapshot(self) -> None:
        """Save the index; see `KnowledgeBase.snapshot`."""
        await self._write(self._knowledge_base.snapshot)

    async def _write(self, work: Callable[[], _T]) -> _T:
        """One at a time, for what is in the thread's queue cannot be taken back."""
        async with self._turn:
            return await to_the_end(self._run(work, self._thread))

    async def _run(self, work: Callable[[], _T], thread: ThreadPoolExecutor) -> _T:
        return await asyncio.get_running_loop().run_in_executor(thread, work)
