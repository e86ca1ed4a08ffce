"""The knowledge base in Elasticsearch. Any number of processes may have it open, reading and writing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from openbook_server.errors import KnowledgeBaseDamaged
from openbook_server.knowledge.elastic.address import parse_address
from openbook_server.knowledge.elastic.candidates import Searcher
from openbook_server.knowledge.elastic.connection import Connection
from openbook_server.knowledge.elastic.documents import Documents
from openbook_server.knowledge.elastic.generations import find_generation, open_generation, open_next_generation, publish
from openbook_server.knowledge.elastic.state import State
from openbook_server.knowledge.graph import EF
from openbook_server.knowledge.records import Counts, Document, Hit, Passage, SearchOptions
from openbook_server.knowledge.vectors import check_vectors

log = logging.getLogger(__name__)


class ElasticsearchKnowledgeBase:
    """A `KnowledgeBase` behind an alias of an Elasticsearch cluster."""

    search_threads = 16  # waiting for the network, mostly
    ef = EF
    recall = None

    def __init__(self, address: str, *, fingerprint: str, dim: int, create: bool = False, new_generation: bool = False) -> None:
        """Open the generation that the alias means.

        Args:
            address: elasticsearch://..., see `address`.
            fingerprint: of the embedder that will query it.
            dim: of its vectors.
            create: make an empty knowledge base where there is none.
            new_generation: open, or make, the one that is built beside it and takes its place when it is published.

        Raises:
            InvalidRequest: the address is none.
            KnowledgeBaseUnavailable: the cluster does not answer, or is red.
            KnowledgeBaseRefused: wrong user or certificate, or no Elasticsearch 9.
            KnowledgeBaseDamaged: there is no such knowledge base.
            FingerprintMismatch: another embedder built it.
        """
        self._address, self._dim = parse_address(address), dim
        self.name = self._address.name
        self._connection = Connection(self._address)
        try:
            self._connection.check_version()
            if new_generation:
                self._generation = open_next_generation(self._connection, self._address, fingerprint=fingerprint, dim=dim)
            else:
                self._generation = open_generation(self._connection, self._address, fingerprint=fingerprint, dim=dim, create=create)
        except BaseException:
            self._connection.close()
            raise
        self.generation = self._generation.facts["generation"]
        self._state = State(self._connection, self._generation.alias)
        self._documents = Documents(self._connection, self._generation.alias, self._state)
        self._searcher = Searcher(self._connection, self._generation.alias)

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
        return index_bytes(self._connection, self._generation.alias)

    def counts(self) -> Counts:
        return self._documents.counts()

    def replace_documents(
        self, documents: Sequence[tuple[Document, str]], passages: Sequence[Passage], vectors: NDArray[np.float32]
    ) -> None:
        check_vectors(vectors, len(passages), self._dim)
        self._documents.replace(documents, passages, vectors)

    def delete_documents(self, ids: Sequence[str]) -> int:
        return self._documents.delete(ids)

    def documents(self, ids: Sequence[str]) -> dict[str, list[Passage]]:
        found = {id_: self._documents.passages(record) for id_, record in self._documents.records(ids).items()}
        return {id_: passages for id_, passages in found.items() if passages}

    def page(self, after: int, size: int) -> list[tuple[int, str, str, int]]:
        return self._documents.page(after, size)

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        return {id_: record.digest for id_, record in self._documents.records(ids).items()}

    def facts(self, *keys: str) -> dict[str, str]:
        known = self._generation.facts | self._state.facts()
        return {key: known[key] for key in keys if key in known}

    def record(self, facts: Mapping[str, str]) -> None:
        self._state.record(facts)

    def search(self, questions: Sequence[str], vectors: NDArray[np.float32] | None, options: SearchOptions) -> list[list[Hit]]:
        return self._searcher.search(questions, vectors, options)

    def watch(self, *, share: float, target: float) -> None:
        """Nothing: to search a whole cluster exactly costs too much."""

    def optimise(self) -> None:
        """Nothing: Elasticsearch merges by itself."""

    def snapshot(self) -> None:
        """Remove what stopped writes left behind; Elasticsearch keeps its indexes itself."""
        swept = self._documents.sweep()
        if swept:
            log.info("%s: removed what stopped writes of %d documents had left", self.name, swept)

    def build(
        self, embed: Callable[[Sequence[Passage]], NDArray[np.float32]], report: Callable[[int, int], None], stopping: Callable[[], bool]
    ) -> bool:
        """Nothing: each generation is an index with passages of its own, filled by storing the documents."""
        return False

    def publish(self) -> None:
        publish(self._connection, self._address, self._generation)

    def close(self) -> None:
        self._searcher.close()
        self._connection.close()


def describe(address: str) -> dict[str, str | int]:
    """What `openbook info` says of an address; needs no bundle. Raises as `ElasticsearchKnowledgeBase` does."""
    parsed = parse_address(address)
    connection = Connection(parsed)
    try:
        connection.check_version()
        generation = find_generation(connection, parsed.alias)
        if generation is None:
            raise KnowledgeBaseDamaged(f"{connection.name} does not exist; make it: openbook index BUNDLE {connection.name} SOURCES...")
        state = State(connection, generation.alias)
        counts = Documents(connection, generation.alias, state).counts()
        health = connection.call(lambda client: client.cluster.health(index=generation.index))
        return {
            "kind": "knowledge base in Elasticsearch",
            "documents": counts.documents,
            "passages": counts.passages,
            "generation": generation.facts["generation"],
            "fingerprint": generation.facts["fingerprint"],
            "dimensions": generation.facts["dim"],
            "writes": state.sequence,
            "bytes": index_bytes(connection, generation.alias),
            "index": generation.index,
            "health": f"{health['status']}, {health['active_shards']} shards and copies active, {health['unassigned_shards']} missing",
        }
    finally:
        connection.close()


def index_bytes(connection: Connection, index: str) -> int:
    """On disk, without copies."""
    stats = connection.call(lambda client: client.indices.stats(index=index, metric="store"))
    return int(stats["_all"]["primaries"]["store"]["size_in_bytes"])
