"""A generation built from what a knowledge base holds, published and taken back: the same for every kind of knowledge base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
from openbook_server.errors import FingerprintMismatch, InvalidRequest, KnowledgeBaseDamaged
from openbook_server.knowledge import Document, KnowledgeBase, Passage, PassageVectors, SearchOptions, pack
from openbook_server.knowledge.building import build_generation, publish_generation
from openbook_server.knowledge.records import BundlePlace

if TYPE_CHECKING:
    from conftest import Place

OLD, NEW = "a" * 64, "b" * 64
DIM = {OLD: 16, NEW: 24}
PLACES = {OLD: BundlePlace("old", "/bundles/old"), NEW: BundlePlace("new", "/bundles/new")}
IDS = [f"d{number}" for number in range(60)]
TEXTS = ["wd1", "wd30", "wd59", "something else"]


def vector(fingerprint: str, text: str) -> np.ndarray:
    """What an embedder makes of a text: the same for the same text, and of other dimensions for another embedder."""
    row = np.random.default_rng([*text.encode(), DIM[fingerprint]]).normal(size=DIM[fingerprint]).astype(np.float32)
    return np.asarray(row / np.linalg.norm(row))


class Embed:
    """An embedder of passages that counts them."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint, self.passages = fingerprint, 0

    def __call__(self, passages: Sequence[Passage]) -> PassageVectors:
        self.passages += len(passages)
        rows = [vector(self.fingerprint, passage.text) for passage in passages]
        windows = [pack(np.stack([row, vector(self.fingerprint, passage.id)])) for row, passage in zip(rows, passages, strict=True)]
        return PassageVectors(np.array(rows, np.float32).reshape(len(rows), DIM[self.fingerprint]), windows)


def store(knowledge_base: KnowledgeBase, fingerprint: str, ids: Sequence[str], version: str = "", passages: int = 1) -> None:
    documents = [(Document(id=id_, text="", metadata={"shelf": id_}), "d" + version) for id_ in ids]
    rows = [
        Passage(id=f"{document.id}#{n}", document_id=document.id, text=f"w{document.id}{version}", start=n)
        for document, _ in documents
        for n in range(passages)
    ]
    knowledge_base.replace_documents(documents, rows, *Embed(fingerprint)(rows))


def build(knowledge_base: KnowledgeBase, fingerprint: str) -> int:
    """Returns how many passages it took to embed."""
    embed = Embed(fingerprint)
    assert build_generation(knowledge_base, embed)
    return embed.passages


def texts(knowledge_base: KnowledgeBase, fingerprint: str) -> list[str]:
    """Of all passages, as every way of reading gives them; they must agree."""
    [dense] = knowledge_base.search([""], vector(fingerprint, "x")[None], SearchOptions(top_k=1_000, mode="dense", ef=1_000))
    found = sorted(hit.passage.text for hit in dense)
    ids = [id_ for _, id_, _, _ in knowledge_base.page(0, 1_000)]
    assert sorted(passage.text for passages in knowledge_base.documents(ids).values() for passage in passages) == found
    assert knowledge_base.counts().passages == len(found)
    for hit in dense:
        assert hit.score == pytest.approx(float(vector(fingerprint, "x") @ vector(fingerprint, hit.passage.text)), abs=1e-5)
        assert hit.passage.metadata == {"shelf": hit.passage.document_id}
    return found


def best(knowledge_base: KnowledgeBase, fingerprint: str, mode: str = "dense") -> list[list[tuple[str, float]]]:
    queries = np.array([vector(fingerprint, text) for text in TEXTS])
    found = knowledge_base.search(TEXTS, queries, SearchOptions(top_k=5, mode=mode, ef=1_000))  # type: ignore[arg-type]
    return [[(hit.passage.id, round(hit.score, 4)) for hit in row] for row in found]


def states(knowledge_base: KnowledgeBase) -> list[tuple[str, int, int]]:
    """(state, passages, lacking) of each generation, by number."""
    return [(state.state, state.passages, state.lacking) for state in knowledge_base.generation_states()]


def beside(knowledge_base: KnowledgeBase, fingerprint: str, name: str | None = None) -> KnowledgeBase:
    return knowledge_base.open_beside(fingerprint=fingerprint, dim=DIM[fingerprint], bundle=PLACES[fingerprint], name=name)


@pytest.fixture
def live(place: Place) -> Iterator[KnowledgeBase]:
    """A knowledge base of the old embedder."""
    knowledge_base = place.open(fingerprint=OLD, dim=DIM[OLD])
    store(knowledge_base, OLD, IDS)
    knowledge_base.serve_with(PLACES[OLD])
    knowledge_base.record({"passage_tokens": "20"})
    yield knowledge_base
    knowledge_base.close()


def test_a_generation_built_from_what_is_stored_finds_what_one_built_directly_finds(
    place: Place, live: KnowledgeBase, direct_place: Place
) -> None:
    following = beside(live, NEW)
    assert build(following, NEW) == 60
    publish_generation(following, Embed(NEW))
    assert following.live_generation == following.generation != live.generation
    direct = direct_place.open(fingerprint=NEW, dim=DIM[NEW])
    store(direct, NEW, IDS)
    for mode in ("dense", "hybrid", "lexical"):
        assert best(following, NEW, mode) == best(direct, NEW, mode)
    direct.close()
    again = beside(following, NEW)  # what is live is there, and not built twice
    assert again.generation == following.generation
    assert build(again, NEW) == 0
    again.close()
    assert states(following) == [("kept", 60, 0), ("live", 60, 0)]
    assert [(state.bundle, state.previous) for state in following.generation_states()] == [(PLACES[OLD], True), (PLACES[NEW], False)]
    assert following.facts("passage_tokens", "fingerprint") == {"passage_tokens": "20", "fingerprint": NEW}
    following.close()
    live.close()
    with pytest.raises(FingerprintMismatch, match="--new-generation"):
        place.open(fingerprint=OLD, dim=DIM[OLD])


def test_publishing_needs_every_passage_and_until_then_nothing_changes(place: Place, live: KnowledgeBase) -> None:
    following = beside(live, NEW)
    with pytest.raises(KnowledgeBaseDamaged, match="lacks 60 passages"):
        following.publish()
    with pytest.raises(RuntimeError, match="not live"):
        store(following, NEW, ["x"])
    assert following.facts("passage_tokens") == {"passage_tokens": "20"}
    following.close()
    store(live, OLD, ["y"])
    assert len(texts(live, OLD)) == 61
    assert states(live) == [("live", 61, 0), ("new", 0, 61)]


def test_what_is_written_while_a_generation_is_built_is_in_it(live: KnowledgeBase) -> None:
    following = beside(live, NEW)
    first = following.lacking(25)
    assert first is not None
    store(live, OLD, ["d3", "d40", "new"], version="changed", passages=2)  # just read; not yet; not there before
    live.delete_documents(["d4", "d41"])
    first.fill(*Embed(NEW)(first.passages))
    store(live, OLD, ["d5"], version="changed")  # filled already
    live.delete_documents(["d6"])
    build(following, NEW)
    store(live, OLD, ["d7"], version="changed")
    live.delete_documents(["d8"])
    publish_generation(following, Embed(NEW))
    changed = {"d3", "d40", "new", "d5", "d7"}
    expected = [f"w{id_}" for id_ in IDS if id_ not in {*changed, "d4", "d41", "d6", "d8"}]
    expected += [f"w{id_}changed" for id_ in changed for _ in range(2 if id_ in {"d3", "d40", "new"} else 1)]
    assert texts(following, NEW) == sorted(expected)
    assert states(following)[1] == ("live", len(expected), 0)
    store(following, NEW, ["after"])
    following.delete_documents(["d9"])
    assert texts(following, NEW) == sorted([text for text in expected if text != "wd9"] + ["wafter"])
    assert following.digests(["after", "d9", "d3"]) == {"after": "d", "d3": "dchanged"}
    following.close()


def test_an_older_generation_is_brought_up_to_date_and_published_again(live: KnowledgeBase) -> None:
    following = beside(live, NEW)
    build(following, NEW)
    publish_generation(following, Embed(NEW))
    store(following, NEW, ["later"])
    store(following, NEW, ["d2"], version="changed")
    following.delete_documents(["d1"])
    before = following.sequence
    assert states(following)[0] == ("kept", 58, 2)
    older = beside(following, OLD, name=live.generation)
    assert build(older, OLD) == 2
    publish_generation(older, Embed(OLD))
    assert older.sequence > before
    assert states(older) == [("live", 60, 0), ("kept", 60, 0)]
    assert texts(older, OLD) == sorted([f"w{id_}" for id_ in IDS if id_ not in {"d1", "d2"}] + ["wlater", "wd2changed"])
    store(older, OLD, ["d1"])
    assert "wd1" in texts(older, OLD)
    older.close()
    following.close()


def test_a_generation_is_removed_for_good_and_its_number_is_never_used_again(live: KnowledgeBase) -> None:
    following = beside(live, NEW)
    following.close()
    for name, problem in (("5-x", "none of"), (live.generation, "is live")):
        with pytest.raises(InvalidRequest, match=problem):
            live.remove_generation(name)
    live.remove_generation(following.generation)
    assert states(live) == [("live", 60, 0)]
    again = beside(live, NEW)
    assert again.generation.startswith("3-")
    build(again, NEW)
    publish_generation(again, Embed(NEW))
    again.remove_generation(live.generation)
    third = beside(again, OLD)
    assert third.generation.startswith("4-")
    third.close()
    again.close()
