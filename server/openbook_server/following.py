"""The pair that may take the live one's place: opened, its generation filled and kept up to date, compared on what is really asked.

All of it in the background: the device runs questions first, the index adds when nobody searches, and the thread that writes
does so some passages at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from openbook_server.backlog import Lane
from openbook_server.bundle import Bundle
from openbook_server.comparison import Comparison
from openbook_server.errors import (
    DeadlineExceeded,
    GenerationNotReady,
    InvalidRequest,
    KnowledgeBaseUnavailable,
    OpenBookError,
    Overloaded,
)
from openbook_server.ingest.embed import PassageEncoder
from openbook_server.knowledge import KnowledgeBase, PassageVectors
from openbook_server.knowledge.opening import place_of
from openbook_server.pair import Pair, Shared, load_graphs
from openbook_server.rows import Row
from openbook_server.states import PASSAGES, joined, vectors_of
from openbook_server.unbroken import to_the_end

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 256  # passages in the engine's queue, and about as many in one transaction
_PATIENCE = 600.0  # seconds that background work waits for the device
_LOOK_AGAIN = 0.5  # seconds between two looks at what was written


class Following:
    """Works from the moment it is made until it is stopped."""

    def __init__(
        self,
        bundle: Bundle,
        live: Pair,
        beside: KnowledgeBase,
        shared: Shared,
        *,
        graph_dims: int | None,
        name: str | None,
    ) -> None:
        """Args:
        live: that answers now, and whose questions it is compared on.
        beside: the live generation.
        graph_dims, name: as `KnowledgeBase.open_beside` takes them; without a name, the generation of the bundle is found or added.
        """
        self.bundle, self._live, self._beside, self._shared = bundle, live, beside, shared
        self.pair: Pair | None = None  # once it is open, like the next two
        self.knowledge_base: KnowledgeBase | None = None
        self.name = name or ""
        self.comparison: Comparison | None = None  # once it lacks nothing
        self.problem = ""  # why it is not built any further
        self.opened, self.complete = asyncio.Event(), asyncio.Event()  # or there is a problem
        self._task = asyncio.ensure_future(self._run(graph_dims, name))

    def check(self) -> None:
        """Raises GenerationNotReady where there is a problem."""
        if self.problem:
            raise GenerationNotReady(f"{self._called} cannot be built: {self.problem}")

    @property
    def _called(self) -> str:
        return f"generation {self.name}" if self.name else f"the generation of the bundle in {self.bundle.folder}"

    @property
    def opened_pair(self) -> Pair:
        assert self.pair is not None  # noqa: S101
        return self.pair

    @property
    def opened_knowledge_base(self) -> KnowledgeBase:
        assert self.knowledge_base is not None  # noqa: S101
        return self.knowledge_base

    async def stop(self) -> None:
        """What is built stays, and the pair stays open."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.opened.set()  # also where it was stopped before it began
        self.complete.set()

    async def fill(self, *, enough: int = 0) -> None:
        """Embed what it lacks; done when a look finds fewer passages than `enough`, or nothing."""
        pair, knowledge_base = self.opened_pair, self.opened_knowledge_base
        encode = PassageEncoder(pair.tokenizer, pair.bundle.embedder.max_tokens, whole=True)
        while gap := await to_the_end(asyncio.to_thread(knowledge_base.lacking, ROWS_AT_ONCE)):
            parts = []
            for at in range(0, max(len(gap.passages), 1), ROWS_AT_ONCE):  # a document comes whole, whatever its length
                rows = await asyncio.to_thread(encode, gap.passages[at : at + ROWS_AT_ONCE])
                parts.append(await self._embed(pair, rows))
            vectors = joined(parts)
            await self._shared.in_writer(lambda gap=gap, vectors=vectors: gap.fill(*vectors))  # type: ignore[misc]
            if len(gap.passages) < enough:
                return

    async def _embed(self, pair: Pair, rows: Sequence[Row]) -> PassageVectors:
        while True:
            try:
                outcome = await pair.models.submit(PASSAGES, rows, deadline=time.monotonic() + _PATIENCE)
                return vectors_of(outcome.rows, pair.bundle.embedder.dim)
            except (Overloaded, DeadlineExceeded) as error:  # uploads fill the lane
                await asyncio.sleep(max(_LOOK_AGAIN, getattr(error, "retry_after_seconds", 0.0)))

    def go_on(self) -> None:
        """After it was stopped."""
        self._task = asyncio.ensure_future(self._run(None, None))

    async def _run(self, graph_dims: int | None, name: str | None) -> None:
        try:
            if self.pair is None:
                await to_the_end(asyncio.to_thread(self._open, graph_dims, name))
                log.info("building generation %s with the bundle in %s", self.name, self.bundle.folder)
                self.opened.set()
            await self._build()
        except (OpenBookError, OSError) as error:
            self.problem = str(error)
            log.error("%s is not built any further: %s", self._called, error)
        except Exception as error:  # a defect of ours: whoever waits must hear of it
            self.problem = f"internal error: {type(error).__name__}"
            log.exception("%s is not built any further", self._called)
        finally:
            self.opened.set()
            self.complete.set()

    def _open(self, graph_dims: int | None, name: str | None) -> None:
        bundle, shared = self.bundle, self._shared
        fingerprint, dim = bundle.embedder.fingerprint, bundle.embedder.dim
        knowledge_base = self._beside.open_beside(
            fingerprint=fingerprint, dim=dim, bundle=place_of(bundle), graph_dims=graph_dims, name=name
        )
        try:
            if knowledge_base.generation == self._beside.generation:
                raise InvalidRequest("bundle", f"{knowledge_base.generation}, which is live, is the generation of this bundle already")
            pair = Pair(bundle, load_graphs(bundle, shared.device), knowledge_base, shared, lane=Lane.BACKGROUND)
        except BaseException:
            knowledge_base.close()
            raise
        self.knowledge_base, self.pair, self.name = knowledge_base, pair, knowledge_base.generation

    async def _build(self) -> None:
        pair, knowledge_base = self.opened_pair, self.opened_knowledge_base
        await self._catch_up()
        if not self.complete.is_set():
            if self._shared.writable:
                await self._shared.in_writer(knowledge_base.optimise)
                await self._shared.in_writer(knowledge_base.snapshot)
            log.info("generation %s lacks nothing; it may be published", self.name)
            self.comparison = Comparison(pair.bundle, pair.encoder, pair.pipeline, share=self._shared.config.shadow_share)
            self.complete.set()
        assert self.comparison is not None  # noqa: S101
        with self._live.compared(self.comparison):
            comparing = asyncio.ensure_future(self.comparison.run())
            try:
                await self._keep_up()
            finally:
                comparing.cancel()
                await asyncio.gather(comparing, return_exceptions=True)

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_AGAIN)
            await self._catch_up()

    async def _catch_up(self) -> None:
        """Until it has all that was stored a moment ago: others may write all the time. What does not answer is asked again later."""
        while True:
            try:
                return await self.fill(enough=ROWS_AT_ONCE)
            except KnowledgeBaseUnavailable as error:
                log.warning("generation %s waits: %s", self.name, error)
                await asyncio.sleep(error.retry_after_seconds)
