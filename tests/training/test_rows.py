"""Data files row by row: what is read, and how a bad row is named while the others are used."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from openbook_training.errors import InvalidData
from openbook_training.labelled import Columns, Labelled, draw_shots, hold_out_by_label, load_labelled
from openbook_training.rows import build_rows, column_text, read_rows, report_left_out
from rich.console import Console

COLUMNS = Columns(text="text", label="label")


def test_a_csv_file_may_hold_lines_within_a_field_and_rows_are_named_by_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('text,label\n"two\nlines",x\nplain,\n,y\nlast,z,surplus\nend,x\n')
    rows, problems = load_labelled(str(file), COLUMNS)
    assert [(row.text, row.label) for row in rows] == [("two\nlines", "x"), ("end", "x")]
    assert [row.place for row in rows] == [f"{file}: lines 2 to 3", f"{file}: line 7"]
    assert problems == [
        f"{file}: line 4: 'label' is empty",
        f"{file}: line 5: 'text' is empty",
        f"{file}: line 6: 1 fields more than the header names",
    ]


NOT_CLOSED = "is a quote not closed, or in the middle of a value?"


def test_a_quote_that_is_not_closed_loses_no_row_unnamed(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('text,label\none,x\n"open,y\n"two",x\nthree,y\n"open,x\nfour,y\n","",z\nfive,x\n"open,y\nsix,x\nseven,y\n')
    rows, problems = load_labelled(str(file), COLUMNS)
    assert [row.text for row in rows] == ["one", "three", "five"]
    assert problems == [
        f"{file}: lines 3 to 4: is not CSV (',' expected after '\"'); {NOT_CLOSED}",
        f"{file}: lines 6 to 8: 1 fields more than the header names",
        f"{file}: lines 10 to 12: is not CSV (unexpected end of data); {NOT_CLOSED}",
    ]


def test_rows_behind_blank_lines_are_named_by_their_own(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("\ntext,label\n\n\na,x\n\nb\nc,\n")
    rows, problems = load_labelled(str(file), COLUMNS)
    assert [row.place for row in rows] == [f"{file}: line 5"]
    assert problems == [f"{file}: line 7: 'label' is empty", f"{file}: line 8: 'label' is empty"]


def test_json_lines_give_the_same_rows_and_one_bad_line_fails_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [
        {"text": " good ", "label": 0},
        {"text": 7, "label": "x"},
        {"text": "t"},
        {"text": "t", "label": None},
        {"text": "t", "label": []},
    ]
    lines = [json.dumps(row).encode() for row in rows] + [b"", b"[]", b"{", b'{"text": "\xff", "label": 1}', b'{"text": "u", "label": 1}']
    file.write_bytes(b"\n".join(lines))
    read, problems = load_labelled(str(file), COLUMNS)
    assert [(row.place, row.text, row.label) for row in read] == [(f"{file}: line 1", "good", "0"), (f"{file}: line 10", "u", "1")]
    reasons = [
        "'text' is 7, no text",
        "no column 'label', only text",
        "'label' is empty",
        "'label' is empty",
        "is no JSON object",
        "is not",
    ]
    for problem, number, reason in zip(problems, (2, 3, 4, 5, 7, 8), reasons, strict=False):
        assert problem.startswith(f"{file}: line {number}: {reason}")
    assert len(problems) == 7


def test_a_label_that_the_training_data_have_not_is_named(tmp_path: Path) -> None:
    file = tmp_path / "dev.csv"
    file.write_text("text,label\na,x\nb,new\n")
    rows, problems = load_labelled(str(file), COLUMNS, known=["x", "y"])
    assert [row.label for row in rows] == ["x"]
    assert problems == [f"{file}: line 3: label 'new' is none of the 2 that the training data have: x, y"]


def test_evidence_in_sentences_is_one_text_and_must_not_be_missing(tmp_path: Path) -> None:
    file = tmp_path / "claims.jsonl"
    rows = [{"claim": "c", "label": "yes", "evidence": ["one .", "two ."]}, {"claim": "c", "label": "yes", "evidence": []}]
    file.write_text("\n".join(map(json.dumps, rows)))
    read, problems = load_labelled(str(file), Columns(text="claim", label="label", evidence="evidence"))
    assert [(row.text, row.evidence) for row in read] == [("c", "one . two .")]
    assert problems == [f"{file}: line 2: 'evidence' is empty"]


def test_a_dataset_on_the_disk_is_read_by_name_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own reader is not loaded; what it returns is a list of rows that knows its classes."""

    class Classes:
        names = ("negative", "positive")

    class Rows(list[dict[str, object]]):
        features = {"text": object(), "label": Classes()}  # noqa: RUF012  # as the library has it

    stored = Rows([{"text": "bad", "label": 0}, {"text": "good", "label": 1}, {"text": "unknown", "label": -1}])
    monkeypatch.setattr("openbook_training.rows.dataset_rows", lambda source: stored)
    rows, problems = load_labelled("some/name:train", COLUMNS)
    assert [(row.place, row.text, row.label) for row in rows] == [
        ("some/name:train: row 1", "bad", "negative"),
        ("some/name:train: row 2", "good", "positive"),
    ]
    assert problems == ["some/name:train: row 3: 'label' is empty"]


def test_a_text_file_has_a_text_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n one \n\ntwo")
    assert [(row.place[-6:], row.values) for row in read_rows(str(tmp_path / "a.txt"))] == [
        ("line 2", {"text": "one"}),
        ("line 4", {"text": "two"}),
    ]


@pytest.mark.parametrize(("name", "content"), [("a.csv", b"t\xffxt,label\none,x\n"), ("a.jsonl", None)])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidData, match=rf"{name}.*(cannot be read|does not exist)"):
        list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize("source", ["x", "nodata", "data/nodata", "../data/train:train", "/data/train", "train.json", ""])
def test_what_is_no_name_of_a_dataset_with_its_split_is_a_path_and_no_hub_is_asked(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openbook_training.rows._ask_hub", lambda name: pytest.fail(f"asked for {name}"))
    with pytest.raises(InvalidData, match=f"data file '{source}' does not exist; a Hugging Face dataset is named NAME:SPLIT"):
        list(read_rows(source))


def test_a_file_of_another_kind_is_looked_for_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"")
    with pytest.raises(InvalidData, match="a.tsv' is of no kind that is read here: .csv, .jsonl, .txt and .parquet"):
        list(read_rows(str(tmp_path / "a.tsv")))


def test_what_the_library_of_datasets_has_written_is_read_from_the_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    two = datasets.Dataset.from_dict({"text": ["c"], "label": ["x"]})
    (tmp_path / "a:b").mkdir()  # a path that exists is no NAME:SPLIT
    one.to_parquet(str(tmp_path / "one.parquet"))
    one.to_parquet(str(tmp_path / "a:b" / "train.parquet"))
    one.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=one, test=two).save_to_disk(str(tmp_path / "splits"))
    expected = {"one.parquet": "ab", "a:b": "ab", "a:b:train": "ab", "saved": "ab", "splits": "ab", "splits:test": "c"}
    for source, texts in expected.items():
        assert [row.values["text"] for row in read_rows(f"{tmp_path}/{source}")] == list(texts), source
    with pytest.raises(InvalidData, match="saved:test'.*it was saved as one part and has no split 'test'; leave it out"):
        list(read_rows(f"{tmp_path}/saved:test"))


def test_a_folder_with_a_row_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"text": "a"}\n{bad\n')
    with pytest.raises(InvalidData, match="folder': neither .*JSON parse error"):
        list(read_rows(str(tmp_path / "folder")))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def unreachable(self: object, name: str, **_: object) -> None:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(InvalidData, match=r"'some/name' is no folder, and the Hugging Face hub does not answer \(OSError\); with HF_HUB"):
        list(read_rows("some/name:train"))
    assert asked == ["some/name"]


def test_one_row_in_another_encoding_or_with_an_endless_field_fails_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"text,label\none,x\ncaf\xe9,x\n" + b"y" * 200_000 + b",x\n" + b"z" * 1_000_001 + b",x\ntwo caf\xc3\xa9s,y\n")
    rows, problems = load_labelled(str(file), COLUMNS)
    assert [(row.place[-6:], row.text[:9]) for row in rows] == [("line 2", "one"), ("line 4", "y" * 9), ("line 6", "two cafés")]
    assert problems == [
        f"{file}: line 3: 'text' is not UTF-8",
        f"{file}: line 5: is not CSV (field larger than field limit (1000000)); {NOT_CLOSED}",
    ]
    (tmp_path / "a.txt").write_bytes(b"one\ncaf\xe9\ntwo")
    texts, problems = build_rows(read_rows(str(tmp_path / "a.txt")), lambda row: column_text(row, "text"))
    assert (texts, problems) == (["one", "two"], [f"{tmp_path}/a.txt: line 2: 'text' is not UTF-8"])


def test_a_row_with_half_a_character_fails_alone_however_deep_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"text": "alpha \ud800"}, {"text": "\U0001f600"}, {"text": "t", "answers": {"text": ["a", "\udfff"]}}]
    deep = '{"text": "t", "x": ' + "[" * 900 + "]" * 900 + "}"
    file.write_text("\n".join([*map(json.dumps, rows), deep, '{"\\ud800": "t"}']))
    texts, problems = build_rows(read_rows(str(file)), lambda row: column_text(row, "text"))
    assert texts == ["\U0001f600", "t"]
    assert problems == [
        f"{file}: line 1: 'text' holds half a character (\\ud800, a lone surrogate)",
        f"{file}: line 3: 'answers' holds half a character (\\udfff, a lone surrogate)",
        f"{file}: line 5: '\\ud800' holds half a character (\\ud800, a lone surrogate)",
    ]


def test_what_was_left_out_is_counted_and_the_first_ones_are_named() -> None:
    console = Console(file=io.StringIO())
    report_left_out(console, "a.csv", 5, [f"a.csv: line {number}: 'text' is empty" for number in range(12)])
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "a.csv: 12 of 17 rows left out:"
    assert lines[1] == "  a.csv: line 0: 'text' is empty"
    assert lines[-1] == "  and 2 more"
    with pytest.raises(InvalidData, match=r"a.csv: no usable row in it; line 1 is bad"):
        report_left_out(console, "a.csv", 0, ["line 1 is bad"])


def labelled(sizes: dict[str, int]) -> list[Labelled]:
    return [Labelled(place=f"{label}{n}", text=f"{label} {n}", label=label) for label, size in sizes.items() for n in range(size)]


def test_shots_are_so_many_of_each_label_and_depend_on_the_seed_alone() -> None:
    rows = labelled({"a": 30, "b": 12, "c": 3})
    drawn = draw_shots(rows, 5, seed=1)
    assert [sum(row.label == label for row in drawn) for label in "abc"] == [5, 5, 3]
    assert drawn == draw_shots(rows, 5, seed=1) == [row for row in rows if row in drawn]
    assert drawn != draw_shots(rows, 5, seed=2)
    assert draw_shots(rows, 0, seed=1) == rows


@pytest.mark.parametrize(("count", "expected"), [(0, [0, 0, 0]), (9, [6, 3, 0]), (15, [10, 5, 0]), (99, [29, 14, 0])])
def test_rows_are_held_out_of_every_label_in_proportion_and_each_label_keeps_one(count: int, expected: list[int]) -> None:
    rows = labelled({"a": 30, "b": 15, "c": 1})
    train, held = hold_out_by_label(rows, count)
    assert [sum(row.label == label for row in held) for label in "abc"] == expected
    assert sorted(row.place for row in [*train, *held]) == sorted(row.place for row in rows)
    assert hold_out_by_label(rows, count) == (train, held)
