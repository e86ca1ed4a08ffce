"""A real server whose pair of bundle and generation is replaced while it answers and stores."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status
from openbook import cli
from openbook.client import Client, Document
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import knowledge_base_pb2_grpc, openbook_pb2_grpc
from openbook.v1 import openbook_pb2 as pb
from openbook_server import following, pair, serving, succession
from openbook_server.bundle import load_bundle
from openbook_server.comparison import Comparison
from openbook_server.config import ServerConfig
from openbook_server.engine import Engine
from openbook_server.errors import BundleInvalid, GenerationNotReady, KnowledgeBaseDamaged, KnowledgeBaseUnavailable
from openbook_server.following import Following
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.home import Home
from openbook_server.pair import Pair
from openbook_server.serving import running_server

if TYPE_CHECKING:
    from conftest import Place

CONFIG = ServerConfig(port=0, device="cpu", threads=1, drain_seconds=1.0)
QUESTIONS = ["what is red ?", "who is king ?", "the green book of the river"]
WAIT = 120  # seconds, on a busy machine


class Caller:
    """Both services of one server."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.openbook: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
        self.knowledge: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub = knowledge_base_pb2_grpc.KnowledgeBaseStub(channel)

    async def answers(self, questions: list[str] = QUESTIONS) -> pb.AnswerResponse:
        return await self.openbook.Answer(pb.AnswerRequest(questions=questions, top_k=5))

    async def build(self, bundle: Path, **options: int) -> str:
        return (await self.knowledge.BuildGeneration(kb.BuildGenerationRequest(bundle=str(bundle), **options), timeout=WAIT)).name  # type: ignore[arg-type]

    async def publish(self, name: str = "") -> str:
        return (await self.knowledge.PublishGeneration(kb.PublishGenerationRequest(name=name), timeout=WAIT)).name

    async def roll_back(self) -> str:
        return (await self.knowledge.RollBackGeneration(kb.RollBackGenerationRequest(), timeout=WAIT)).name

    async def generations(self) -> list[tuple[int, int, int]]:
        """(state, passages, lacking) of each."""
        reply = await self.knowledge.ListGenerations(kb.ListGenerationsRequest())
        return [(generation.state, generation.passages, generation.lacking) for generation in reply.generations]

    async def upsert(self, **texts: str) -> None:
        documents = [kb.Document(id=id_, text=text) for id_, text in texts.items()]
        reply = await self.knowledge.Upsert(kb.UpsertRequest(documents=documents), timeout=WAIT)
        assert not any(result.HasField("error") for result in reply.results)


class Running:
    """`running_server` with a caller."""

    def __init__(self, bundle: Path, knowledge_base: str, config: ServerConfig = CONFIG) -> None:
        self._server = running_server(bundle, knowledge_base, config)

    async def __aenter__(self) -> Caller:
        port = await self._server.__aenter__()
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        return Caller(self._channel)

    async def __aexit__(self, *error: Any) -> None:
        await self._channel.close()
        await self._server.__aexit__(*error)


def told(reply: pb.AnswerResponse) -> list[object]:
    """All of a reply but its timings and where it comes from."""
    return [
        (
            [(hit.passage_id, round(hit.score, 4)) for hit in result.hits],
            [(answer.text, round(answer.probability, 4)) for answer in result.answers],
        )
        for result in reply.results
    ]


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, str]:
    """(status, reason, message) of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    info = ErrorInfo()
    rpc_status.from_call(raised.value).details[0].Unpack(info)
    return raised.value.code(), info.reason, str(raised.value.details())


LIVE, KEPT, NEW = kb.GENERATION_STATE_LIVE, kb.GENERATION_STATE_KEPT, kb.GENERATION_STATE_NEW


@pytest.fixture
async def caller(tiny_bundle: Path, tiny_place: Place) -> AsyncIterator[Caller]:
    async with Running(tiny_bundle, tiny_place.target) as caller:
        yield caller


async def test_the_new_pair_answers_as_one_that_was_indexed_directly_and_so_does_the_old_one_after_a_rollback(
    tiny_bundle: Path, tuned_bundle: Path, tiny_place: Place, index_with: Callable[[Path], str]
) -> None:
    documents = {f"n{number}": f"the {word} book of the river was by {word}" for number, word in enumerate("one two three city".split())}
    direct = {}
    for bundle in (tiny_bundle, tuned_bundle):
        async with Running(bundle, index_with(bundle)) as caller:
            await caller.upsert(**documents)
            direct[bundle] = told(await caller.answers())
    assert direct[tiny_bundle] != direct[tuned_bundle]
    async with Running(tiny_bundle, tiny_place.target) as caller:
        name = await caller.build(tuned_bundle)
        await caller.upsert(**documents)
        assert told(await caller.answers()) == direct[tiny_bundle]
        assert await caller.publish() == name
        reply = await caller.answers()
        assert (told(reply), reply.provenance.generation) == (direct[tuned_bundle], name)
        assert reply.provenance.bundle_id == load_bundle(tuned_bundle).id
        assert await caller.generations() == [(KEPT, 7, 0), (LIVE, 7, 0)]
    for named in (tiny_bundle, tuned_bundle):  # a start comes up with the pair that is live, whichever the command line is from
        async with Running(named, tiny_place.target) as caller:
            reply = await caller.answers()
            assert (told(reply), reply.provenance.bundle_id) == (direct[tuned_bundle], load_bundle(tuned_bundle).id)
            if named == tuned_bundle:
                await caller.roll_back()
                assert told(await caller.answers()) == direct[tiny_bundle]
    async with Running(tuned_bundle, tiny_place.target) as caller:
        assert (await caller.answers()).provenance.bundle_id == load_bundle(tiny_bundle).id
        assert told(await caller.answers()) == direct[tiny_bundle]


async def test_what_was_written_since_is_lacking_until_a_rollback_and_then_found(
    tiny_bundle: Path, tuned_bundle: Path, tiny_place: Place
) -> None:
    async with Running(tiny_bundle, tiny_place.target) as caller:
        await caller.publish(await caller.build(tuned_bundle))
        assert await caller.generations() == [(KEPT, 3, 0), (LIVE, 3, 0)]
        await caller.upsert(later="the yak was red", d1="a yak, no king")
        await caller.knowledge.Delete(kb.DeleteRequest(ids=["d0"]))
        assert await caller.generations() == [(KEPT, 1, 2), (LIVE, 3, 0)]
        await caller.roll_back()
        assert await caller.generations() == [(LIVE, 3, 0), (KEPT, 3, 0)]
        for mode in (pb.SEARCH_MODE_LEXICAL, pb.SEARCH_MODE_DENSE):
            reply = await caller.openbook.Search(pb.SearchRequest(questions=["yak"], mode=mode, top_k=9))
            found = {hit.document_id: hit.text for hit in reply.results[0].hits if hit.document_id != "d2"}
            assert found == {"later": "the yak was red", "d1": "a yak, no king"}


async def test_no_question_fails_or_is_answered_by_a_mixture_while_pairs_are_swapped_and_documents_written(
    tiny_bundle: Path, tuned_bundle: Path, caller: Caller
) -> None:
    ids = {load_bundle(bundle).id for bundle in (tiny_bundle, tuned_bundle)}
    expected: dict[tuple[str, str], object] = {}
    seen: list[str] = []
    stopped = False

    async def ask() -> None:
        while not stopped:
            # Dense, and among the old passages: a score then depends on the question's vector and the passage's, and on nothing written.
            request = pb.AnswerRequest(questions=QUESTIONS, filter=OLD_ONES, mode=pb.SEARCH_MODE_DENSE)
            reply = await caller.openbook.Answer(request)
            pair = reply.provenance.bundle_id, reply.provenance.generation
            assert told(reply) == expected.setdefault(pair, told(reply))
            seen.append(reply.provenance.bundle_id)

    async def write() -> list[str]:
        written: list[str] = []
        while not stopped:
            written.append(f"w{len(written)}")
            await caller.upsert(**{written[-1]: f"zebra {written[-1]}"})
            if len(written) > 5:
                await caller.knowledge.Delete(kb.DeleteRequest(ids=[written[-5]]))
                written[-5] = ""
        return written

    askers, writer = [asyncio.create_task(ask()) for _ in range(6)], asyncio.create_task(write())

    async def answered_by(bundle: Path) -> None:
        wanted = load_bundle(bundle).id
        async with asyncio.timeout(WAIT):
            while seen[-1:] != [wanted]:
                await asyncio.sleep(0.01)

    name = await caller.build(tuned_bundle)
    await caller.publish(name)
    await answered_by(tuned_bundle)
    for bundle in (tiny_bundle, tuned_bundle, tiny_bundle):
        await caller.roll_back()
        await answered_by(bundle)
    stopped = True
    await asyncio.gather(*askers)
    written = [id_ for id_ in await writer if id_]
    assert len(expected) == 2
    assert {bundle for bundle, _ in expected} == ids
    assert len({generation for _, generation in expected}) == 2
    changes = sum(one != other for one, other in itertools.pairwise(seen))
    assert changes >= 4
    for mode in (pb.SEARCH_MODE_LEXICAL, pb.SEARCH_MODE_DENSE):
        reply = await caller.openbook.Search(pb.SearchRequest(questions=["zebra"], mode=mode, top_k=100))
        found = {hit.document_id for hit in reply.results[0].hits} - {"d0", "d1", "d2"}
        assert found == set(written)


OLD_ONES = pb.Filter(one_of=pb.Filter.OneOf(key="shelf", values=["two"]))


async def test_publishing_and_removing_refuse_what_makes_no_sense(
    caller: Caller, tiny_bundle: Path, tuned_bundle: Path, tmp_path: Path
) -> None:
    service = caller.knowledge
    invalid, unready = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
    assert (await refusal(caller.publish()))[0] is invalid
    assert (await refusal(caller.publish("7-x")))[0] is invalid
    assert (await refusal(caller.roll_back()))[:2] == (unready, "GENERATION_NOT_READY")
    assert (await refusal(caller.build(tmp_path)))[1] == "BUNDLE_INVALID"
    assert (await refusal(caller.build(Path())))[0] in {invalid, unready}
    assert (await refusal(caller.build(tuned_bundle, graph_dims=1_000)))[0] is invalid
    status, reason, message = await refusal(caller.build(tiny_bundle))
    assert (status, reason) == (unready, "GENERATION_NOT_READY")
    assert "is live" in message
    assert "no generation is being built" in (await refusal(caller.publish()))[2]
    live = (await service.ListGenerations(kb.ListGenerationsRequest())).generations[0]
    assert (await refusal(service.RemoveGeneration(kb.RemoveGenerationRequest(name=live.name))))[0] is invalid
    for absent, problem in (("", "name: empty; "), ("7-x", f"name: '7-x' is none of {live.name}")):
        assert (await refusal(service.RemoveGeneration(kb.RemoveGenerationRequest(name=absent))))[2].startswith(problem)
    name = await caller.build(tuned_bundle)
    assert await caller.build(tuned_bundle) == name  # the same again goes on
    assert len(await caller.generations()) == 2
    await service.RemoveGeneration(kb.RemoveGenerationRequest(name=name))  # while it is being built
    assert [state for state, *_ in await caller.generations()] == [LIVE]
    await caller.publish(await caller.build(tuned_bundle))
    await service.RemoveGeneration(kb.RemoveGenerationRequest(name=live.name))
    assert [state for state, *_ in await caller.generations()] == [LIVE]
    assert (await refusal(caller.roll_back()))[:2] == (unready, "GENERATION_NOT_READY")
    assert told(await caller.answers())


async def test_a_build_that_is_waited_for_holds_up_no_other_change_and_its_removal_ends_the_wait(
    caller: Caller, tuned_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never, waiting = asyncio.Event(), asyncio.Semaphore(0)
    really_begun = succession.Succession._begun

    async def stuck(following: Following, *, enough: int = 0) -> None:
        await never.wait()

    async def begun(self: succession.Succession, name: str) -> Following:
        following = await really_begun(self, name)
        waiting.release()
        return following

    monkeypatch.setattr(Following, "fill", stuck)
    monkeypatch.setattr(succession.Succession, "_begun", begun)
    name = await caller.build(tuned_bundle)
    publishing = [asyncio.ensure_future(refusal(caller.publish(chosen))) for chosen in (name, "")]
    for _ in publishing:
        await asyncio.wait_for(waiting.acquire(), WAIT)
    assert await caller.build(tuned_bundle) == name  # which those that wait go on to wait for
    assert not any(task.done() for task in publishing)
    await caller.knowledge.RemoveGeneration(kb.RemoveGenerationRequest(name=name), timeout=WAIT)
    for status, reason, message in await asyncio.wait_for(asyncio.gather(*publishing), WAIT):
        assert (status, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "GENERATION_NOT_READY")
        assert f"generation {name} was removed" in message
    monkeypatch.undo()
    again = await caller.build(tuned_bundle)
    assert await asyncio.gather(*(caller.publish(again) for _ in range(3))) == [again] * 3
    assert [state for state, *_ in await caller.generations()] == [KEPT, LIVE]


async def test_a_publication_that_waits_for_a_build_is_refused_as_soon_as_the_server_drains(
    tiny_bundle: Path, tiny_place: Place, tuned_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never, waiting = asyncio.Event(), asyncio.Event()
    really_begun = succession.Succession._begun

    async def stuck(following: Following, *, enough: int = 0) -> None:
        await never.wait()

    async def begun(self: succession.Succession, name: str) -> Following:
        following = await really_begun(self, name)
        waiting.set()
        return following

    monkeypatch.setattr(Following, "fill", stuck)
    monkeypatch.setattr(succession.Succession, "_begun", begun)
    server = running_server(tiny_bundle, tiny_place.target, dataclasses.replace(CONFIG, drain_seconds=10 * WAIT))
    port = await server.__aenter__()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        caller = Caller(channel)
        await caller.build(tuned_bundle)
        publishing = asyncio.ensure_future(refusal(caller.publish()))
        await asyncio.wait_for(waiting.wait(), WAIT)
        await asyncio.wait_for(server.__aexit__(None, None, None), WAIT)
        assert (await publishing)[:2] == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING")


async def test_a_removal_that_waits_for_a_publication_does_not_wait_for_itself(
    caller: Caller, tuned_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishes, removing = asyncio.Event(), asyncio.Event()
    really_make_live, really_remove = succession.Succession._make_live, succession.Succession._remove

    async def make_live(self: succession.Succession, following: Following) -> None:
        publishes.set()
        await removing.wait()
        await really_make_live(self, following)

    async def remove(self: succession.Succession, name: str) -> None:
        removing.set()
        await really_remove(self, name)

    monkeypatch.setattr(succession.Succession, "_make_live", make_live)
    monkeypatch.setattr(succession.Succession, "_remove", remove)
    [old] = (await caller.knowledge.ListGenerations(kb.ListGenerationsRequest())).generations
    publishing = asyncio.ensure_future(caller.publish(await caller.build(tuned_bundle)))
    await asyncio.wait_for(publishes.wait(), WAIT)
    await caller.knowledge.RemoveGeneration(kb.RemoveGenerationRequest(name=old.name), timeout=WAIT)
    assert await caller.generations() == [(LIVE, 3, 0)]
    await publishing


class Retiring:
    """The part of a pair that counts once another one took its place."""

    def __init__(self, generation: str) -> None:
        self.knowledge_base, self.served, self.done = SimpleNamespace(generation=generation), self, asyncio.Event()

    async def finished(self) -> None:
        await self.done.wait()

    async def close(self) -> None:
        pass


async def settled() -> None:
    """All that can go on without time or threads has gone on."""
    for _ in range(100):
        await asyncio.sleep(0)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> succession.Succession:
    """Of pairs that only pretend."""

    async def in_writer(work: Callable[[], None]) -> None:
        work()

    async def nothing(self: succession.Succession) -> None:
        pass

    monkeypatch.setattr(succession.Succession, "_follow", nothing)
    shared: Any = SimpleNamespace(writable=False, in_writer=in_writer)
    knowledge_base: Any = SimpleNamespace(name="kb", generation="live", removed=[])
    knowledge_base.remove_generation = knowledge_base.removed.append
    unused: Any = None
    return succession.Succession(unused, knowledge_base, shared, unused)


async def test_a_generation_that_was_live_twice_is_removed_when_no_request_of_either_time_runs(alone: succession.Succession) -> None:
    first, second, other = pairs = [Retiring("old"), Retiring("old"), Retiring("other")]
    for old in pairs:
        alone._retiring.add(cast(Pair, old))
    removed = cast(Any, alone._knowledge_base).removed
    second.done.set()  # whose requests are done before those of the first
    removing = asyncio.create_task(alone.remove("old"))
    await settled()
    assert removed == []
    first.done.set()
    await removing
    assert removed == ["old"]
    closing = asyncio.create_task(alone.close())
    await settled()
    assert not closing.done()
    other.done.set()
    await closing


async def test_a_server_that_stops_while_a_removal_waits_closes_what_is_being_retired(alone: succession.Succession) -> None:
    old = Retiring("old")
    alone._retiring.add(cast(Pair, old))
    removing = asyncio.create_task(alone.remove("old"))
    await settled()
    closing = asyncio.create_task(alone.close())
    await settled()
    assert removing.cancelled()
    assert not closing.done()
    old.done.set()
    await closing


async def test_following_others_outlives_a_defect(
    alone: succession.Succession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks, looked = 0, asyncio.Event()

    async def look(self: succession.Succession) -> None:
        nonlocal looks
        looks += 1
        if looks < 4:
            raise KeyError("a defect")
        looked.set()

    monkeypatch.setattr(succession, "_LOOK_AGAIN", 0.0)
    monkeypatch.setattr(succession.Succession, "_follow", look)
    await alone.follow()
    await asyncio.wait_for(looked.wait(), WAIT)
    await alone.close()
    [told] = [record for record in caplog.records if "cannot tell or follow" in record.message]
    assert told.exc_info is not None  # where the defect is


async def test_a_refused_change_whose_caller_hung_up_is_not_logged(alone: succession.Succession, caplog: pytest.LogCaptureFixture) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    begun, let = asyncio.Event(), asyncio.Event()

    async def refused() -> None:
        begun.set()
        await let.wait()
        raise GenerationNotReady("another generation is being built")

    change = asyncio.create_task(alone._uncancelled(refused))
    await begun.wait()
    change.cancel()
    await settled()
    let.set()
    await settled()
    del change
    gc.collect()
    assert (complaints, caplog.messages) == ([], [])


async def test_a_generation_that_fails_while_it_keeps_up_is_compared_no_longer(
    caller: Caller, tuned_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended, fails = asyncio.Event(), asyncio.Event(), False
    really_fill, really_run = Following.fill, Comparison.run

    async def fill(self: Following, *, enough: int = 0) -> None:
        if fails:
            raise KnowledgeBaseDamaged("the disk is full")
        await really_fill(self, enough=enough)

    async def run(self: Comparison) -> None:
        begun.set()
        try:
            await really_run(self)
        finally:
            ended.set()

    monkeypatch.setattr(following, "_LOOK_AGAIN", 0.01)
    monkeypatch.setattr(Following, "fill", fill)
    monkeypatch.setattr(Comparison, "run", run)
    await caller.build(tuned_bundle)
    await asyncio.wait_for(begun.wait(), WAIT)
    fails = True
    await asyncio.wait_for(ended.wait(), WAIT)
    reply = await caller.knowledge.ListGenerations(kb.ListGenerationsRequest())
    assert reply.generations[1].problem == "the disk is full"


async def test_a_pair_that_does_not_open_leaves_no_graph_in_the_engine(
    caller: Caller, tuned_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added, removed = list[str](), list[str]()
    really_add, really_remove = Engine.add, Engine.remove

    def add(self: Engine, graphs: dict[str, Any]) -> None:
        added.extend(graphs)
        really_add(self, graphs)

    def remove(self: Engine, names: Iterable[str]) -> None:
        removed.extend(names)
        really_remove(self, names)

    def fail(*_: object, **__: object) -> None:
        raise KnowledgeBaseUnavailable("it does not answer")

    monkeypatch.setattr(Engine, "add", add)
    monkeypatch.setattr(Engine, "remove", remove)
    monkeypatch.setattr(pair, "choose_splitting", fail)
    assert "it does not answer" in (await refusal(caller.build(tuned_bundle)))[2]
    assert added
    assert removed == added


async def test_a_look_at_what_is_lacking_ends_before_its_generation_is_closed(
    tiny_bundle: Path, tuned_bundle: Path, tiny_knowledge_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, go_on, order = threading.Event(), threading.Event(), list[str]()
    really_stop, really_close = Following.stop, EmbeddedKnowledgeBase.close

    def look(self: EmbeddedKnowledgeBase, limit: int) -> None:
        looking.set()
        go_on.wait(WAIT)
        order.append("looked")

    async def stop(self: Following) -> None:
        asyncio.get_running_loop().call_later(0.1, go_on.set)
        await really_stop(self)

    def close(self: EmbeddedKnowledgeBase) -> None:
        order.append("closed")
        really_close(self)

    async with Running(tiny_bundle, str(tiny_knowledge_base)) as caller:
        with monkeypatch.context() as patch:
            patch.setattr(EmbeddedKnowledgeBase, "lacking", look)
            patch.setattr(EmbeddedKnowledgeBase, "close", close)
            patch.setattr(Following, "stop", stop)
            name = await caller.build(tuned_bundle)
            assert await asyncio.to_thread(looking.wait, WAIT)
            await caller.knowledge.RemoveGeneration(kb.RemoveGenerationRequest(name=name), timeout=WAIT)
    assert order == ["looked", "closed"]


async def test_generations_of_one_embedder_with_other_parameters_are_swapped_without_embedding(
    tiny_place: Place, tiny_bundle: Path
) -> None:
    async with Running(tiny_bundle, tiny_place.target) as caller:
        before = await caller.answers()
        if tiny_place.in_elasticsearch:  # where the parameter is the number of shards, which stands in the address
            assert "keeps whole vectors" in (await refusal(caller.build(tiny_bundle, graph_dims=8)))[2]
        else:
            name = await caller.build(tiny_bundle, graph_dims=8)
            assert await caller.publish() == name
    if tiny_place.in_elasticsearch:
        async with Running(tiny_bundle, tiny_place.target.replace("shards=2", "shards=1")) as caller:
            name = await caller.build(tiny_bundle)
            assert await caller.publish() == name
    async with Running(tiny_bundle, tiny_place.target) as caller:
        after = await caller.answers()
        assert told(after) == told(before)
        assert (after.provenance.bundle_id, after.provenance.generation) == (before.provenance.bundle_id, name)


async def test_changes_are_refused_where_writes_are(
    tiny_bundle: Path, tuned_bundle: Path, tiny_place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "LOOPBACK", ())  # as if the server listened on an address that others reach
    async with Running(tiny_bundle, tiny_place.target) as caller:
        assert await caller.generations() == [(LIVE, 3, 0)]
        for call in (
            caller.build(tuned_bundle),
            caller.publish(),
            caller.roll_back(),
            caller.knowledge.RemoveGeneration(kb.RemoveGenerationRequest(name="x")),
        ):
            assert (await refusal(call))[1] == "READ_ONLY"


async def test_a_server_without_a_knowledge_base_says_so(tiny_bundle: Path) -> None:
    async with running_server(tiny_bundle, None, CONFIG) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert (await refusal(Caller(channel).publish()))[1] == "NO_KNOWLEDGE_BASE"


async def test_a_bundle_that_moved_away_is_named_with_the_way_out(
    tiny_bundle: Path, tuned_bundle: Path, tiny_place: Place, tmp_path: Path
) -> None:
    moving = Path(shutil.copytree(tuned_bundle, tmp_path / "moving"))
    async with Running(tiny_bundle, tiny_place.target) as caller:
        await caller.publish(await caller.build(moving))
    await asyncio.to_thread(moving.rename, tmp_path / "moved")
    with pytest.raises(BundleInvalid, match="moving"):
        await Running(tiny_bundle, tiny_place.target).__aenter__()
    async with Running(tmp_path / "moved", tiny_place.target) as caller:  # from here on it is known where it is
        await caller.roll_back()
        await caller.roll_back()
        assert (await caller.answers()).provenance.bundle_id == load_bundle(tuned_bundle).id


async def test_building_goes_on_after_a_start(tiny_bundle: Path, tuned_bundle: Path, tiny_place: Place) -> None:
    async with Running(tiny_bundle, tiny_place.target) as caller:
        name = await caller.build(tuned_bundle)
        await caller.upsert(**{f"n{number}": f"the king {number}" for number in range(9)})
    async with Running(tiny_bundle, tiny_place.target) as caller:
        assert await caller.publish() == name
        assert await caller.generations() == [(KEPT, 12, 0), (LIVE, 12, 0)]


def serve(bundle: Path, knowledge_base: str) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "openbook.cli", "serve", str(bundle), knowledge_base, "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"serving .* on (127\.0\.0\.1:\d+)", line):
            return process, found.group(1)
    raise AssertionError("the server did not start")


def test_a_server_killed_while_it_builds_or_publishes_comes_up_with_one_pair_and_the_command_goes_on(
    tiny_bundle: Path, tuned_bundle: Path, tiny_place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = {load_bundle(bundle).id: embedder for bundle, embedder in ((tiny_bundle, "old"), (tuned_bundle, "new"))}
    rng = random.Random(0)
    stored: list[str] = []
    for turn in range(3):
        process, address = serve(tiny_bundle, tiny_place.target)
        try:
            with Client(address, timeout_seconds=WAIT) as client:
                documents = [Document(id=f"n{turn}-{number}", text=f"a yak {turn} {number} was in the city") for number in range(20)]
                stored += [written.id for written in client.upsert(documents)]
                client.build_generation(str(tuned_bundle))
                publishing = threading.Thread(
                    target=lambda address=address: cli.main(["generations", "publish", address, "--timeout", "3"])
                )
                publishing.start()
                time.sleep(rng.random() * 0.6)
                process.kill()
                publishing.join()
        finally:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
        process, address = serve(tiny_bundle, tiny_place.target)
        try:
            with Client(address, timeout_seconds=WAIT) as client:
                [result] = client.answer(["who is king ?"])
                assert not isinstance(result, Exception)
                live = [generation for generation in client.generations() if generation.state == LIVE]
                assert [(generation.name, generation.bundle_id, generation.lacking) for generation in live] == [
                    (result.generation, result.bundle_id, 0)
                ]
                assert result.bundle_id in ids
                [found] = client.search(["yak"], mode="dense", top_k=100)
                assert not isinstance(found, Exception)
                assert {*stored} <= {hit.document_id for hit in found.hits}
                if ids[result.bundle_id] == "new":
                    assert cli.main(["generations", "rollback", address]) == 0
                else:
                    assert cli.main(["generations", "publish", address, client.generations()[-1].name]) == 0
                    assert cli.main(["generations", "rollback", address]) == 0
                assert cli.main(["generations", "list", address]) == 0
                assert "live before" in capsys.readouterr().out
                assert cli.main(["generations", "remove", address, client.generations()[-1].name]) == 0
                assert len(client.generations()) == 1
        finally:
            process.terminate()
            process.wait()
            process.stderr.close()  # type: ignore[union-attr]


def test_the_command_changes_a_knowledge_base_without_a_server(
    tiny_bundle: Path, tuned_bundle: Path, tiny_place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_place.target
    assert cli.main(["index", str(tiny_bundle), folder, "--new-generation"]) == 0  # live already; but from now on its bundle is known
    assert cli.main(["index", str(tuned_bundle), folder, "--new-generation"]) == 0
    assert cli.main(["generations", "list", folder]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[1] == "-"]
    assert len(names) == 2
    for action, message in (
        (["remove", folder, names[1]], "is live"),
        (["publish", folder, "9-x"], f"NAME: '9-x' is none of {names[0]}, {names[1]}; see"),
        (["publish", folder], f"NAME: not given; name one of {names[0]}, {names[1]}; see"),
        (["build", "b", folder], "--new"),
    ):
        assert cli.main(["generations", *action]) == 1
        assert message in capsys.readouterr().err
    for live in (names[0], names[1]):
        assert cli.main(["generations", "rollback", folder]) == 0
        assert f"{live} is live" in capsys.readouterr().out
    if not tiny_place.in_elasticsearch:
        held = Home(Path(folder))
        for action in (["rollback", folder], ["remove", folder, names[0]]):
            assert cli.main(["generations", *action]) == 1
            assert "open in another process" in capsys.readouterr().err
        held.close()
    assert cli.main(["generations", "publish", folder, names[0]]) == 0
    assert cli.main(["generations", "remove", folder, names[1]]) == 0
    capsys.readouterr()
    assert cli.main(["generations", "rollback", folder]) == 1
    assert "no generation was live before, or it was removed; publish one by its name" in capsys.readouterr().err


async def test_a_server_follows_another_one_that_publishes_rolls_back_or_is_told_so_and_its_writes_are_refused_until_then(
    tiny_bundle: Path, tuned_bundle: Path, tiny_place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not tiny_place.in_elasticsearch:
        pytest.skip("one process at a time has a folder open")
    monkeypatch.setattr(succession, "_LOOK_AGAIN", 0.2)
    old, new = load_bundle(tiny_bundle).id, load_bundle(tuned_bundle).id

    async def follows(caller: Caller, bundle: str) -> None:
        async with asyncio.timeout(WAIT):
            while (await caller.answers()).provenance.bundle_id != bundle:
                await asyncio.sleep(0.05)

    async with Running(tiny_bundle, tiny_place.target) as first, Running(tiny_bundle, tiny_place.target) as second:
        await first.publish(await first.build(tuned_bundle))
        await follows(second, new)
        assert told(await second.answers()) == told(await first.answers())
        await second.upsert(later="the yak was red")
        assert await first.generations() == await second.generations() == [(KEPT, 3, 1), (LIVE, 4, 0)]
        await second.roll_back()
        await follows(first, old)
        await first.upsert(last="the zebra was red")
        monkeypatch.setattr(succession, "_LOOK_AGAIN", 1e9)  # from its next look on, the second one does not see what others do
        await asyncio.sleep(0.5)
        assert (await first.generations())[0] == (LIVE, 5, 0)
        await first.roll_back()
        status, reason, message = await refusal(second.knowledge.Upsert(kb.UpsertRequest(documents=[kb.Document(id="x", text="a yak")])))
        assert (status, reason) == (grpc.StatusCode.UNAVAILABLE, "GENERATION_REPLACED")
        assert "took the place" in message
        assert (await second.answers()).provenance.bundle_id == old
        name = await second.roll_back()  # back to what it answers with; but it is not live
        assert name == (await second.answers()).provenance.generation
        await second.upsert(x="a yak")
        assert (await second.generations())[0] == (LIVE, 6, 0)


@pytest.mark.parametrize("read_only", [False, True])
async def test_a_server_that_takes_writes_sweeps_now_and_then_though_nobody_writes(
    tiny_bundle: Path, tiny_knowledge_base: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    monkeypatch.setattr(succession, "_LOOK_AGAIN", 0.001)
    looks, swept = asyncio.Semaphore(0), 0
    loop, really_live = asyncio.get_running_loop(), EmbeddedKnowledgeBase.live_generation.fget
    assert really_live is not None

    def live_generation(self: EmbeddedKnowledgeBase) -> str:
        loop.call_soon_threadsafe(looks.release)
        return really_live(self)

    def sweep(self: EmbeddedKnowledgeBase) -> None:
        nonlocal swept
        swept += 1
        raise KnowledgeBaseUnavailable("not now")  # which costs nothing but a line in the log

    monkeypatch.setattr(EmbeddedKnowledgeBase, "live_generation", property(live_generation))
    monkeypatch.setattr(EmbeddedKnowledgeBase, "sweep", sweep)
    async with Running(tiny_bundle, str(tiny_knowledge_base), replace(CONFIG, read_only=read_only)) as caller, asyncio.timeout(WAIT):
        before = swept
        for _ in range(20):
            await looks.acquire()
        assert (swept > before) is not read_only
        await caller.answers()


async def test_a_server_that_does_not_find_the_bundle_of_what_another_one_published_goes_on_and_says_so(
    tiny_bundle: Path,
    tuned_bundle: Path,
    tiny_place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not tiny_place.in_elasticsearch:
        pytest.skip("one process at a time has a folder open")
    monkeypatch.setattr(succession, "_LOOK_AGAIN", 0.2)
    moving = Path(shutil.copytree(tuned_bundle, tmp_path / "moving"))
    assert cli.main(["index", str(tiny_bundle), tiny_place.target, "--new-generation"]) == 0
    async with Running(tiny_bundle, tiny_place.target) as caller:
        assert cli.main(["index", str(moving), tiny_place.target, "--new-generation"]) == 0
        await asyncio.to_thread(moving.rename, tmp_path / "moved")
        before = (await caller.answers()).provenance.bundle_id
        async with asyncio.timeout(WAIT):
            while not any("cannot tell or follow" in line and "moving" in line for line in caplog.messages):
                await asyncio.sleep(0.05)
        assert (await caller.answers()).provenance.bundle_id == before == load_bundle(tiny_bundle).id
        await asyncio.to_thread((tmp_path / "moved").rename, moving)
        async with asyncio.timeout(WAIT):
            while (await caller.answers()).provenance.bundle_id == before:
                await asyncio.sleep(0.05)
