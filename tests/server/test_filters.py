"""Filters against the obvious loop over all documents, for random conditions, in every mode of search."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pytest
from openbook.v1 import openbook_pb2 as pb
from openbook_server.errors import InvalidRequest
from openbook_server.knowledge import Document, Filter, KnowledgeBase, Passage, SearchOptions, filters, vectors
from openbook_server.knowledge.recent_matches import RecentMatches
from openbook_server.knowledge.records import SearchMode
from openbook_server.options import MAX_CONDITIONS, MAX_DEPTH, parse_filter

if TYPE_CHECKING:
    from conftest import Place

DIM, COUNT = 16, 300
VALUES = {"lang": ["en", "de", "", "q\"uo'te"], "year": ["1999", "2004.5", "-3", "1e3", "unknown", " 7 "], "a.b$": ["x", "y"]}


def matches(condition: Filter, metadata: Mapping[str, str]) -> bool:
    match condition:
        case filters.OneOf(key, values):
            return metadata.get(key) in values
        case filters.Range(key, low, high):
            try:
                return low <= float(metadata[key]) <= high
            except (KeyError, ValueError):
                return False
        case filters.All(parts):
            return all(matches(part, metadata) for part in parts)
        case filters.Any(parts):
            return any(matches(part, metadata) for part in parts)
        case filters.Not(inner):
            return not matches(inner, metadata)


def random_filter(rng: random.Random, depth: int = 0) -> Filter:
    kind = rng.choice(["one", "range", "all", "any", "not"] if depth < 3 else ["one", "range"])
    if kind == "one":
        key = rng.choice([*VALUES, "absent"])
        return filters.OneOf(key, tuple(rng.choices(VALUES.get(key, ["x"]), k=rng.randrange(0, 3))))
    if kind == "range":
        low, high = sorted(rng.uniform(-10, 3000) for _ in range(2))
        return filters.Range(rng.choice(["year", "lang"]), *rng.choice([(low, high), (low, float("inf")), (float("-inf"), high)]))
    if kind == "not":
        return filters.Not(random_filter(rng, depth + 1))
    parts = tuple(random_filter(rng, depth + 1) for _ in range(rng.randrange(0, 4)))
    return filters.All(parts) if kind == "all" else filters.Any(parts)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    rng = random.Random(5)
    rows = []
    for number in range(COUNT):
        metadata = {key: rng.choice(values) for key, values in VALUES.items() if rng.random() < 0.8}
        rows.append(Document(id=f"d{number}", text=f"common word{number % 30}", metadata=metadata))
    return rows


@pytest.fixture
def knowledge_base(place: Place, documents: list[Document]) -> Iterator[KnowledgeBase]:
    """Most passages in the graph, some in the buffer."""
    knowledge_base = place.open(dim=DIM, flat_limit=200)
    rows = np.random.default_rng(0).normal(size=(COUNT, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for part in (slice(0, 250), slice(250, COUNT)):
        passages = [Passage(id=f"{d.id}#0", document_id=d.id, text=d.text, start=0) for d in documents[part]]
        knowledge_base.replace_documents([(d, "1") for d in documents[part]], passages, rows[part])
    assert knowledge_base.graph_rows > 0
    yield knowledge_base
    knowledge_base.close()


@pytest.mark.parametrize("scan_limit", [0, 5_000])
@pytest.mark.parametrize("mode", ["dense", "late_interaction", "lexical", "hybrid", "random"])
def test_a_filtered_search_is_the_unfiltered_one_without_what_does_not_match(
    knowledge_base: KnowledgeBase, documents: list[Document], monkeypatch: pytest.MonkeyPatch, mode: SearchMode, scan_limit: int
) -> None:
    monkeypatch.setattr(vectors, "SCAN_LIMIT", scan_limit)
    rng = random.Random(f"{mode}/{scan_limit}")
    metadata = {document.id: document.metadata for document in documents}
    question = np.random.default_rng(1).normal(size=(1, DIM)).astype(np.float32)
    question /= np.linalg.norm(question)
    [everything] = knowledge_base.search(["word3 common"], question, SearchOptions(top_k=COUNT, mode=mode, ef=COUNT))
    sizes = set()
    for _ in range(60):
        condition = random_filter(rng)
        allowed = [hit.passage.document_id for hit in everything if matches(condition, metadata[hit.passage.document_id])]
        [found] = knowledge_base.search(["word3 common"], question, SearchOptions(top_k=COUNT, mode=mode, ef=COUNT, condition=condition))
        assert {hit.passage.document_id for hit in found} == set(allowed)
        if mode != "hybrid":  # there a word's weight depends on the candidates
            assert [hit.passage.document_id for hit in found] == allowed
            [best] = knowledge_base.search(["word3 common"], question, SearchOptions(top_k=5, mode=mode, ef=COUNT, condition=condition))
            assert [hit.passage.document_id for hit in best] == allowed[:5]
        sizes.add(len(allowed))
    assert len(sizes) > 10


def test_what_a_filter_matches_changes_with_the_next_write(knowledge_base: KnowledgeBase) -> None:
    condition = filters.OneOf("lang", ("fr",))
    assert knowledge_base.search(["common"], None, SearchOptions(top_k=5, mode="lexical", condition=condition)) == [[]]
    document = Document(id="new", text="common", metadata={"lang": "fr"})
    vector = np.eye(1, DIM, dtype=np.float32)
    knowledge_base.replace_documents([(document, "1")], [Passage(id="new#0", document_id="new", text="common", start=0)], vector)
    [[hit]] = knowledge_base.search(["common"], vector, SearchOptions(top_k=5, mode="hybrid", condition=condition))
    assert hit.passage.document_id == "new"


def test_what_filters_matched_is_remembered_in_so_many_bytes_the_least_recently_used_goes_first_and_a_write_ends_it_all() -> None:
    asked: list[filters.Filter] = []

    def find(condition: Filter) -> frozenset[int]:
        asked.append(condition)
        return frozenset(range(1_000))

    first, second, third, big = (filters.OneOf("k", (value,)) for value in ("one", "two", "three", "v" * 1_000_000))
    matches = RecentMatches(find, capacity=150_000)
    for condition in (first, second, first, third, first, second):  # two of them fit
        assert matches(condition, 7) == frozenset(range(1_000))
        assert matches.bytes < 150_000
    assert asked == [first, second, third, second]
    for _ in range(2):  # one is remembered, whatever its size
        matches(big, 7)
    assert asked[4:] == [big]
    assert matches.bytes > 1_000_000
    matches(first, 8)
    assert asked[5:] == [first]
    assert matches.bytes < 100_000


def test_numbers_are_told_from_what_only_begins_like_one() -> None:
    for text in ("1", "-2.5", " .5 ", "3.", "+1e-3", "007"):
        assert filters.as_number(text) == float(text)
    for text in ("", ".", "1x", "1e", "e5", "1.2.3", "0x10", "inf", "1_000", "1" * 200_000 + "x"):  # the last in no time
        assert filters.as_number(text) is None


def test_a_request_s_filter_is_parsed_as_it_was_meant() -> None:
    message = pb.Filter(
        all=pb.Filter.Filters(
            filters=[
                pb.Filter(equals=pb.Filter.Equals(key="lang", value="en")),
                pb.Filter(range=pb.Filter.Range(key="year", at_least=2000)),
                pb.Filter(**{"not": pb.Filter(any=pb.Filter.Filters())}),
                pb.Filter(one_of=pb.Filter.OneOf(key="k", values=["a", "b"])),
            ]
        )
    )
    assert parse_filter(message) == filters.All(
        (
            filters.OneOf("lang", ("en",)),
            filters.Range("year", 2000.0, float("inf")),
            filters.Not(filters.Any(())),
            filters.OneOf("k", ("a", "b")),
        )
    )


def nested(depth: int) -> pb.Filter:
    message = pb.Filter(equals=pb.Filter.Equals(key="k", value="v"))
    for _ in range(depth - 1):
        message = pb.Filter(**{"not": message})
    return message


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.Filter(), "filter"),
        (pb.Filter(equals=pb.Filter.Equals(value="v")), "filter.equals.key"),
        (pb.Filter(equals=pb.Filter.Equals(key="k", value="v\0w")), "filter.equals.value"),
        (pb.Filter(one_of=pb.Filter.OneOf(key="k", values=["v", "\0"])), "filter.one_of.values[1]"),
        (pb.Filter(range=pb.Filter.Range(key="k\0")), "filter.range.key"),
        (pb.Filter(range=pb.Filter.Range(key="k", at_least=float("nan"))), "filter.range"),
        (pb.Filter(any=pb.Filter.Filters(filters=[nested(1), pb.Filter()])), "filter.any[1]"),
        (nested(MAX_DEPTH + 1), "filter" + ".not" * MAX_DEPTH),
        (pb.Filter(all=pb.Filter.Filters(filters=[nested(1)] * MAX_CONDITIONS)), f"filter.all[{MAX_CONDITIONS - 1}]"),
        (pb.Filter(one_of=pb.Filter.OneOf(key="k", values=["v"] * 1_001)), "filter.one_of.values"),
    ],
)
def test_a_malformed_filter_is_refused_by_its_place(message: pb.Filter, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse_filter(message)
    assert raised.value.field == field
    parse_filter(nested(MAX_DEPTH))


def test_as_many_values_as_the_limits_allow_are_one_parameter() -> None:
    condition = filters.All(tuple(filters.OneOf("k", tuple(f"{part}-{n}" for n in range(1_000))) for part in range(60)))
    _, parameters = filters.sql(condition)
    assert len(parameters) == 120  # SQLite takes 32,766 where nobody raised that
