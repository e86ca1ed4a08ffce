"""The embedded knowledge base: a store, the indexes derived from it, and search over both.

Opening loads the newest good snapshot of the graph, adds the rows it lacks and drops those that are gone: after any
crash the indexes hold exactly what the store holds. One process at a time has a knowledge base open.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from openbook_server.errors import FingerprintMismatch, KnowledgeBaseDamaged, KnowledgeBaseLocked
from openbook_server.knowledge.fusion import Candidates, depth, rank
from openbook_server.knowledge.graph import EF_CONSTRUCTION
from openbook_server.knowledge.graph import M as LINKS
from openbook_server.knowledge.projection import Vectors
from openbook_server.knowledge.records import Counts, Document, Hit, Passage, SearchOptions
from openbook_server.knowledge.snapshots import load_snapshot, save_snapshot
from openbook_server.knowledge.store import FILE, Store
from openbook_server.knowledge.vectors import FLAT_LIMIT, VectorIndex, check_vectors
from openbook_server.knowledge.watch import Recall, RecallWatch
from openbook_server.knowledge.words import WordIndex

log = logging.getLogger(__name__)

_LOCK = "lock"
_GRAPH_DIMS = "graph_dims"  # the fact under which a knowledge base keeps its setting


class EmbeddedKnowledgeBase:
    """A `KnowledgeBase` in a folder: search from one thread, write from another."""

    search_threads = 1  # numpy and hnswlib use the cores themselves

    def __init__(
        self,
        folder: Path,
        *,
        fingerprint: str,
        dim: int,
        create: bool = False,
        flat_limit: int = FLAT_LIMIT,
        graph_dims: int | None = None,
    ) -> None:
        """Open a knowledge base.

        Args:
            fingerprint: of the embedder that will query it.
            dim: of its vectors.
            create: make the folder and an empty knowledge base where there is none.
            graph_dims: dimensions of what the graph holds, from now on; 0 = as few as the data allow, None = as before (at first 0).

        Raises:
            KnowledgeBaseLocked: another process has it open.
            KnowledgeBaseDamaged: it is missing, damaged or of a newer format.
            FingerprintMismatch: another embedder built it.
        """
        self.folder, self._dim = folder, dim
        if not create and not (folder / FILE).is_file():
            raise KnowledgeBaseDamaged(
                f"{folder} is no knowledge base, it has no {FILE}; make one: openbook index BUNDLE {folder} SOURCES..."
            )
        self._lock = _lock(folder)
        try:
            self._store = Store(folder)
            self._check(fingerprint, folder, graph_dims)
            self.generation = self._store.meta("generation") or ""
            live = self._store.numbers()
            self._index = self._open_index(live, flat_limit)
            self._words = WordIndex(folder, self._store.texts, live)
            self._watch: RecallWatch | None = None
        except BaseException:
            self._lock.close()
            raise

    def _check(self, fingerprint: str, folder: Path, graph_dims: int | None) -> None:
        built_by = self._store.meta("fingerprint")
        if built_by is not None and built_by != fingerprint:
            raise FingerprintMismatch(
                f"{folder} was built by embedder {built_by[:12]}, the bundle's is {fingerprint[:12]}; their vectors do not compare. "
                f"Serve the bundle it was built with, or build a new one: openbook index BUNDLE NEW-FOLDER SOURCES..."
            )
        before = int(self._store.meta(_GRAPH_DIMS) or 0)
        facts = {_GRAPH_DIMS: str(before if graph_dims is None else graph_dims)}
        parameters = f"{fingerprint}/{self._dim}/{LINKS}/{EF_CONSTRUCTION}/{facts[_GRAPH_DIMS]}"
        facts["generation"] = "1-" + hashlib.sha256(parameters.encode()).hexdigest()[:12]
        if built_by is None:
            self._store.initialise({"fingerprint": fingerprint, "dim": str(self._dim), **facts})
        elif graph_dims is not None and graph_dims != before:
            self._store.record(facts)  # snapshots of the generation before are not used any more

    def _open_index(self, live: frozenset[int], flat_limit: int) -> VectorIndex:
        snapshot = load_snapshot(self.folder, generation=self.generation, dim=self._dim, sequence=self._store.sequence())
        self._saved = snapshot.sequence if snapshot else -1  # sequence up to which the snapshot of this very graph goes
        index = VectorIndex(
            self._dim,
            self._vectors,
            flat_limit=flat_limit,
            graph_dims=int(self._store.meta(_GRAPH_DIMS) or 0),
            graph=snapshot.graph if snapshot else None,
            live=live,
        )
        missing = sorted(live - index.labels)
        if missing and len(missing) > flat_limit:
            log.info("building the index of %d passages that no snapshot holds", len(missing))
        for numbers, vectors in self._store.vectors(missing, self._dim):
            index.add(numbers, vectors)
        self._optimise(index)
        return index

    def _optimise(self, index: VectorIndex) -> None:
        if index.optimise():
            self._saved = -1  # else every start from the old snapshot would build the graph again

    def _vectors(self, numbers: Sequence[int]) -> dict[int, Vectors]:
        """Stored vectors of those passages that are stored."""
        batches = self._store.vectors(numbers, self._dim)
        return {number: vector for found, vectors in batches for number, vector in zip(found, vectors, strict=True)}

    def counts(self) -> Counts:
        return self._store.counts()

    def replace_documents(self, documents: Sequence[tuple[Document, str]], passages: Sequence[Passage], vectors: Vectors) -> None:
        check_vectors(vectors, len(passages), self._dim)  # a row that the index cannot take must not get into the store
        removed, added = self._store.replace(documents, passages, vectors)
        self._index.delete(removed)
        self._words.delete(removed)
        if added:
            self._index.add(added, vectors)
            self._words.add(added, [f"{passage.title}\n{passage.text}" for passage in passages])

    def delete_documents(self, ids: Sequence[str]) -> int:
        removed = self._store.delete(ids)
        self._index.delete(removed)
        self._words.delete(removed)
        return len(removed)

    def documents(self, ids: Sequence[str]) -> dict[str, list[Passage]]:
        return self._store.documents(ids)

    def page(self, after: int, size: int) -> list[tuple[int, str, str, int]]:
        return self._store.page(after, size)

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        return self._store.digests(ids)

    def facts(self, *keys: str) -> dict[str, str]:
        found = {key: self._store.meta(key) for key in keys}
        return {key: value for key, value in found.items() if value is not None}

    def record(self, facts: Mapping[str, str]) -> None:
        self._store.record(facts)

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def sequence(self) -> int:
        return self._store.sequence()

    @property
    def graph_rows(self) -> int:
        return self._index.graph_rows

    @property
    def graph_width(self) -> int:
        return self._index.graph_width

    def size_bytes(self) -> int:
        return self._store.path.stat().st_size

    def search(self, questions: Sequence[str], vectors: NDArray[np.float32] | None, options: SearchOptions) -> list[list[Hit]]:
        allowed = None if options.condition is None else self._store.matching(options.condition)
        wanted = depth(options)
        nearest: Sequence[dict[int, float]] = [{} for _ in questions]
        if options.mode != "lexical":
            if vectors is None:
                raise ValueError(f"mode {options.mode!r} needs the questions' vectors")
            watch = self._watch if allowed is None and options.ef is None and self._index.graph_rows else None
            horizon = self._store.last_number() if watch is not None else 0
            nearest = self._index.search(vectors, wanted, ef=options.ef, allowed=allowed)
            if watch is not None:
                watch.offer(vectors, nearest, horizon)
        found = []
        for at, (question, dense) in enumerate(zip(questions, nearest, strict=True)):
            words = self._words.search(question, wanted, allowed) if options.mode != "dense" else {}
            if options.mode == "hybrid" and vectors is not None:  # what only the words found gets its exact cosine
                stored = self._index.vectors([number for number in words if number not in dense])
                dense = dense | {number: float(np.dot(row, vectors[at])) for number, row in stored.items()}
            found.append(rank(question, Candidates(dense, words, self._store.passages, self._index.vectors), options))
        return found

    def watch(self, *, share: float, target: float) -> None:
        if share and self._watch is None:
            self._watch = RecallWatch(self._index, share=share, target=target)

    @property
    def recall(self) -> Recall | None:
        return self._watch.recall() if self._watch is not None else None

    @property
    def ef(self) -> int:
        return self._index.ef

    def optimise(self) -> None:
        self._index.flush()
        self._optimise(self._index)

    def snapshot(self) -> None:
        """Save graph and words, so that the next start need not build them; nothing to do while there are few rows."""
        sequence = self._store.sequence()  # before the graph is looked at: a row too many is no harm, one too few would be
        if sequence == self._saved:
            return
        self._words.flush()
        self._index.flush()
        if self._index.graph_rows:
            save_snapshot(self.folder, self._index, generation=self.generation, sequence=sequence)
        self._saved = sequence

    def publish(self) -> None:
        """A folder has one generation."""

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._store.close()
        self._lock.close()


def _lock(folder: Path) -> IO[str]:
    """Hold the folder's lock until the returned file is closed or the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / _LOCK).open("a+")
    except OSError as error:
        raise KnowledgeBaseDamaged(f"{folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        handle.close()
        raise KnowledgeBaseLocked(
            f"{folder} is open in another process (pid {owner}); stop it first, or use a copy of the folder"
        ) from error
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle
