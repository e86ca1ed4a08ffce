"""Classify over the wire: texts beside labelled neighbours, claims beside evidence, words; the oracle is the model as training has it."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from grpc_status import rpc_status
from openbook.client import AsyncClient
from openbook.results import Document
from openbook.v1 import openbook_pb2 as pb
from openbook.v1 import openbook_pb2_grpc
from openbook_server.bundle import Bundle, load_bundle
from openbook_server.classification import SEPARATOR, passages_read
from openbook_server.config import ServerConfig
from openbook_server.errors import BundleInvalid
from openbook_server.options import DEFAULT_TOP_K
from openbook_server.pair import load_graphs
from openbook_server.runtime import build_device
from openbook_server.serving import running_server
from openbook_server.tokenization import TextEncoder, load_tokenizer
from openbook_training.checkpoint import Checkpoint, resolve_checkpoint
from openbook_training.evidence import PASSAGES, beside_retrieved, evidence_corpus
from openbook_training.heads import HeadModel, RowEncoder, load_head_model
from openbook_training.labelled import SEPARATOR as SEPARATOR_IN_TRAINING
from openbook_training.labelled import Labelled
from openbook_training.negatives import embed as embed_texts
from openbook_training.neighbours import Mixture, knn_probabilities, nearest
from rich.console import Console

if TYPE_CHECKING:  # the class is in the stub file alone
    from openbook.v1.openbook_pb2_grpc import OpenBookAsyncStub as Stub

CONFIG = ServerConfig(port=0, device="cpu", threads=1, max_texts=8, max_text_bytes=2_000, drain_seconds=1.0)
SHELVED = [  # (id, text, label)
    ("a", "the red king", "warm"),
    ("b", "the blue river", "cold"),
    ("c", "a green book", "leafy"),
    ("d", "the red city", "warm"),
    ("e", "two blue books in the river", "cold"),
    ("f", "what the king read", "leafy"),
    ("g", "one of three", "unknown"),  # no label of the classifier's
]
TEXTS = ["red king by the river", "a book", "one two three blue green"]


@pytest.fixture
async def address(labelling_bundle: Path, tiny_knowledge_base: Path) -> AsyncIterator[str]:
    async with running_server(labelling_bundle, tiny_knowledge_base, CONFIG) as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture
async def stub(address: str) -> AsyncIterator[Stub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield openbook_pb2_grpc.OpenBookStub(channel)


@pytest.fixture
async def shelved(address: str) -> None:
    """Labelled texts, stored while the server runs."""
    documents = [
        Document(id=id_, text=text, metadata={"shelf": label, "kind": "odd" if id_ in "ace" else "even"}) for id_, text, label in SHELVED
    ]
    async with AsyncClient(address) as client:
        assert [written.outcome async for written in client.upsert(documents)] == ["created"] * len(documents)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return resolve_checkpoint(str(tiny_checkpoint))


def trained(
    checkpoint: Checkpoint, folder: Path, texts: Sequence[tuple[str, str]], neighbours: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """(texts, classes) probabilities by PyTorch."""
    model, settings = load_head_model(checkpoint, folder)
    assert isinstance(model, HeadModel)
    encoder = RowEncoder(checkpoint, max_tokens=settings["max_tokens"])
    found = () if neighbours is None else (tuple(torch.from_numpy(array) for array in neighbours),)
    with torch.inference_mode():
        return np.asarray(model(encoder.batch(encoder.rows(texts), torch.device("cpu")), *found).exp().numpy())


async def embed(stub: Stub, texts: Sequence[str]) -> np.ndarray:
    reply = await stub.Embed(pb.EmbedRequest(texts=texts))
    return np.frombuffer(reply.vectors, "<f4").reshape(-1, reply.dim)


async def classify(stub: Stub, classifier: str, texts: Sequence[str], **options: object) -> pb.ClassifyResponse:
    return await stub.Classify(pb.ClassifyRequest(classifier=classifier, texts=texts, max_labels=10, **options))  # type: ignore[arg-type]


def table(reply: pb.ClassifyResponse, reading: str = "probability", labels: Sequence[str] = ("cold", "leafy", "warm")) -> np.ndarray:
    """(texts, labels) in the order of `labels`."""
    rows = [{label.label: getattr(label, reading) for label in result.labels} for result in reply.results]
    return np.array([[row[label] for label in labels] for row in rows])


async def refusal(call: grpc.aio.UnaryUnaryCall[object, object]) -> tuple[grpc.StatusCode, str, str, str]:
    """(status, reason, field, message) of a call that must fail with google.rpc details."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    status, info, bad = rpc_status.from_call(raised.value), ErrorInfo(), BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    return raised.value.code(), info.reason, bad.field_violations[0].field if bad.field_violations else "", raised.value.details() or ""


async def test_without_labelled_passages_a_text_is_labelled_by_itself(
    stub: Stub, checkpoint: Checkpoint, tiny_heads: dict[str, Path]
) -> None:
    reply = await classify(stub, "topics", TEXTS)
    assert table(reply) == pytest.approx(trained(checkpoint, tiny_heads["topics"], [(text, "") for text in TEXTS]), abs=1e-4)
    for result in reply.results:
        assert result.passages == 0
        assert not result.labels[0].HasField("knn")
        assert [label.probability for label in result.labels] == sorted((label.probability for label in result.labels), reverse=True)
    assert reply.classifier == "topics"
    assert reply.provenance.bundle_id
    assert reply.timings.read_ms > 0


@pytest.mark.usefixtures("shelved")
async def test_stored_labelled_texts_take_part_at_once_as_in_training(
    stub: Stub, checkpoint: Checkpoint, tiny_heads: dict[str, Path]
) -> None:
    labelled = [(text, ("cold", "leafy", "warm").index(label)) for _, text, label in SHELVED if label != "unknown"]
    found = nearest(
        await embed(stub, TEXTS), await embed(stub, [text for text, _ in labelled]), np.array([label for _, label in labelled]), 5
    )
    alone = trained(checkpoint, tiny_heads["topics"], [(text, "") for text in TEXTS])
    model = trained(checkpoint, tiny_heads["topics"], [(text, "") for text in TEXTS], (found.scores, found.labels))
    knn = knn_probabilities(found, 3, 0.1)
    reply = await classify(stub, "topics", TEXTS, explain=True)
    assert table(reply, "alone") == pytest.approx(alone, abs=1e-4)
    assert table(reply, "model") == pytest.approx(model, abs=1e-4)
    assert table(reply, "knn") == pytest.approx(knn, abs=1e-3)
    assert table(reply) == pytest.approx(Mixture(0.6, 0.1).probabilities(model, knn), abs=1e-3)
    assert np.abs(table(reply) - alone).max() > 0.02  # they matter
    shelf = {id_: label for id_, _, label in SHELVED}
    for result, scores in zip(reply.results, found.scores, strict=True):
        assert result.passages == 5
        assert [one.hit.score for one in result.neighbours] == pytest.approx(scores.tolist(), abs=1e-5)
        assert all(one.label == shelf[one.hit.document_id] and one.hit.text for one in result.neighbours)


@pytest.mark.usefixtures("shelved")
async def test_a_request_chooses_its_neighbours(stub: Stub) -> None:
    def found(reply: pb.ClassifyResponse) -> set[str]:
        return {one.hit.document_id for one in reply.results[0].neighbours}

    odd = pb.Filter(equals=pb.Filter.Equals(key="kind", value="odd"))
    assert found(await classify(stub, "topics", ["red"], explain=True, filter=odd)) == {"a", "c", "e"}
    nearest_one = await classify(stub, "topics", ["the red king"], explain=True, omit_text=True, top_k=1)
    assert found(nearest_one) == {"a"}
    assert nearest_one.results[0].neighbours[0].hit.text == ""
    assert table(nearest_one, "knn").tolist() == [[0.0, 0.0, 1.0]]
    assert found(await classify(stub, "topics", ["red"], explain=True, label_key="kind")) == set()
    none = await classify(stub, "topics", ["red"], explain=True, mode=pb.SEARCH_MODE_NONE)
    assert found(none) == set()
    assert table(none).tolist() == table(await classify(stub, "topics", ["red"]), "alone").tolist()
    assert not (await classify(stub, "topics", ["red"])).results[0].neighbours  # only where they are asked for


@pytest.mark.usefixtures("shelved")
async def test_a_result_has_the_same_bytes_alone_and_among_others(stub: Stub) -> None:
    for name in ("topics", "claims", "words"):
        evidence = (
            {"evidence": [pb.Evidence(passages=["the red city was one of three", text]) for text in TEXTS]} if name == "claims" else {}
        )
        together = await classify(stub, name, TEXTS, **evidence)
        for at, text in enumerate(TEXTS):
            one = {"evidence": [evidence["evidence"][at]]} if evidence else {}
            alone = await classify(stub, name, [text], **one)
            assert alone.results[0].SerializeToString(deterministic=True) == together.results[at].SerializeToString(deterministic=True), (
                name
            )


async def test_a_long_text_is_refused_or_cut_for_the_classifier_alone(
    stub: Stub, checkpoint: Checkpoint, tiny_heads: dict[str, Path]
) -> None:
    long = "red king blue river " * 10
    code, reason, field, message = await refusal(stub.Classify(pb.ClassifyRequest(classifier="topics", texts=[long])))
    assert (code, reason, field) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", "texts[0]")
    assert "40 tokens exceed the limit of 22; split it, or set truncate" in message
    expected = trained(checkpoint, tiny_heads["topics"], [(long, "")])
    for mode in (pb.SEARCH_MODE_NONE, pb.SEARCH_MODE_DENSE):
        assert table(await classify(stub, "topics", [long], truncate=True, mode=mode)) == pytest.approx(expected, abs=1e-4)


async def test_a_claim_is_read_beside_the_evidence_given(stub: Stub, checkpoint: Checkpoint, tiny_heads: dict[str, Path]) -> None:
    passages = [["the red city", "was one of three"], ["the blue king of the green city " * 9, "never read"], ["a book"]]
    claims = ["the city was red", "the king read", "a river"]
    reply = await classify(stub, "claims", claims, evidence=[pb.Evidence(passages=one) for one in passages])
    pairs = [(claim, " ".join(one).strip()) for claim, one in zip(claims, passages, strict=True)]
    assert table(reply, labels=("no", "yes")) == pytest.approx(trained(checkpoint, tiny_heads["claims"], pairs), abs=1e-4)
    assert [result.passages for result in reply.results] == [2, 1, 1]  # of a long one the rest is cut
    alone = await classify(stub, "claims", claims, mode=pb.SEARCH_MODE_NONE)
    expected = trained(checkpoint, tiny_heads["claims"], [(claim, "") for claim in claims])
    assert table(alone, labels=("no", "yes")) == pytest.approx(expected, abs=1e-4)
    assert np.abs(table(alone, labels=("no", "yes")) - table(reply, labels=("no", "yes"))).max() > 0.02


async def test_blank_evidence_is_none_that_was_read(stub: Stub, labelling_bundle: Path) -> None:
    long = "the blue king of the green city " * 9
    passages = [[" ", "a book", "", "\u200b"], ["\n"], ["a book", long, " "], ["", "", "river"]]
    reply = await classify(stub, "claims", ["the king read"] * 4, evidence=[pb.Evidence(passages=one) for one in passages])
    assert [result.passages for result in reply.results] == [1, 0, 2, 1]
    encoder = TextEncoder(load_tokenizer(load_bundle(labelling_bundle).tokenizer_path))
    pairs = [encoder.pairs("the king read", [SEPARATOR.join(one)], 64)[0] for one in passages]
    assert [passages_read(pair, one) for pair, one in zip(pairs, passages, strict=True)] == [[1], [], [0, 1], [2]]


async def test_a_claim_is_read_beside_what_is_found_for_it(stub: Stub) -> None:
    claim = "the blue king was in the city"
    found = await classify(stub, "claims", [claim], explain=True, top_k=2)
    hits = (await stub.Search(pb.SearchRequest(questions=[claim], top_k=2))).results[0].hits
    assert [hit.passage_id for hit in found.results[0].evidence] == [hit.passage_id for hit in hits]
    assert found.results[0].passages == 2
    given = await classify(stub, "claims", [claim], evidence=[pb.Evidence(passages=[hit.text for hit in hits])])
    assert table(given, labels=("no", "yes")).tolist() == table(found, labels=("no", "yes")).tolist()


async def test_evidence_is_found_and_read_as_in_training(
    address: str, stub: Stub, checkpoint: Checkpoint, tiny_heads: dict[str, Path], tmp_path: Path
) -> None:
    """By dense search; in hybrid search words have a say too. The passages are more than the verifier can read."""
    assert (PASSAGES, SEPARATOR_IN_TRAINING) == (DEFAULT_TOP_K, SEPARATOR)
    documents = [
        {"_id": "a", "title": "the red king", "text": "it was one of three in the city by the river"},
        {"_id": "b", "title": "", "text": "who read the blue book of the green river"},
        {"_id": "c", "title": "a green book", "text": "what is it of and to"},
        {"_id": "d", "title": "", "text": "two kings by a river and one in the red city"},
        {"_id": "e", "title": "river", "text": "a city is three of the books in a case"},
        {"_id": "f", "title": "", "text": "the king was one to read it"},
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    async with AsyncClient(address) as client:
        await client.delete(["d0", "d1", "d2"])
        stored = [Document(id=one["_id"], text=one["text"], title=one["title"]) for one in documents]
        assert [written.outcome async for written in client.upsert(stored)] == ["created"] * len(documents)
    rows = [Labelled(place="", text=text, label="no") for text in ("the king read one book", "a river in the city", "it was red")]
    corpus = evidence_corpus(str(tmp_path), rows, Console(file=io.StringIO()))
    retrieved = beside_retrieved(rows, corpus, PASSAGES, checkpoint, lambda texts: embed_texts(checkpoint, texts))
    reply = await classify(stub, "claims", [row.text for row in rows], mode=pb.SEARCH_MODE_DENSE, explain=True)
    for result, row in zip(reply.results, retrieved, strict=True):
        assert tuple(hit.text for hit in result.evidence) == row.passages[: result.passages]
    assert any(result.passages < PASSAGES for result in reply.results)
    expected = trained(checkpoint, tiny_heads["claims"], [(row.text, row.evidence) for row in retrieved])
    assert table(reply, labels=("no", "yes")) == pytest.approx(expected, abs=1e-4)


async def test_a_vocabulary_head_tells_tokens(stub: Stub, checkpoint: Checkpoint, tiny_heads: dict[str, Path]) -> None:
    reply = await classify(stub, "words", TEXTS)
    expected = trained(checkpoint, tiny_heads["words"], [(text, "") for text in TEXTS])
    vocabulary = RowEncoder(checkpoint, max_tokens=24).tokenizer.get_vocab()
    for result, row in zip(reply.results, expected, strict=True):
        assert [label.probability for label in result.labels] == pytest.approx(np.sort(row)[::-1][:10], abs=1e-4)
        assert [row[vocabulary[label.label]] for label in result.labels] == pytest.approx(
            [label.probability for label in result.labels], abs=1e-4
        )


async def test_a_bad_text_or_evidence_fails_alone(stub: Stub) -> None:
    reply = await classify(stub, "topics", ["red", " ", "blue " * 40, "king"])
    assert {error.index: error.field for error in reply.errors} == {1: "texts[1]", 2: "texts[2]"}
    assert [bool(result.labels) for result in reply.results] == [True, False, False, True]
    evidence = [pb.Evidence(passages=["the king"]), pb.Evidence(), pb.Evidence(passages=["x" * 3_000])]
    reply = await classify(stub, "claims", ["red", "blue", "green"], evidence=evidence)
    assert {error.index: error.message for error in reply.errors} == {
        1: "empty; send a passage, or choose mode none to read the claim alone",
        2: "3000 bytes exceed the limit of 2000; the model reads only the beginning, send that",
    }
    assert reply.results[0].labels
    claim = await refusal(stub.Classify(pb.ClassifyRequest(classifier="claims", texts=["red " * 19], truncate=True)))
    assert claim[2:] == ("texts[0]", "texts[0]: 19 tokens exceed the limit of 18; shorten the claim")


@pytest.mark.parametrize(
    ("request_", "field", "message"),
    [
        (
            pb.ClassifyRequest(texts=["red"]),
            "classifier",
            "empty, and this bundle has several; name one of claims, own_words, topics, words",
        ),
        (pb.ClassifyRequest(classifier="moods", texts=["red"]), "classifier", "this bundle has no 'moods'; name one of"),
        (pb.ClassifyRequest(classifier="topics"), "texts", "no texts in the request"),
        (pb.ClassifyRequest(classifier="topics", texts=["red"], max_labels=0), "max_labels", "0 is outside 1 to 1000"),
        (pb.ClassifyRequest(classifier="topics", texts=["red"], top_k=101), "top_k", "101 is outside 1 to 100"),
        (pb.ClassifyRequest(classifier="topics", texts=["red"], mode=pb.SEARCH_MODE_LEXICAL), "mode", "lexical finds no neighbours"),
        (pb.ClassifyRequest(classifier="topics", texts=["red"], mode=77), "mode", "77 is no SearchMode"),  # type: ignore[arg-type]
        (pb.ClassifyRequest(classifier="topics", texts=["red"], evidence=[pb.Evidence()]), "evidence", "only a verifier reads evidence"),
        (pb.ClassifyRequest(classifier="claims", texts=["a", "b"], evidence=[pb.Evidence()]), "evidence", "1 entries for 2 texts"),
        (pb.ClassifyRequest(classifier="topics", texts=["red"], filter=pb.Filter()), "filter", "an empty condition"),
    ],
)
async def test_a_wrong_request_is_refused_by_field_value_and_way_out(
    stub: Stub, request_: pb.ClassifyRequest, field: str, message: str
) -> None:
    code, reason, named, said = await refusal(stub.Classify(request_))
    assert (code, reason, named) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", field)
    assert message in said


async def test_too_many_texts_are_told_with_a_reason_of_their_own(stub: Stub) -> None:
    code, reason, field, message = await refusal(stub.Classify(pb.ClassifyRequest(classifier="topics", texts=["red"] * 9)))
    assert (code, reason, field) == (grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_TOO_LARGE", "texts")
    assert "9 texts exceed the limit of 8" in message


async def test_without_a_knowledge_base_texts_are_labelled_alone_and_claims_need_evidence(labelling_bundle: Path) -> None:
    async with running_server(labelling_bundle, None, CONFIG) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = openbook_pb2_grpc.OpenBookStub(channel)
        assert (await classify(stub, "topics", ["red"])).results[0].passages == 0
        code, reason, field, message = await refusal(stub.Classify(pb.ClassifyRequest(classifier="claims", texts=["red"])))
        assert (code, reason, field) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_KNOWLEDGE_BASE", "")
        assert "no knowledge base; start it as `openbook serve BUNDLE KB`, send evidence, or choose mode none" in message


async def test_a_bundle_without_classifiers_says_how_to_get_one(tiny_bundle: Path) -> None:
    async with running_server(tiny_bundle, None, CONFIG) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = openbook_pb2_grpc.OpenBookStub(channel)
        code, reason, _, message = await refusal(stub.Classify(pb.ClassifyRequest(texts=["red"])))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_IN_BUNDLE")
        assert "this bundle has no classifier; `openbook export --task NAME=FOLDER` adds one" in message
        assert not (await stub.Describe(pb.DescribeRequest())).bundle.classifiers


async def test_describe_tells_every_classifier(stub: Stub) -> None:
    told = {one.name: one for one in (await stub.Describe(pb.DescribeRequest())).bundle.classifiers}
    assert set(told) == {"topics", "claims", "words", "own_words"}
    topics, claims = told["topics"], told["claims"]
    assert (topics.objective, list(topics.labels), topics.max_text_tokens) == ("classifier", ["cold", "leafy", "warm"], 22)
    assert (topics.neighbours, topics.label_key) == (5, "shelf")
    assert (claims.objective, claims.max_text_tokens, claims.neighbours) == ("verification", 18, 0)
    assert list(told["words"].labels) == []


def test_a_neighbours_graph_that_computes_something_else_is_not_served(labelling_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(labelling_bundle)
    golden = bundle.golden()
    golden["topics.neighbours/knn"] = golden["topics.neighbours/knn"][::-1]
    monkeypatch.setattr(Bundle, "golden", lambda _: golden)
    with pytest.raises(BundleInvalid, match=r"fails its golden vectors on cpu in fp32: topics.neighbours_distance"):
        load_graphs(bundle, build_device("cpu", "fp32", 1))
