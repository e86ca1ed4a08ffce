"""Who writes to the live index, while it is live; and the moment in which another one takes its place.

    hold     the live index loses the name -here, by which users' writes go in, and gets a name -held-... of this holder's own; then it is
             blocked, for Elasticsearch waits for the writes under way before it says that it is. From here on nobody writes, and the index
             that follows can be brought up to date to the last document.
    publish  all names are moved in one step, -held-... among them; the block stays on the index that was replaced
    release  the block goes, then -held-..., and -here comes back

A write that does not find -here, or meets the block, looks at what the alias means by now: while the index is held it waits and tries
again, and if another index took its place it is refused. Who holds and dies leaves -held-... behind, with the time in it; after
`HOLD_SECONDS` the next write releases. Either a release or the publication finds the name still there, never both: so nothing is written to
an index that was just replaced, whatever the clocks say.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from openbook_server.errors import GenerationNotReady, GenerationReplaced
from openbook_server.knowledge.elastic.connection import WRITING_PATIENCE, Action, Connection
from openbook_server.knowledge.elastic.generations import (
    Alias,
    Generation,
    all_generations,
    change_facts,
    existing_generation,
    find_generation,
    kept_name,
    move_names,
    open_to_writes,
    previous_name,
    still_live,
)

log = logging.getLogger(__name__)

HOLD_SECONDS = 30.0  # after which whoever holds the live index is taken for dead
_LOOK_AGAIN = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class Held:
    """The live index, while nobody writes to it."""

    generation: Generation
    name: str  # that its holder gave it


def hold(connection: Connection, alias: str) -> Held:
    """Let nobody write to the live index; waits while another process holds it.

    Raises:
        GenerationNotReady: another index became live just now, or writes under way did not end.
    """
    while (live := existing_generation(connection, alias)).held is not None:
        if not _release_if_expired(connection, alias, live):
            time.sleep(_LOOK_AGAIN)
    name = f"{live.holding}{time.time_ns() // 1_000_000}-{uuid.uuid4().hex[:8]}"
    held = Held(live, name)
    actions: list[Alias] = [{"remove": {"index": live.index, "alias": live.writing, "must_exist": True}}]
    try:
        move_names(connection, [*still_live(alias, live), *actions, {"add": {"index": live.index, "alias": name}}])
    except GenerationNotReady:
        if existing_generation(connection, alias).held != name:  # else it was our own first try, whose answer got lost
            raise
    try:
        answer = connection.call(lambda client: client.indices.add_block(index=live.index, block="write"), patience=WRITING_PATIENCE)
        if not (answer["acknowledged"] and answer["shards_acknowledged"]):
            raise GenerationNotReady(f"{connection.name}: writes under way did not end in time; try again later")
        connection.refresh(live.index)  # a writer that died may not have come to it
    except BaseException:
        release(connection, alias, held)
        raise
    return held


def release(connection: Connection, alias: str, held: Held) -> None:
    """Let writes in again; nothing to do where another process did, or another index took its place."""
    live = find_generation(connection, alias)
    if live is None or live.held != held.name:
        return
    open_to_writes(connection, live)
    actions: list[Alias] = [{"remove": {"index": live.index, "alias": held.name, "must_exist": True}}]
    try:
        move_names(connection, [*still_live(alias, live), *actions, {"add": {"index": live.index, "alias": live.writing}}])
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
    actions += [{"add": {"index": live.index, "alias": name}} for name in (kept, previous)]
    actions += [{"add": {"index": following.index, "alias": name}} for name in (alias, following.writing)]
    for generation in all_generations(connection, alias):
        gone = {previous} - ({previous} if generation.index == live.index else set())
        if generation.index == following.index:
            gone |= {following.filling, kept}
        actions += [{"remove": {"index": generation.index, "alias": name}} for name in sorted(gone & generation.aliases)]
    try:
        move_names(connection, actions)
    except GenerationNotReady as error:
        if existing_generation(connection, alias).index != following.index:  # else it was our own first try, whose answer got lost
            raise GenerationNotReady(
                f"{connection.name}: what was written meanwhile could not be embedded within the {HOLD_SECONDS:.0f} s for which writes "
                "wait, or another process published; nothing changed, try again"
            ) from error
    log.info("%s now means %s; %s is kept", alias, following.index, live.index)


class Entrance:
    """By which entries get into one index, for one of two reasons; thread-safe."""

    def __init__(self, connection: Connection, alias: str, generation: Generation, *, live: bool) -> None:
        """`live`: for what users write; else for what is copied."""
        self._connection, self._alias, self._generation, self.live = connection, alias, generation, live

    def bulk(self, actions: Iterable[Action]) -> list[dict[str, Any] | None]:
        """As `Connection.bulk`.

        Raises:
            GenerationReplaced: another generation is live by now.
        """
        name = self._generation.writing if self.live else self._generation.filling
        return self._connection.bulk(name, actions, will_open=self._will_open)

    def _will_open(self) -> bool:
        """Whether to try again where the index did not take a write."""
        now = find_generation(self._connection, self._alias)
        here = now is not None and now.index == self._generation.index
        if now is None or here != self.live:
            if self.live and now is not None:
                place = now.bundle
                raise GenerationReplaced(
                    f"{self._connection.name}: generation {now.name} took the place of {self._generation.name}, with which this process "
                    f"answers; it goes with bundle {place.id[:12] or 'unknown'}, last seen in {place.folder or 'no known folder'}. "
                    "A server follows by itself where that bundle is there; else start it with the bundle"
                )
            if here:
                raise GenerationNotReady(f"{self._connection.name}: another process published {self._generation.name} meanwhile")
            return False  # the index is gone, or lost its name
        if now.held is None:
            return now.writing in now.aliases and not now.closed  # it was open again before we looked; else an operator closed it
        _release_if_expired(self._connection, self._alias, now)
        return True


def _release_if_expired(connection: Connection, alias: str, live: Generation) -> bool:
    """Where whoever holds it is taken for dead; returns whether that is so."""
    assert live.held is not None  # noqa: S101
    began = int(live.held.split("-")[-2]) / 1_000
    if abs(time.time() - began) <= HOLD_SECONDS:
        return False
    log.warning("%s: whoever was publishing a generation is gone; taking writes again", connection.name)
    release(connection, alias, Held(live, live.held))
    return True
