"""A bundle and the generation that its embedder built: what a request is served by, from beginning to end.

A server has one pair live, and may have a second one that takes its place later: both share the engine, whose queue lets
questions go first, and the thread that writes to their knowledge base.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from openbook_server.backlog import Lane
from openbook_server.bundle import Bundle
from openbook_server.classification import Classification
from openbook_server.classify_service import ClassifyService
from openbook_server.comparison import Comparison
from openbook_server.config import ServerConfig
from openbook_server.decoding import Decoder, decoders_of
from openbook_server.embedder import QUESTIONS, Embedder
from openbook_server.engine import Engine, Runnable
from openbook_server.generate_service import GenerateService
from openbook_server.golden import verify_golden
from openbook_server.heads import neighbours_graph
from openbook_server.ingest.preparation import FACTS, choose_splitting
from openbook_server.ingest.writer import Writer
from openbook_server.invariance import measure_invariance
from openbook_server.knowledge import KnowledgeBase
from openbook_server.knowledge_service import KnowledgeService
from openbook_server.metrics import Metrics
from openbook_server.models import Models
from openbook_server.pipeline import Pipeline
from openbook_server.rows import Row
from openbook_server.runtime import Device, Graph, build_device
from openbook_server.served import Served
from openbook_server.service import Service
from openbook_server.states import PASSAGES, PassageGraph, QuestionGraph
from openbook_server.text_writer import TextWriter
from openbook_server.tokenization import TextEncoder, load_tokenizer
from openbook_server.unbroken import to_the_end

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Shared:
    """What all pairs of a server have in common."""

    config: ServerConfig
    device: Device
    engine: Engine
    metrics: Metrics
    thread: ThreadPoolExecutor  # the one that writes to the knowledge base
    splitter: ThreadPoolExecutor  # the one that splits what is to be written
    writable: bool

    async def in_writer(self, work: Callable[[], _T]) -> _T:
        """Do something in the thread that writes."""
        return await to_the_end(asyncio.get_running_loop().run_in_executor(self.thread, work))


@dataclass(frozen=True, slots=True)
class LoadedGraphs:
    """A bundle's graphs on a device."""

    graphs: dict[str, Graph]
    invariant: frozenset[str]  # models that gave rows the same bytes whatever shared their batch


def load_graphs(bundle: Bundle, device: Device) -> LoadedGraphs:
    """Those of a bundle's graphs that are served, verified, and warm where the first batch of a length would be slow; blocking.

    Raises:
        BundleInvalid: one does not load, or computes something else than at export.
    """
    limits = {"embedder": bundle.embedder.max_tokens} | ({"reader": bundle.reader.max_tokens} if bundle.reader else {})
    limits |= {name: head.max_tokens for name, head in bundle.heads.items() if head.classifies}
    graphs = {name: Graph(bundle.graph_path(name, device.precision), device) for name in limits}
    verify_golden(bundle, graphs, device)
    for name, limit in limits.items() if device.prepares_lengths else ():
        for length in graphs[name].buckets.padded_lengths(limit):
            half = length // 2
            graphs[name].warm([Row([1] * length, [0] * half + [1] * (length - half))], length)
    invariant = measure_invariance(bundle, graphs, device)
    graphs |= _writing(bundle, device)
    exact = build_device("cpu", "fp32", 1)  # whatever the device: they are a few small products, and no half precision holds their votes
    votes = {neighbours_graph(name): head for name, head in bundle.heads.items() if head.neighbours and head.classifies}
    voting = {name: Graph(bundle.graph_path(name, exact.precision), exact) for name in votes}
    verify_golden(bundle, voting, exact)
    return LoadedGraphs(graphs | voting, invariant)


def _writing(bundle: Bundle, device: Device) -> dict[str, Graph]:
    """Graphs that write text. Their shapes grow with the text: on CUDA no buffers are kept for any, and other processors' kernels are
    onnxruntime's, which are made for no shape."""
    on = replace(device, memory="") if device.name == "cuda" else build_device("cpu", "fp32", device.threads, device.sessions)
    names = [name for writer in bundle.writers.values() for name in writer.graphs]
    graphs = {name: Graph(bundle.graph_path(name, on.precision), on) for name in names}
    verify_golden(bundle, graphs, on)
    return graphs


class Pair:
    """Everything that is open of a bundle and, where there is one, of a generation."""

    def __init__(
        self,
        bundle: Bundle,
        loaded: LoadedGraphs,
        knowledge_base: KnowledgeBase | None,
        shared: Shared,
        *,
        lane: Lane = Lane.FOREGROUND,
    ) -> None:
        """`lane` is the most urgent one that its work gets; see `go_live`."""
        self.bundle, self.knowledge_base, graphs = bundle, knowledge_base, loaded.graphs
        voting = {name: graphs[graph] for name in bundle.heads if (graph := neighbours_graph(name)) in graphs}
        decoders, writing = decoders_of(bundle.writers, graphs)
        read = [name for name in ("embedder", "reader", *bundle.heads) if name in graphs]
        dims = bundle.embedder.token_dims
        views: dict[str, Runnable] = {PASSAGES: PassageGraph(graphs["embedder"], dims), QUESTIONS: QuestionGraph(graphs["embedder"], dims)}
        runnable: dict[str, Runnable] = {name: graphs[name] for name in read} | views | writing
        self.tokenizer = load_tokenizer(bundle.tokenizer_path)
        self.encoder = TextEncoder(load_tokenizer(bundle.tokenizer_path), bundle.tokenizer_digest)
        self._config, self._metrics = shared.config, shared.metrics
        self.models = Models(shared.engine, runnable, invariant=loaded.invariant, lane=lane)
        try:
            self.embedder = Embedder(self.models, cache_bytes=shared.config.cache_mb << 20, observe=self._observe_cache)
            self.pipeline = Pipeline(bundle, self.encoder, self.embedder, self.models, knowledge_base, observe=self._observe_reading)
            self.served = self._services(loaded.invariant, voting, decoders, shared)
        except BaseException:
            self.models.close()
            raise

    def _services(self, invariant: Collection[str], voting: Mapping[str, Graph], decoders: Mapping[str, Decoder], shared: Shared) -> Served:
        bundle, knowledge_base, config = self.bundle, self.knowledge_base, shared.config
        classification = Classification(bundle, self.encoder, self.pipeline, self.models, voting)
        classify = ClassifyService(bundle, knowledge_base, config=config, encoder=self.encoder, classification=classification)
        generate = GenerateService(
            bundle, knowledge_base, config=config, encoder=self.encoder, pipeline=self.pipeline, writers=self._writers(decoders)
        )
        service = Service(
            bundle,
            knowledge_base,
            config=config,
            device=shared.device,
            encoder=self.encoder,
            pipeline=self.pipeline,
            invariant=invariant,
            classifiers=classify.describe(),
            writers=generate.describe(),
        )
        knowledge = None
        if knowledge_base is not None:
            writer = None
            if shared.writable:
                splitting = choose_splitting(bundle, knowledge_base.facts(*FACTS))
                writer_encoder = TextEncoder(self.tokenizer, bundle.tokenizer_digest)
                writer = Writer(bundle, knowledge_base, writer_encoder, self.models, splitting, shared.thread, shared.splitter)
            knowledge = KnowledgeService(bundle, knowledge_base, writer, config)
        return Served(service, classify, generate, knowledge)

    def _writers(self, decoders: Mapping[str, Decoder]) -> dict[str, TextWriter]:
        infos = self.bundle.writers
        return {
            name: TextWriter(infos[name], load_tokenizer(self.bundle.folder / infos[name].tokenizer), decoder, self.models)
            for name, decoder in decoders.items()
        }

    def go_live(self) -> None:
        """From now on its work is what people wait for."""
        self.models.lane = Lane.FOREGROUND
        self.watch()

    def watch(self) -> None:
        """See `KnowledgeBase.watch`."""
        if self.knowledge_base is not None:
            self.knowledge_base.watch(share=self._config.recall_share, target=self._config.recall_target)

    @contextmanager
    def compared(self, comparison: Comparison) -> Iterator[None]:
        """Within, what it is asked is offered for comparison, and who asks is told how that goes."""
        self.served.openbook.asked, self.served.knowledge.comparison = comparison.offer, comparison
        try:
            yield
        finally:
            self.served.openbook.asked = self.served.knowledge.comparison = None

    def _observe_cache(self, hits: int, joined: int, misses: int) -> None:
        if self.models.lane is Lane.FOREGROUND:  # metrics are of what people asked
            self._metrics.observe_cache(hits, joined, misses)

    def _observe_reading(self, passages: int) -> None:
        if self.models.lane is Lane.FOREGROUND:
            self._metrics.observe_reading(passages)

    async def close(self) -> None:
        """Let go of everything once the requests that it serves are done."""
        await self.served.finished()
        self.models.close()
        await asyncio.to_thread(self.pipeline.close)
        if self.knowledge_base is not None:
            await asyncio.to_thread(self.knowledge_base.close)
