"""The indexing run: read, split, leave out what is stored already, embed, store; one transaction a batch.

Memory is bounded by the batch. A stop between two batches loses nothing, and the same run again goes on where it
stopped, because a document that is stored with the same digest is not embedded again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from openbook_server.ingest.items import Unreadable, readable_name
from openbook_server.ingest.parts import at_once
from openbook_server.ingest.preparation import Splitting, digested, passages_of, replaced_sources, unstored
from openbook_server.ingest.sources import Source, displaced, read_source
from openbook_server.knowledge import Document, KnowledgeBase, Passage, PassageVectors
from openbook_server.states import joined
from openbook_server.tokenization import TextEncoder

log = logging.getLogger(__name__)

SHOWN_PROBLEMS = 1_000  # unreadable items that are logged one by one; all are counted
_EMBEDDED_AT_ONCE = 256  # passages between two looks at whether the run shall stop: some ten seconds of one core
_BATCH_CHARACTERS = 2_000_000  # of documents read before they are split, whatever their number


@dataclass(slots=True)
class Progress:
    """Where a run is; handed to `report` after every batch."""

    documents: int = 0  # read
    embedded: int = 0  # passages embedded by this run
    passages: int = 0  # of them, those that are stored
    unchanged: int = 0  # documents that were stored already
    replaced_ids: int = 0  # ids that came twice in one run; the last one stays
    replaced_files: int = 0  # documents of other files, which had the same names in the folders that they were indexed from
    unreadable: int = 0
    bytes_read: int = 0  # of all sources, about; exact at the end of each
    _ids: set[bytes] = field(default_factory=set)  # 8-byte digests of the ids seen


class Indexing:
    """One run over some sources into one knowledge base."""

    def __init__(
        self,
        knowledge_base: KnowledgeBase,
        encoder: TextEncoder,
        embed: Callable[[Sequence[Passage]], PassageVectors],
        splitting: Splitting,
        *,
        batch: int = 64,
    ) -> None:
        """`batch` is how many documents a transaction holds."""
        self._knowledge_base, self._encoder, self._embed = knowledge_base, encoder, embed
        self._splitting, self._batch = splitting, batch
        self.progress = Progress()

    def run(self, sources: Iterable[Source], report: Callable[[Progress], None], stopping: Callable[[], bool]) -> None:
        """Index everything, or until `stopping` says so; a batch under way is then left out, it was not reported.

        Raises:
            KnowledgeBaseDamaged: a write failed; everything reported so far is stored.
        """
        for batch in self._batches(sources):
            if not self._store(batch, report, stopping):
                return
            report(self.progress)
            if stopping():
                return

    def _batches(self, sources: Iterable[Source]) -> Iterator[list[Document]]:
        batch: dict[str, Document] = {}
        characters = 0
        finished = 0
        for source in sources:
            self._note_renamed(source)
            read = 0
            for item in read_source(source):
                if isinstance(item, Unreadable):
                    self._note(source, item)
                    continue
                self.progress.documents += 1
                key = hashlib.blake2b(item.id.encode(), digest_size=8).digest()
                if key in self.progress._ids:
                    self.progress.replaced_ids += 1
                self.progress._ids.add(key)
                batch[item.id] = item
                characters += len(item.text)
                read += len(item.text) + len(item.title)
                self.progress.bytes_read = finished + min(read, source.bytes)
                if len(batch) >= self._batch or characters >= _BATCH_CHARACTERS:
                    yield list(batch.values())
                    batch, characters = {}, 0
            finished += source.bytes
            self.progress.bytes_read = finished
        if batch:
            yield list(batch.values())

    def _store(self, documents: Sequence[Document], report: Callable[[Progress], None], stopping: Callable[[], bool]) -> bool:
        """Whether the documents are stored; False where the run was stopped while they were embedded."""
        stored = self._knowledge_base.digests([document.id for document in documents])
        changed = unstored(digested(documents, self._splitting), stored)
        self.progress.unchanged += len(documents) - len(changed)
        if not changed:
            return True
        self._note_replaced([document for document, _ in changed if document.id in stored])
        passages = at_once(passages_of([document for document, _ in changed], self._encoder, self._splitting))
        parts = []
        for at in range(0, max(len(passages), 1), _EMBEDDED_AT_ONCE):  # one document may have a hundred thousand
            if at:
                report(self.progress)
            if at and stopping():
                return False
            parts.append(self._embed(passages[at : at + _EMBEDDED_AT_ONCE]))
            self.progress.embedded += len(parts[-1].whole)
        self._knowledge_base.replace_documents(changed, passages, *joined(parts))
        self.progress.passages += len(passages)
        return True

    def _note_replaced(self, documents: Sequence[Document]) -> None:
        """Two runs over two folders cannot tell files of one name apart, as one run over both does."""
        for id_, before in replaced_sources(documents, self._knowledge_base).items():
            if told := displaced(id_, before):
                if not self.progress.replaced_files:
                    log.warning("%s", told)
                self.progress.replaced_files += 1

    def _note_renamed(self, source: Source) -> None:
        """A file that was indexed without the others of its name stays stored under the id that it had by itself."""
        alone, path = readable_name(source.alone), readable_name(str(source.path))
        if source.alone and (kept := self._knowledge_base.documents([alone]).get(alone)) and kept[0].source == path:
            log.warning("%s was stored as %s before, and still is: openbook delete %s", path, alone, alone)

    def _note(self, source: Source, problem: Unreadable) -> None:
        self.progress.unreadable += 1
        if self.progress.unreadable <= SHOWN_PROBLEMS:
            log.warning("skipped %s%s: %s", source.path or source.name, f", {problem.where}" if problem.where else "", problem.reason)
        elif self.progress.unreadable == SHOWN_PROBLEMS + 1:
            log.warning("more items are skipped; from here on they are only counted")
