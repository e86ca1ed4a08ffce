"""What a client sends and gets back: plain frozen objects instead of protocol messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openbook.errors import RequestRejected
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import openbook_pb2 as pb

STAGES = ("tokenise", "embed", "search", "read", "rank", "queue", "total")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """A passage that a search found, with its score and where it comes from."""

    passage_id: str
    document_id: str
    score: float
    dense_score: float | None
    lexical_score: float | None
    window_score: float | None
    token_score: float | None
    overlap_score: float | None
    answer_probability: float | None  # that the answer stands in it, where it was read
    title: str
    text: str
    source: str
    document_start: int  # where the passage begins in the document's text, in code points
    metadata: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        names = ("passage_id", "document_id", "score", "title", "source", "document_start")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A span of a passage; offsets count code points of the passage's text, the end is exclusive."""

    text: str
    probability: float
    passage_id: str
    document_id: str
    start: int
    end: int
    document_start: int  # the same place in the document's text
    document_end: int

    def to_json(self) -> dict[str, Any]:
        names = ("text", "probability", "passage_id", "document_id", "start", "end", "document_start", "document_end")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """The passages found for one question, best first."""

    question: str
    hits: tuple[Hit, ...]
    timings_ms: Mapping[str, float]  # of the message the question travelled in
    bundle_id: str
    generation: str

    def to_json(self) -> dict[str, Any]:
        return {"question": self.question, "hits": [hit.to_json() for hit in self.hits], "timings_ms": dict(self.timings_ms)}


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerResult:
    """The answers to one question, most probable first, and the passages that were found for it."""

    question: str
    answers: tuple[Answer, ...]
    hits: tuple[Hit, ...]
    no_answer_probability: float  # that none of the passages read holds an answer
    passages_read: int  # the first so many of `hits`
    timings_ms: Mapping[str, float]  # of the message the question travelled in
    bundle_id: str
    generation: str

    def to_json(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "answers": [answer.to_json() for answer in self.answers],
            "hits": [hit.to_json() for hit in self.hits],
            "no_answer_probability": self.no_answer_probability,
            "passages_read": self.passages_read,
            "timings_ms": dict(self.timings_ms),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """A label of a text, and how probable it is."""

    label: str
    probability: float  # what labels are ordered by
    alone: float | None  # of the model without neighbours; this and the next two only where the text has some
    model: float | None  # of the model, summed over the neighbours
    knn: float | None  # of the neighbours' vote

    def to_json(self) -> dict[str, Any]:
        return {name: value for name in Label.__dataclass_fields__ if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbour:
    """A labelled passage that took part."""

    label: str
    hit: Hit


@dataclass(frozen=True, kw_only=True, slots=True)
class Classified:
    """The labels of one text, most probable first, and what they rest on where that was asked for."""

    text: str
    labels: tuple[Label, ...]
    passages: int  # neighbours that took part, or passages of evidence of which something was read
    neighbours: tuple[Neighbour, ...]
    evidence: tuple[Hit, ...]  # that was found
    classifier: str
    timings_ms: Mapping[str, float]  # of the message the text travelled in
    bundle_id: str
    generation: str

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "labels": [label.to_json() for label in self.labels],
            "passages": self.passages,
            "neighbours": [{"label": one.label, **one.hit.to_json()} for one in self.neighbours],
            "evidence": [hit.to_json() for hit in self.evidence],
            "timings_ms": dict(self.timings_ms),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """What is known of a written text once it has ended."""

    text: str  # the whole of it
    finish: str  # end (of the model's own accord), length or stop
    tokens: int
    hits: tuple[Hit, ...]  # the passages that were read, best first
    seed: int
    writer: str
    timings_ms: Mapping[str, float]
    bundle_id: str
    generation: str

    def to_json(self) -> dict[str, Any]:
        names = ("text", "finish", "tokens", "seed", "writer")
        told = {name: getattr(self, name) for name in names}
        return told | {"hits": [hit.to_json() for hit in self.hits], "timings_ms": dict(self.timings_ms)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a text that is being written."""

    text: str  # since the piece before
    tokens: int  # written so far
    ending: Ending | None  # of the last piece


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """What `upsert` stores: named by its id, replaced whole when it is written again."""

    id: str
    text: str
    title: str = ""
    source: str = ""  # file, URL or row it came from; given back with every hit
    metadata: Mapping[str, str] = field(default_factory=dict)  # what filters compare; numbers too are given as texts

    def to_message(self) -> kb.Document:
        return kb.Document(id=self.id, text=self.text, title=self.title, source=self.source, metadata=dict(self.metadata))


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What became of one document of a write."""

    id: str
    outcome: str  # created, replaced, unchanged, deleted, absent or failed
    passages: int  # that it has now; for a deletion, that it had
    problem: str  # why it failed; empty where it did not
    replaced_source: str = ""  # where what it took the place of came from, if that was another source


def written(message: kb.WriteResult, first: int = 0) -> Written:
    """`first`: the place in the caller's list of the first one in the same message."""
    if message.HasField("error"):
        problem = str(RequestRejected(message.error.message, field=message.error.field).moved(first))
        return Written(id=message.id, outcome="failed", passages=0, problem=problem)
    outcome = kb.Outcome.Name(message.outcome).removeprefix("OUTCOME_").lower()
    return Written(id=message.id, outcome=outcome, passages=message.passages, problem="", replaced_source=message.replaced_source)


def timings_ms(message: pb.Timings) -> dict[str, float]:
    """Stage -> milliseconds; `queue` is the part of embed and read spent waiting."""
    return {stage: round(getattr(message, stage + "_ms"), 3) for stage in STAGES}


def hit(message: pb.Hit) -> Hit:
    return Hit(
        passage_id=message.passage_id,
        document_id=message.document_id,
        score=message.score,
        dense_score=message.dense_score if message.HasField("dense_score") else None,
        lexical_score=message.lexical_score if message.HasField("lexical_score") else None,
        window_score=message.window_score if message.HasField("window_score") else None,
        token_score=message.token_score if message.HasField("token_score") else None,
        overlap_score=message.overlap_score if message.HasField("overlap_score") else None,
        answer_probability=message.answer_probability if message.HasField("answer_probability") else None,
        title=message.title,
        text=message.text,
        source=message.source,
        document_start=message.document_start,
        metadata=dict(message.metadata),
    )


def answer(message: pb.Answer) -> Answer:
    return Answer(**{name: getattr(message, name) for name in Answer.__dataclass_fields__})


def label(message: pb.Label) -> Label:
    readings = {name: getattr(message, name) if message.HasField(name) else None for name in ("alone", "model", "knn")}
    return Label(label=message.label, probability=message.probability, **readings)


def neighbour(message: pb.Neighbour) -> Neighbour:
    return Neighbour(label=message.label, hit=hit(message.hit))


def piece(message: pb.GenerateResponse) -> Piece:
    ending = message.ending
    ended = Ending(
        text=ending.text,
        finish=pb.Finish.Name(ending.finish).removeprefix("FINISH_").lower(),
        tokens=message.tokens,
        hits=tuple(map(hit, ending.hits)),
        seed=ending.seed,
        writer=ending.writer,
        timings_ms=timings_ms(ending.timings),
        bundle_id=ending.provenance.bundle_id,
        generation=ending.provenance.generation,
    )
    return Piece(text=message.text, tokens=message.tokens, ending=ended if message.HasField("ending") else None)
