"""Texts and options to the protocol's messages, of bounded size each; what cannot be sent is refused by name."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import date, time
from numbers import Integral, Number, Real
from typing import Any, TypedDict, Unpack

from openbook.errors import RequestRejected
from openbook.parts import TEXTS_A_MESSAGE
from openbook.results import Document
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import openbook_pb2 as pb

MODES = {
    "hybrid": pb.SEARCH_MODE_HYBRID,
    "dense": pb.SEARCH_MODE_DENSE,
    "lexical": pb.SEARCH_MODE_LEXICAL,
    "none": pb.SEARCH_MODE_NONE,
    "random": pb.SEARCH_MODE_RANDOM,
    "late_interaction": pb.SEARCH_MODE_LATE_INTERACTION,
}
FUSIONS = {"weighted": pb.FUSION_WEIGHTED, "reciprocal_rank": pb.FUSION_RECIPROCAL_RANK}
Conditions = Mapping[str, object] | Sequence[tuple[str, object]] | pb.Filter  # of metadata; all pairs of key and value must hold


class SearchOptions(TypedDict, total=False):
    """How passages are found; what is left out, or None, is the server's default. docs/search.md explains each."""

    top_k: int | None  # passages a question
    mode: str | None  # of MODES
    fusion: str | None  # of FUSIONS
    ef: int | None  # candidates of the dense index
    filter: Conditions | None  # only documents whose metadata match: {key: value} or pairs, a list of values means one of them; or a Filter
    min_score: float | None  # only passages that score as much or more
    diversity: float | None  # 0 to 1: how much a passage loses for being like a better one
    batch_invariant: bool | None  # the same question gives the same bytes whatever shares its batch; slower where the models do not


class RankedSearchOptions(SearchOptions, total=False):
    """`SearchOptions`, and how the passages found are ranked."""

    rerank: int | None  # the best so many are read beside the question and ordered by that


class AnswerOptions(SearchOptions, total=False):
    """`SearchOptions`, and what is made of the passages."""

    max_answers: int | None  # answers a question
    read_all: bool | None  # read every passage found, though the best answer be settled by the first ones


class ClassifyOptions(TypedDict, total=False):
    """By what texts are labelled, and what is returned; what is left out, or None, is the server's default."""

    classifier: str | None  # its name; needed where the bundle has several
    truncate: bool | None  # cut texts that are too long instead of refusing them
    max_labels: int | None  # labels a text
    explain: bool | None  # return the neighbours, or the evidence found, that a result rests on
    evidence: Sequence[Sequence[str]] | None  # verifiers: the passages that each claim is read beside; None = they are searched for
    top_k: int | None  # neighbours, or passages of evidence searched for
    mode: str | None  # of MODES; "none" labels a text by itself
    filter: Conditions | None  # as in SearchOptions, of the documents that are searched
    label_key: str | None  # of the metadata in which neighbours' labels stand
    batch_invariant: bool | None  # the same text gives the same bytes whatever shares its batch; slower where the models do not


class GenerateOptions(TypedDict, total=False):
    """How a text is written, and from what; what is left out, or None, is the server's default."""

    writer: str | None  # language_model or generator; needed where the bundle has both
    max_tokens: int | None  # to write at most
    temperature: float | None  # 0 = the most probable token at each step
    top_p: float | None  # draw among the fewest tokens whose probabilities sum to it
    seed: int | None  # the same seed gives the same text
    stop: Sequence[str] | None  # the text ends before the first of them
    top_k: int | None  # passages that are read, at most as many as in training
    mode: str | None  # of MODES; "none" reads no passages
    filter: Conditions | None  # as in SearchOptions


_KINDS: dict[str, tuple[Any, str]] = {
    name: (kind, called)
    for kind, called, names in (
        (Integral, "a whole number", "top_k max_answers max_labels max_tokens ef rerank seed graph_dims"),
        (Real, "a number", "min_score diversity temperature top_p"),
        (bool, "True or False", "batch_invariant read_all truncate explain"),
        (str, "a string", "mode fusion classifier label_key writer bundle name"),
        (Collection, "a list", "stop evidence"),
        ((Mapping, list, tuple, pb.Filter), "a mapping of keys to values, a list of such pairs, or a Filter", "filter"),
    )
    for name in names.split()
}


def check_options(given: Mapping[str, Any]) -> None:
    """Raises RequestRejected where one cannot be sent, for it is of another type or too large."""
    for name, value in given.items():
        kind, called = _KINDS[name]
        if not isinstance(value, kind):
            raise RequestRejected(f"{value!r} is not {called}", field=name)
        if kind is str:
            check_text(value, name)
        elif name == "seed" and not 0 <= value < 2**64:
            raise RequestRejected(f"{value} is not a number from 0 to 2^64 - 1", field=name)
        elif kind is Integral and name != "seed" and not -(2**31) <= value < 2**31:
            raise RequestRejected(f"{value} is no 32-bit number", field=name)


def embed_requests(texts: Sequence[str], *, truncate: bool, batch_invariant: bool) -> list[pb.EmbedRequest]:
    check_options({"truncate": truncate, "batch_invariant": batch_invariant})
    return [pb.EmbedRequest(texts=part, truncate=truncate, batch_invariant=batch_invariant) for part in _parts(texts, "texts")]


def search_requests(questions: Sequence[str], **options: Unpack[RankedSearchOptions]) -> list[pb.SearchRequest]:
    return [pb.SearchRequest(questions=part, **_given(options, RankedSearchOptions)) for part in _parts(questions, "questions")]


def answer_requests(questions: Sequence[str], **options: Unpack[AnswerOptions]) -> list[pb.AnswerRequest]:
    return [pb.AnswerRequest(questions=part, **_given(options, AnswerOptions)) for part in _parts(questions, "questions")]


def classify_requests(texts: Sequence[str], **options: Unpack[ClassifyOptions]) -> list[pb.ClassifyRequest]:
    given = _given(options, ClassifyOptions)
    evidence = given.pop("evidence", None)
    requests = [pb.ClassifyRequest(texts=part, **given) for part in _parts(texts, "texts")]
    if evidence is not None and len(evidence) != len(texts):
        raise RequestRejected(f"{len(evidence)} entries for {len(texts)} texts; give one for each", field="evidence")
    for at, passages in enumerate(evidence or ()):
        sendable = [passage for part in _parts(passages, f"evidence[{at}]") for passage in part]
        requests[at // TEXTS_A_MESSAGE].evidence.append(pb.Evidence(passages=sendable))
    return requests


def generate_request(text: str, **options: Unpack[GenerateOptions]) -> pb.GenerateRequest:
    given = _given(options, GenerateOptions)
    given["stop"] = [stop for part in _parts(given.get("stop", []), "stop") for stop in part]
    [[sendable]] = _parts([text], "text")
    return pb.GenerateRequest(text=sendable, **given)


def delete_requests(ids: Sequence[str]) -> list[kb.DeleteRequest]:
    return [kb.DeleteRequest(ids=part) for part in _parts(ids, "ids")]


def _parts(texts: Sequence[str], field: str) -> Iterator[list[str]]:
    if isinstance(texts, str):
        raise RequestRejected(f"{field} is one string; give a list of strings", field=field)
    if not isinstance(texts, Collection):
        raise RequestRejected(f"{type(texts).__name__} is no list of strings", field=field)
    for at, text in enumerate(texts):
        check_text(text, f"{field}[{at}]")
    for at in range(0, len(texts), TEXTS_A_MESSAGE):
        yield list(texts[at : at + TEXTS_A_MESSAGE])


def check_text(text: object, field: str) -> None:
    """Raises RequestRejected where it is none, or cannot be sent."""
    if not isinstance(text, str):
        raise RequestRejected(f"{reprlib.repr(text)} is no text; give a string", field=field)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestRejected(f"text that cannot be sent as UTF-8 ({error}); replace what is no character", field=field) from error


def document_message(document: Document, field: str) -> kb.Document:
    """Raises RequestRejected where a document cannot be sent; the field is within the one that names it."""
    try:
        return document.to_message()
    except (TypeError, ValueError) as error:  # protobuf and dict, which name neither field nor value
        for name in ("id", "text", "title", "source"):
            if getattr(document, name) is not None:
                check_text(getattr(document, name), f"{field}.{name}")
        if not isinstance(document.metadata, Mapping):
            raise RequestRejected(
                f"{reprlib.repr(document.metadata)} is no mapping; give {{key: text}}", field=f"{field}.metadata"
            ) from error
        for key, value in document.metadata.items():
            check_text(key, f"{field}.metadata")
            check_text(value, f"{field}.metadata[{key!r}]")
        raise RequestRejected(f"cannot be sent ({error})", field=field) from error


def _given(options: Mapping[str, Any], kind: type[SearchOptions] | type[ClassifyOptions] | type[GenerateOptions]) -> dict[str, Any]:
    if unknown := options.keys() - kind.__annotations__.keys():
        raise TypeError(f"unknown option {min(unknown)!r}; there are {', '.join(kind.__annotations__)}")
    given = {name: value for name, value in options.items() if value is not None}
    check_options(given)
    for field, known in (("mode", MODES), ("fusion", FUSIONS)):
        if field in given:
            if given[field] not in known:
                raise RequestRejected(f"{given[field]!r} is none of {', '.join(known)}", field=field)
            given[field] = known[given[field]]
    if "filter" in given and not isinstance(given["filter"], pb.Filter):
        pairs = given["filter"].items() if isinstance(given["filter"], Mapping) else given["filter"]
        given["filter"] = pb.Filter(all=pb.Filter.Filters(filters=[_condition(pair) for pair in pairs]))
    return given


def _condition(pair: object) -> pb.Filter:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise RequestRejected(f"{reprlib.repr(pair)} is no pair of a key and a value", field="filter")
    key, value = pair
    check_text(key, "filter")
    several = isinstance(value, list | tuple | set | frozenset)
    texts = [text for one in (value if several else [value]) for text in _as_stored(key, one)]
    if not texts:
        raise RequestRejected(f"{key!r} is to be one of no values; name one, or leave the key out", field="filter")
    if len(texts) > 1:
        return pb.Filter(one_of=pb.Filter.OneOf(key=key, values=texts))
    return pb.Filter(equals=pb.Filter.Equals(key=key, value=texts[0]))


def _as_stored(key: str, value: object) -> list[str]:
    """The texts that a value may be in metadata, where all are texts."""
    if isinstance(value, bool):
        return [str(value).lower(), str(value)]  # as JSON and as Python write it; either may be stored
    if isinstance(value, date | time):
        return [value.isoformat()]
    if not isinstance(value, str | Number):
        what = f"{reprlib.repr(value)}, which no metadata are"
        raise RequestRejected(f"{key!r} is to be {what}; give a text, a number, a date or a list of them, or a Filter", field="filter")
    text = value if isinstance(value, str) else str(value)
    check_text(text, "filter")
    return [text]
