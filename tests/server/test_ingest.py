"""Sources and indexing runs: every format, every kind of damage, and going on after a stop."""

from __future__ import annotations

import datetime
import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from openbook_server.errors import SourceInvalid
from openbook_server.ingest import indexing, tables
from openbook_server.ingest.embed import PassageEncoder
from openbook_server.ingest.indexing import Indexing
from openbook_server.ingest.items import Unreadable
from openbook_server.ingest.preparation import Splitting
from openbook_server.ingest.python_docs import python_docs
from openbook_server.ingest.sources import find_sources, read_source
from openbook_server.knowledge import Document, Passage, PassageVectors, pack
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.tokenization import TextEncoder, load_tokenizer
from reportlab.pdfgen.canvas import Canvas
from tokenizers import Encoding, Tokenizer


def items(path: Path) -> list[Document | Unreadable]:
    [source] = find_sources([str(path)])
    return list(read_source(source))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_and_markdown_are_kept_as_they_stand(tmp_path: Path) -> None:
    [text] = items(write(tmp_path / "a.txt", "\ufeffPlain töxt"))
    [markdown] = items(write(tmp_path / "b.md", "intro\n# The *Title*\nbody"))
    assert (text.id, text.text) == ("a.txt", "Plain töxt")  # type: ignore[union-attr]
    assert (markdown.title, markdown.text) == ("The *Title*", "intro\n# The *Title*\nbody")  # type: ignore[union-attr]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_a_text_is_encoded(tmp_path: Path, encoding: str) -> None:
    [text] = items(write(tmp_path / "a.txt", "Grüße\r\naus Zürich\r☃".encode(encoding)))
    assert isinstance(text, Document)
    assert text.text == "Grüße\naus Zürich\n☃"


@pytest.mark.parametrize(
    ("declaration", "encoding"),
    [
        ('<meta charset="iso-8859-1">', "windows-1252"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=windows-1252">', "windows-1252"),
        ('<meta charset="iso-8859-1">', "utf-8"),  # as pages are saved that a server sent with another charset
        ('<meta charset="latin-99">', "utf-8"),
        ("", "utf-16"),
    ],
)
def test_html_is_read_in_the_encoding_that_it_declares(tmp_path: Path, declaration: str, encoding: str) -> None:
    page = f"<html><head>{declaration}<title>Café</title></head><body>Zürich – “café”</body></html>"
    [document] = items(write(tmp_path / "a.html", page.encode(encoding)))
    assert isinstance(document, Document)
    assert (document.title, document.text) == ("Café", "Zürich – “café”")


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html"])
def test_a_text_in_an_encoding_that_nobody_named_is_unreadable_and_a_few_bad_bytes_are_not(tmp_path: Path, name: str) -> None:
    [problem] = items(write(tmp_path / name, "Grüße aus Zürich".encode("latin-1")))
    assert isinstance(problem, Unreadable)
    assert problem.reason.startswith("3 of 16 characters are not UTF-8; convert it")
    [document] = items(write(tmp_path / name, b"one bad \xff byte " + b"among many good ones " * 10))
    assert isinstance(document, Document)
    assert document.text.startswith("one bad \ufffd byte")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_byte_order_mark_says_how_rows_are_encoded(tmp_path: Path, name: str, encoding: str) -> None:
    rows = {
        "a.csv": 'id,title,text\r\nx,Grüße,"aus Zürich,\r\n☃"\r\ny,,ਊ Gurmukhi 😀\r\n',
        "a.jsonl": '{"id": "x", "title": "Grüße", "text": "aus Zürich,\\r\\n☃"}\r\n\r\n{"id": "y", "text": "ਊ Gurmukhi 😀"}',
    }
    found = [item for item in items(write(tmp_path / name, rows[name].encode(encoding))) if isinstance(item, Document)]
    assert [(d.id, d.title, d.text) for d in found] == [("x", "Grüße", "aus Zürich,\r\n☃"), ("y", "", "ਊ Gurmukhi 😀")]


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_the_columns_of_a_csv_are_those_that_its_first_line_separates(tmp_path: Path, separator: str) -> None:
    lines = [separator.join(row) for row in (("id", "text", "price"), ("x", '"one, two; three\tfour"', '"3,5"'))]
    [document] = items(write(tmp_path / "a.csv", "\r\n".join(lines).encode("utf-16")))
    assert isinstance(document, Document)
    assert (document.id, document.text, document.metadata) == ("x", "one, two; three\tfour", {"price": "3,5"})


def test_rows_in_an_encoding_that_nobody_named_are_unreadable_and_a_few_bad_bytes_are_not(tmp_path: Path) -> None:
    long = "among many good ones " * 10
    table = f"id,text\n1,Grüße aus Zürich\n2,good\n3,one bad ä byte {long}\n".encode("latin-1")
    lines = f'{{"text": "Grüße aus Zürich"}}\n{{"text": "good"}}\n{{"text": "one bad ä byte {long}"}}\n'.encode("latin-1")
    for name, content, where in (("a.csv", table, "line 2"), ("a.jsonl", lines, "line 1")):
        problem, good, damaged = items(write(tmp_path / name, content))
        assert isinstance(problem, Unreadable)
        assert (problem.where, " characters are not UTF-8; convert it" in problem.reason) == (where, True)
        assert (good.text, damaged.text) == ("good", f"one bad \ufffd byte {long}")  # type: ignore[union-attr]
    [problem] = items(write(tmp_path / "b.csv", "id,größe\n1,two\n".encode("latin-1")))
    assert isinstance(problem, Unreadable)
    assert problem.where == "line 1"


def test_a_line_of_a_jsonl_that_is_too_long_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROW_CHARACTERS", 100)
    problem, good = items(write(tmp_path / "a.jsonl", f'{{"text": "{"x" * 500}"}}\n{{"text": "good"}}\n'.encode("utf-16")))
    assert isinstance(problem, Unreadable)
    assert (problem.where, problem.reason) == ("line 1", "longer than 100 characters")
    assert isinstance(good, Document)


def test_html_gives_its_visible_text_and_title(tmp_path: Path) -> None:
    page = "<html><head><title>My page</title><style>x{}</style></head><body><h1>Head</h1><p>One &amp; two</p><script>bad()</script></body>"
    [document] = items(write(tmp_path / "a.html", page))
    assert document == Document(id="a.html", title="My page", text="Head\n\nOne & two", source=str(tmp_path / "a.html"))


def test_pdf_gives_the_text_of_its_pages_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    canvas = Canvas(str(tmp_path / "good.pdf"))
    for line in ("First page text", "Second page text"):
        canvas.drawString(72, 700, line)
        canvas.showPage()
    canvas.save()
    [document] = items(tmp_path / "good.pdf")
    assert isinstance(document, Document)
    assert document.text.split() == "First page text Second page text".split()
    for name, content in (("cut.pdf", (tmp_path / "good.pdf").read_bytes()[:200]), ("no.pdf", b"%PDF-1.4 nothing")):
        [problem] = items(write(tmp_path / name, content))
        assert isinstance(problem, Unreadable)


def test_a_pdf_that_needs_a_package_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pypdf.errors import DependencyError

    def lacking(path: Path) -> None:
        raise DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr("pypdf.PdfReader", lacking)
    assert problems(write(tmp_path / "a.pdf", b"%PDF")) == [("", "encrypted with AES; to have it read: pip install cryptography")]


def test_jsonl_keeps_given_ids_and_names_each_bad_row(tmp_path: Path) -> None:
    rows = [
        '{"_id": "x1", "title": "T", "text": "one", "metadata": {"year": 3, "deep": {}}}',
        '{"id": 7, "text": "two", "lang": "en"}',
        '{"text": "three"}',
        "{broken",
        '{"text": 5}',
        '{"text": "  "}',
        "[1]",
        '{"name": "Ada", "born": 1815}',
    ]
    found = items(write(tmp_path / "a.jsonl", "\n".join(rows) + "\n\n"))
    documents = [item for item in found if isinstance(item, Document)]
    assert [(d.id, d.text) for d in documents] == [
        ("x1", "one"),
        ("7", "two"),
        ("a.jsonl:3", "three"),
        ("a.jsonl:8", "name: Ada\nborn: 1815"),
    ]
    assert documents[0].metadata == {"year": "3"}
    assert documents[1].metadata == {"lang": "en"}
    assert [item.where for item in found if isinstance(item, Unreadable)] == ["line 4", "row 5", "row 6", "row 7"]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"_id": None, "id": "real"}, "real"),
        ({"_id": "", "id": "real"}, "real"),
        ({"_id": "first", "id": "second"}, "first"),
        ({"_id": 0, "id": "second"}, "0"),
        ({"_id": None, "id": ""}, "a.jsonl:1"),
        ({}, "a.jsonl:1"),
    ],
)
def test_an_id_is_the_first_of_the_two_that_holds_something(tmp_path: Path, ids: dict[str, object], expected: str) -> None:
    [document] = items(write(tmp_path / "a.jsonl", json.dumps({**ids, "text": "one"})))
    assert isinstance(document, Document)
    assert (document.id, document.metadata) == (expected, {})


def test_what_would_stand_beside_every_passage_is_limited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"id": "long title", "title": "t" * 2_049, "text": "one"},
        {"id": "long metadata", "text": "two", "metadata": {"a": "b" * 16_384}},
        {"id": "many entries", "text": "x", "metadata": {str(n): "" for n in range(65)}},
        {"id": "i" * 513, "text": "y"},
        {"id": " ", "text": "zero"},
        {"id": "i" * 512, "title": "t" * 2_048, "text": "three", "metadata": {"a": "b" * 16_383}},
        {"id": "nameless", "text": "four", "": "x", "metadata": {"": "y", "a": "b"}},
    ]
    title, metadata, entries, id_, blank, good, nameless = items(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert isinstance(title, Unreadable)
    assert (title.reason, title.where) == ("title: 2049 bytes exceed the limit of 2048; shorten it, or make it part of the text", "row 1")
    assert isinstance(metadata, Unreadable)
    assert metadata.reason.startswith("metadata: 16385 bytes exceed the limit of 16384; ")
    assert isinstance(entries, Unreadable)
    assert entries.reason == "metadata: 65 entries exceed the limit of 64; leave some out"
    assert isinstance(id_, Unreadable)
    assert id_.reason.startswith("id: 513 bytes exceed the limit of 512; ")
    assert isinstance(blank, Unreadable)
    assert (blank.reason, blank.where) == ("id: empty, or nothing but white space; give it another one", "row 5")
    assert isinstance(good, Document)
    assert isinstance(nameless, Document)
    assert (nameless.text, nameless.metadata) == ("four", {"a": "b"})
    assert f"{tmp_path / 'a.jsonl'}: values without a name are left out" in caplog.text
    [page] = items(write(tmp_path / "a.html", f"<title>a{'ü' * 2_000}</title><p>text"))
    assert isinstance(page, Document)  # its title is cut: a page is not lost for it
    assert page.title == "a" + "ü" * 1_023


def test_values_that_no_filter_compares_are_left_out_and_their_column_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = {
        "text": ["one", "two", "three"],
        "tags": [["a"], [], None],
        "day": [datetime.date(2026, 1, 2), None, None],
        "at": [datetime.datetime(2026, 1, 2, 3, 4), None, None],
        "metadata": ["mine", None, None],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    documents = items(tmp_path / "a.parquet")
    metadata = [document.metadata for document in documents if isinstance(document, Document)]
    assert metadata == [{"day": "2026-01-02", "at": "2026-01-02T03:04:00", "metadata": "mine"}, {}, {}]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.parquet'}: 'tags' is left out where it holds a list or a table; documents take texts, numbers and dates"
    ]


def test_a_title_is_tokenised_once_for_all_passages_of_its_document(tiny_checkpoint: Path) -> None:
    class Counting:
        def __init__(self, tokenizer: Tokenizer) -> None:
            self.titles: list[str] = []
            self._tokenizer = tokenizer

        def encode(self, text: str, **options: bool) -> Encoding:
            self.titles.append(text)
            return self._tokenizer.encode(text, **options)

        def encode_batch_fast(self, texts: list[str]) -> list[Encoding]:
            return self._tokenizer.encode_batch_fast(texts)

    tokenizer = load_tokenizer(tiny_checkpoint / "tokenizer.json")
    counting = Counting(tokenizer)
    titles = ["red king", "", "blue city " * 40]
    passages = [Passage(id=f"{n}", document_id="d", text=f"one book {n}", start=0, title=titles[n % 3]) for n in range(9)]
    rows = PassageEncoder(counting, 64)(passages)  # type: ignore[arg-type]
    assert sorted(counting.titles) == sorted(title for title in titles if title)
    texts = [("red king\n", "", "blue city " * 15 + "blue city\n")[n % 3] + f"one book {n}" for n in range(9)]
    assert [row.ids for row in rows] == [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def test_names_and_values_that_are_no_unicode_become_what_can_be_stored_and_sent(tmp_path: Path) -> None:
    rows = r"""{"id": "a\ud83d", "text": "one\ud83d", "author": "cut \ud83d", "key\ud83d": "v"}
{"id": "a\ud83e", "text": "two"}"""
    first, second = items(write(tmp_path / "a.jsonl", rows))
    assert isinstance(first, Document)
    assert isinstance(second, Document)
    assert (first.id, second.id) == (r"a\ud83d", r"a\ud83e")
    assert (first.text, first.metadata) == ("one?", {"author": "cut ?", "key?": "v"})
    folder = tmp_path / "folder"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text("text")
    [source] = find_sources([str(folder)])
    [document] = read_source(source)
    assert isinstance(document, Document)
    assert document.id == r"caf\udce9.txt"
    document.source.encode()


def test_html_that_no_parser_takes_is_named(tmp_path: Path) -> None:
    [problem] = items(write(tmp_path / "a.html", "<html><![foo[ bar"))
    assert isinstance(problem, Unreadable)
    assert "html" in problem.reason


def problems(path: Path) -> list[tuple[str, str]]:
    return [(item.where, item.reason) for item in items(path) if isinstance(item, Unreadable)]


def texts(path: Path) -> list[str]:
    return [item.text for item in items(path) if isinstance(item, Document)]


def test_a_row_with_more_values_than_columns_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "id,text\n1,signed on May 5, 1843\n2,fine,,\n3\n")
    assert texts(file) == ["fine"]
    assert problems(file) == [
        ("line 2", "3 values for 2 columns; is a value that holds the separator not in quotes?"),
        ("row 4", "no text in it"),
    ]


@pytest.mark.parametrize(
    ("rows", "kept", "lost"),
    [
        ('1,"never closed\n2,second\n3,third\n', [], "lines 2 to 4"),
        ('1,one\n2,"quoted\n3,third\n4,"fourth"\n5,fifth\n', ["one", "fifth"], "lines 3 to 5"),
        ('1,"said "so" twice"\n2,second\n', ["second"], "line 2"),
    ],
)
def test_a_quote_that_is_not_closed_takes_no_row_with_it_unsaid(tmp_path: Path, rows: str, kept: list[str], lost: str) -> None:
    file = write(tmp_path / "a.csv", f"id,text\n{rows}")
    assert texts(file) == kept
    [(where, reason)] = problems(file)
    assert where == lost
    assert "quote" in reason


def test_columns_without_a_name_and_of_one_name_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert texts(write(tmp_path / "a.csv", ",text,\n0,the text,more\n1,the other,more\n")) == ["the text", "the other"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.csv'}: column {number} has no name, and is left out" for number in (1, 3)
    ]
    assert problems(write(tmp_path / "b.csv", "id,text,text\nd,first,second\n")) == [
        ("line 1", "it names several columns 'text'; give each a name of its own")
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"]), tmp_path / "b.parquet")
    assert problems(tmp_path / "b.parquet") == [("", "it has several columns 'text'; give each a name of its own")]


def test_a_spreadsheet_may_say_what_separates_its_columns(tmp_path: Path) -> None:
    assert items(write(tmp_path / "a.csv", "sep=;\r\nid;text\r\nx;one, two\r\n")) == [
        Document(id="x", text="one, two", source=str(tmp_path / "a.csv"))
    ]
    assert texts(write(tmp_path / "b.csv", "id;text;a, b\nx;one;two\n")) == ["one"]


def test_values_are_written_as_their_format_writes_them(tmp_path: Path) -> None:
    rows = [
        {"id": None, "text": "zero"},
        {"id": "t", "text": "one", "title": "A  double\nspaced title", "ok": True},
        {"id": ["a"], "text": "two"},
        {"id": "u", "text": "three", "title": ["a", "b"]},
        {"id": "v", "text": "four", "title": 0},
        {"id": float("nan"), "text": "five"},
    ]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    documents = [item for item in items(file) if isinstance(item, Document)]
    assert [(document.id, document.title) for document in documents] == [
        ("a.jsonl:1", ""),
        ("t", "A double spaced title"),
        ("u", ""),
        ("v", "0"),
        ("a.jsonl:6", ""),
    ]
    assert documents[1].metadata == {"ok": "true"}
    assert problems(file) == [("row 3", "its id is a list; give it a text or a number")]


def test_csv_and_parquet_give_a_document_a_row(tmp_path: Path) -> None:
    [first, second] = items(write(tmp_path / "a.csv", 'id,title,text,author\n1,T,"a, ""b""\nc",Ada\n2,,second,\n'))
    assert first == Document(id="1", title="T", text='a, "b"\nc', source=str(tmp_path / "a.csv"), metadata={"author": "Ada"})
    assert second.text == "second"  # type: ignore[union-attr]
    pyarrow.parquet.write_table(pyarrow.table({"id": ["p"], "text": ["from parquet"]}), tmp_path / "a.parquet")
    assert items(tmp_path / "a.parquet") == [Document(id="p", text="from parquet", source=str(tmp_path / "a.parquet"))]
    [problem] = items(write(tmp_path / "bad.parquet", b"PAR1 no"))
    assert isinstance(problem, Unreadable)


def test_a_value_that_cannot_be_read_costs_its_row_alone(tmp_path: Path) -> None:
    texts = pyarrow.array([b"good one", b"bad \xff\xfe", b"good two", b"good three"], pyarrow.binary())
    days = pyarrow.array([0, 0, 2**30, 0], pyarrow.date32())
    columns = {"id": list("abcd"), "text": pyarrow.Array.from_buffers(pyarrow.string(), 4, texts.buffers()), "day": days}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    found = items(tmp_path / "a.parquet")
    assert [item.id for item in found if isinstance(item, Document)] == ["a", "d"]
    problems = [item for item in found if isinstance(item, Unreadable)]
    assert [problem.where for problem in problems] == ["row 2", "row 3"]
    assert "UnicodeDecodeError" in problems[0].reason
    assert "OverflowError" in problems[1].reason


@pytest.mark.parametrize("name", ["hf:", "hf::train"])
def test_a_dataset_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(SourceInvalid, match=r"source 'hf:.*' needs a name, hf:NAME\[:SPLIT\]"):
        find_sources([name])


def test_a_source_that_its_library_cannot_go_on_with_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield {"text": "the first row"}
        raise KeyError("a shard")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    sources = find_sources(["hf:broken", str(write(tmp_path / "a.txt", "good"))])
    first, problem, good = (item for source in sources for item in read_source(source))
    assert isinstance(first, Document)
    assert isinstance(problem, Unreadable)
    assert problem.reason == "cannot be read, or no further (KeyError: 'a shard')"
    assert isinstance(good, Document)


def test_a_field_of_a_csv_that_is_too_long_costs_its_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROW_CHARACTERS", 100)
    first, problem, third = items(write(tmp_path / "a.csv", f'id,text\n1,one\n2,"{"x" * 200}"\n3,three\n'))
    assert (first.text, third.text) == ("one", "three")  # type: ignore[union-attr]
    assert isinstance(problem, Unreadable)
    assert (problem.where, "limit (100)" in problem.reason) == ("line 3", True)
    [problem] = items(write(tmp_path / "b.csv", f"id,{'x' * 200}\n1,one\n"))
    assert isinstance(problem, Unreadable)
    assert problem.where == "line 1"


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\x00\xd8bad", b"nul\0inside"])
def test_bytes_that_are_hardly_text_give_a_clean_document_or_a_reason(tmp_path: Path, content: bytes) -> None:
    [item] = items(write(tmp_path / "a.txt", content))
    if isinstance(item, Document):
        assert "\0" not in item.text
        item.text.encode()
    else:
        assert item.reason == "no text in it" or "not UTF-8" in item.reason


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(("name", "content"), [("a.txt", "The lease, signed by Ada Byron."), ("a.jsonl", '{"text": "signed by Ädä"}\n')])
def test_utf_16_needs_no_mark_where_its_letters_are_latin(tmp_path: Path, encoding: str, name: str, content: str) -> None:
    [text] = texts(write(tmp_path / name, content.encode(encoding)))
    assert text in content


def test_what_is_no_file_in_a_folder_is_named(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    write(folder / "a.txt", "text")
    write(outside / "b.txt", "text")
    (folder / "linked").symlink_to(outside)
    (folder / "again").symlink_to(folder / "sub")  # what it leads to is read without it
    (folder / "linked.txt").symlink_to(outside / "b.txt")
    (folder / "gone.txt").symlink_to("nowhere.txt")
    (folder / "circle.txt").symlink_to("circle.txt")
    os.mkfifo(folder / "pipe.txt")
    found = {source.name: list(read_source(source)) for source in find_sources([str(folder)])}
    assert {name: item.reason for name, [item] in found.items() if isinstance(item, Unreadable)} == {
        "circle.txt": "it leads nowhere",
        "gone.txt": "it leads nowhere",
        "linked": "a link to a folder, which is not followed; name that folder as a source",
        "pipe.txt": "it is no regular file",
    }
    assert {name for name, [item] in found.items() if isinstance(item, Document)} == {"a.txt", "linked.txt"}


def test_folders_are_read_whole_in_a_fixed_order_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/.git/x.txt", ".hidden.txt", "image.png"):
        write(tmp_path / name, "text")
    assert [source.name for source in find_sources([str(tmp_path)])] == ["a.md", "b.txt", "sub/c.txt"]


def close_folders(monkeypatch: pytest.MonkeyPatch, *closed: Path) -> None:
    """As permissions do, which do not bind root."""
    scandir = os.scandir

    def refuse(path: str | os.PathLike[str] = ".") -> object:
        if Path(path) in closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_a_folder_that_cannot_be_looked_into_is_unreadable_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "closed/b.txt", "open/c.txt", ".git/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "text")
    (tmp_path / "link").symlink_to(tmp_path / "open")
    close_folders(monkeypatch, tmp_path / "closed", tmp_path / ".git")
    sources = find_sources([str(tmp_path)])
    assert [source.name for source in sources] == ["a.txt", "closed", "open/c.txt"]
    first, problem, last = (item for source in sources for item in read_source(source))
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert isinstance(problem, Unreadable)
    assert problem.reason == "Permission denied"
    assert sources[1].path == tmp_path / "closed"


def test_a_named_source_that_cannot_be_looked_at_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    close_folders(monkeypatch, tmp_path / "closed")
    with pytest.raises(SourceInvalid, match=r"^source '.*/closed' cannot be read: Permission denied$"):
        find_sources([str(tmp_path / "closed")])
    with pytest.raises(SourceInvalid, match=r"^source '.*' cannot be read: File name too long$"):
        find_sources([str(tmp_path / ("x" * 300))])


def test_the_questions_of_a_data_set_are_no_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("beir/corpus.jsonl", "beir/queries.jsonl", "queries.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, '{"text": "something"}')
    with caplog.at_level("INFO"):
        assert [source.name for source in find_sources([str(tmp_path)])] == ["beir/corpus.jsonl", "queries.jsonl"]
    assert "queries.jsonl beside corpus.jsonl holds questions" in caplog.text
    assert "other formats" not in caplog.text
    [named] = find_sources([str(tmp_path / "beir/queries.jsonl")])
    assert named.name == "queries.jsonl"


def test_files_of_one_name_in_two_folders_are_two_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("one/read.txt", "two/read.txt", "two/other.txt", "two/slides.pptx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, name)
    with caplog.at_level("INFO"):
        sources = find_sources([str(tmp_path / "one"), str(tmp_path / "two")])
    assert [source.name for source in sources] == [str(tmp_path / "one/read.txt"), "other.txt", str(tmp_path / "two/read.txt")]
    assert "1 files of other formats are left out (.pptx)" in caplog.text


def test_what_is_named_twice_is_one_source_under_its_first_name(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    write(folder / "lease.txt", "text")
    write(folder / "sub" / "rent.txt", "text")
    (tmp_path / "link").symlink_to(folder)
    for names, found in (
        ([folder, folder / "lease.txt"], ["lease.txt", "sub/rent.txt"]),
        ([folder / "lease.txt", folder], ["lease.txt", "sub/rent.txt"]),
        ([folder, f"{folder}/../docs", tmp_path / "link"], ["lease.txt", "sub/rent.txt"]),
        ([folder / "sub/rent.txt", folder], ["rent.txt", "lease.txt"]),
        (["python-docs:", "python-docs:"], ["python-docs:"]),
    ):
        assert [source.name for source in find_sources([str(name) for name in names])] == found


def test_a_source_whose_module_is_not_installed_is_told_by_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "rows.parquet", b"PAR1")
    for module in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    for source, module in (("hf:squad", "datasets"), (str(tmp_path), "pyarrow")):
        with pytest.raises(ModuleNotFoundError) as told:
            find_sources([source])
        assert told.value.name == module
    assert find_sources([str(tmp_path / "a.txt")])


def test_sources_that_are_none_are_refused_with_what_would_be_one(tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match="source '' names nothing"):
        find_sources([""])
    write(tmp_path / "a.exe", b"MZ")
    (tmp_path / "empty").mkdir()
    for source, message in ((tmp_path / "none.txt", "does not exist"), (tmp_path / "a.exe", "jsonl"), (tmp_path / "empty", "no file")):
        with pytest.raises(SourceInvalid, match=message):
            find_sources([str(source)])


def test_a_hugging_face_dataset_saved_on_disk_is_a_source(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"id": ["h1"], "text": ["from a dataset"]}).save_to_disk(str(tmp_path / "data"))
    [source] = find_sources([str(tmp_path / "data")])
    [document] = read_source(source)
    assert (document.id, document.text) == ("h1", "from a dataset")  # type: ignore[union-attr]


def test_the_documentation_inside_python_names_what_it_documents() -> None:
    documents = {document.id: document for document in python_docs()}
    assert documents["python:str.casefold"].text.startswith("str.casefold(")
    assert "with" in documents["python:topic:with"].title
    assert documents["python:heapq"].text.startswith("The module heapq.")
    assert len(documents) > 3_000
    assert not any("/" in document.source for document in documents.values())


def fake_embed(passages: Sequence[Passage]) -> PassageVectors:
    """A unit vector from the text alone, and one window."""
    vectors = np.array([np.random.default_rng(len(passage.text)).normal(size=8) for passage in passages], np.float32).reshape(-1, 8)
    return PassageVectors(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), [pack(row[None]) for row in vectors])


class Run:
    """An indexing run over a folder that counts what it embeds."""

    def __init__(self, folder: Path, tiny_checkpoint: Path, **options: int) -> None:
        self.embedded = 0
        self.knowledge_base = EmbeddedKnowledgeBase(folder / "kb", fingerprint="f", dim=8, create=True)
        tokenizer = load_tokenizer(tiny_checkpoint / "tokenizer.json")
        self.indexing = Indexing(self.knowledge_base, TextEncoder(tokenizer), self._embed, Splitting(8, 2), batch=4, **options)

    def _embed(self, passages: Sequence[Passage]) -> PassageVectors:
        self.embedded += len(passages)
        return fake_embed(passages)

    def __call__(self, *sources: Path, stop_after: int = 10**9) -> Run:
        batches = 0

        def report(progress: object) -> None:
            nonlocal batches
            batches += 1

        self.indexing.run(find_sources([*map(str, sources)]), report, lambda: batches >= stop_after)
        self.documents = self.knowledge_base.counts().documents
        self.knowledge_base.close()
        return self


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [json.dumps({"_id": f"r{n}", "text": f"red city {n}. Blue king {n}. One book of the river {n}."}) for n in range(30)]
    return write(tmp_path / "rows.jsonl", "\n".join(lines))


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path: Path, tiny_checkpoint: Path, rows: Path) -> None:
    first = Run(tmp_path, tiny_checkpoint)(rows, stop_after=3)
    assert first.documents == 12
    second = Run(tmp_path, tiny_checkpoint)(rows)
    assert (second.documents, second.indexing.progress.unchanged) == (30, 12)
    whole = Run(tmp_path / "other", tiny_checkpoint)(rows)
    assert first.embedded + second.embedded == whole.embedded


def test_a_stop_in_the_middle_of_a_huge_document_leaves_no_half_of_it(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "_EMBEDDED_AT_ONCE", 10)
    path = write(tmp_path / "huge.txt", "\n\n".join(f"Red city {n} by the river." for n in range(100)))
    stopped = Run(tmp_path, tiny_checkpoint)(path, stop_after=2)
    assert (stopped.documents, stopped.embedded) == (0, 20)
    assert Run(tmp_path, tiny_checkpoint)(path).documents == 1


def test_only_what_changed_is_embedded_again(tmp_path: Path, tiny_checkpoint: Path, rows: Path) -> None:
    Run(tmp_path, tiny_checkpoint)(rows)
    rows.write_text(rows.read_text().replace("Blue king 7.", "Green king 7."))
    again = Run(tmp_path, tiny_checkpoint)(rows)
    assert (again.documents, again.indexing.progress.unchanged, again.indexing.progress.documents) == (30, 29, 30)


def test_an_id_that_comes_twice_keeps_its_last_text_and_is_counted(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = write(tmp_path / "twice.jsonl", '{"_id": "a", "text": "red"}\n{"_id": "b", "text": "two"}\n{"_id": "a", "text": "blue"}\n')
    run = Run(tmp_path, tiny_checkpoint)(path)
    assert (run.documents, run.indexing.progress.replaced_ids) == (2, 1)


def test_a_file_that_takes_the_place_of_another_folders_is_told(
    tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "readme.md", f"red city {folder}")
        write(tmp_path / folder / "rows.csv", f"text\nblue king {folder}\n")
        write(tmp_path / folder / "given.jsonl", json.dumps({"id": "x", "text": f"green book {folder}"}))
    assert Run(tmp_path, tiny_checkpoint)(tmp_path / "one").indexing.progress.replaced_files == 0
    write(tmp_path / "one" / "readme.md", "blue city one")
    assert Run(tmp_path, tiny_checkpoint)(tmp_path / "one").indexing.progress.replaced_files == 0
    assert not caplog.records
    other = Run(tmp_path, tiny_checkpoint)(tmp_path / "two")
    assert (other.documents, other.indexing.progress.replaced_files) == (3, 2)
    [record] = caplog.records
    assert record.getMessage().startswith(f"readme.md takes the place of {tmp_path}/one/readme.md: files of one name are one document")


def test_a_file_that_is_stored_under_the_id_that_it_had_alone_is_told(
    tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "readme.txt", f"red city {folder}")
    Run(tmp_path, tiny_checkpoint)(tmp_path / "one")
    assert Run(tmp_path, tiny_checkpoint)(tmp_path / "one", tmp_path / "two").documents == 3
    [record] = caplog.records
    assert record.getMessage() == f"{tmp_path}/one/readme.txt was stored as readme.txt before, and still is: openbook delete readme.txt"


def test_unreadable_rows_are_counted_and_the_rest_is_stored(
    tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "some.jsonl", '{"_id": "a", "text": "red"}\n{nope\n{"_id": "b", "text": "two"}\n')
    run = Run(tmp_path, tiny_checkpoint)(path)
    assert (run.documents, run.indexing.progress.unreadable) == (2, 1)
    assert "some.jsonl, line 2" in caplog.text
