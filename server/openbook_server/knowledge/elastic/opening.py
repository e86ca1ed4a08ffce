"""Which of an alias's generations a process opens; making one where there is none."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

from openbook_server.errors import FingerprintMismatch, KnowledgeBaseRefused, KnowledgeBaseUnavailable
from openbook_server.knowledge.elastic import schema
from openbook_server.knowledge.elastic.address import Address
from openbook_server.knowledge.elastic.connection import PATIENCE, WRITING_PATIENCE, Connection
from openbook_server.knowledge.elastic.generations import (
    Generation,
    Layout,
    all_generations,
    change_facts,
    existing_generation,
    find_generation,
    move_names,
    named_generation,
    open_to_writes,
    renamed,
    still_live,
)
from openbook_server.knowledge.elastic.publication import not_held
from openbook_server.knowledge.graph import EF_CONSTRUCTION, M
from openbook_server.knowledge.records import BundlePlace

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a generation is to be like."""

    fingerprint: str  # of its embedder
    dim: int
    bundle: BundlePlace


def make_first(connection: Connection, address: Address, asked: Asked) -> None:
    """Make a knowledge base where there is none."""
    if find_generation(connection, address.alias) is None:
        first = _Made(address, 1, asked)
        _create(connection, first, [address.alias, f"{first.index}-here"], _layout(address, Layout()))


def open_live(connection: Connection, address: Address, asked: Asked) -> Generation:
    """The one that the alias means.

    Raises:
        KnowledgeBaseDamaged: there is none, or it is none.
        FingerprintMismatch: another embedder built it.
    """
    generation = existing_generation(connection, address.alias)
    built_by = generation.facts["fingerprint"]
    if built_by != asked.fingerprint:
        raise FingerprintMismatch(
            f"{connection.name} was built by embedder {built_by[:12]}, the bundle's is {asked.fingerprint[:12]}; their vectors do not "
            "compare. Serve the bundle it was built with, or build a new generation from what is stored: openbook index BUNDLE "
            f"{connection.name} --new-generation"
        )
    _add_fields(connection, generation)
    check_health(connection, generation)
    return generation


def open_next(connection: Connection, address: Address, asked: Asked, name: str | None) -> Generation:
    """The one of a name, or of a bundle and the address's number of shards, live or not; without a name, a new one where there is none.

    What the address says nothing of is as the live one's.

    Raises:
        InvalidRequest: there is none of that name.
        GenerationNotReady: another process publishes at this moment.
        KnowledgeBaseRefused: an operator closed its index.
    """
    live = existing_generation(connection, address.alias)
    known = all_generations(connection, address.alias)
    layout = _layout(address, live.layout)
    if name is not None:
        chosen = named_generation(connection, address.alias, name)
    else:
        for chosen in [live, *reversed(known)]:
            shards = chosen.layout.shards
            same = (chosen.facts["fingerprint"], chosen.facts["dim"], shards) == (asked.fingerprint, str(asked.dim), layout.shards)
            if same and chosen.bundle.id in ("", asked.bundle.id):
                break
        else:
            number = 1 + max(known[-1].number, int(live.facts.get("newest") or 0))  # never one of a generation that was removed
            change_facts(connection, live, newest=str(number))
            made = _Made(address, number, asked)
            _create(connection, made, [f"{made.index}-next"], layout)
            chosen = named_generation(connection, address.alias, made.name)
    if not chosen.readable:
        raise KnowledgeBaseRefused(
            f"{connection.name}: the index of generation {chosen.name} is closed; POST {chosen.index}/_open opens it"
        )
    for generation in (live, chosen):
        _add_fields(connection, generation)
    if chosen.index != live.index:
        _let_in(connection, address.alias, chosen)
    check_health(connection, chosen)
    return chosen


def _let_in(connection: Connection, alias: str, chosen: Generation) -> None:
    """Let what is copied into an index that is not live."""
    if chosen.filling in chosen.aliases:
        return
    live = not_held(connection, alias)  # whoever holds may be publishing this one, and wants nothing copied into it
    chosen = named_generation(connection, alias, chosen.name)
    if chosen.index == live.index or chosen.filling in chosen.aliases:
        return
    open_to_writes(connection, chosen)  # it is closed since it was replaced
    nobody_holds = renamed(live, live.writing, live.writing)
    move_names(connection, [*still_live(alias, live), *nobody_holds, {"add": {"index": chosen.index, "alias": chosen.filling}}])


def _add_fields(connection: Connection, generation: Generation) -> None:
    """Give an index of an earlier version the fields that it lacks."""
    if lacking := {name: field for name, field in schema.ADDED.items() if name not in generation.fields}:
        connection.call(lambda client: client.indices.put_mapping(index=generation.index, properties=lacking), patience=WRITING_PATIENCE)


@dataclass(frozen=True, slots=True)
class _Made:
    """A generation that is to be made."""

    address: Address
    number: int
    asked: Asked

    @property
    def name(self) -> str:
        parameters = f"{self.asked.fingerprint}/{self.asked.dim}/{M}/{EF_CONSTRUCTION}"
        return f"{self.number}-" + hashlib.sha256(parameters.encode()).hexdigest()[:12]

    @property
    def index(self) -> str:
        return f"{self.address.alias}-{self.name}"


def _layout(address: Address, otherwise: Layout) -> Layout:
    """What an address asks for."""
    return Layout(
        shards=address.shards or otherwise.shards,
        replicas=otherwise.replicas if address.replicas is None else address.replicas,
        active_copies=str(address.active_copies or otherwise.active_copies),
    )


def _create(connection: Connection, made: _Made, names: list[str], layout: Layout) -> None:
    """Index, names and facts come into being in one step, so there is never half of a knowledge base."""
    address, asked = made.address, made.asked
    bundle = {"bundle_id": asked.bundle.id, "bundle": asked.bundle.folder}
    mappings = schema.mappings(asked.dim, {"fingerprint": asked.fingerprint, "dim": str(asked.dim), "generation": made.name, **bundle})
    connection.call(
        lambda client: client.indices.create(
            index=made.index,
            aliases={name: {} for name in names},
            settings=schema.settings(shards=layout.shards, replicas=layout.replicas, active_copies=layout.active_copies),
            mappings=mappings,
            wait_for_active_shards="1",
            timeout=f"{max(1, int(address.timeout / 2))}s",  # for the shards; shorter than the client waits
        ),
        patience=WRITING_PATIENCE,
        accept=["resource_already_exists_exception"],  # another process was faster, or this is our own second try
    )


def check_health(connection: Connection, generation: Generation) -> None:
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
