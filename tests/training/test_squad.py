"""Questions, gold spans and metrics as SQuAD defines them."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
from openbook_training.errors import InvalidData
from openbook_training.squad import Question, exact_match, f1, load_questions, normalise, occurrences, spread
from rich.console import Console


def test_normal_form_drops_case_punctuation_articles_and_extra_spaces() -> None:
    assert normalise("  The  Eiffel-Tower, a  landmark! ") == "eiffeltower landmark"


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "expected"),
    [
        ("the Normans", ["Normans"], 1.0, 1.0),
        ("in France", ["France", "northern France"], 0.0, 2 / 3),
        ("Denmark", ["Iceland"], 0.0, 0.0),
        ("", [], 1.0, 1.0),
        ("something", [], 0.0, 0.0),
        ("a b b", ["b b c"], 0.0, 0.8),  # "a" is an article: {b, b} against {b, b, c}
    ],
)
def test_exact_match_and_f1_take_the_best_accepted_answer(prediction: str, answers: list[str], em: float, expected: float) -> None:
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(expected)


def test_every_free_standing_occurrence_counts_and_one_inside_a_word_only_when_there_is_no_other() -> None:
    assert occurrences("art, party, art", ["art"]) == [(0, 3), (12, 15)]
    assert occurrences("party", ["art"]) == [(1, 4)]
    assert occurrences("it costs $12 (12%)", ["$12", " "]) == [(9, 12)]


def test_flat_and_nested_files_give_the_same_questions(tmp_path: Path) -> None:
    row = {"id": "q1", "question": " Who? ", "context": "Ada did.", "answers": {"text": ["Ada", "Ada"], "answer_start": [0, 0]}}
    (tmp_path / "flat.jsonl").write_text(json.dumps(row) + "\n\n")
    answers = [{"text": "Ada", "answer_start": 0}] * 2
    nested = {"data": [{"paragraphs": [{"context": "Ada did.", "qas": [{"id": "q1", "question": "Who?", "answers": answers}]}]}]}
    (tmp_path / "nested.json").write_text(json.dumps(nested))
    flat = load_questions(str(tmp_path / "flat.jsonl"))
    assert flat == load_questions(str(tmp_path / "nested.json"))
    assert (flat[0].text, flat[0].answers, flat[0].gold_spans()) == ("Who?", ("Ada",), [(0, 3)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"id": 1}\n', "line 1: lacks 'answers'"),
        ("a.jsonl", '{"id": 1, "question": "x"\n', "line 1: is not JSON"),
        ("a.json", "[]", 'not a SQuAD JSON file .it is no object with a list of articles, "data"'),
        ("a.json", '{"data": {}}', "not a SQuAD JSON file"),
        ("a.json", "[" * 100_000, "not a SQuAD JSON file"),
        ("a.json", '{"data": [{"paragraphs": 3}]}', "article 1, paragraph 1, question 1: not of SQuAD's shape"),
        ("a.jsonl", "", "no usable row"),
        ("a.jsonl", '{"id": 1, "question": " ", "context": "c", "answers": []}', "empty question"),
        ("a.jsonl", '{"id": 1, "question": "q", "context": " ", "answers": []}', "line 1: empty question or context"),
        ("a.jsonl", '{"id": 1, "question": "q", "context": "\\u200b\\u200b", "answers": []}', "line 1: empty question or context"),
        ("a.jsonl", '{"id": 1, "question": "q", "context": "c\\ud800", "answers": []}', "line 1: 'context' holds half a character"),
        (
            "a.json",
            '{"data": [{"paragraphs": [{"context": "c\\ud800", "qas": [{"id": 1, "question": "q", "answers": []}]}]}]}',
            "article 1, paragraph 1, question 1: 'context' holds half a character",
        ),
        ("a.jsonl", '{"id": 1, "question": "q", "context": 5, "answers": []}', "context is no text"),
        ("a.jsonl", '{"id": 1, "question": "q", "context": "c", "answers": [{}]}', "answers is no text"),
    ],
)
def test_data_without_a_usable_row_are_refused_by_file_place_and_reason(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidData, match=message) as raised:
        load_questions(str(tmp_path / name))
    assert name in str(raised.value)


def test_bad_rows_are_left_out_counted_and_named_without_their_text(tmp_path: Path) -> None:
    good = json.dumps({"id": "q", "question": "Who?", "context": "Ada did.", "answers": ["Ada"]})
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([b'{"question": "secret"}'] * 11 + [b"\xff\xfe", good.encode()]))
    console = Console(file=io.StringIO())
    assert [question.id for question in load_questions(str(tmp_path / "a.jsonl"), console)] == ["q"]
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert "12 of 13 rows left out" in said
    assert "line 10: lacks 'answers'" in said
    assert "and 2 more" in said
    assert "secret" not in said


def test_one_bad_question_of_an_article_leaves_its_neighbours(tmp_path: Path) -> None:
    rows = [{"id": str(number), "question": "Who?", "answers": [{"text": "Ada"}]} for number in range(3)]
    del rows[1]["answers"]
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"title": "Ada_Lovelace", "paragraphs": [{"context": "Ada.", "qas": rows}]}]}))
    questions = load_questions(str(tmp_path / "a.json"), Console(file=io.StringIO()))
    assert [(question.id, question.title) for question in questions] == [("0", "Ada Lovelace"), ("2", "Ada Lovelace")]


def test_an_empty_answer_is_none(tmp_path: Path) -> None:
    rows = [{"id": "q", "question": "Who?", "context": "Ada did.", "answers": answers} for answers in (["", "Ada", " "], [""])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [question.answers for question in load_questions(str(tmp_path / "a.jsonl"))] == [("Ada",), ()]


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InvalidData, match="nowhere.jsonl"):
        load_questions("nowhere.jsonl")


@pytest.mark.parametrize(("total", "count", "expected"), [(10, 0, 10), (10, 3, 3), (10, 10, 10), (10, 99, 10), (11, 10, 6), (0, 5, 0)])
def test_a_sample_is_spread_over_the_whole_file(total: int, count: int, expected: int) -> None:
    questions = [Question(id=str(number), text="?", context="c", answers=()) for number in range(total)]
    chosen = spread(questions, count)
    assert len(chosen) == expected
    assert {int(after.id) - int(before.id) for before, after in pairwise(chosen)} <= {max(1, -(-total // max(count, 1)) if count else 1)}
