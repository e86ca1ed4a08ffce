"""Files of questions: rows fail alone, requests that no row is to blame for stop the run, and files are written whole."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from openbook.commands import InputRow, InvalidFile, read_rows, work_through, written_aside
from openbook.errors import RequestRejected, ServerUnavailable


class Answered:
    def __init__(self, text: str) -> None:
        self.text = text

    def to_json(self) -> dict[str, Any]:
        return {"answer": self.text.upper()}


def work(file: Path, out: Path, ask: Any) -> int:
    return work_through("ask", str(file), str(out), ask, counted="questions answered", fields=("questions[",))


def answers(rows: list[InputRow]) -> Sequence[Answered]:
    return [Answered(row.text) for row in rows]


def test_an_id_that_is_no_unicode_is_written_readably(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": "\\ud83d", "text": "who"}\n{"id": 2, "text": "cut \\ud83d"}\n{"id": 3, "text": "what"}\n')
    assert work(tmp_path / "in.jsonl", tmp_path / "out.jsonl", answers) == 3
    first, bad, last = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first == {"id": "\\ud83d", "answer": "WHO"}
    assert "Unicode" in bad["error"]
    assert last == {"id": "3", "answer": "WHAT"}


@pytest.mark.parametrize(
    ("ids", "given"),
    [
        ({"id": None}, "1"),
        ({"_id": None, "id": "real"}, "real"),
        ({"_id": "", "id": 7}, "7"),
        ({"_id": 0, "id": "other"}, "0"),
        ({"_id": 1.5}, "1.5"),
        ({}, "1"),
    ],
)
def test_an_id_that_holds_nothing_is_none(tmp_path: Path, ids: dict[str, Any], given: str) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({**ids, "text": "who"}) + "\n")
    assert [row.id for row in read_rows(str(tmp_path / "in.jsonl"))] == [given]


def test_standard_input_that_is_closed_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it then
    with pytest.raises(InvalidFile, match="standard input is closed; redirect a file"):
        list(read_rows("-"))


def test_an_id_that_is_no_string_or_number_fails_its_row_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["[1, 2]", '{"a": 1}', "NaN", "Infinity", "true"]
    rows = ['{"id": "good", "text": "who"}', *(f'{{"_id": {id_}, "id": "x", "text": "who"}}' for id_ in wrong)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    assert work(tmp_path / "in.jsonl", tmp_path / "out.jsonl", answers) == 3
    good, *bad = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert good == {"id": "good", "answer": "WHO"}
    assert [row["id"] for row in bad] == ["2", "3", "4", "5", "6"]
    assert bad[0]["error"] == "`_id` is [1, 2]; give a string or a number, or none"
    assert "line 4 (id 4): `_id` is nan; give a string" in capsys.readouterr().err


def test_what_no_row_is_to_blame_for_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": 1, "text": "who"}\n')

    def fails(field: str) -> Any:
        def ask(rows: list[InputRow]) -> Sequence[Answered]:
            raise RequestRejected("no knowledge base", field=field)

        return ask

    with pytest.raises(RequestRejected):
        work(tmp_path / "in.jsonl", tmp_path / "out.jsonl", fails("questions"))
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    assert work(tmp_path / "in.jsonl", tmp_path / "out.jsonl", fails("questions[0]")) == 1


def test_a_file_of_which_every_row_failed_is_told_by_the_exit_status(tmp_path: Path) -> None:
    """1, as where nothing was there to be done; 3 where some rows were."""
    for rows, status in ((["{", "{"], 1), (["{", '{"text": "who"}'], 3), (['{"text": "who"}'], 0), ([], 1)):
        (tmp_path / "in.jsonl").write_text("\n".join(rows))
        assert work(tmp_path / "in.jsonl", tmp_path / "out.jsonl", answers) == status
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(rows)


def test_what_was_answered_before_a_run_stops_is_kept_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text("".join(f'{{"id": {n}, "text": "who"}}\n' for n in range(40)))

    def ask(rows: list[InputRow]) -> Sequence[Answered]:
        if rows[0].id != "0":
            raise ServerUnavailable("gone")
        return answers(rows)

    with pytest.raises(ServerUnavailable):
        work(tmp_path / "in.jsonl", tmp_path / "out.jsonl", ask)
    assert not (tmp_path / "out.jsonl").exists()
    assert len((tmp_path / "out.jsonl.part").read_text().splitlines()) == 32
    assert f"what was done before is in {tmp_path / 'out.jsonl.part'}" in capsys.readouterr().err
    assert work(tmp_path / "in.jsonl", tmp_path / "out.jsonl", answers) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    (tmp_path / "pipe.part").write_text("somebody else's")
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    with written_aside(str(pipe)) as stream:
        stream.write("line\n")
    reader.join()
    assert read == ["line\n"]
    assert pipe.is_fifo()
    assert (tmp_path / "pipe.part").read_text() == "somebody else's"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_what_it_names_is_written(tmp_path: Path, there: bool) -> None:
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    if there:
        target.write_text("before")
    link.symlink_to("folder/target")
    with written_aside(str(link)) as stream:
        stream.write("after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert [file.name for file in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("name", ["file/x", "folder", "absent/x"])
def test_what_cannot_be_written_is_told_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidFile, match=name), written_aside(str(tmp_path / name)):
        pass
