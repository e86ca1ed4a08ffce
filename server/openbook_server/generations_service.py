"""The methods of the KnowledgeBase service that are about generations of embedders; Generate is in generate_service.py."""

from __future__ import annotations

from pathlib import Path

from openbook.v1 import knowledge_base_pb2 as kb

from openbook_server.errors import InvalidRequest, ReadOnly
from openbook_server.knowledge.records import GenerationState
from openbook_server.knowledge_service import comparison_message
from openbook_server.succession import Succession
from openbook_server.wire import Parsed
from openbook_server.work import Work

_STATES = {"live": kb.GENERATION_STATE_LIVE, "kept": kb.GENERATION_STATE_KEPT, "new": kb.GENERATION_STATE_NEW}


class GenerationsService:
    """Serves the succession of one server's pairs."""

    def __init__(self, succession: Succession, *, writable: bool) -> None:
        self._succession, self._writable = succession, writable

    async def build(self, parsed: Parsed[kb.BuildGenerationRequest], work: Work) -> kb.BuildGenerationResponse:
        self._check_writable()
        request = parsed.message
        if not request.bundle:
            raise InvalidRequest("bundle", "empty; name a bundle's folder on the server's machine")
        graph_dims = request.graph_dims if request.HasField("graph_dims") else None
        return kb.BuildGenerationResponse(name=await self._succession.build(Path(request.bundle), graph_dims))

    async def list(self, parsed: Parsed[kb.ListGenerationsRequest], work: Work) -> kb.ListGenerationsResponse:
        return kb.ListGenerationsResponse(generations=[self._message(state) for state in await self._succession.states()])

    async def publish(self, parsed: Parsed[kb.PublishGenerationRequest], work: Work) -> kb.PublishGenerationResponse:
        self._check_writable()
        return kb.PublishGenerationResponse(name=await self._succession.publish(parsed.message.name))

    async def roll_back(self, parsed: Parsed[kb.RollBackGenerationRequest], work: Work) -> kb.RollBackGenerationResponse:
        self._check_writable()
        return kb.RollBackGenerationResponse(name=await self._succession.roll_back())

    async def remove(self, parsed: Parsed[kb.RemoveGenerationRequest], work: Work) -> kb.RemoveGenerationResponse:
        self._check_writable()
        if not parsed.message.name:
            raise InvalidRequest("name", "empty; name a generation, as ListGenerations does")
        await self._succession.remove(parsed.message.name)
        return kb.RemoveGenerationResponse()

    def _check_writable(self) -> None:
        if not self._writable:
            raise ReadOnly()

    def _message(self, state: GenerationState) -> kb.Generation:
        following = self._succession.following
        if following is not None and following.name != state.name:
            following = None
        comparison = following.comparison if following is not None else None
        return kb.Generation(
            name=state.name,
            state=_STATES[state.state],
            previous=state.previous,
            embedder_fingerprint=state.fingerprint,
            bundle_id=state.bundle.id,
            bundle=state.bundle.folder,
            dim=state.dim,
            graph_dims=state.graph_dims,
            passages=state.passages,
            lacking=state.lacking,
            vector_bytes=state.vector_bytes,
            snapshot_bytes=state.snapshot_bytes,
            following=following is not None and not following.problem,
            problem=following.problem if following is not None else "",
            comparison=comparison_message(comparison),
        )
