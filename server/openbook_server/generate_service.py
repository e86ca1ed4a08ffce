"""The method Generate: which model writes, what it reads, how it chooses, and the messages of the stream."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence

from openbook.v1 import openbook_pb2 as pb

from openbook_server.bundle import Bundle
from openbook_server.config import ServerConfig
from openbook_server.errors import InvalidRequest, NotInBundle
from openbook_server.knowledge import Hit, KnowledgeBase, SearchOptions
from openbook_server.options import parse_filter, parse_mode
from openbook_server.pipeline import Pipeline
from openbook_server.replies import to_hit, to_provenance, to_timings
from openbook_server.text_writer import Sampling, TextWriter
from openbook_server.tokenization import TextEncoder
from openbook_server.validation import bounded, choose, text_error
from openbook_server.wire import Parsed
from openbook_server.work import Work

GENERATOR = "generator"
DEFAULT_TOKENS, MAX_TEMPERATURE = 64, 10.0
MAX_STOPS, MAX_STOP_BYTES = 8, 1_024  # after every token the end of the text is compared with every beginning of each


class GenerateService:
    """Serves the models of one bundle that write text, with the passages of one knowledge base where there is one."""

    def __init__(
        self,
        bundle: Bundle,
        knowledge_base: KnowledgeBase | None,
        *,
        config: ServerConfig,
        encoder: TextEncoder,
        pipeline: Pipeline,
        writers: Mapping[str, TextWriter],
    ) -> None:
        self._bundle, self._knowledge_base, self._config = bundle, knowledge_base, config
        self._encoder, self._pipeline, self._writers = encoder, pipeline, writers

    def describe(self) -> list[pb.DescribeResponse.Writer]:
        """Every model that writes, as Describe tells it."""
        return [
            pb.DescribeResponse.Writer(
                name=name,
                architecture=writer.info.architecture,
                max_tokens=writer.info.max_tokens,
                passages=writer.info.passages,
                max_text_tokens=writer.question_room() if name == GENERATOR else writer.prompt_room(writer.info.passages),
            )
            for name, writer in self._writers.items()
        ]

    async def generate(self, parsed: Parsed[pb.GenerateRequest], work: Work) -> AsyncIterator[pb.GenerateResponse]:
        request = parsed.message
        name, writer = self._chosen(request.writer)
        options = self._options(request, writer)
        self._check_text(parsed)
        ids = writer.ids(request.text)
        if not ids:
            raise InvalidRequest("text", "holds nothing the model knows (only spaces or control characters)")
        count = options.top_k if options is not None else 0
        left = self._left_for_question(ids, writer) if name == GENERATOR else self._left_after_prompt(ids, writer, count)
        sampling = self._sampling(request, left, left if name == GENERATOR else DEFAULT_TOKENS)
        with writer.place(work.deadline):
            hits = await self._found(request.text if name == GENERATOR else writer.query(ids), options, work)
            passages = [hit.passage.text for hit in hits]
            pieces = (
                writer.answer(request.text, passages, sampling, work) if name == GENERATOR else writer.go_on(ids, passages, sampling, work)
            )
            async for piece in pieces:
                reply = pb.GenerateResponse(text=piece.text, tokens=piece.tokens)
                if piece.finish is not None:
                    reply.ending.finish = pb.Finish.ValueType(piece.finish.value)
                    reply.ending.text, reply.ending.seed, reply.ending.writer = piece.whole, sampling.seed, name
                    reply.ending.hits.extend(to_hit(hit, omit_text=request.omit_text) for hit in hits)
                    reply.ending.provenance.CopyFrom(to_provenance(self._bundle, self._knowledge_base))
                    reply.ending.timings.CopyFrom(to_timings(work))
                yield reply

    async def _found(self, query: str, options: SearchOptions | None, work: Work) -> Sequence[Hit]:
        if options is None or not query.strip():
            return []
        [row] = self._encoder.texts([query])
        limit = self._bundle.embedder.max_tokens
        row = self._encoder.cut(row, limit) if len(row.ids) > limit else row
        work.tokenise_ms += work.lap()
        [hits] = await self._pipeline.search([query], [row], options, work)
        return hits

    def _chosen(self, name: str) -> tuple[str, TextWriter]:
        if not self._writers:
            way_out = "`openbook export --language-model FOLDER` or `--generator FOLDER` adds one"
            raise NotInBundle(f"this bundle has no model that writes text; {way_out}")
        return choose("writer", name, self._writers)

    def _options(self, request: pb.GenerateRequest, writer: TextWriter) -> SearchOptions | None:
        mode, most = parse_mode(request.mode), min(writer.info.passages, self._config.max_top_k)
        top_k = bounded("top_k", request.top_k if request.HasField("top_k") else None, most, 0, most)
        condition = parse_filter(request.filter) if request.HasField("filter") else None
        if mode is None or self._knowledge_base is None or not top_k:
            return None
        return SearchOptions(top_k=top_k, mode=mode, condition=condition)

    def _check_text(self, parsed: Parsed[pb.GenerateRequest]) -> None:
        if parsed.not_utf8:
            raise InvalidRequest(min(parsed.not_utf8)[0], "not valid UTF-8; encode the text as UTF-8 before sending it")
        if (error := text_error("text", parsed.message.text, self._config)) is not None:
            raise error

    def _sampling(self, request: pb.GenerateRequest, left: int, default: int) -> Sampling:
        """`left`: tokens that there is room to write."""
        max_tokens = bounded("max_tokens", request.max_tokens if request.HasField("max_tokens") else None, default, 1, left)
        top_p = request.top_p if request.HasField("top_p") else 1.0
        if not 0 <= request.temperature <= MAX_TEMPERATURE:  # NaN is refused too
            raise InvalidRequest("temperature", f"{request.temperature} is outside 0 to {MAX_TEMPERATURE:g}")
        if not 0 < top_p <= 1:
            raise InvalidRequest("top_p", f"{top_p} is not above 0 and up to 1")
        if len(request.stop) > MAX_STOPS or not all(request.stop):
            raise InvalidRequest("stop", f"{len(request.stop)} strings, at most {MAX_STOPS} are taken, and none that is empty")
        if (longest := max((len(stop.encode()) for stop in request.stop), default=0)) > MAX_STOP_BYTES:
            raise InvalidRequest("stop", f"{longest} bytes exceed the limit of {MAX_STOP_BYTES} a string; shorten it")
        seed = request.seed if request.HasField("seed") else secrets.randbits(63)
        return Sampling(max_tokens=max_tokens, temperature=request.temperature, top_p=top_p, seed=seed, stop=tuple(request.stop))

    @staticmethod
    def _left_for_question(ids: Sequence[int], writer: TextWriter) -> int:
        if len(ids) > writer.question_room():
            raise InvalidRequest("text", f"{len(ids)} tokens exceed the limit of {writer.question_room()}; shorten the question")
        return writer.info.max_answer_tokens

    @staticmethod
    def _left_after_prompt(ids: Sequence[int], writer: TextWriter, passages: int) -> int:
        room = writer.prompt_room(passages)
        if len(ids) >= room:
            raise InvalidRequest(
                "text", f"{len(ids)} tokens leave none of {room} to write beside {passages} passages; shorten it, or lower top_k"
            )
        return room - len(ids)
