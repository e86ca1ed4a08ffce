"""Who writes to the live index, while it is live; and the moment in which another one takes its place.

    hold     in one step the live index loses the name -here, by which users' writes go in, the one that shall follow loses the name -next,
             by which copies go in, and both get a name -held-... of this holder's own; then they are blocked, for Elasticsearch waits
             for the writes under way before it says that an index is. The block stays on the live one and goes from the other. From
             here on nobody writes to the one, and only the holder to the other, so it can be brought up to date to the last document
    publish  all names are moved in one step, both -held-... among them; the block stays on the index that was replaced
    release  the block goes, then both -held-..., and -here and -next come back

A write that does not find its name, or meets the block, looks at what the names mean by now: while the index is held it waits and tries
again, and if another index took its place it is refused. Who holds and dies leaves -held-... behind, with the time in it; after
`HOLD_SECONDS` the next write or copy releases. Either a release or the publication finds the names still there, never both: so nothing is
written to an index that was just replaced, nor copied into one that was just published, whatever the clocks say.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from openbook_server.errors import GenerationNotReady, GenerationReplaced, KnowledgeBaseDamaged
from openbook_server.knowledge.elastic.connection import WRITING_PATIENCE, Action, Connection
from openbook_server.knowledge.elastic.generations import (
    Alias,
    Generation,
    all_generations,
    bring_back,
    change_facts,
    check_names_are_own,
    existing_generation,
    find_generation,
    kept_name,
    move_names,
    open_to_writes,
    previous_name,
    renamed,
    still_live,
)

log = logging.getLogger(__name__)

HOLD_SECONDS = 30.0  # after which whoever holds the live index is taken for dead
_LOOK_AGAIN = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class Held:
    """The live index, while nobody writes to it, and the one that shall follow, while only its holder does."""

    generation: Generation
    by: str  # in the names that its holder gave both

    @property
    def name(self) -> str:
        return self.generation.holding + self.by


def hold(connection: Connection, alias: str, following: Generation) -> Held:
    """Let nobody write to the live index, and nobody else to `following`; waits while another process holds it.

    Raises:
        GenerationNotReady: another index became live just now, `following` takes no copies any more, or writes under way did not end.
    """
    check_names_are_own(connection, alias)
    live = not_held(connection, alias)
    held = Held(live, f"{time.time_ns() // 1_000_000}-{uuid.uuid4().hex[:8]}")
    actions = [*renamed(live, live.writing, held.name), *renamed(following, following.filling, following.holding + held.by)]
    try:
        move_names(connection, [*still_live(alias, live), *actions])
    except GenerationNotReady:
        if existing_generation(connection, alias).held != held.by:  # else it was our own first try, whose answer got lost
            raise
    try:
        for generation in (live, following):
            _drain(connection, generation)
        open_to_writes(connection, following)
        for generation in (live, following):
            connection.refresh(generation.index)  # a writer that died may not have come to it
    except BaseException:
        release(connection, alias, held)
        raise
    return held


def not_held(connection: Connection, alias: str) -> Generation:
    """The live one, once nobody holds it."""
    while (live := existing_generation(connection, alias)).held is not None:
        if not _release_if_expired(connection, alias, live):
            time.sleep(_LOOK_AGAIN)
    return live


def _drain(connection: Connection, generation: Generation) -> None:
    """Let the writes under way end, and no other begin."""
    answer = connection.call(lambda client: client.indices.add_block(index=generation.index, block="write"), patience=WRITING_PATIENCE)
    if not (answer["acknowledged"] and answer["shards_acknowledged"]):
        raise GenerationNotReady(f"{connection.name}: writes under way did not end in time; try again later")


def release(connection: Connection, alias: str, held: Held) -> None:
    """Let writes and copies in again; nothing to do where another process did, or another index took its place."""
    live = find_generation(connection, alias)
    if live is None or live.held != held.by:
        return
    actions = [*still_live(alias, live), *renamed(live, held.name, live.writing)]
    open_to_writes(connection, live)
    for following in all_generations(connection, alias):
        if following.index != live.index and following.holding + held.by in following.aliases:
            open_to_writes(connection, following)  # where its holder died between the block and this
            actions += renamed(following, following.holding + held.by, following.filling)
    try:
        move_names(connection, actions)
    except GenerationNotReady:
        return


def publish(connection: Connection, alias: str, held: Held, following: Generation) -> None:
    """Let the alias mean `following` in place of the one that is held, in one step.

    Raises:
        GenerationNotReady: it was held for too long.
    """
    kept, previous, live = kept_name(alias), previous_name(alias), held.generation
    change_facts(connection, following, newest=live.facts.get("newest", ""))
    actions: list[Alias] = [{"remove": {"index": live.index, "alias": name, "must_exist": True}} for name in (alias, held.name)]
    actions += renamed(following, following.holding + held.by, following.writing)
    actions += [{"add": {"index": live.index, "alias": name}} for name in (kept, previous)]
    actions += [{"add": {"index": following.index, "alias": alias}}]
    for generation in all_generations(connection, alias):
        gone = {previous} - ({previous} if generation.index == live.index else set())
        if generation.index == following.index:
            gone |= {following.filling, kept}
        actions += [{"remove": {"index": generation.index, "alias": name}} for name in sorted(gone & generation.aliases)]
    try:
        move_names(connection, actions)
    except GenerationNotReady as error:
        if existing_generation(connection, alias).index != following.index:  # else it was our own first try, whose answer got lost
            raise _held_too_long(connection) from error
    log.info("%s now means %s; %s is kept", alias, following.index, live.index)


def _held_too_long(connection: Connection) -> GenerationNotReady:
    return GenerationNotReady(
        f"{connection.name}: what was written meanwhile could not be embedded within the {HOLD_SECONDS:.0f} s for which writes "
        "wait, or another process published; nothing changed, try again"
    )


class Entrance:
    """By which entries get into one index, for one of two reasons; thread-safe."""

    def __init__(self, connection: Connection, alias: str, generation: Generation, *, live: bool) -> None:
        """`live`: for what users write; else for what is copied."""
        self._connection, self._alias, self._generation, self.live = connection, alias, generation, live
        self.held: Held | None = None  # by this process, which then copies by a name of its own

    @property
    def _name(self) -> str:
        if self.live:
            return self._generation.writing
        return self._generation.filling if self.held is None else self._generation.holding + self.held.by

    def bulk(self, actions: Iterable[Action]) -> list[dict[str, Any] | None]:
        """As `Connection.bulk`.

        Raises:
            GenerationReplaced: another generation is live by now.
            GenerationNotReady: what is copied is not wanted any more.
        """
        return self._connection.bulk(self._name, actions, will_open=self._takes_writes if self.live else self._takes_copies)

    def _takes_writes(self) -> bool:
        """Whether to try again where the index did not take a write."""
        now = find_generation(self._connection, self._alias)
        if now is None:
            return False
        if now.index != self._generation.index:
            place = now.bundle
            raise GenerationReplaced(
                f"{self._connection.name}: generation {now.name} took the place of {self._generation.name}, with which this process "
                f"answers; it goes with bundle {place.id[:12] or 'unknown'}, last seen in {place.folder or 'no known folder'}. "
                "A server follows by itself where that bundle is there; else start it with the bundle"
            )
        if now.held is None and now.writing not in now.aliases:
            raise KnowledgeBaseDamaged(
                f"{self._connection.name}: the index {now.index} has lost the name {now.writing}, by which writes go in; "
                f"{bring_back(now, now.writing)} gives it back"
            )
        if now.held is None:
            return not now.closed  # it was open again before we looked; else an operator closed it
        _release_if_expired(self._connection, self._alias, now)
        return True

    def _takes_copies(self) -> bool:
        """Whether to try again where the index did not take a copy."""
        found = {generation.index: generation for generation in all_generations(self._connection, self._alias)}  # at one moment
        own = found.get(self._generation.index)
        live = next((generation for generation in found.values() if self._alias in generation.aliases), None)
        called = f"{self._connection.name}: generation {self._generation.name}"
        if own is None:
            raise GenerationNotReady(f"{called} was removed meanwhile")
        if own is live:
            raise GenerationNotReady(f"{called} was published by another process meanwhile")
        if self._name in own.aliases:
            return not own.closed  # it was open again before we looked; else an operator closed it
        if self.held is not None:
            raise _held_too_long(self._connection)
        if live is None or live.held is None or own.holding + live.held not in own.aliases:
            raise GenerationNotReady(f"{called} was published and replaced meanwhile; it takes copies when it is built again")
        _release_if_expired(self._connection, self._alias, live)
        return True


def _release_if_expired(connection: Connection, alias: str, live: Generation) -> bool:
    """Where whoever holds it is taken for dead; returns whether that is so."""
    assert live.held is not None  # noqa: S101
    began = int(live.held.partition("-")[0]) / 1_000
    if abs(time.time() - began) <= HOLD_SECONDS:
        return False
    log.warning("%s: whoever was publishing a generation is gone; taking writes again", connection.name)
    release(connection, alias, Held(live, live.held))
    return True
