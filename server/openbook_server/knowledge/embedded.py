"""The embedded knowledge base: one generation of a store, the index derived from it, and search over both.

Opening loads the newest good snapshot of the graph, adds the rows it lacks and drops those that are gone: after any
crash the index holds exactly what the store holds. One process at a time has a folder open; it may have several of the
folder's generations open, which share the store's passages and words and differ in their vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from openbook_server.errors import GenerationNotReady, KnowledgeBaseDamaged
from openbook_server.knowledge.choice import choose_generation
from openbook_server.knowledge.drawing import draw
from openbook_server.knowledge.fusion import Candidates, depth, rank
from openbook_server.knowledge.home import Home
from openbook_server.knowledge.interface import Gap
from openbook_server.knowledge.inventory import describe_generations, remove_generation
from openbook_server.knowledge.projection import Vectors
from openbook_server.knowledge.records import BundlePlace, Counts, Document, GenerationState, Hit, Passage, SearchOptions
from openbook_server.knowledge.snapshots import load_snapshot, save_snapshot
from openbook_server.knowledge.store import FILE, Store, is_there
from openbook_server.knowledge.vectors import FLAT_LIMIT, VectorIndex, check_vectors
from openbook_server.knowledge.watch import NEAREST, Estimate, RecallWatch
from openbook_server.knowledge.windows import Tokens

log = logging.getLogger(__name__)


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
        bundle: BundlePlace | None = None,
        new_generation: bool = False,
        name: str | None = None,
        beside: EmbeddedKnowledgeBase | None = None,
    ) -> None:
        """Open the live generation of a knowledge base, or the one that is to take its place.

        Args:
            fingerprint: of the embedder that will query it.
            dim: of its vectors.
            create: make the folder and an empty knowledge base where there is none.
            graph_dims: dimensions of what the graph holds, from now on; 0 = as few as the data allow, None = as before (at first 0).
            bundle: recorded as the one that this generation is served with, where none is yet.
            new_generation: open the one of this embedder, these parameters (None: whichever) and this bundle, live or not; where
                there is none, add it.
            name: open the generation of this name; `fingerprint` and `graph_dims` must be its own.
            beside: another generation of the same folder that this process has open; all writing must be done by one thread.

        Raises:
            KnowledgeBaseLocked: another process has it open.
            KnowledgeBaseDamaged: it is missing, damaged or of a newer format.
            FingerprintMismatch: another embedder built the live generation.
        """
        self.folder = folder
        if not is_there(folder) and not create:
            raise KnowledgeBaseDamaged(
                f"{folder} is no knowledge base, it has no {FILE}; make one: openbook index BUNDLE {folder} SOURCES..."
            )
        self._home: Home = beside._home if beside is not None else Home(folder)
        self._watch: RecallWatch | None = None
        self._filled = 0  # number up to which nothing is lacking
        self._resident = self._home.enter()
        with ExitStack() as undo:
            undo.callback(self._home.leave, self._resident)
            self._store = Store(folder, create=create, checked=beside is not None)
            undo.callback(self._store.close)
            self._generation = choose_generation(
                folder,
                self._store,
                fingerprint=fingerprint,
                dim=dim,
                graph_dims=graph_dims,
                place=bundle or BundlePlace(),
                new_generation=new_generation,
                name=name,
            )
            self._words = self._home.words(self._store)
            self._index = self._open_index(flat_limit)
            self._resident.open(self._index, self._generation.table)
            undo.pop_all()

    def _open_index(self, flat_limit: int) -> VectorIndex:
        live = self._store.generations.numbers(self._generation)
        snapshot = load_snapshot(self.folder, generation=self.generation, dim=self._generation.dim)
        self._saved = snapshot.sequence if snapshot else -1  # sequence up to which the snapshot of this very graph goes
        index = VectorIndex(
            self._generation.dim,
            self._vectors,
            flat_limit=flat_limit,
            graph_dims=self._generation.graph_dims,
            precedence=self._home.precedence,
            graph=snapshot.graph if snapshot else None,
            live=live,
        )
        missing = sorted(live - index.labels)
        if missing and len(missing) > flat_limit:
            log.info("building the index of %d passages that no snapshot holds", len(missing))
        for numbers, vectors in self._store.generations.vectors(self._generation, missing):
            index.add(numbers, vectors)
            index.settle()
        self._optimise(index)
        return index

    def _optimise(self, index: VectorIndex) -> None:
        if index.optimise():
            self._saved = -1  # else every start from the old snapshot would build the graph again

    def _vectors(self, numbers: Sequence[int]) -> dict[int, Vectors]:
        """Stored vectors of those passages that are stored."""
        batches = self._store.generations.vectors(self._generation, numbers)
        return {number: vector for found, vectors in batches for number, vector in zip(found, vectors, strict=True)}

    def open_beside(
        self, *, fingerprint: str, dim: int, bundle: BundlePlace, graph_dims: int | None = None, name: str | None = None
    ) -> EmbeddedKnowledgeBase:
        return EmbeddedKnowledgeBase(
            self.folder,
            fingerprint=fingerprint,
            dim=dim,
            graph_dims=graph_dims,
            bundle=bundle,
            new_generation=name is None,
            name=name,
            beside=self,
        )

    def counts(self) -> Counts:
        return self._store.counts()

    def replace_documents(
        self, documents: Sequence[tuple[Document, str]], passages: Sequence[Passage], vectors: Vectors, windows: Sequence[bytes] = ()
    ) -> None:
        check_vectors(vectors, len(passages), self._generation.dim)  # a row that the index cannot take must not get into the store
        if self.live_generation != self.generation:
            raise RuntimeError(f"{self.generation} is not live: what is stored must be in the generation that answers")
        known = self._store.digests([document.id for document, _ in documents])
        with self._home.replacing() if known else nullcontext():
            removed, added = self._store.replace(documents, passages, vectors, windows or [b""] * len(passages), self._generation)
            self._home.forget(removed)
            if added:
                self._home.add(self._generation.table, added, vectors)
                self._words.add(added, [passage.searched_text for passage in passages])
        self._home.settle(self._store)

    def delete_documents(self, ids: Sequence[str]) -> int:
        with self._home.replacing():  # a search must not find one whose windows are gone already: it would look at none of the others'
            removed = self._store.delete(ids)
            self._home.forget(removed)
        self._home.settle(self._store)
        return len(removed)

    def documents(self, ids: Sequence[str]) -> dict[str, list[Passage]]:
        return self._store.documents(ids)

    def page(self, after: int, size: int) -> list[tuple[int, str, str, int]]:
        return self._store.page(after, size)

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        return self._store.digests(ids)

    def facts(self, *keys: str) -> dict[str, str]:
        found = {key: self._store.meta(key) for key in keys} | {"fingerprint": self._generation.fingerprint}
        return {key: value for key, value in found.items() if key in keys and value is not None}

    def record(self, facts: Mapping[str, str]) -> None:
        self._store.record(facts)

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def generation(self) -> str:
        return self._generation.name

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
        return self._store.size_bytes()

    def search(self, questions: Sequence[str], vectors: Vectors | None, options: SearchOptions, tokens: Tokens = ()) -> list[list[Hit]]:
        return self._home.whole(lambda: self._search(questions, vectors, options, tokens))

    def _search(self, questions: Sequence[str], vectors: Vectors | None, options: SearchOptions, tokens: Tokens) -> list[list[Hit]]:
        allowed = None if options.condition is None else self._store.matching(options.condition)
        wanted = max(depth(options), NEAREST)  # so that recall is of as many, however few are asked for
        nearest: Sequence[dict[int, float]] = [{} for _ in questions]
        if options.by_vectors:
            if vectors is None:
                raise ValueError(f"mode {options.mode!r} needs the questions' vectors")
            watch = self._watch if allowed is None and options.ef is None and self._index.graph_rows else None
            horizon = self._store.last_number() if watch is not None else 0
            nearest = self._index.search(vectors, wanted, ef=options.ef, allowed=allowed)
            if watch is not None:
                watch.offer(vectors, nearest, horizon)
        rows = sorted(self._index.labels if allowed is None else allowed) if options.mode == "random" else []
        recent = self._store.recent
        load = recent.batch(number for row in nearest for number in row) if options.mode == "dense" else recent
        found = []
        for at, (question, dense) in enumerate(zip(questions, nearest, strict=True)):
            words = self._words.search(question, wanted, allowed) if options.by_words else {}
            if options.mode == "hybrid" and vectors is not None:  # what only the words found gets its exact cosine
                dense = dense | self._index.compare(vectors[at], [number for number in words if number not in dense])
            asked = None if vectors is None else vectors[at], tokens[at] if tokens else None
            near = partial(self._store.generations.nearness, self._generation, *asked)
            found.append(rank(question, Candidates(dense, words, load, self._index.vectors, near, draw(question, rows, wanted)), options))
        return found

    def watch(self, *, share: float, target: float) -> None:
        if share and self._watch is None:
            self._watch = RecallWatch(self._index, share=share, target=target)

    @property
    def recall(self) -> Estimate | None:
        return self._watch.recall() if self._watch is not None else None

    @property
    def ef(self) -> int:
        return self._index.ef

    def optimise(self) -> None:
        self._index.flush()
        self._optimise(self._index)

    def sweep(self) -> None:
        """Nothing: a write that was stopped left nothing behind."""

    def snapshot(self) -> None:
        """Save graph and words, so that the next start need not build them; nothing to do while there are few rows."""
        sequence = self._store.sequence()  # before the graph is looked at: a row too many is no harm, one too few would be
        if sequence == self._saved:
            return
        self._words.flush(self._store.texts)
        self._index.flush()
        if self._index.graph_rows:
            others = [other.name for other in self._store.generations.all() if other.number != self._generation.number]
            save_snapshot(self.folder, self._index, generation=self.generation, sequence=sequence, others=others)
        self._saved = sequence

    def lacking(self, limit: int) -> Gap | None:
        last = self._store.last_number()
        if not (numbers := self._store.generations.lacking(self._generation, after=self._filled, limit=limit)):
            self._filled = max(self._filled, last)  # it is asked again and again, and need not look through all passages each time
        passages = dict(sorted(self._store.passages(numbers).items()))
        return Gap(list(passages.values()), partial(self._fill, list(passages))) if passages else None

    def _fill(self, numbers: Sequence[int], vectors: Vectors, windows: Sequence[bytes]) -> None:
        check_vectors(vectors, len(numbers), self._generation.dim)
        if places := self._store.generations.fill(self._generation, numbers, vectors, windows):
            self._home.add(self._generation.table, [numbers[at] for at in places], vectors[places])
            self._home.settle(self._store)
            self._saved = -1
        self._filled = max(numbers)

    def serve_with(self, bundle: BundlePlace) -> None:
        if bundle != self._generation.bundle:
            self._generation = replace(self._generation, bundle=bundle)
            self._store.generations.change(self._generation)

    @property
    def live_generation(self) -> str:
        live = self._store.generations.live()
        assert live is not None  # noqa: S101  # opening made one where there was none
        return live.name

    def generation_states(self) -> list[GenerationState]:
        return describe_generations(self.folder, self._store)

    def remove_generation(self, name: str) -> None:
        remove_generation(self.folder, self._store, name)

    def hold(self) -> None:
        """Nothing: only this process has the folder open, and lets one thread write."""

    def release(self) -> None:
        """Nothing, see `hold`."""

    def went_live(self) -> None:
        if self.live_generation != self.generation:
            raise GenerationNotReady(f"{self.name}: generation {self.generation} is not live")

    def publish(self) -> None:
        if not self._store.generations.publish(self._generation):
            lacks = self.counts().passages - self._store.generations.count(self._generation)
            raise KnowledgeBaseDamaged(f"{self.name}: generation {self.generation} lacks {lacks} passages; build it to the end first")

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._resident.close()
        self._store.close()
        self._home.leave(self._resident)
