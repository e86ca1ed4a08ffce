"""Which pair of bundle and generation a server answers with, and which one follows it.

    build     a second pair is opened beside the live one; the passages that its generation lacks are embedded in the background
              lane, and so is what is written meanwhile
    publish   writes wait, what is still lacking is embedded, the generation goes live in the store, and new requests get the new
              pair; those that began with the old one end with it, and then it is closed
    rollback  publishes the generation that was live before, which is brought up to date first in the same way
    follow    where another process published a generation of the same knowledge base, new requests get that pair here, too

The store is the truth about which generation is live: a server that dies at any point comes up with the pair before or the new
one. One change is made at a time, and a caller that hangs up stops none. That a generation is built is waited for between changes:
meanwhile others are made, and one that takes what is being built away, a removal say, ends the wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from openbook_server.bundle import Bundle, load_bundle
from openbook_server.errors import GenerationNotReady, InvalidRequest, NotServing, OpenBookError
from openbook_server.following import Following
from openbook_server.gate import Gate
from openbook_server.ingest.preparation import FACTS, check_stored_passages
from openbook_server.knowledge import KnowledgeBase
from openbook_server.knowledge.opening import recorded_bundle
from openbook_server.knowledge.records import GenerationState
from openbook_server.pair import Pair, Shared
from openbook_server.retiring import Retiring
from openbook_server.served import Served
from openbook_server.unbroken import to_the_end, uncancelled

log = logging.getLogger(__name__)

_LOOK_AGAIN = 2.0  # seconds between two looks at what other processes made live

_T = TypeVar("_T")


class Front(Protocol):
    """Where requests come in."""

    served: Served | None  # what new requests get; None = the server is shutting down
    writes: Gate  # every request that writes is inside


class Succession:
    """Of the pairs of one server with a knowledge base."""

    def __init__(self, live: Pair, knowledge_base: KnowledgeBase, shared: Shared, front: Front) -> None:
        self.live, self._knowledge_base = live, knowledge_base
        self._shared, self._front = shared, front
        self.following: Following | None = None
        self._change = asyncio.Lock()
        self._draining = asyncio.Event()
        self._changes: set[asyncio.Task[Any]] = set()
        self._retiring = Retiring(shared)
        self._watching: asyncio.Future[None] | None = None

    async def states(self) -> list[GenerationState]:
        with self.live.served.request():  # it stays open meanwhile
            return await asyncio.to_thread(self._knowledge_base.generation_states)

    async def build(self, folder: Path, graph_dims: int | None) -> str:
        """Begin, or go on, to build the generation of a bundle; returns its name once it is open.

        Raises:
            BundleInvalid, PassageTooLong: the bundle cannot take the place of the live one.
            InvalidRequest: `graph_dims` is out of range, or the live generation is the one that is asked for.
            GenerationNotReady: another one is being built.
        """
        return await self._uncancelled(lambda: self._build(folder, graph_dims))

    async def publish(self, name: str) -> str:
        """Make a generation the live one, when it lacks nothing; returns its name when new requests get it.

        Args:
            name: "" = the one that is being built.

        Raises:
            InvalidRequest: there is no such generation.
            BundleInvalid: the bundle that goes with it is not where it was.
            GenerationNotReady: it cannot be built to the end, or was removed or given up for another one meanwhile.
        """
        return await self._uncancelled(lambda: self._publish(name))

    async def roll_back(self) -> str:
        """Publish the generation that was live before the live one. Raises as `publish`; GenerationNotReady where there was none."""
        return await self._uncancelled(self._roll_back)

    async def remove(self, name: str) -> None:
        """Remove a generation for good. Raises InvalidRequest: there is none of that name, or it is live."""
        await self._uncancelled(lambda: self._remove(name))

    async def resume(self) -> None:
        """Go on building what a server or a command before was building, where its bundle is still there."""
        name = "that was begun"
        try:
            begun = [state for state in await self.states() if state.state == "new" and state.bundle.id]
            if begun and self._shared.writable:
                name = begun[-1].name
                async with self._change:
                    if self.following is None:
                        await self._reopen(begun[-1])
        except OpenBookError as error:
            log.warning("generation %s is not built any further: %s", name, error)

    async def follow(self) -> None:
        """From now on follow other processes that make another generation live."""
        self._watching = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        problem = ""
        while True:
            await asyncio.sleep(_LOOK_AGAIN * (5 if problem else 1))
            try:
                await self._uncancelled(self._follow)
                if problem:
                    log.info("%s answers with generation %s, which is live", self._knowledge_base.name, self._knowledge_base.generation)
                problem = ""
                await self._sweep()
            except Exception as error:  # whatever it is, the next look may succeed
                if repr(error) != problem:
                    defect = not isinstance(error, (OpenBookError, OSError))
                    log.warning("cannot tell or follow the live generation: %s", error, exc_info=defect)
                problem = repr(error)

    async def _sweep(self) -> None:
        """In a server that nobody writes to, too: what a stopped write left behind is in the way of every search near it."""
        try:
            if self._shared.writable:
                with self.live.served.request():  # it stays open meanwhile
                    await self._shared.in_writer(self._knowledge_base.sweep)
        except (OpenBookError, OSError) as error:
            log.warning("%s", error)

    async def _reopen(self, state: GenerationState) -> Following:
        """Begin to bring a generation that there is up to date, with the bundle that goes with it, in place of what is being built."""
        way_out = "openbook generations build BUNDLE HOST:PORT"
        bundle = await asyncio.to_thread(recorded_bundle, state.name, state.bundle, way_out)
        await self._stop_following()
        return self._begin(bundle, name=state.name, graph_dims=state.graph_dims)

    def drain(self) -> None:
        """Nothing is published from now on: whoever waits for a generation to be built is refused."""
        self._draining.set()

    async def close(self) -> None:
        """Stop building; what was built stays. Pairs that are being retired are closed to the end: they hold the folder's lock too."""
        tasks = [*self._changes, *([self._watching] if self._watching is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._retiring.all_closed()
        await self._stop_following()

    async def _uncancelled(self, change: Callable[[], Awaitable[_T]]) -> _T:
        """A change that goes on to its end whether or not its caller waits for it."""
        task = asyncio.ensure_future(change())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await uncancelled(task)

    async def _build(self, folder: Path, graph_dims: int | None) -> str:
        bundle = await asyncio.to_thread(load_bundle, folder)
        if graph_dims is not None and not 0 <= graph_dims <= bundle.embedder.dim:
            raise InvalidRequest("graph_dims", f"{graph_dims} is outside 0 to {bundle.embedder.dim}, the embedder's dimensions")
        await self._follow()
        async with self._change:
            check_stored_passages(bundle, await asyncio.to_thread(self._knowledge_base.facts, *FACTS))
            before = self.following
            if before is not None and not before.problem and before.bundle.id != bundle.id:
                raise GenerationNotReady(f"generation {before.name} is being built; publish or remove it first")
            await self._stop_following()
            following = self._begin(bundle, graph_dims=graph_dims)
            await following.opened.wait()
            if following.pair is None:  # refused before anything was built: there is nothing to go on with, or to publish
                await self._stop_following()
            following.check()
            return following.name

    async def _publish(self, name: str) -> str:
        if not name:
            async with self._change:
                if self.following is None:
                    raise InvalidRequest("name", "no generation is being built")
                self.following.check()
                name = self.following.name
        await self._follow()
        await self._answer_with(name, self._make_live)
        return name

    async def _answer_with(self, name: str, change: Callable[[Following], Awaitable[None]]) -> None:
        """Let new requests get the generation of a name, when it lacks nothing; `change` as of `_swap`."""
        async with self._change:
            if name == self._knowledge_base.generation:
                return
            following = await self._begun(name)
        while True:
            await self._built(following)
            async with self._change:
                if name == self._knowledge_base.generation:  # another caller waited, too
                    return
                now = self.following
                if now is None or now.name != name:
                    problem = "was removed, or given up for another one, before it was built; look at what `generations list` shows"
                    raise GenerationNotReady(f"generation {name} {problem}")
                if now is following:
                    following.check()
                    await self._swap(following, change)
                    return
                following = now  # it was begun again

    async def _built(self, following: Following) -> None:
        """Wait until it lacks nothing, or there is a problem; raises NotServing where the server drains before."""
        waiting = [asyncio.ensure_future(event.wait()) for event in (following.complete, self._draining)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        self._check_serving()

    async def _make_live(self, following: Following) -> None:
        knowledge_base = following.opened_knowledge_base
        try:
            await self._shared.in_writer(knowledge_base.hold)
            await following.fill()
            self._check_serving()
            await self._shared.in_writer(knowledge_base.publish)  # from here on a server that starts comes up with the new pair
        except BaseException:
            try:
                await self._shared.in_writer(knowledge_base.release)
            except OpenBookError as error:  # then whoever writes next does it, after a while
                log.warning("%s", error)
            raise

    async def _follow(self) -> None:
        """Answer with the generation that is live, where another process made it so."""
        async with self._change:
            live = await to_the_end(asyncio.to_thread(lambda: self._knowledge_base.live_generation))
            if live == self._knowledge_base.generation:
                return
            log.info("another process made generation %s live in place of %s: following it", live, self._knowledge_base.generation)
            others = self.following is not None and self.following.name != live
        await self._answer_with(live, self._take_over)
        if others:
            await self.resume()

    async def _take_over(self, following: Following) -> None:
        self._check_serving()
        await self._shared.in_writer(following.opened_knowledge_base.went_live)

    def _check_serving(self) -> None:
        if self._front.served is None:
            raise NotServing("the server is shutting down", retry_after_seconds=1.0)

    async def _begun(self, name: str) -> Following:
        """The one of a name, being brought up to date."""
        following = self.following
        if following is not None and following.name == name and not following.problem:
            return following
        states = {state.name: state for state in await self.states()}
        if name not in states:
            raise InvalidRequest("name", f"{name!r} is none of {', '.join(states)}")
        return await self._reopen(states[name])

    async def _roll_back(self) -> str:
        previous = [state.name for state in await self.states() if state.previous]
        if not previous:
            raise GenerationNotReady(
                f"no generation was live before {self._knowledge_base.generation}, or it was removed; publish one by its name"
            )
        return await self._publish(previous[0])

    async def _remove(self, name: str) -> None:
        await self._follow()
        async with self._change:
            if self.following is not None and self.following.name == name:
                await self._stop_following()
            await self._retiring.closed(name)
            await self._shared.in_writer(lambda: self._knowledge_base.remove_generation(name))

    def _begin(self, bundle: Bundle, *, graph_dims: int | None, name: str | None = None) -> Following:
        self.following = Following(bundle, self.live, self._knowledge_base, self._shared, graph_dims=graph_dims, name=name)
        return self.following

    async def _stop_following(self) -> None:
        following, self.following = self.following, None
        if following is not None:
            await following.stop()
            if following.pair is not None:
                await following.pair.close()

    async def _swap(self, following: Following, change: Callable[[Following], Awaitable[None]]) -> None:
        """Let new requests get its pair; `change`, while nobody writes, makes sure that it is the live one."""
        await following.stop()
        pair, knowledge_base = following.opened_pair, following.opened_knowledge_base
        began = time.monotonic()
        async with self._front.writes.closed():
            try:
                await change(following)
            except BaseException:
                following.go_on()
                raise
            pair.go_live()
            self._front.served = pair.served
            old, self.live, self._knowledge_base, self.following = self.live, pair, knowledge_base, None
        log.info("generation %s is live; writes waited for %.3f s", knowledge_base.generation, time.monotonic() - began)
        self._retiring.add(old)
