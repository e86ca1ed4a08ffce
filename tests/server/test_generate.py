"""Generate over the wire: a language model and a generator write what PyTorch writes; the oracle never keeps keys and values."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from grpc_status import rpc_status
from openbook.client import AsyncClient
from openbook.v1 import openbook_pb2 as pb
from openbook.v1 import openbook_pb2_grpc
from openbook_server.config import ServerConfig
from openbook_server.decoding import LOGITS, Written
from openbook_server.rows import Row
from openbook_server.sampling import choose
from openbook_server.serving import running_server
from openbook_server.text_writer import MOST_AT_ONCE, Finish, Sampling, TextWriter, _settled
from openbook_server.tokenization import load_tokenizer
from openbook_server.work import Work
from openbook_server.writers import WriterInfo
from openbook_training.generator import load_generator
from openbook_training.language_model import load_language_model

if TYPE_CHECKING:  # the class is in the stub file alone
    from openbook.v1.openbook_pb2_grpc import OpenBookAsyncStub as Stub

CONFIG = ServerConfig(port=0, device="cpu", threads=1, max_text_bytes=2_000, drain_seconds=1.0)
PROMPTS = ["the king of the red city", "one book by the river", "blue"]


@pytest.fixture
async def address(writing_bundle: Path, tiny_knowledge_base: Path) -> AsyncIterator[str]:
    async with running_server(writing_bundle, tiny_knowledge_base, CONFIG) as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture
async def stub(address: str) -> AsyncIterator[Stub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield openbook_pb2_grpc.OpenBookStub(channel)


async def written(stub: Stub, text: str, writer: str = "language_model", **options: object) -> tuple[str, list[pb.GenerateResponse]]:
    """The whole text, and every message."""
    replies = [reply async for reply in stub.Generate(pb.GenerateRequest(text=text, writer=writer, **options))]  # type: ignore[arg-type]
    assert [reply.HasField("ending") for reply in replies] == [False] * (len(replies) - 1) + [True]
    return replies[-1].ending.text, replies


@torch.inference_mode()
def greedy(folder: Path, prompt: str, passages: Sequence[str], count: int, end: int | None = None) -> str:
    """What PyTorch goes on with, the whole text read anew for every token."""
    model, prompts, settings = load_language_model(str(folder))
    encode = prompts.tokenizer.backend_tokenizer.encode
    read = [token for passage in reversed(passages) for token in (*encode(passage).ids[: settings.passage_tokens], *prompts.newline)]
    ids, found = [prompts.start, *read, *encode(prompt).ids], list[int]()
    for _ in range(count):
        token = int(model.network(torch.tensor([[*ids, *found]])).logits[0, -1].argmax())
        if token == prompts.tokenizer.eos_token_id:
            break
        found.append(token)
    return str(prompts.tokenizer.backend_tokenizer.decode(found))


async def test_a_language_model_writes_greedily_what_pytorch_writes(stub: Stub, tiny_language_model: Path) -> None:
    for prompt in PROMPTS:
        whole, replies = await written(stub, prompt, max_tokens=12, mode=pb.SEARCH_MODE_NONE)
        assert whole == greedy(tiny_language_model, prompt, [], 12)
        assert "".join(reply.text for reply in replies) == whole
        assert replies[-1].tokens <= 12
        assert replies[-1].ending.finish in (pb.FINISH_LENGTH, pb.FINISH_END)
        assert not replies[-1].ending.hits
        assert replies[-1].ending.provenance.bundle_id
        assert replies[-1].ending.timings.read_ms > 0
    assert len({greedy(tiny_language_model, prompt, [], 12) for prompt in PROMPTS}) == 3  # prompts matter


async def test_a_text_is_written_up_to_the_last_position_of_its_model(stub: Stub, tiny_language_model: Path) -> None:
    """100 of them, which is no multiple of what texts are padded to."""
    longest = 0
    for prompt in PROMPTS:
        whole, replies = await written(stub, prompt, max_tokens=85, mode=pb.SEARCH_MODE_NONE)
        assert whole == greedy(tiny_language_model, prompt, [], 85)
        longest = max(longest, replies[-1].tokens)
    assert longest > 64


async def test_retrieved_passages_are_read_before_the_prompt(stub: Stub, tiny_language_model: Path) -> None:
    whole, replies = await written(stub, PROMPTS[0], max_tokens=8)
    passages = [hit.text for hit in replies[-1].ending.hits]
    assert len(passages) == 2
    assert whole == greedy(tiny_language_model, PROMPTS[0], passages, 8)
    one, replies = await written(stub, PROMPTS[0], max_tokens=8, top_k=1, omit_text=True)
    assert one == greedy(tiny_language_model, PROMPTS[0], passages[:1], 8)
    assert [hit.text for hit in replies[-1].ending.hits] == [""]
    assert whole != greedy(tiny_language_model, PROMPTS[0], [], 8)  # they matter


async def test_texts_written_together_are_those_written_alone(stub: Stub) -> None:
    options = {"max_tokens": 16, "temperature": 1.0, "seed": 7}
    for writer, texts in (("language_model", [*PROMPTS, PROMPTS[0] + " and the river"]), ("generator", PROMPTS)):
        alone = [(await written(stub, text, writer, **options | ({"max_tokens": 7} if writer == "generator" else {})))[0] for text in texts]
        together = await asyncio.gather(
            *(written(stub, text, writer, **options | ({"max_tokens": 7} if writer == "generator" else {})) for text in texts * 3)
        )
        assert [text for text, _ in together] == alone * 3


async def test_a_seed_says_what_is_drawn(stub: Stub) -> None:
    options = {"max_tokens": 16, "temperature": 1.5, "top_p": 0.95, "mode": pb.SEARCH_MODE_NONE}
    first, replies = await written(stub, PROMPTS[0], seed=1, **options)
    assert replies[-1].ending.seed == 1
    assert (await written(stub, PROMPTS[0], seed=1, **options))[0] == first
    assert len({(await written(stub, PROMPTS[0], seed=seed, **options))[0] for seed in range(5)}) > 1
    drawn, replies = await written(stub, PROMPTS[0], **options)
    assert (await written(stub, PROMPTS[0], seed=replies[-1].ending.seed, **options))[0] == drawn
    narrow = options | {"top_p": 1e-6}
    assert (await written(stub, PROMPTS[0], seed=3, **narrow))[0] == (await written(stub, PROMPTS[0], **options | {"temperature": 0.0}))[0]


async def test_a_stop_string_ends_the_text_before_it_and_is_never_sent(stub: Stub) -> None:
    whole, _ = await written(stub, PROMPTS[0], max_tokens=16, mode=pb.SEARCH_MODE_NONE)
    stop = whole[5:8]
    assert len(stop) == 3
    cut, replies = await written(stub, PROMPTS[0], max_tokens=16, stop=["never there", stop], mode=pb.SEARCH_MODE_NONE)
    assert cut == whole[: whole.index(stop)] == "".join(reply.text for reply in replies)
    assert replies[-1].ending.finish == pb.FINISH_STOP


@torch.inference_mode()
def fused(folder: Path, question: str, passages: Sequence[str], count: int) -> str:
    model, encoder, _ = load_generator(str(folder))
    [ids] = model.write(encoder.inputs([(question, passages)], torch.device("cpu")), beams=1, max_answer_tokens=count)
    return encoder.text(ids, passages)


async def test_a_generator_writes_from_all_passages_what_pytorch_writes(stub: Stub, tiny_generator: Path) -> None:
    answers = set()
    for question in PROMPTS:
        whole, replies = await written(stub, question, "generator", max_tokens=7)
        passages = [hit.text for hit in replies[-1].ending.hits]
        assert len(passages) == 2
        assert whole.strip() == fused(tiny_generator, question, passages, 7)
        alone, _ = await written(stub, question, "generator", max_tokens=7, mode=pb.SEARCH_MODE_NONE)
        assert alone.strip() == fused(tiny_generator, question, [], 7)
        answers |= {whole, alone}
    assert len(answers) > 2  # question and passages matter


@pytest.mark.parametrize(
    ("text", "stops", "settled"),
    [
        ("a list\n\ufffd", ("\n•",), "a list"),
        ("a list\ufffd", ("\n•",), "a list"),
        ("a list\n\ufffd\ufffd", ("t\n•", "x"), "a lis"),
        ("a list\n", (), "a list\n"),
    ],
)
def test_what_a_stop_string_may_begin_is_not_sent_though_its_next_character_is_only_partly_written(
    text: str, stops: tuple[str, ...], settled: str
) -> None:
    assert text[: _settled(text, stops)] == settled


class Dictation:
    """The models and the decoder of a writer that writes given tokens."""

    sources = ()

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = iter(tokens)

    def begin(self, source: object, source_ids: object) -> Written:
        return Written([], 1, {}, [])

    async def read(self, graph: str, rows: Sequence[Row], work: Work) -> list[dict[str, np.ndarray]]:
        return [{LOGITS: np.eye(1_000, dtype=np.float32)[next(self.tokens)]}] if graph == "generator_decoder" else [{} for _ in rows]


@pytest.mark.parametrize(("stop", "ending"), [((), "The KING"), (("KING",), "the king"), (("book",), "The KING")])
async def test_no_stop_string_comes_back_with_the_characters_of_a_passage(
    tiny_checkpoint: Path, stop: tuple[str, ...], ending: str
) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint / "tokenizer.json")
    info = WriterInfo(
        architecture="bert2bert",
        max_tokens=64,
        passages=1,
        passage_tokens=0,
        query_tokens=0,
        max_answer_tokens=8,
        start_token=2,
        end_token=3,
        tokenizer="tokenizer.json",
        graphs={},
    )
    dictation: Any = Dictation([*tokenizer.encode("the king", add_special_tokens=False).ids, 3])
    writer = TextWriter(info, tokenizer, dictation, dictation)
    sampling = Sampling(max_tokens=8, temperature=0.0, top_p=1.0, seed=0, stop=stop)
    pieces = [piece async for piece in writer.answer("who ?", ["The KING read a book"], sampling, Work(deadline=float("inf")))]
    assert "".join(piece.text for piece in pieces) == "the king"
    assert (pieces[-1].whole, pieces[-1].finish) == (ending, Finish.END)


async def refused(stub: Stub, request: pb.GenerateRequest) -> tuple[grpc.StatusCode, str, str, str]:
    """(status, reason, field, message)."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        [reply async for reply in stub.Generate(request)]
    status, info, bad = rpc_status.from_call(raised.value), ErrorInfo(), BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    return raised.value.code(), info.reason, bad.field_violations[0].field if bad.field_violations else "", raised.value.details() or ""


LM = "language_model"


@pytest.mark.parametrize(
    ("request_", "field", "message"),
    [
        (pb.GenerateRequest(text="red"), "writer", "empty, and this bundle has several; name one of generator, language_model"),
        (pb.GenerateRequest(text="red", writer="poet"), "writer", "this bundle has no 'poet'"),
        (pb.GenerateRequest(text=" ", writer=LM), "text", "empty; send some text"),
        (pb.GenerateRequest(text="red " * 600, writer=LM), "text", "2400 bytes exceed the limit of 2000"),
        (pb.GenerateRequest(text="red king " * 100, writer=LM), "text", "tokens leave none of 65 to write beside 2 passages"),
        (pb.GenerateRequest(text="red king " * 30, writer="generator"), "text", "60 tokens exceed the limit of 30; shorten the question"),
        (pb.GenerateRequest(text="red", writer=LM, max_tokens=96), "max_tokens", "96 is outside 1 to "),
        (pb.GenerateRequest(text="red", writer="generator", max_tokens=9), "max_tokens", "9 is outside 1 to 8"),
        (pb.GenerateRequest(text="red", writer=LM, temperature=-1), "temperature", "-1.0 is outside 0 to 10"),
        (pb.GenerateRequest(text="red", writer=LM, temperature=10.00001), "temperature", "10.0000095"),
        (pb.GenerateRequest(text="red", writer=LM, temperature=float("nan")), "temperature", "nan is outside 0 to 10"),
        (pb.GenerateRequest(text="red", writer=LM, top_p=0), "top_p", "0.0 is not above 0 and up to 1"),
        (pb.GenerateRequest(text="red", writer=LM, stop=["x"] * 9), "stop", "9 strings, at most 8 are taken"),
        (pb.GenerateRequest(text="red", writer=LM, stop=[""]), "stop", "none that is empty"),
        (pb.GenerateRequest(text="red", writer=LM, stop=["x", "é" * 513]), "stop", "1026 bytes exceed the limit of 1024 a string"),
        (pb.GenerateRequest(text="red", writer=LM, top_k=3), "top_k", "3 is outside 0 to 2"),
        (pb.GenerateRequest(text="red", writer=LM, mode=77), "mode", "77 is no SearchMode"),  # type: ignore[arg-type]
    ],
)
async def test_a_wrong_request_is_refused_by_field_value_and_way_out(
    stub: Stub, request_: pb.GenerateRequest, field: str, message: str
) -> None:
    code, reason, named, said = await refused(stub, request_)
    assert (code, reason, named) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", field)
    assert message in said


async def test_a_bundle_without_writers_says_how_to_get_one(tiny_bundle: Path) -> None:
    async with running_server(tiny_bundle, None, CONFIG) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        code, reason, _, message = await refused(openbook_pb2_grpc.OpenBookStub(channel), pb.GenerateRequest(text="red"))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_IN_BUNDLE")
        assert "this bundle has no model that writes text; `openbook export --language-model FOLDER`" in message


async def test_a_caller_that_hangs_up_frees_its_place_and_whoever_comes_meanwhile_waits(stub: Stub, address: str) -> None:
    request = pb.GenerateRequest(text="red", writer=LM, max_tokens=60, mode=pb.SEARCH_MODE_NONE)
    calls = [stub.Generate(request) for _ in range(MOST_AT_ONCE)]
    for call in calls:
        assert (await call.read()).tokens >= 1  # type: ignore[union-attr]
    for call in calls:
        call.cancel()
    async with AsyncClient(address) as client:  # the server hears of it soon, and may be on the last step of some: it is asked again
        assert [piece async for piece in client.generate("red", writer=LM, max_tokens=4)][-1].ending is not None


async def test_a_deadline_ends_a_text(stub: Stub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        [reply async for reply in stub.Generate(pb.GenerateRequest(text="red", writer=LM, max_tokens=60), timeout=1e-3)]
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_describe_tells_every_writer(stub: Stub) -> None:
    told = {one.name: one for one in (await stub.Describe(pb.DescribeRequest())).bundle.writers}
    assert set(told) == {"generator", "language_model"}
    assert (told["language_model"].architecture, told["language_model"].passages) == ("gpt2", 2)
    assert (told["generator"].architecture, told["generator"].max_text_tokens) == ("bert2bert", 30)


def test_sampling_draws_by_temperature_from_the_nucleus() -> None:
    """Against the formula: softmax of logits / temperature, cut to the fewest tokens that reach top_p, scaled to one again."""
    logits, random = np.array([1.0, 3.0, 2.0, -1.0, 2.5]), np.random.default_rng(0)
    weights = np.exp(logits / 0.8)
    weights /= weights.sum()
    for top_p, kept in ((1.0, [0, 1, 2, 3, 4]), (0.85, [1, 4, 2]), (0.5, [1])):
        expected = np.zeros(5)
        expected[kept] = weights[kept] / weights[kept].sum()
        drawn = np.bincount([choose(logits, temperature=0.8, top_p=top_p, random=random) for _ in range(20_000)], minlength=5) / 20_000
        assert drawn == pytest.approx(expected, abs=0.015)
    assert weights[[1, 4]].sum() < 0.85 < weights[[1, 4, 2]].sum()
    assert choose(np.array([0.0, 2.0, 2.0]), temperature=0.0, top_p=1.0, random=random) == 1


@pytest.mark.parametrize("top_p", [1e-9, 0.5, 1.0])
def test_of_tokens_that_are_equally_probable_the_first_ranks_first(top_p: float) -> None:
    """Against the ranking written out; many logits are equal."""
    logits = np.round(np.random.default_rng(1).normal(size=50) * 2)
    order = sorted(range(50), key=lambda token: (-logits[token], token))
    weights = np.exp(logits[order] - logits.max())
    kept = int(np.searchsorted(np.cumsum(weights), top_p * weights.sum())) + 1
    summed = np.cumsum(weights)[:kept]
    for seed in range(200):
        drawn = order[int(np.searchsorted(summed, np.random.default_rng(seed).random() * summed[-1], side="right"))]
        assert choose(logits, temperature=1.0, top_p=top_p, random=np.random.default_rng(seed)) == drawn
