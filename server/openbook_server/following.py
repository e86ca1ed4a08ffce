"""The pair that may take the live one's place: opened, its generation filled and kept up to date, compared on what is really asked.

All of it in the background: the device runs questions first, the index adds when nobody searches, and the thread that writes
does so some passages at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time

import numpy as np

from openbook_server.backlog import Lane
from openbook_server.bundle import Bundle
from openbook_server.comparison import Comparison
from openbook_server.errors import DeadlineExceeded, GenerationNotReady, InvalidRequest, OpenBookError, Overloaded
from openbook_server.ingest.embed import PassageEncoder
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.opening import place_of
from openbook_server.pair import Pair, Shared, load_graphs, to_the_end

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 256  # passages embedded for one transaction
_PATIENCE = 600.0  # seconds that background work waits for the device
_LOOK_AGAIN = 0.5  # seconds between two looks at what was written


class Following:
    """Works from the moment it is made until it is stopped."""

    def __init__(
        self,
        bundle: Bundle,
        live: Pair,
        beside: EmbeddedKnowledgeBase,
        shared: Shared,
        *,
        graph_dims: int | None,
        name: str | None,
    ) -> None:
        """Args:
        live: that answers now, and whose questions it is compared on.
        beside: the live generation.
        graph_dims, name: as `EmbeddedKnowledgeBase` takes them; without a name, the generation of the bundle is found or added.
        """
        self.bundle, self._live, self._beside, self._shared = bundle, live, beside, shared
        self.pair: Pair | None = None  # once it is open, like the next two
        self.knowledge_base: EmbeddedKnowledgeBase | None = None
        self.name = name or ""
        self.comparison: Comparison | None = None  # once it lacks nothing
        self.problem = ""  # why it is not built any further
        self.opened, self.complete = asyncio.Event(), asyncio.Event()  # or there is a problem
        self._after = 0  # number of the last passage that was looked at; later ones have higher numbers
        self._task = asyncio.ensure_future(self._run(graph_dims, name))

    def check(self) -> None:
        """Raises GenerationNotReady where there is a problem."""
        if self.problem:
            raise GenerationNotReady(f"generation {self.name} cannot be built: {self.problem}")

    async def stop(self) -> None:
        """What is built stays, and the pair stays open."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def fill(self) -> None:
        """Embed what it lacks."""
        pair, knowledge_base = self.pair, self.knowledge_base
        assert pair is not None  # noqa: S101
        assert knowledge_base is not None  # noqa: S101
        encode = PassageEncoder(pair.tokenizer, pair.bundle.embedder.max_tokens, whole=True)
        while lacking := await asyncio.to_thread(knowledge_base.lacking, after=self._after, limit=ROWS_AT_ONCE):
            rows = await asyncio.to_thread(encode, list(lacking.values()))
            try:
                outcome = await pair.models.submit("embedder", rows, deadline=time.monotonic() + _PATIENCE)
            except (Overloaded, DeadlineExceeded) as error:  # uploads fill the lane
                await asyncio.sleep(max(_LOOK_AGAIN, getattr(error, "retry_after_seconds", 0.0)))
                continue
            vectors = np.array([row["sentence_embedding"] for row in outcome.rows], np.float32)
            numbers = list(lacking)
            await self._shared.in_writer(lambda numbers=numbers, vectors=vectors: knowledge_base.fill(numbers, vectors))  # type: ignore[misc]
            self._after = max(numbers)

    async def _run(self, graph_dims: int | None, name: str | None) -> None:
        try:
            pair, knowledge_base = await to_the_end(asyncio.to_thread(self._open, graph_dims, name))
            log.info("building generation %s with the bundle in %s", self.name, self.bundle.folder)
            self.opened.set()
            await self.fill()
            await self._shared.in_writer(knowledge_base.optimise)
            await self._shared.in_writer(knowledge_base.snapshot)
            log.info("generation %s lacks nothing; it may be published", self.name)
            self.comparison = Comparison(pair.bundle, pair.encoder, pair.pipeline, share=self._shared.config.shadow_share)
            self.complete.set()
            with self._live.compared(self.comparison):
                await asyncio.gather(self._keep_up(), self.comparison.run())
        except (OpenBookError, OSError) as error:
            self.problem = str(error)
            log.error("generation %s is not built any further: %s", self.name, error)
        except Exception as error:  # a defect of ours: whoever waits must hear of it
            self.problem = f"internal error: {type(error).__name__}"
            log.exception("generation %s is not built any further", self.name)
        finally:
            self.opened.set()
            self.complete.set()

    def _open(self, graph_dims: int | None, name: str | None) -> tuple[Pair, EmbeddedKnowledgeBase]:
        bundle, shared = self.bundle, self._shared
        knowledge_base = EmbeddedKnowledgeBase(
            self._beside.folder,
            fingerprint=bundle.embedder.fingerprint,
            dim=bundle.embedder.dim,
            graph_dims=graph_dims,
            bundle=place_of(bundle),
            new_generation=name is None,
            name=name,
            beside=self._beside,
        )
        try:
            if knowledge_base.is_live:
                raise InvalidRequest("bundle", f"{knowledge_base.generation}, which is live, is the generation of this bundle already")
            pair = Pair(bundle, load_graphs(bundle, shared.device, shared.config), knowledge_base, shared, lane=Lane.BACKGROUND)
        except BaseException:
            knowledge_base.close()
            raise
        self.knowledge_base, self.pair, self.name = knowledge_base, pair, knowledge_base.generation
        return pair, knowledge_base

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_AGAIN)
            await self.fill()
