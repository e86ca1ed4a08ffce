"""Which generations an alias has, and which one it means; their names, and removing one.

    ALIAS                        what users name; means the live index
    ALIAS-previous               means the one that was live before it
    ALIAS-kept                   means all that were live before and were replaced
    ALIAS-<number>-<digest>      an index: a generation of the knowledge base, with passages of its own
    ALIAS-<number>-<digest>-here the same while it is live: whatever users write goes in by this name
    ALIAS-<number>-<digest>-next the same while it may take the live one's place: what is copied into it goes in by this name
    ALIAS-<number>-<digest>-held-<milliseconds>-<random>  the live one while another one is taking its place, and that other one: nobody
                                 writes to the one, and only who holds both to the other

Names are moved all together (`publication`), so a process that opened an index as the live one cannot write to it any more once it is
not, and one that fills an index cannot once it is live. A process searches the index that it opened, whatever the names mean by then, so
one embedder's questions never meet another one's passages.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openbook_server.errors import GenerationNotReady, InvalidRequest, KnowledgeBaseDamaged
from openbook_server.knowledge.elastic import schema
from openbook_server.knowledge.elastic.connection import WRITING_PATIENCE, Connection
from openbook_server.knowledge.records import BundlePlace

log = logging.getLogger(__name__)

Alias = dict[str, Any]  # one action of `update_aliases`


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How an index lies on the nodes."""

    shards: int = 1
    replicas: int = 1
    active_copies: str = "1"  # that must be there for a write; an operator may have written "all"


@dataclass(frozen=True, slots=True)
class Generation:
    """One index."""

    index: str
    facts: dict[str, str]  # format, fingerprint, dim, generation; where known: bundle_id, bundle, newest (number of a generation)
    aliases: frozenset[str]
    layout: Layout
    closed: bool  # to all writes, by a block
    readable: bool  # else an operator closed it: it keeps its names and its number, and nothing else can be said of it
    fields: frozenset[str]

    @property
    def name(self) -> str:
        return self.facts["generation"]

    @property
    def number(self) -> int:
        return int(self.name.partition("-")[0])

    @property
    def bundle(self) -> BundlePlace:
        return BundlePlace(self.facts.get("bundle_id", ""), self.facts.get("bundle", ""))

    @property
    def writing(self) -> str:
        return f"{self.index}-here"

    @property
    def filling(self) -> str:
        return f"{self.index}-next"

    @property
    def holding(self) -> str:
        """What the names of holders begin with."""
        return f"{self.index}-held-"

    @property
    def held(self) -> str | None:
        """What its holder's name for it ends with; None where nobody holds it."""
        return min((alias.removeprefix(self.holding) for alias in self.aliases if alias.startswith(self.holding)), default=None)


def previous_name(alias: str) -> str:
    return f"{alias}-previous"


def kept_name(alias: str) -> str:
    return f"{alias}-kept"


def find_generation(connection: Connection, alias: str) -> Generation | None:
    """The live one, which an alias means; None where there is no such alias.

    Raises:
        KnowledgeBaseDamaged: it means something else than one knowledge base of a format that is known here.
    """
    meant = _get(connection, alias)  # names and settings as they were at one moment, for others may move them
    if not meant:
        left = all_generations(connection, alias)
        if left and not any(alias in generation.aliases for generation in left):  # else it was made at this moment
            raise _nameless(connection, alias, left)
        return None
    if alias in meant:
        raise KnowledgeBaseDamaged(f"{connection.name}: {alias} is an index, not the alias of a knowledge base; choose another name")
    if len(meant) > 1:
        raise KnowledgeBaseDamaged(f"{connection.name} means {len(meant)} indices ({', '.join(sorted(meant))}); it must mean one")
    found = _parse(meant)
    if not found:
        raise KnowledgeBaseDamaged(
            f"{connection.name} means the index {next(iter(meant))}, which is no knowledge base of openbook's; choose another name"
        )
    return found[0]


def _nameless(connection: Connection, alias: str, left: Sequence[Generation]) -> KnowledgeBaseDamaged:
    """`left`, by number, are there, and no alias."""
    live = max(
        left, key=lambda each: (each.writing in each.aliases, each.filling not in each.aliases, kept_name(alias) not in each.aliases)
    )
    return KnowledgeBaseDamaged(
        f"{connection.name}: there is no alias of that name, but the index {live.index}; {bring_back(live, alias, live.writing)} makes it "
        "the live one again; or delete it and all its like to begin anew"
    )


def bring_back(generation: Generation, *names: str) -> str:
    """The request by which an operator gives names back to an index."""
    actions = [{"add": {"index": generation.index, "alias": name}} for name in names]
    return f"POST _aliases {json.dumps({'actions': actions})}"


def existing_generation(connection: Connection, alias: str) -> Generation:
    """As `find_generation`; raises KnowledgeBaseDamaged where there is none."""
    generation = find_generation(connection, alias)
    if generation is None:
        raise KnowledgeBaseDamaged(
            f"{connection.name} does not exist; make it: openbook index BUNDLE {connection.name} SOURCES... (or check the alias's name)"
        )
    return generation


def all_generations(connection: Connection, alias: str) -> list[Generation]:
    """Every generation of an alias, by number."""
    name = re.compile(re.escape(alias) + r"-\d+-[0-9a-f]{12}")
    found = _parse({index: entry for index, entry in _get(connection, f"{alias}-*").items() if name.fullmatch(index)})
    return sorted(found, key=lambda generation: generation.number)


def check_names_are_own(connection: Connection, alias: str) -> None:
    """Raises KnowledgeBaseDamaged: a name that publishing gives to generations means something else."""
    own = {generation.index for generation in all_generations(connection, alias)}
    for name in (previous_name(alias), kept_name(alias)):
        if others := sorted({*_get(connection, name)} - own):
            raise KnowledgeBaseDamaged(
                f"{connection.name}: {name}, a name that publishing gives to the generation before, means {others[0]}, which is none of "
                "its generations; remove that alias or index, or give it another name"
            )


def named_generation(connection: Connection, alias: str, name: str) -> Generation:
    """Raises InvalidRequest: there is none of that name."""
    known = {generation.name: generation for generation in all_generations(connection, alias)}
    if name not in known:
        raise InvalidRequest("name", f"{name!r} is none of {', '.join(known)}")
    return known[name]


def _get(connection: Connection, pattern: str) -> Mapping[str, Any]:
    """What Elasticsearch says of each index that a name or a pattern means."""
    found: Mapping[str, Any] | None = connection.call(
        lambda client: client.indices.get(index=pattern, expand_wildcards=["open", "closed"]), accept=[404]
    )
    return found or {}


def _parse(entries: Mapping[str, Any]) -> list[Generation]:
    """Those that are knowledge bases."""
    found = []
    for index, entry in entries.items():
        facts, settings = entry["mappings"].get("_meta", {}).get("openbook"), entry["settings"]["index"]
        if facts is None:
            continue
        if int(facts["format"]) > schema.FORMAT:
            raise KnowledgeBaseDamaged(f"{index} has format {facts['format']}, this server reads {schema.FORMAT}; update openbook")
        closed = settings.get("blocks", {}).get("write") == "true"
        fields = frozenset(entry["mappings"].get("properties", {}))
        layout = Layout(
            shards=int(settings["number_of_shards"]),
            replicas=int(settings["number_of_replicas"]),
            active_copies=settings.get("write", {}).get("wait_for_active_shards", "1"),
        )
        readable = settings.get("verified_before_close") != "true"
        found.append(Generation(index, facts, frozenset(entry["aliases"]), layout, closed, readable, fields))
    return found


def still_live(alias: str, live: Generation) -> list[Alias]:
    """Actions that change nothing, and let all that come with them fail where another index is live by now."""
    return renamed(live, alias, alias)


def renamed(generation: Generation, before: str, after: str) -> list[Alias]:
    """Actions by which an index gets one name in place of another; all that come with them fail where it has not the one before."""
    index = generation.index
    return [{"remove": {"index": index, "alias": before, "must_exist": True}}, {"add": {"index": index, "alias": after}}]


def move_names(connection: Connection, actions: Sequence[Alias]) -> None:
    """All or none of them.

    Raises:
        GenerationNotReady: one that must exist does not; another process was faster.
    """
    # 404: a name is not where it was, by others' doing or by our own first try whose answer got lost
    moved = connection.call(lambda client: client.indices.update_aliases(actions=actions), patience=WRITING_PATIENCE, accept=[404])
    if moved is None:
        raise GenerationNotReady(f"{connection.name}: another process changed its generations at this moment; look at them and try again")


def open_to_writes(connection: Connection, generation: Generation) -> None:
    settings = {"index.blocks.write": None}
    connection.call(lambda client: client.indices.put_settings(index=generation.index, settings=settings), patience=WRITING_PATIENCE)


def change_facts(connection: Connection, generation: Generation, **facts: str) -> Generation:
    """Record facts of an index, beside those it has; works while it takes no writes."""
    facts = generation.facts | facts
    if facts != generation.facts:
        meta = {"openbook": facts}
        connection.call(lambda client: client.indices.put_mapping(index=generation.index, meta=meta), patience=WRITING_PATIENCE)
    return replace(generation, facts=facts)


def remove_generation(connection: Connection, alias: str, name: str) -> None:
    """Delete the index of a generation.

    Raises:
        InvalidRequest: there is none of that name, or it is the live one.
        GenerationNotReady: another process published at the same moment.
    """
    live, wanted = existing_generation(connection, alias), named_generation(connection, alias, name)
    if live.index == wanted.index:
        raise InvalidRequest("name", f"{name} is live; publish another one first")
    move_names(connection, [*still_live(alias, live), {"remove_index": {"index": wanted.index}}])
