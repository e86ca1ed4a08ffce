"""The same text, the same bytes: whether a graph gives that is measured, and where it does not, whoever asks for it gets it still."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import numpy as np
import pytest
from google.protobuf.message import Message
from openbook import cli
from openbook.v1 import openbook_pb2 as pb
from openbook.v1 import openbook_pb2_grpc
from openbook_server import pair
from openbook_server.bundle import Bundle, load_bundle
from openbook_server.config import ServerConfig
from openbook_server.embedder import OUTPUT
from openbook_server.golden import INPUTS
from openbook_server.invariance import BATCH_TOKENS, measure_invariance, varying_outputs
from openbook_server.runtime import HIDDEN_STATES, Graph, build_device
from openbook_server.serving import running_server

if TYPE_CHECKING:  # the class is in the stub file alone
    from openbook.v1.openbook_pb2_grpc import OpenBookAsyncStub as Stub

CONFIG = ServerConfig(port=0, device="cpu", threads=1, drain_seconds=1.0, cache_mb=0)
TEXT, *OTHERS = [" ".join(words) for words in itertools.islice(itertools.permutations(["red", "city", "book", "king", "blue"], 3), 32)]
MODELS = ["embedder", "embedder.questions", "reader"]


@asynccontextmanager
async def serving(bundle: Path, knowledge_base: Path | None = None, **settings: object) -> AsyncIterator[Stub]:
    config = dataclasses.replace(CONFIG, **settings)  # type: ignore[arg-type]
    async with running_server(bundle, knowledge_base, config) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield openbook_pb2_grpc.OpenBookStub(channel)


async def vector(stub: Stub, *others: str, batch_invariant: bool) -> bytes:
    """Of `TEXT`, asked with others of as many tokens, which are in front of it and behind."""
    half = len(others) // 2
    texts = [*others[:half], TEXT, *others[half:]]
    reply = await stub.Embed(pb.EmbedRequest(texts=texts, batch_invariant=batch_invariant))
    return np.frombuffer(reply.vectors, "<f4").reshape(-1, reply.dim)[half].tobytes()


class Batches:
    """The shapes that graphs run, from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run = Graph.run
        self.rows: list[int] = []

        def noted(graph: Graph, inputs: Mapping[str, np.ndarray], *, states: bool = False) -> dict[str, np.ndarray]:
            if "input_ids" in inputs:
                self.rows.append(len(inputs["input_ids"]))
            return run(graph, inputs, states=states)  # type: ignore[return-value]

        monkeypatch.setattr(Graph, "run", noted)


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.mark.parametrize(("precision", "invariant"), [("fp32", MODELS), ("int8", [])])
def test_it_is_measured_through_which_graphs_a_row_depends_on_its_batch(
    bundle: Bundle, precision: str, invariant: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    device = build_device("cpu", precision, 1)
    graphs = {model: Graph(bundle.graph_path(model, precision), device) for model in ("embedder", "reader")}
    with caplog.at_level(logging.DEBUG, logger="openbook_server.invariance"):
        assert sorted(measure_invariance(bundle, graphs, device)) == invariant
    [line] = caplog.messages
    assert f"cpu in {precision}" in line
    assert ("batch_invariant" in line) == (not invariant)


class Leaking:
    """A graph that lets what is in a batch, or its place there, show in one output."""

    def __init__(self, graph: Graph, output: str, leak: Callable[[np.ndarray], np.ndarray]) -> None:
        self._graph, self._output, self._leak = graph, output, leak
        self.buckets, self.gives_states = graph.buckets, graph.gives_states

    def run(self, inputs: Mapping[str, np.ndarray], *, states: bool = False) -> dict[str, np.ndarray]:
        outputs: dict[str, np.ndarray] = dict(self._graph.run(inputs, states=states))
        values = outputs[self._output]
        leak = self._leak(inputs["input_ids"]).reshape(-1, *[1] * (values.ndim - 1))
        outputs[self._output] = (values * (1 + 1e-6 * leak)).astype(np.float32)
        return outputs


@pytest.mark.parametrize(
    "leak",
    [
        lambda ids: np.full(len(ids), len(ids)),
        lambda ids: np.full(len(ids), ids.sum()),
        lambda ids: (np.arange(len(ids)) >= 8) * 1,  # kernels that take eight rows at a time
        lambda ids: np.full(len(ids), len(ids) > 1 and ids.shape[1] > 40),
    ],
)
def test_whatever_of_a_batch_shows_in_a_row_is_found(bundle: Bundle, leak: Callable[[np.ndarray], np.ndarray]) -> None:
    graph = Graph(bundle.graph_path("embedder", "fp32"), build_device("cpu", "fp32", 1))
    inputs = {name: bundle.golden()[f"embedder/{name}"] for name in INPUTS}
    assert varying_outputs(graph, inputs, batch_tokens=BATCH_TOKENS) == set()
    for output in (OUTPUT, HIDDEN_STATES):
        leaking = Leaking(graph, output, leak)
        assert varying_outputs(leaking, inputs, batch_tokens=BATCH_TOKENS) == {output}  # type: ignore[arg-type]  # stands for a graph
    leaking = Leaking(graph, HIDDEN_STATES, leak)  # which only questions of hybrid searches need
    assert measure_invariance(bundle, {"embedder": leaking}, build_device("cpu", "fp32", 1)) == {"embedder"}  # type: ignore[dict-item]


async def test_with_the_flag_a_text_gives_the_same_bytes_alone_and_among_31_others_and_without_it_does_not(tiny_bundle: Path) -> None:
    async with serving(tiny_bundle, precision="int8") as stub:
        alone = await vector(stub, batch_invariant=True)
        assert await vector(stub, batch_invariant=False) == alone  # nothing was beside it either
        assert await vector(stub, *OTHERS, batch_invariant=False) != alone
        assert await vector(stub, *OTHERS, batch_invariant=True) == alone
        crowd = [vector(stub, *OTHERS[at : at + 4], batch_invariant=at % 2 > 0) for at in range(20)]
        assert set((await asyncio.gather(*crowd))[1::2]) == {alone}
        description = await stub.Describe(pb.DescribeRequest())
    assert list(description.batch_invariant) == []


@pytest.mark.parametrize("flagged_first", [True, False])
async def test_the_cache_keeps_apart_what_was_computed_among_others(tiny_bundle: Path, flagged_first: bool) -> None:
    async with serving(tiny_bundle, precision="int8", cache_mb=1) as stub:
        found = {}
        for flagged in (flagged_first, not flagged_first) * 2:
            found.setdefault(flagged, set()).add(await vector(stub, *OTHERS, batch_invariant=flagged))
        assert {flagged: len(bytes_) for flagged, bytes_ in found.items()} == {True: 1, False: 1}
        assert found[True] != found[False]
        assert found[True] == {await vector(stub, batch_invariant=True)}


async def test_through_an_invariant_graph_the_flag_changes_nothing(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(CONFIG, cache_mb=1)
    async with running_server(tiny_bundle, None, config) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Stub = openbook_pb2_grpc.OpenBookStub(channel)
        batches = Batches(monkeypatch)
        first = await vector(stub, *OTHERS, batch_invariant=True)
        assert batches.rows == [32]
        assert await vector(stub, *OTHERS, batch_invariant=False) == first
        assert batches.rows == [32]  # they were in the cache
        assert list((await stub.Describe(pb.DescribeRequest())).batch_invariant) == MODELS
        assert await asyncio.to_thread(cli.main, ["info", f"127.0.0.1:{port}"]) == 0
    assert ", ".join(MODELS) in capsys.readouterr().out


@pytest.mark.parametrize("flagged", [True, False])
async def test_questions_and_what_is_read_beside_them_run_alone_too(
    tiny_bundle: Path, tiny_knowledge_base: Path, monkeypatch: pytest.MonkeyPatch, flagged: bool
) -> None:
    monkeypatch.setattr(pair, "measure_invariance", lambda *_: frozenset())
    questions = [f"{text} ?" for text in (TEXT, *OTHERS[:7])]
    requests: list[tuple[str, Message]] = [
        ("Search", pb.SearchRequest(questions=questions, rerank=3, batch_invariant=flagged)),
        ("Search", pb.SearchRequest(questions=questions, mode=pb.SEARCH_MODE_DENSE, batch_invariant=flagged)),
        ("Answer", pb.AnswerRequest(questions=questions, batch_invariant=flagged)),
    ]
    async with serving(tiny_bundle, tiny_knowledge_base) as stub:
        for method, request in requests:
            batches = Batches(monkeypatch)
            reply = await getattr(stub, method)(request)
            assert len(reply.results) == len(questions)
            assert (max(batches.rows) == 1) == flagged


@pytest.mark.parametrize("flagged", [True, False])
async def test_texts_that_are_labelled_and_claims_run_alone_too(
    labelling_bundle: Path, tiny_knowledge_base: Path, monkeypatch: pytest.MonkeyPatch, flagged: bool
) -> None:
    monkeypatch.setattr(pair, "measure_invariance", lambda *_: frozenset())
    texts = [TEXT, *OTHERS[:7]]
    async with serving(labelling_bundle, tiny_knowledge_base) as stub:
        for classifier, mode in (("topics", 0), ("topics", pb.SEARCH_MODE_NONE), ("claims", 0), ("claims", pb.SEARCH_MODE_NONE)):
            batches = Batches(monkeypatch)
            request = pb.ClassifyRequest(classifier=classifier, texts=texts, mode=mode, batch_invariant=flagged)
            assert len((await stub.Classify(request)).results) == len(texts)
            assert (max(batches.rows) == 1) == flagged


async def test_an_answer_of_a_graph_that_depends_on_its_batch_is_the_same_beside_other_questions(
    tiny_bundle: Path, tiny_knowledge_base: Path
) -> None:
    async with serving(tiny_bundle, tiny_knowledge_base, precision="int8") as stub:

        async def answer(*others: str) -> bytes:
            request = pb.AnswerRequest(questions=[TEXT, *others], top_k=3, read_all=True, batch_invariant=True)
            return (await stub.Answer(request)).results[0].SerializeToString(deterministic=True)

        alone = await answer()
        assert await answer(*OTHERS) == alone
        await asyncio.gather(*(stub.Answer(pb.AnswerRequest(questions=OTHERS)) for _ in range(2)))
        assert set(await asyncio.gather(*(answer(other) for other in OTHERS[:6]))) == {alone}
