"""The services behind the methods, and which requests they serve at the moment."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from openbook_server.classify_service import ClassifyService
from openbook_server.errors import NoKnowledgeBase
from openbook_server.generate_service import GenerateService
from openbook_server.knowledge_service import KnowledgeService
from openbook_server.service import Service


@dataclass(slots=True)
class Served:
    """The services behind the methods, once everything is loaded. A request is served by one of these from beginning to end."""

    openbook: Service
    classification: ClassifyService
    text_generation: GenerateService
    knowledge_service: KnowledgeService | None
    running: int = 0  # requests
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Within, a request is being served."""
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    async def finished(self) -> None:
        """Until no request is being served; none may begin any more."""
        if self.running:
            await self._idle.wait()

    @property
    def knowledge(self) -> KnowledgeService:
        if self.knowledge_service is None:
            raise NoKnowledgeBase
        return self.knowledge_service
