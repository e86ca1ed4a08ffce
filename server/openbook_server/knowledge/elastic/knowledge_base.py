"""The knowledge base in Elasticsearch: one generation of an alias. Any number of processes may have it open, reading and writing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from openbook_server.errors import GenerationNotReady, GenerationReplaced, InvalidRequest, KnowledgeBaseDamaged
from openbook_server.knowledge.elastic import publication
from openbook_server.knowledge.elastic.address import parse_address
from openbook_server.knowledge.elastic.candidates import Searcher
from openbook_server.knowledge.elastic.connection import Connection
from openbook_server.knowledge.elastic.copying import Copying
from openbook_server.knowledge.elastic.documents import Documents
from openbook_server.knowledge.elastic.generations import change_facts, existing_generation, named_generation, remove_generation
from openbook_server.knowledge.elastic.inventory import describe_generations, index_bytes
from openbook_server.knowledge.elastic.opening import Asked, make_first, open_live, open_next
from openbook_server.knowledge.elastic.publication import Entrance
from openbook_server.knowledge.elastic.state import State
from openbook_server.knowledge.graph import EF
from openbook_server.knowledge.interface import Gap
from openbook_server.knowledge.records import BundlePlace, Counts, Document, GenerationState, Hit, Passage, SearchOptions
from openbook_server.knowledge.vectors import check_vectors
from openbook_server.knowledge.windows import Tokens

log = logging.getLogger(__name__)


class ElasticsearchKnowledgeBase:
    """A `KnowledgeBase` behind an alias of an Elasticsearch cluster."""

    search_threads = 16  # waiting for the network, mostly
    ef = EF
    recall = None

    def __init__(
        self,
        address: str,
        *,
        fingerprint: str,
        dim: int,
        create: bool = False,
        graph_dims: int | None = None,
        bundle: BundlePlace | None = None,
        new_generation: bool = False,
        name: str | None = None,
    ) -> None:
        """Open the generation that the alias means, or the one that is to take its place.

        Args:
            address: elasticsearch://..., see `address`.
            fingerprint: of the embedder that will query it.
            dim: of its vectors.
            create: make an empty knowledge base where there is none.
            graph_dims: there is no choice: all of them.
            bundle: recorded as the one that a generation is served with, when it is made.
            new_generation: open the one of this embedder, this bundle and the address's number of shards, live or not; where there is
                none, add it.
            name: open the generation of this name; `fingerprint` must be its own.

        Raises:
            InvalidRequest: the address is none, or `graph_dims` asks for fewer.
            KnowledgeBaseUnavailable: the cluster does not answer, or is red.
            KnowledgeBaseRefused: wrong user or certificate, or no Elasticsearch 9.
            KnowledgeBaseDamaged: there is no such knowledge base.
            FingerprintMismatch: another embedder built it.
        """
        if graph_dims not in (None, dim):
            raise InvalidRequest("graph_dims", "Elasticsearch keeps whole vectors; leave it out")
        self._given, self._address, self._dim = address, parse_address(address), dim
        self.name, alias = self._address.name, self._address.alias
        self._connection = Connection(self._address)
        try:
            self._connection.check_version()
            asked = Asked(fingerprint, dim, bundle or BundlePlace())
            if create:
                make_first(self._connection, self._address, asked)
            if name is not None or new_generation:
                self._generation = open_next(self._connection, self._address, asked, name)
                live = existing_generation(self._connection, alias).index == self._generation.index
            else:
                self._generation = open_live(self._connection, self._address, asked)
                live = True  # if it was replaced meanwhile, the first write says so
        except BaseException:
            self._connection.close()
            raise
        index = self._generation.index
        self._entrance = Entrance(self._connection, alias, self._generation, live=live)
        self._state = State(self._connection, index, self._entrance)
        self._live_state = State(self._connection, alias)
        self._documents = Documents(self._connection, index, self._state, self._entrance)
        live_documents = Documents(self._connection, alias, self._live_state, self._entrance)
        self._copying = Copying(self._connection, live_documents, self._documents)
        self._searcher = Searcher(self._connection, index)

    def open_beside(
        self, *, fingerprint: str, dim: int, bundle: BundlePlace, graph_dims: int | None = None, name: str | None = None
    ) -> ElasticsearchKnowledgeBase:
        return ElasticsearchKnowledgeBase(
            self._given,
            fingerprint=fingerprint,
            dim=dim,
            graph_dims=graph_dims,
            bundle=bundle,
            new_generation=name is None,
            name=name,
        )

    @property
    def generation(self) -> str:
        return self._generation.name

    @property
    def live_generation(self) -> str:
        return existing_generation(self._connection.hasty(), self._address.alias).name  # it is looked at all the time

    @property
    def sequence(self) -> int:
        return self._state.sequence

    @property
    def graph_rows(self) -> int:
        return self._documents.counts().passages  # what Elasticsearch scans and what it walks is its own affair

    @property
    def graph_width(self) -> int:
        return self._dim

    def size_bytes(self) -> int:
        return index_bytes(self._connection, self._generation.index)

    def counts(self) -> Counts:
        return self._documents.counts()

    def replace_documents(
        self,
        documents: Sequence[tuple[Document, str]],
        passages: Sequence[Passage],
        vectors: NDArray[np.float32],
        windows: Sequence[bytes] = (),
    ) -> None:
        check_vectors(vectors, len(passages), self._dim)
        self._check_live()
        self._documents.replace(documents, passages, vectors, windows or [b""] * len(passages))

    def delete_documents(self, ids: Sequence[str]) -> int:
        self._check_live()
        return self._documents.delete(ids)

    def _check_live(self) -> None:
        if not self._entrance.live:
            raise RuntimeError(f"{self.generation} is not live: what is stored must be in the generation that answers")

    def documents(self, ids: Sequence[str]) -> dict[str, list[Passage]]:
        return {id_: passages for id_, passages in self._documents.documents(ids).items() if passages}

    def page(self, after: int, size: int) -> list[tuple[int, str, str, int]]:
        return self._documents.page(after, size)

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        return {id_: record.digest for id_, record in self._documents.records(ids).items()}

    def facts(self, *keys: str) -> dict[str, str]:
        known = self._generation.facts | self._live_state.facts()
        return {key: known[key] for key in keys if key in known}

    def record(self, facts: Mapping[str, str]) -> None:
        self._check_live()
        self._state.record(facts)

    def search(
        self, questions: Sequence[str], vectors: NDArray[np.float32] | None, options: SearchOptions, tokens: Tokens = ()
    ) -> list[list[Hit]]:
        return self._searcher.search(questions, vectors, options, tokens)

    def watch(self, *, share: float, target: float) -> None:
        """Nothing: to search a whole cluster exactly costs too much."""

    def optimise(self) -> None:
        """Nothing: Elasticsearch merges by itself."""

    def sweep(self) -> None:
        self._sweep(self._documents.sweep_if_due)

    def snapshot(self) -> None:
        """Remove what stopped writes left behind; Elasticsearch keeps its indexes itself."""
        named_generation(
            self._connection.hasty(), self._address.alias, self.generation
        )  # a server that stops waits for no cluster that hangs
        self._sweep(self._documents.sweep)

    def _sweep(self, sweep: Callable[[], int]) -> None:
        try:
            swept = sweep()
        except GenerationReplaced:  # whoever makes it the live one again does
            return
        if swept:
            log.info("%s: removed what stopped writes of %d documents had left", self.name, swept)

    def lacking(self, limit: int) -> Gap | None:
        return self._copying.gap(limit)

    def serve_with(self, bundle: BundlePlace) -> None:
        now = named_generation(self._connection, self._address.alias, self.generation)
        self._generation = change_facts(self._connection, now, bundle_id=bundle.id, bundle=bundle.folder)

    def hold(self) -> None:
        if self.live_generation != self.generation:
            self._entrance.held = publication.hold(self._connection, self._address.alias, self._generation)

    def release(self) -> None:
        held, self._entrance.held = self._entrance.held, None
        if held is not None:
            publication.release(self._connection, self._address.alias, held)

    def went_live(self) -> None:
        if self.live_generation != self.generation:
            raise GenerationNotReady(f"{self.name}: generation {self.generation} is not live any more")
        self._entrance.live = True

    def publish(self) -> None:
        if self.live_generation != self.generation:
            if self._entrance.held is None:
                self.hold()
            try:
                self._publish()
            except BaseException:
                self.release()
                raise
        self._entrance.live = True

    def _publish(self) -> None:
        while gap := self.lacking(limit=1):
            if gap.passages:
                lacks = f"{self.name}: generation {self.generation} lacks {self._copying.lacking()} passages"
                raise KnowledgeBaseDamaged(f"{lacks}; build it to the end first")
            gap.fill(np.empty((0, self._dim), np.float32), [])
        self._state.go_on_from(self._live_state)
        assert self._entrance.held is not None  # noqa: S101
        publication.publish(self._connection, self._address.alias, self._entrance.held, self._generation)
        self._entrance.held = None

    def generation_states(self) -> list[GenerationState]:
        return describe_generations(self._connection, self._address.alias)

    def remove_generation(self, name: str) -> None:
        remove_generation(self._connection, self._address.alias, name)

    def close(self) -> None:
        self._searcher.close()
        self._connection.close()
