"""Retrieval data: BEIR folders and SQuAD files become the same thing, and held-out questions share no passage with training."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from openbook_training.beir import EVALUATION, TRAINING, Passage
from openbook_training.errors import InvalidData
from openbook_training.retrieval import Asked, RetrievalSet, hold_out_passages, load_retrieval, load_unlabelled
from rich.console import Console


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def beir(folder: Path, corpus: list[object], queries: list[object], qrels: str) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


CORPUS: list[object] = [{"_id": "a", "title": "Kings", "text": "the red king"}, {"_id": 7, "title": None, "text": "a blue river"}]
QUERIES: list[object] = [{"_id": "q", "text": "who?", "metadata": {"answers": ["king", " "]}}, {"_id": "other", "text": "of another split"}]


def test_a_beir_folder_gives_passages_with_titles_and_graded_questions(tmp_path: Path) -> None:
    data = load_retrieval(str(beir(tmp_path / "data", CORPUS, QUERIES, "q\ta\t2\nq\t7\t0\n")), console(), TRAINING)
    assert data.passages == [Passage(id="a", text="the red king", title="Kings"), Passage(id="7", text="a blue river")]
    assert data.questions == [Asked(id="q", text="who?", answers=("king",), gold={0: 2.0})]


def test_a_squad_file_gives_its_contexts_as_the_corpus(tmp_path: Path) -> None:
    rows = [{"id": str(n), "question": "who?", "context": f"passage {n // 2}", "answers": ["passage"]} for n in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_retrieval(str(tmp_path / "a.jsonl"), console(), TRAINING)
    assert [passage.text for passage in data.passages] == ["passage 0", "passage 1"]
    assert [dict(question.gold) for question in data.questions] == [{0: 1.0}, {0: 1.0}, {1: 1.0}, {1: 1.0}]


def test_bad_rows_of_a_beir_folder_are_named_and_the_rest_is_used(tmp_path: Path) -> None:
    corpus: list[object] = [
        *CORPUS,
        {"_id": "a", "text": "again"},
        {"_id": "b", "text": " "},
        ["no object"],
        {"_id": "t", "text": "x", "title": 3},
    ]
    queries: list[object] = [
        *QUERIES,
        {"_id": "lost", "text": "where?"},
        {"_id": "q2", "text": "x", "metadata": {"answers": "king"}},
        {"_id": "q", "text": "who again?"},
    ]
    qrels = "q\ta\t1\nlost\tgone\t1\nq\ta\nq\ta\tmuch\nq\ta\tnan\nq\taway\t1\nnobody\ta\t1\nq\t0\ta\t1\nq\ta\t0\n"
    out = console()
    data = load_retrieval(str(beir(tmp_path / "data", corpus, queries, qrels)), out, TRAINING)
    assert (len(data.passages), [question.id for question in data.questions]) == (2, ["q"])
    for problem in (
        "corpus.jsonl: line 3: its _id 'a' stands further up",
        "corpus.jsonl: line 4: 'text' is empty",
        "corpus.jsonl: line 5: is no JSON object",
        "corpus.jsonl: line 6: 'title' is no text",
        "queries.jsonl: line 4: metadata.answers is no list of texts",
        "test.tsv: line 4: expected query-id, corpus-id and score",
        "test.tsv: line 5: expected",
        "query lost: none of its relevant passages",
        "queries.jsonl: line 5: its _id 'q' stands further up",
        "test.tsv: line 6: expected",
        "test.tsv: line 9: expected query-id, corpus-id and score between tabs, and no more",
        "test.tsv: line 10: query q and passage a are judged further up",
        "query nobody: no usable row of queries.jsonl",
        "query q: of its relevant passages, away not in corpus.jsonl",
    ):
        assert problem in said(out)


def test_a_byte_order_mark_is_part_of_no_query(tmp_path: Path) -> None:
    folder = beir(tmp_path / "data", CORPUS, QUERIES, "")
    (folder / "qrels" / "test.tsv").write_text("\ufeffq\ta\t1\n", encoding="utf-8")
    assert [question.id for question in load_retrieval(str(folder), console(), TRAINING).questions] == ["q"]


@pytest.mark.parametrize(
    ("qrels", "message"),
    [("", "test.tsv: no usable row"), ("x\ta\t1\n", "judges no query"), ("q\tgone\t1\n", "none of its relevant passages")],
)
def test_a_folder_without_a_usable_question_is_refused(tmp_path: Path, qrels: str, message: str) -> None:
    folder = beir(tmp_path / "data", CORPUS, QUERIES, qrels)
    with pytest.raises(InvalidData, match=message):
        load_retrieval(str(folder), console(), TRAINING)


def test_a_folder_that_is_not_in_beirs_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"corpus\.jsonl' does not exist"):
        load_retrieval(str(tmp_path), console(), TRAINING)
    (tmp_path / "corpus.jsonl").write_text(json.dumps(CORPUS[0]))
    with pytest.raises(InvalidData, match=r"has no qrels/\*\.tsv"):
        load_retrieval(str(tmp_path), console(), TRAINING)


def test_of_several_tables_training_and_evaluation_read_one_each_and_say_which(tmp_path: Path) -> None:
    queries: list[object] = [{"_id": split, "text": f"{split}?"} for split in ("train", "dev", "test", "more")]
    folder = beir(tmp_path / "data", CORPUS, queries, "test\ta\t1\n")

    def asked(splits: tuple[str, ...]) -> list[str]:
        return [question.id for question in load_retrieval(str(folder), console(), splits).questions]

    assert asked(TRAINING) == asked(EVALUATION) == ["test"]  # a single table is the one that is meant
    for split in ("train", "dev", "more"):
        (folder / "qrels" / f"{split}.tsv").write_text(f"{split}\ta\t1\n")
    out = console()
    load_retrieval(str(folder), out, TRAINING)
    assert "questions of qrels/train.tsv" in said(out)
    assert (asked(TRAINING), asked(EVALUATION)) == (["train"], ["test"])
    assert [question.id for question in load_unlabelled(str(folder), console()).questions] == ["test"]
    (folder / "qrels" / "test.tsv").unlink()
    assert asked(EVALUATION) == ["dev"]
    (folder / "qrels" / "train.tsv").unlink()
    with pytest.raises(InvalidData, match=r"qrels/ holds dev.tsv, more.tsv, and none is train.tsv; make a folder"):
        asked(TRAINING)


@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_held_out_questions_share_no_gold_passage_with_training(count: int) -> None:
    passages = [Passage(id=str(n), text=f"passage {n}") for n in range(20)]
    questions = [Asked(id=str(n), text="?", answers=(), gold={n % 20: 1.0, (n * 3) % 20 if n % 9 == 0 else n % 20: 1.0}) for n in range(60)]
    train, held = hold_out_passages(RetrievalSet(passages, questions), count)
    assert not {row for q in train for row in q.gold} & {row for q in held for row in q.gold}
    assert sorted(question.id for question in train + held) == sorted(question.id for question in questions)
    assert len(held) >= min(count, 60)


def test_unlabelled_data_bring_the_questions_that_they_carry(tmp_path: Path) -> None:
    labelled = load_unlabelled(str(beir(tmp_path / "asked", CORPUS, QUERIES, "q\ta\t2\n")), console())
    assert [question.id for question in labelled.questions] == ["q"]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "corpus.jsonl").write_text("\n".join(map(json.dumps, CORPUS)))
    assert load_unlabelled(str(tmp_path / "corpus"), console()) == RetrievalSet(labelled.passages, [])
    rows = [{"id": n, "question": f"who {n}?", "context": "the red king", "title": "Old_kings", "answers": ["king"]} for n in range(2)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = load_unlabelled(str(tmp_path / "asked.jsonl"), console())
    assert asked.passages == [Passage(id="0", text="the red king", title="Old kings")]
    assert [question.gold for question in asked.questions] == [{0: 1.0}] * 2
    (tmp_path / "texts.txt").write_text("one\ntwo\none\n")
    assert load_unlabelled(str(tmp_path / "texts.txt"), console()) == RetrievalSet(
        [Passage(id="0", text="one"), Passage(id="1", text="two")], []
    )
