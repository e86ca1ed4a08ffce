"""The KnowledgeBase service of openbook.v1: documents in and out while the server answers.

The knowledge base may be on another machine, so every question to it is asked in a thread, never on the event loop.
A document that is bad beside good ones fails alone, in its own result; every other failure is raised for `frontend`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import openbook_pb2 as pb

from openbook_server.bundle import Bundle
from openbook_server.comparison import Comparison
from openbook_server.config import ServerConfig
from openbook_server.errors import InvalidRequest, MessageTooLarge, ReadOnly
from openbook_server.ingest.limits import MAX_ID_BYTES, MAX_STORED_ID_BYTES, excess
from openbook_server.ingest.writer import Writer
from openbook_server.knowledge import Document, KnowledgeBase, Passage
from openbook_server.knowledge.watch import Estimate
from openbook_server.listening import max_wire_bytes
from openbook_server.validation import bounded
from openbook_server.wire import Parsed
from openbook_server.work import Work

PAGE_SIZE, MAX_PAGE_SIZE = 100, 1_000
_READ_AT_ONCE = 16  # documents
_FRAME_BYTES = 6  # of a document in a reply: a tag and a length


class KnowledgeService:
    """Serves one knowledge base; `writer` is None where it takes no writes."""

    def __init__(self, bundle: Bundle, knowledge_base: KnowledgeBase, writer: Writer | None, config: ServerConfig) -> None:
        self._bundle, self._knowledge_base, self._writer, self._config = bundle, knowledge_base, writer, config
        self.comparison: Comparison | None = None  # with the generation that may take this one's place

    async def upsert(self, parsed: Parsed[kb.UpsertRequest], work: Work) -> kb.UpsertResponse:
        writer, documents = self._writable(), parsed.message.documents
        self._check_count("documents", len(documents))
        errors: dict[int, InvalidRequest] = {}
        good: dict[str, Document] = {}
        for at, document in enumerate(documents):
            try:
                bad_utf8 = ("documents", at) in parsed.not_utf8
                good[document.id] = self._checked(f"documents[{at}]", document, bad_utf8=bad_utf8, known=good)
            except InvalidRequest as error:
                errors[at] = error
        results = _failures([document.id for document in documents], errors)
        if good:
            done = await writer.upsert(list(good.values()), work.deadline)
            unchanged = await asyncio.to_thread(self._knowledge_base.documents, [id_ for id_ in good if id_ not in done.passages])
            passages = {**done.passages, **{id_: len(stored) for id_, stored in unchanged.items()}}
            for at, document in enumerate(documents):
                if at not in errors:
                    outcome = kb.OUTCOME_REPLACED if document.id in done.replaced else kb.OUTCOME_CREATED
                    results[at].outcome = outcome if document.id in done.passages else kb.OUTCOME_UNCHANGED
                    results[at].passages = passages.get(document.id, 0)
                    results[at].replaced_source = done.replaced_sources.get(document.id, "")
        return kb.UpsertResponse(results=results, sequence=await self._sequence())

    async def delete(self, parsed: Parsed[kb.DeleteRequest], work: Work) -> kb.DeleteResponse:
        writer, ids = self._writable(), list(parsed.message.ids)
        errors = self._check_ids(ids, parsed.not_utf8)
        removed = await writer.delete([id_ for at, id_ in enumerate(ids) if at not in errors])
        results = _failures(ids, errors)
        for at, id_ in enumerate(ids):
            if at not in errors:
                results[at].outcome = kb.OUTCOME_DELETED if id_ in removed else kb.OUTCOME_ABSENT
                results[at].passages = removed.get(id_, 0)
        return kb.DeleteResponse(results=results, sequence=await self._sequence())

    async def get(self, parsed: Parsed[kb.GetRequest], work: Work) -> kb.GetResponse:
        ids = list(parsed.message.ids)
        for error in self._check_ids(ids, parsed.not_utf8).values():
            raise error
        return await asyncio.to_thread(self._gathered, list(dict.fromkeys(ids)))

    def _gathered(self, ids: Sequence[str]) -> kb.GetResponse:
        """Those documents that are stored; no more of them are read than a reply may hold, and some."""
        limit = max_wire_bytes(self._config)
        reply, size = kb.GetResponse(), 0
        for at in range(0, len(ids), _READ_AT_ONCE):
            part = ids[at : at + _READ_AT_ONCE]
            stored = self._knowledge_base.documents(part)
            for id_ in [id_ for id_ in part if id_ in stored]:
                document = _stored(id_, stored[id_])
                reply.documents.append(document)
                size += document.ByteSize() + _FRAME_BYTES
                if size > limit:
                    problem = f"{len(reply.documents)} of these documents exceed the limit of {limit} bytes a reply"
                    raise MessageTooLarge("ids", f"{problem}; ask for fewer, or start the server with a larger --max-message-bytes")
        return reply

    async def list(self, parsed: Parsed[kb.ListRequest], work: Work) -> kb.ListResponse:
        request = parsed.message
        size = bounded("page_size", request.page_size if request.HasField("page_size") else None, PAGE_SIZE, 1, MAX_PAGE_SIZE)
        if request.page_token and not (request.page_token.isascii() and request.page_token.isdigit() and len(request.page_token) < 19):
            raise InvalidRequest("page_token", "it is none that a page before gave; leave it empty for the first page")
        rows = await asyncio.to_thread(self._knowledge_base.page, int(request.page_token or 0), size + 1)  # one tells that more follow
        return kb.ListResponse(
            documents=[kb.ListedDocument(id=id_, source=source, passages=passages) for _, id_, source, passages in rows[:size]],
            next_page_token=str(rows[size - 1][0]) if len(rows) > size else "",
        )

    async def describe(self, parsed: Parsed[kb.DescribeKnowledgeBaseRequest], work: Work) -> kb.DescribeKnowledgeBaseResponse:
        def look() -> kb.DescribeKnowledgeBaseResponse:
            counts, recall = self._knowledge_base.counts(), self._knowledge_base.recall
            return kb.DescribeKnowledgeBaseResponse(
                generation=self._knowledge_base.generation,
                embedder_fingerprint=self._bundle.embedder.fingerprint,
                documents=counts.documents,
                passages=counts.passages,
                sequence=self._knowledge_base.sequence,
                graph_passages=self._knowledge_base.graph_rows,
                bytes=self._knowledge_base.size_bytes(),
                writable=self._writer is not None,
                graph_dims=self._knowledge_base.graph_width,
                ef=self._knowledge_base.ef,
                recall=kb.Recall(mean=recall.mean, low=recall.low, high=recall.high, samples=recall.samples) if recall else None,
                comparison=comparison_message(self.comparison),
            )

        return await asyncio.to_thread(look)

    async def snapshot(self, parsed: Parsed[kb.SnapshotRequest], work: Work) -> kb.SnapshotResponse:
        sequence = await self._sequence()
        await self._writable().snapshot()
        return kb.SnapshotResponse(sequence=sequence, graph_passages=await asyncio.to_thread(lambda: self._knowledge_base.graph_rows))

    async def _sequence(self) -> int:
        return await asyncio.to_thread(lambda: self._knowledge_base.sequence)

    def _writable(self) -> Writer:
        if self._writer is None:
            raise ReadOnly()
        return self._writer

    def _check_count(self, field: str, count: int) -> None:
        if not count:
            raise InvalidRequest(field, "none in the request; send at least one")
        if count > self._config.max_texts:
            raise MessageTooLarge(field, f"{count} exceed the limit of {self._config.max_texts} a request; send several requests")

    def _checked(self, name: str, document: kb.Document, *, bad_utf8: bool, known: Mapping[str, Document]) -> Document:
        if bad_utf8:
            raise InvalidRequest(name, "not valid UTF-8; encode its texts as UTF-8 before sending it")
        _check_id(f"{name}.id", document.id, MAX_ID_BYTES)
        if document.id in known:
            raise InvalidRequest(f"{name}.id", f"{document.id!r} comes twice in the request; send it once")
        if not document.text.strip():
            raise InvalidRequest(f"{name}.text", "empty; send some text, or use Delete")
        for field in ("title", "text", "source"):
            if "\0" in getattr(document, field):
                raise InvalidRequest(f"{name}.{field}", "holds a NUL character; leave it out")
        if any("\0" in key + value for key, value in document.metadata.items()):  # no filter would match it
            raise InvalidRequest(f"{name}.metadata", "holds a NUL character; leave it out")
        checked = Document(
            id=document.id,
            text=document.text,
            title=" ".join(document.title.split()),
            source=document.source,
            metadata=dict(document.metadata),
        )
        if problem := excess(checked):
            field, reason = problem
            raise InvalidRequest(f"{name}.{field}", reason)
        return checked

    def _check_ids(self, ids: Sequence[str], not_utf8: frozenset[tuple[str, int]]) -> dict[int, InvalidRequest]:
        self._check_count("ids", len(ids))
        errors: dict[int, InvalidRequest] = {}
        for at, id_ in enumerate(ids):
            try:
                if ("ids", at) in not_utf8:
                    raise InvalidRequest(f"ids[{at}]", "not valid UTF-8")
                _check_id(f"ids[{at}]", id_, MAX_STORED_ID_BYTES)
            except InvalidRequest as error:
                errors[at] = error
        return errors


def comparison_message(comparison: Comparison | None) -> kb.Comparison | None:
    return kb.Comparison(overlap=_share(comparison.overlap), agreement=_share(comparison.agreement)) if comparison is not None else None


def _share(estimate: Estimate | None) -> kb.Share | None:
    if estimate is None:
        return None
    return kb.Share(mean=estimate.mean, low=estimate.low, high=estimate.high, samples=estimate.samples)


def _check_id(field: str, id_: str, most: int) -> None:
    size = len(id_.encode())
    if not id_ or "\0" in id_ or size > most:
        raise InvalidRequest(field, f"{size} bytes; an id has 1 to {most}, and no NUL character")


def _failures(ids: Sequence[str], errors: Mapping[int, InvalidRequest]) -> list[kb.WriteResult]:
    """A result an id, filled in where it failed."""
    results = [kb.WriteResult(id=id_) for id_ in ids]
    for at, error in errors.items():
        results[at].error.CopyFrom(
            pb.ItemError(index=at, code=error.status.value[0], reason=error.reason, field=error.field, message=error.description)
        )
    return results


def _stored(id_: str, passages: Sequence[Passage]) -> kb.StoredDocument:
    first = passages[0]
    return kb.StoredDocument(
        id=id_,
        title=first.title,
        source=first.source,
        metadata=dict(first.metadata),
        passages=[kb.StoredPassage(id=passage.id, text=passage.text, document_start=passage.start) for passage in passages],
    )
