"""The index of words against BM25 written out, and what becomes of it when its files or the disk fail."""

from __future__ import annotations

import logging
import math
import random
import sys
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from openbook_server.errors import KnowledgeBaseDamaged
from openbook_server.knowledge import lexical, saved_words
from openbook_server.knowledge.lexical import question_words, stem_lines, words
from openbook_server.knowledge.overlap import overlaps
from openbook_server.knowledge.words import FOLDER, WordIndex

VOCABULARY = [f"w{number}" for number in range(40)]


def passages(count: int, seed: int = 0, words: int = 12) -> dict[int, str]:
    rng = random.Random(seed)
    return {row: " ".join(rng.choices(VOCABULARY, weights=range(40, 0, -1), k=words)) for row in range(1, count + 1)}


class Stored:
    """A store of texts, and indexes over it."""

    def __init__(self, folder: Path, rows: dict[int, str]) -> None:
        self.folder, self.rows, self.last = folder, dict(rows), max(rows, default=0)

    def texts(self, rows: Sequence[int]) -> dict[int, str]:
        return {row: self.rows[row] for row in rows if row in self.rows}

    def open(self, limit: int = 10) -> WordIndex:
        return WordIndex(self.folder, self.texts, frozenset(self.rows), self.last, buffer_limit=limit)

    def add(self, index: WordIndex, rows: dict[int, str]) -> None:
        self.rows |= rows
        self.last = max(self.last, *rows)
        index.add(list(rows), list(rows.values()))
        index.settle(self.texts)

    def delete(self, index: WordIndex, rows: Sequence[int]) -> None:
        for row in rows:
            del self.rows[row]
        index.delete(rows)


def bm25(rows: dict[int, str], question: str, counted: dict[int, str] | None = None) -> dict[int, float]:
    """Of texts whose words are their stems; `counted`: what statistics are taken of, where that is more."""
    everything = counted or rows
    average = sum(len(text.split()) for text in everything.values()) / len(everything)
    scores: dict[int, float] = {}
    for word in dict.fromkeys(question.split()):
        holding = sum(word in text.split() for text in everything.values())
        idf = math.log(1 + (len(everything) - holding + 0.5) / (holding + 0.5))
        for row, text in rows.items():
            times = text.split().count(word)
            if times:
                length = len(text.split())
                scores[row] = scores.get(row, 0.0) + idf * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * length / average))
    return scores


def best(scores: dict[int, float], limit: int) -> dict[int, float]:
    return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:limit])


@pytest.mark.parametrize("limit", [1_000, 10, 7], ids=["buffer", "saved", "both"])
def test_scores_are_bm25_over_all_rows_wherever_they_are(tmp_path: Path, limit: int) -> None:
    rows = passages(60)
    store = Stored(tmp_path, {})
    index = store.open(limit)
    for row, text in rows.items():
        store.add(index, {row: text})
    assert index.saved_rows == {1_000: 0, 10: 60, 7: 56}[limit]
    for question in ("w1 w5", "w30", "w2 w2 w39 w17 unknown"):
        expected = bm25(rows, question)
        assert index.search(question, 100) == pytest.approx(expected, rel=1e-5)
        assert list(index.search(question, 5).values()) == pytest.approx(list(best(expected, 5).values()), rel=1e-5)


def test_case_accents_endings_and_punctuation_do_not_matter(tmp_path: Path) -> None:
    index = Stored(tmp_path, {1: "Beyoncé's RUNNING shoes\nof 1997", 2: "nothing of it"}).open()
    for question in ("beyonce", "Runs?", "the shoe", '"1997" OR *', "shoes' : -"):
        assert list(index.search(question, 10)) == [1], question
    assert index.search("?!", 10) == {}
    assert index.search("", 10) == {}


WRITTEN = {
    "Greek": ("ο κόσμος είναι μεγάλος", "ΚΌΣΜΟΣ"),
    "Greek, the same case": ("ο κόσμος είναι μεγάλος", "κόσμος"),
    "Hindi": ("हिन्दी भारत की भाषा है", "हिन्दी"),
    "Tamil": ("தமிழ் ஒரு மொழி", "தமிழ்"),
    "vocalised Arabic": ("هَذَا كِتَابٌ جَدِيدٌ", "كِتَابٌ"),
    "vocalised Hebrew": ("שָׁלוֹם עֲלֵיכֶם", "שָׁלוֹם"),
    "Turkish": ("İstanbul'da bir köprü", "istanbul"),
    "Turkish, the same case": ("İstanbul'da bir köprü", "İstanbul"),
    "German": ("eine STRASSE am Fluss", "straße"),
    "composed": (unicodedata.normalize("NFC", "his résumé and ångström"), unicodedata.normalize("NFD", "Résumé")),
    "decomposed": (unicodedata.normalize("NFD", "his résumé and ångström"), "resume"),
    "Korean": (unicodedata.normalize("NFD", "한국어 문장"), "한국어"),
}


@pytest.mark.parametrize("limit", [1_000, 1], ids=["buffer", "saved"])
@pytest.mark.parametrize("script", WRITTEN)
def test_words_are_found_in_every_script_however_they_are_encoded(tmp_path: Path, script: str, limit: int) -> None:
    text, question = WRITTEN[script]
    index = Stored(tmp_path, {1: text, 2: "nothing of it"}).open(limit)
    assert list(index.search(question, 10)) == [1]
    assert list(index.search(text, 10)) == [1]
    assert overlaps(question, [stem_lines(text), stem_lines("nothing of it")])[0] > 0
    assert overlaps(text, [stem_lines(text)]) == overlaps(text, [stem_lines(unicodedata.normalize("NFD", text))])


def test_a_word_is_not_cut_at_its_marks_and_a_question_keeps_its_words_as_they_are_written() -> None:
    assert words("हिन्दी, κόσμος") == ["हिन्दी", "κόσμος"]
    assert words(unicodedata.normalize("NFD", "Where is Škoda?")) == ["Where", "is", "Škoda"]
    assert question_words("The King, the KING of İzmir") == ["KING", "İzmir"]


def test_either_tokenizer_gives_the_same_words_where_both_may_be_asked() -> None:
    blocks = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    marks = [mark for mark in blocks if unicodedata.category(mark).startswith("M")]
    assert all(lexical._MAY_BE_MARKED.search(mark) for mark in marks)
    unmarked = " ".join(f"a{character}b" for character in blocks if not lexical._MAY_BE_MARKED.search(character))
    for simple, whole in (lexical._cutters, lexical._stemmers):
        assert simple.analyze(unmarked) == whole.analyze(unmarked)


def test_deleted_rows_are_never_found_however_many_would_come_first(tmp_path: Path) -> None:
    rows = dict.fromkeys(range(1, 41), "king king") | dict.fromkeys(range(41, 61), "king of the hill")
    store = Stored(tmp_path, rows)
    index = store.open()
    store.delete(index, range(1, 31))
    assert set(index.search("king", 30)) == set(range(31, 61))
    store.delete(index, [31])
    store.add(index, {99: "king"})
    assert set(index.search("king", 100)) == set(range(32, 61)) | {99}
    assert 99 in store.open().search("king", 100)


@pytest.mark.parametrize("selected", [5_000, 3], ids=["named", "picked"])
def test_only_what_a_filter_allows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, selected: int) -> None:
    monkeypatch.setattr(saved_words, "_SELECTED", selected)
    rows = passages(55)
    index = Stored(tmp_path, rows).open()
    allowed = frozenset(range(5, 60, 9))
    expected = bm25({row: text for row, text in rows.items() if row in allowed}, "w1 w2 w3", counted=rows)
    assert index.search("w1 w2 w3", 50, allowed) == pytest.approx(expected, rel=1e-5)
    assert index.search("w1 w2 w3", 50, frozenset()) == {}
    assert index.search("w1 w2 w3", 50, frozenset({999})) == {}


def test_an_index_opened_again_holds_what_the_store_holds(tmp_path: Path) -> None:
    store = Stored(tmp_path, passages(40))
    index = store.open()
    index.flush(store.texts)
    del store.rows[3]  # deleted and added while no index was open
    store.rows |= {row + 100: text for row, text in passages(6, seed=1).items()}
    again = store.open()
    assert again.saved_rows == 39
    found = again.search(" ".join(VOCABULARY[:30]), 1_000)
    assert set(found) == set(bm25(store.rows, " ".join(VOCABULARY[:30])))


def test_an_index_of_rows_that_the_store_lost_is_built_again_before_others_get_their_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Stored(tmp_path, passages(20))
    restored = Stored(tmp_path, store.rows)
    index = store.open()
    store.add(index, dict.fromkeys(range(21, 41), "lost"))
    store.delete(index, range(31, 41))
    restored.add(restored.open(), dict.fromkeys(range(21, 31), "fresh"))
    assert "it goes to passage 40, the store to 20" in caplog.text
    again = restored.open()
    assert (again.saved_rows, set(again.search("fresh", 100)), again.search("lost", 100)) == (30, set(range(21, 31)), {})


def test_rows_move_to_the_disk_again_once_most_of_it_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Stored(tmp_path, passages(40))
    index = store.open()
    store.delete(index, range(1, 31))
    with caplog.at_level(logging.INFO):
        index.flush(store.texts)
    assert "building the index of words of 10 passages again" in caplog.text
    assert index.saved_rows == 10
    expected = bm25(store.rows, "w1 w3 w9")
    assert index.search("w1 w3 w9", 100) == pytest.approx(expected, rel=1e-5)
    assert store.open().search("w1 w3 w9", 100) == pytest.approx(expected, rel=1e-5)


def damaged(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.is_file() and file.suffix != ".lock")


@pytest.mark.parametrize("harm", ["flipped", "truncated", "missing"])
def test_a_damaged_file_is_noticed_and_the_index_built_again(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Stored(tmp_path, passages(30))
    expected = store.open().search("w1 w2", 100)
    files = damaged(tmp_path / FOLDER)
    assert len(files) > 5
    for name in files:
        file = tmp_path / FOLDER / name
        if not file.exists():  # the index was built again, under other names
            file = next(other for other in (tmp_path / FOLDER).iterdir() if other.suffix == file.suffix)
        if not file.stat().st_size:
            continue
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x10
        file.unlink()  # what an open index has mapped stays as it is
        if harm != "missing":
            file.write_bytes(data if harm == "flipped" else data[:-1])
        caplog.clear()
        index = store.open()
        assert "the index of words is built again" in caplog.text, name
        assert index.search("w1 w2", 100) == pytest.approx(expected, rel=1e-5)


def test_an_index_of_another_version_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Stored(tmp_path, passages(30))
    version = saved_words._VERSION
    monkeypatch.setattr(saved_words, "_VERSION", version - 1)
    expected = store.open().search("w1 w2", 100)
    monkeypatch.undo()
    assert store.open().search("w1 w2", 100) == expected
    assert f'"version": {version}' in (tmp_path / FOLDER / "openbook.json").read_text()


@pytest.mark.parametrize("step", ["publish", "_opened"])
def test_rows_stay_searchable_where_the_disk_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    store = Stored(tmp_path, passages(20))
    index = store.open()

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saved_words, step, full)
        store.add(index, {row + 100: text for row, text in passages(15, seed=1).items()})
        assert "No space left on device" in caplog.text
        assert set(index.search("w1 w2", 100)) == set(bm25(store.rows, "w1 w2"))
        with pytest.raises(KnowledgeBaseDamaged, match=r"words could not be saved: .*nothing that is stored is lost"):
            index.flush(store.texts)
    assert set(store.open().search("w1 w2", 100)) == set(bm25(store.rows, "w1 w2"))  # as after a crash here
    index.flush(store.texts)
    assert index.saved_rows == 35
    assert index.search("w1 w2", 100) == pytest.approx(bm25(store.rows, "w1 w2"), rel=1e-5)
    assert store.open().search("w1 w2", 100) == pytest.approx(bm25(store.rows, "w1 w2"), rel=1e-5)


def test_rows_that_could_not_be_saved_leave_memory_once_the_disk_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Stored(tmp_path, passages(20))
    index, attempts = store.open(), 0

    def full(*_: object) -> None:
        nonlocal attempts
        attempts += 1
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saved_words, "publish", full)
        for row in range(100, 125):
            store.add(index, {row: "w1 w2"})
    assert attempts == 2  # with 10 rows and with 20: every attempt writes all there is
    assert index.saved_rows == 20
    store.add(index, dict.fromkeys(range(125, 130), "w1 w2"))
    assert index.saved_rows == 50
    store.add(index, dict.fromkeys(range(130, 140), "w1 w2"))
    assert index.saved_rows == 60
    assert index.search("w1 w2", 100) == pytest.approx(bm25(store.rows, "w1 w2"), rel=1e-5)


def test_a_search_beside_writes_misses_no_row_that_was_there_before(tmp_path: Path) -> None:
    store = Stored(tmp_path, dict.fromkeys(range(1, 6), "king"))
    index = store.open()
    added = 5
    missed: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            known = added
            missed.append(known - len(index.search("king", 1_000)))

    thread = threading.Thread(target=ask)
    thread.start()
    for row in range(6, 120):
        store.add(index, {row: "king"})
        added += 1
    done.set()
    thread.join()
    assert len(missed) > 3
    assert max(missed) <= 0
