"""Which index an alias means; making a new one; switching the alias to it.

    ALIAS                        what users name; means one index at a time
    ALIAS-next                   means the one that is being built beside it, while there is one
    ALIAS-<number>-<digest>      an index: a generation of the knowledge base
    ALIAS-<number>-<digest>-here means that index alone; what is opened is used by this name

A process stays with the index that the alias meant when it opened it, so a switch never lets one embedder's questions meet
another one's passages. The index before a switch is kept; its deletion is the operator's.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

from openbook_server.errors import FingerprintMismatch, KnowledgeBaseDamaged, KnowledgeBaseUnavailable
from openbook_server.knowledge.elastic import schema
from openbook_server.knowledge.elastic.address import Address
from openbook_server.knowledge.elastic.connection import PATIENCE, WRITING_PATIENCE, Connection
from openbook_server.knowledge.graph import EF_CONSTRUCTION, M

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Generation:
    """One index."""

    index: str
    facts: dict[str, str]  # format, fingerprint, dim, generation

    @property
    def alias(self) -> str:
        return f"{self.index}-here"


def find_generation(connection: Connection, alias: str) -> Generation | None:
    """The one that an alias means, None where there is no such alias.

    Raises:
        KnowledgeBaseDamaged: it means something else than one knowledge base of a format that is known here.
    """
    meant = connection.call(lambda client: client.indices.get_alias(name=alias), accept=[404])
    if meant is None:
        if connection.call(lambda client: client.indices.get_settings(index=alias), accept=[404]) is not None:
            raise KnowledgeBaseDamaged(f"{connection.name}: {alias} is an index, not the alias of a knowledge base; choose another name")
        return None
    if len(meant) > 1:
        raise KnowledgeBaseDamaged(f"{connection.name} means {len(meant)} indices ({', '.join(sorted(meant))}); it must mean one")
    [index] = meant
    mapping = connection.call(lambda client: client.indices.get_mapping(index=index))
    facts = mapping[index]["mappings"].get("_meta", {}).get("openbook")
    if facts is None:
        raise KnowledgeBaseDamaged(
            f"{connection.name} means the index {index}, which is no knowledge base of openbook's; choose another name"
        )
    if int(facts["format"]) > schema.FORMAT:
        raise KnowledgeBaseDamaged(
            f"{index} has format {facts['format']}, this server reads {schema.FORMAT}; upgrade it: pip install -U openbook"
        )
    return Generation(index, facts)


def check_fingerprint(connection: Connection, generation: Generation, fingerprint: str) -> None:
    """Raises FingerprintMismatch where another embedder built it."""
    built_by = generation.facts["fingerprint"]
    if built_by != fingerprint:
        raise FingerprintMismatch(
            f"{connection.name} was built by embedder {built_by[:12]}, the bundle's is {fingerprint[:12]}; their vectors do not compare. "
            f"Serve the bundle it was built with, or build a new generation: openbook index BUNDLE ADDRESS SOURCES... --new-generation"
        )


def open_generation(connection: Connection, address: Address, *, fingerprint: str, dim: int, create: bool) -> Generation:
    """The one that the alias means; where there is none and `create` says so, a new, empty one.

    Raises:
        KnowledgeBaseDamaged: there is none, or it is none.
        FingerprintMismatch: another embedder built it.
    """
    generation = find_generation(connection, address.alias)
    if generation is None:
        if not create:
            raise KnowledgeBaseDamaged(
                f"{connection.name} does not exist; make it: openbook index BUNDLE {connection.name} SOURCES... (or check the alias's name)"
            )
        _create(connection, address, address.alias, 1, fingerprint, dim)
        generation = find_generation(connection, address.alias)
        if generation is None:
            raise KnowledgeBaseDamaged(f"{connection.name} was made and is gone again")
    check_fingerprint(connection, generation, fingerprint)
    _check_health(connection, generation)
    return generation


def open_next_generation(connection: Connection, address: Address, *, fingerprint: str, dim: int) -> Generation:
    """The one that is being built beside the one in use; a new one where there is none; the first where none is in use.

    Raises:
        FingerprintMismatch: another embedder began to build one.
    """
    current = find_generation(connection, address.alias)
    if current is None:
        return open_generation(connection, address, fingerprint=fingerprint, dim=dim, create=True)
    following = f"{address.alias}-next"
    generation = find_generation(connection, following)
    if generation is None:
        number = 1 + int(current.facts["generation"].partition("-")[0])
        while find_generation(connection, _index(address, number, fingerprint, dim) + "-here") is not None:
            number += 1  # built once and left behind
        _create(connection, address, following, number, fingerprint, dim)
        generation = find_generation(connection, following)
        if generation is None:
            raise KnowledgeBaseDamaged(f"{connection.name}: {following} was made and is gone again")
    built_by = generation.facts["fingerprint"]
    if built_by != fingerprint:
        raise FingerprintMismatch(
            f"{connection.name}: embedder {built_by[:12]} began to build {generation.index}, the bundle's is {fingerprint[:12]}; "
            f"go on with that bundle, or delete that index first: DELETE /{generation.index}"
        )
    _check_health(connection, generation)
    return generation


def publish(connection: Connection, address: Address, generation: Generation) -> None:
    """Let the alias mean this generation from now on, in one step; nothing to do where it does already."""
    current = find_generation(connection, address.alias)
    if current is None or current.index == generation.index:
        return
    actions: list[dict[str, Any]] = [
        {"remove": {"index": current.index, "alias": address.alias}},
        {"add": {"index": generation.index, "alias": address.alias}},
        {"remove": {"index": generation.index, "alias": f"{address.alias}-next", "must_exist": False}},
    ]
    # 404: the alias was moved meanwhile, by others or by our own first try whose answer got lost
    connection.call(lambda client: client.indices.update_aliases(actions=actions), patience=WRITING_PATIENCE, accept=[404])
    meant = find_generation(connection, address.alias)
    if meant is None or meant.index != generation.index:
        raise KnowledgeBaseDamaged(f"{connection.name}: another process moved the alias at the same time; run the same command again")
    log.info(
        "%s now means %s; servers follow when they are restarted. %s is kept: DELETE /%s once nothing serves it",
        address.alias,
        generation.index,
        current.index,
        current.index,
    )


def _name(number: int, fingerprint: str, dim: int) -> str:
    return f"{number}-" + hashlib.sha256(f"{fingerprint}/{dim}/{M}/{EF_CONSTRUCTION}".encode()).hexdigest()[:12]


def _index(address: Address, number: int, fingerprint: str, dim: int) -> str:
    return f"{address.alias}-{_name(number, fingerprint, dim)}"


def _create(connection: Connection, address: Address, alias: str, number: int, fingerprint: str, dim: int) -> None:
    """Index, alias and facts come into being in one step, so there is never half of a knowledge base."""
    index = _index(address, number, fingerprint, dim)
    connection.call(
        lambda client: client.indices.create(
            index=index,
            aliases={alias: {}, f"{index}-here": {}},
            settings=schema.settings(shards=address.shards, replicas=address.replicas, active_copies=address.active_copies),
            mappings=schema.mappings(fingerprint=fingerprint, dim=dim, generation=_name(number, fingerprint, dim)),
            wait_for_active_shards="1",
            timeout=f"{max(1, int(address.timeout / 2))}s",  # for the shards; shorter than the client waits
        ),
        patience=WRITING_PATIENCE,
        accept=["resource_already_exists_exception"],  # another process was faster, or this is our own second try
    )


def _check_health(connection: Connection, generation: Generation) -> None:
    """Raises KnowledgeBaseUnavailable while a shard is missing; says so where only copies are."""
    wait = f"{int(PATIENCE)}s"
    health = connection.call(
        lambda client: client.options(ignore_status=408).cluster.health(index=generation.index, wait_for_status="yellow", timeout=wait)
    )
    if health["status"] == "red":
        raise KnowledgeBaseUnavailable(
            f"{connection.name} is red: {health['unassigned_primary_shards']} of its shards are on no node; "
            "GET _cluster/allocation/explain says why"
        )
    if health["status"] == "yellow":
        log.warning(
            "%s is yellow: %d copies of shards are missing; another node less may stop it", connection.name, health["unassigned_shards"]
        )
