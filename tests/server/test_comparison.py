"""Shadow comparison: what overlap and agreement mean, that figures are those of an exact comparison, and that nobody waits for it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from pathlib import Path
from typing import cast

import grpc.aio
import pytest
from openbook import cli
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import knowledge_base_pb2_grpc, openbook_pb2_grpc
from openbook.v1 import openbook_pb2 as pb
from openbook_server.bundle import load_bundle
from openbook_server.comparison import Asked, Comparison, overlap
from openbook_server.config import ServerConfig
from openbook_server.knowledge import Hit, SearchOptions
from openbook_server.pipeline import Pipeline, QuestionAnswered
from openbook_server.serving import running_server
from openbook_server.tokenization import TextEncoder, load_tokenizer

CONFIG = ServerConfig(port=0, device="cpu", threads=1, drain_seconds=1.0, shadow_share=1.0)
QUESTIONS = ["what is red ?", "who is king ?", "the green book", "river", "one two three"]
WAIT = 120  # seconds, on a busy machine


def test_overlap_is_what_both_found_of_the_longer_list() -> None:
    assert overlap(["a", "b", "c", "d"], ["d", "x", "a", "y"]) == 0.5
    assert overlap(["a", "b", "c", "d"], ["a"]) == 0.25
    assert overlap(["a"], []) == 0
    assert overlap([], []) == 1


async def test_figures_are_those_of_both_pairs_and_no_question_is_kept(
    tiny_bundle: Path,
    tuned_bundle: Path,
    tiny_knowledge_base: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    requests = [pb.AnswerRequest(questions=[question], mode=pb.SEARCH_MODE_DENSE, top_k=2, max_answers=1) for question in QUESTIONS]
    async with running_server(tiny_bundle, tiny_knowledge_base, CONFIG) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        openbook: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
        knowledge: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub = knowledge_base_pb2_grpc.KnowledgeBaseStub(channel)

        async def following() -> kb.Generation:
            return (await knowledge.ListGenerations(kb.ListGenerationsRequest())).generations[-1]

        await knowledge.BuildGeneration(kb.BuildGenerationRequest(bundle=str(tuned_bundle)), timeout=WAIT)
        async with asyncio.timeout(WAIT):
            while not (await following()).HasField("comparison"):
                await asyncio.sleep(0.02)
        assert not (await following()).comparison.HasField("overlap")  # nothing was asked yet
        old = [(await openbook.Answer(request)).results[0] for request in requests]
        search = pb.SearchRequest(questions=QUESTIONS[:1], mode=pb.SEARCH_MODE_DENSE, top_k=2)
        await openbook.Search(pb.SearchRequest(questions=QUESTIONS, mode=pb.SEARCH_MODE_RANDOM))  # is no figure of either
        await openbook.Search(search)
        async with asyncio.timeout(WAIT):
            while (compared := (await following()).comparison).overlap.samples < len(QUESTIONS) + 1:
                await asyncio.sleep(0.02)
        assert compared.agreement.samples == len(QUESTIONS)
        assert (await knowledge.Describe(kb.DescribeKnowledgeBaseRequest())).comparison == compared
        assert await asyncio.to_thread(cli.main, ["info", f"127.0.0.1:{port}"]) == 0
        assert f"overlap@k {compared.overlap.mean:.3f}" in capsys.readouterr().out
        await knowledge.PublishGeneration(kb.PublishGenerationRequest(), timeout=WAIT)
        assert not (await knowledge.Describe(kb.DescribeKnowledgeBaseRequest())).HasField("comparison")  # the one before is closed
        new = [(await openbook.Answer(request)).results[0] for request in requests]
    overlaps = [
        overlap([hit.passage_id for hit in one.hits], [hit.passage_id for hit in other.hits]) for one, other in zip(old, new, strict=True)
    ]
    agreements = [best(one) == best(other) for one, other in zip(old, new, strict=True)]
    assert compared.overlap.mean == pytest.approx((sum(overlaps) + overlaps[0]) / (len(overlaps) + 1))
    assert compared.agreement.mean == pytest.approx(sum(agreements) / len(agreements))
    assert compared.overlap.low < compared.overlap.mean <= compared.overlap.high
    assert not any(question in message for message in caplog.messages for question in QUESTIONS)
    assert not any(
        question.encode() in data for data in await asyncio.to_thread(contents, tiny_knowledge_base) for question in QUESTIONS[:2]
    )


def contents(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in folder.iterdir()]


def best(result: pb.AnswerResult) -> str | None:
    if not result.answers or result.answers[0].probability < result.no_answer_probability:
        return None
    return " ".join(result.answers[0].text.casefold().split())


async def test_the_other_pair_reads_as_much_as_the_caller_asked_for(tiny_bundle: Path) -> None:
    settled: list[bool] = []

    class Recorder:
        async def answer(self, *arguments: object, settle: bool) -> list[QuestionAnswered]:
            settled.append(settle)
            return [QuestionAnswered([], 0, [], 1.0)]

    bundle = load_bundle(tiny_bundle)
    encoder = TextEncoder(load_tokenizer(bundle.tokenizer_path), bundle.tokenizer_digest)
    comparison = Comparison(bundle, encoder, cast(Pipeline, Recorder()), share=1.0)
    for read_all in (True, False):
        comparison.offer(Asked("what is red ?", SearchOptions(top_k=2), (), None, read=True, read_all=read_all))
    running = asyncio.create_task(comparison.run())
    async with asyncio.timeout(WAIT):
        while len(settled) < 2:
            await asyncio.sleep(0)
    running.cancel()
    assert settled == [False, True]


async def test_a_question_that_fails_unexpectedly_is_logged_and_the_next_one_compared(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: list[Exception | list[list[Hit]]] = [RuntimeError("a defect"), [[]]]

    class Broken:
        async def search(self, *arguments: object) -> list[list[Hit]]:
            outcome = outcomes.pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

    bundle = load_bundle(tiny_bundle)
    encoder = TextEncoder(load_tokenizer(bundle.tokenizer_path), bundle.tokenizer_digest)
    comparison = Comparison(bundle, encoder, cast(Pipeline, Broken()), share=1.0)
    for _ in range(2):
        comparison.offer(Asked("what is red ?", SearchOptions(top_k=2), (), None, read=False))
    running = asyncio.create_task(comparison.run())
    async with asyncio.timeout(WAIT):
        while comparison.overlap is None and not running.done():
            await asyncio.sleep(0)
    assert running.cancel()
    assert caplog.messages == ["a question was not compared"]


async def test_without_a_share_nothing_is_compared(tiny_bundle: Path, tuned_bundle: Path, tiny_knowledge_base: Path) -> None:
    config = dataclasses.replace(CONFIG, shadow_share=0.0)
    async with running_server(tiny_bundle, tiny_knowledge_base, config) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        openbook: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
        knowledge: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub = knowledge_base_pb2_grpc.KnowledgeBaseStub(channel)
        await knowledge.BuildGeneration(kb.BuildGenerationRequest(bundle=str(tuned_bundle)), timeout=WAIT)
        await openbook.Answer(pb.AnswerRequest(questions=QUESTIONS))
        generations = (await knowledge.ListGenerations(kb.ListGenerationsRequest())).generations
        assert not generations[-1].comparison.HasField("overlap")
