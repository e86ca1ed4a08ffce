"""What there is of an alias, without a bundle: its generations, and what stands in the live one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from openbook_server.knowledge.elastic.address import parse_address
from openbook_server.knowledge.elastic.connection import Connection
from openbook_server.knowledge.elastic.copying import Copying
from openbook_server.knowledge.elastic.documents import Documents
from openbook_server.knowledge.elastic.generations import (
    Generation,
    all_generations,
    existing_generation,
    find_generation,
    kept_name,
    previous_name,
    remove_generation,
)
from openbook_server.knowledge.elastic.publication import Entrance
from openbook_server.knowledge.elastic.state import State
from openbook_server.knowledge.records import BundlePlace, GenerationState


class Alias:
    """A knowledge base that nobody opens; see `opening.Closed`."""

    def __init__(self, connection: Connection, alias: str) -> None:
        self._connection, self._alias = connection, alias

    def facts(self, *keys: str) -> dict[str, str]:
        known = State(self._connection, self._alias).facts()
        return {key: known[key] for key in keys if key in known}

    def bundles(self) -> tuple[str, dict[str, BundlePlace]]:
        live = existing_generation(self._connection, self._alias)
        return live.name, {generation.name: generation.bundle for generation in all_generations(self._connection, self._alias)}

    def states(self) -> list[GenerationState]:
        return describe_generations(self._connection, self._alias)

    def remove(self, name: str) -> None:
        remove_generation(self._connection, self._alias, name)


@contextmanager
def look(address: str) -> Iterator[Alias | None]:
    """What an address means, None where there is nothing yet. Raises as `ElasticsearchKnowledgeBase` does."""
    parsed = parse_address(address)
    connection = Connection(parsed)
    try:
        connection.check_version()
        yield Alias(connection, parsed.alias) if find_generation(connection, parsed.alias) is not None else None
    finally:
        connection.close()


def describe(address: str) -> dict[str, str | int]:
    """What `openbook info` says of an address. Raises as `ElasticsearchKnowledgeBase` does."""
    parsed = parse_address(address)
    connection = Connection(parsed)
    try:
        connection.check_version()
        generation = existing_generation(connection, parsed.alias)
        counts = _documents(connection, parsed.alias, generation).counts()
        health = connection.call(lambda client: client.cluster.health(index=generation.index))
        facts: dict[str, str | int] = {
            "kind": "knowledge base in Elasticsearch",
            "documents": counts.documents,
            "passages": counts.passages,
            "generation": generation.name,
            "fingerprint": generation.facts["fingerprint"],
            "dimensions": generation.facts["dim"],
            "writes": State(connection, generation.index).sequence,
            "bytes": index_bytes(connection, generation.index),
            "index": generation.index,
            "health": f"{health['status']}, {health['active_shards']} shards and copies active, {health['unassigned_shards']} missing",
        }
        return facts | {f"generation {state.name}": str(state) for state in describe_generations(connection, parsed.alias)}
    finally:
        connection.close()


def describe_generations(connection: Connection, alias: str) -> list[GenerationState]:
    """All generations of an alias, by number, but those that an operator closed."""
    live = existing_generation(connection, alias)
    live_documents = _documents(connection, alias, live)
    passages = live_documents.counts().passages
    states = []
    for generation in (each for each in all_generations(connection, alias) if each.readable):
        is_live = generation.index == live.index
        documents = _documents(connection, alias, generation)
        lacking = 0 if is_live else Copying(connection, live_documents, documents).lacking()
        dim = int(generation.facts["dim"])
        states.append(
            GenerationState(
                name=generation.name,
                state="live" if is_live else "kept" if kept_name(alias) in generation.aliases else "new",
                previous=previous_name(alias) in generation.aliases,
                fingerprint=generation.facts["fingerprint"],
                dim=dim,
                graph_dims=dim,
                bundle=generation.bundle,
                passages=passages - lacking,
                lacking=lacking,
                vector_bytes=index_bytes(connection, generation.index),
                snapshot_bytes=0,
            )
        )
    return states


def index_bytes(connection: Connection, index: str) -> int:
    """On disk, without copies."""
    stats = connection.call(lambda client: client.indices.stats(index=index, metric="store"))
    return int(stats["_all"]["primaries"]["store"]["size_in_bytes"])


def _documents(connection: Connection, alias: str, generation: Generation) -> Documents:
    entrance = Entrance(connection, alias, generation, live=False)
    return Documents(connection, generation.index, State(connection, generation.index), entrance)
