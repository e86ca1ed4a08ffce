"""When to stop reading, chosen at export: by counting the best answers that change, on questions and a corpus like those served."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from openbook_export.export import ExportOptions, export_bundle
from openbook_export.settling import Calibration, Settled
from openbook_server.bundle import Bundle
from openbook_server.errors import SourceInvalid
from openbook_server.knowledge import Hit, Passage
from openbook_server.ranking import Reading, Settling, Span
from openbook_training.errors import InvalidData

PASSAGES = [
    "the king read a red book in the city",
    "a blue river",
    "one two three",
    "the king of the river city",
    "what was it in the book",
    "red",
]
ASKED = [("what was red ?", PASSAGES[0]), ("was it the king ?", PASSAGES[3]), *(("what ?", text) for text in PASSAGES)]


def squad_file(folder: Path, *questions: tuple[str, str]) -> str:
    """A file of (question, passage)."""
    rows = [
        {"id": str(row), "question": question, "context": context, "answers": {"text": [], "answer_start": []}}
        for row, (question, context) in enumerate(questions)
    ]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def exported(checkpoint: Path, bundle: Path, report: Callable[[str], None] = lambda line: None, **changes: object) -> Bundle:
    return export_bundle(ExportOptions(**{"checkpoint": str(checkpoint), "bundle": bundle, **changes}), report)


def test_settling_stops_reading_where_no_more_answers_change_than_may() -> None:
    def read(texts: list[str], scores: list[float]) -> tuple[list[Hit], list[Reading]]:
        hits = [
            Hit(passage=Passage(id=f"p{z}", document_id="d", text=text, start=0), score=1.0 - 0.1 * z, dense_score=1.0 - 0.1 * z)
            for z, text in enumerate(texts)
        ]
        spans = [[Span(z, 0, len(text), score)] for z, (text, score) in enumerate(zip(texts, scores, strict=True))]
        return hits, [Reading(found, -2.0, math.log(math.exp(found[0].score) + math.exp(-2.0))) for found in spans]

    easy = read(["Rome", *["Milan"] * 4], [8.0, *[0.0] * 4])  # the first passage answers for certain
    hard = read(["Milan", *["Turin"] * 3, "Rome"], [0.0] * 4 + [5.0])  # the first ones are unsure, the last one is not
    tricky = read(["Milan", *["Turin"] * 3, "Rome"], [8.0, *[0.0] * 3, 9.0])  # the first one is sure, the last one more so
    tried: list[Calibration] = []
    chosen = Settled([easy] * 9 + [hard], prior_weight=1.0, null_bias=0.0).choose(0.0, tried.append)
    assert chosen in tried
    assert (chosen.passages, chosen.changed) == ((9 * 1 + 5) / 10, 0.0)
    among = Settled([easy] * 9 + [tricky], prior_weight=1.0, null_bias=0.0)
    assert among.choose(0.0) == Calibration(None, 5.0, 0.0)
    allowed = among.choose(10.0)
    assert (allowed.passages, allowed.changed) == (1.0, 10.0)
    assert Settled([hard], prior_weight=1.0, null_bias=0.0).choose(0.0).settling is None


def test_when_to_stop_reading_is_chosen_at_export_for_a_stated_budget(tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path) -> None:
    reader = shutil.copytree(tiny_reader, tmp_path / "reader")
    stating = json.loads((reader / "reader.json").read_text()) | {"settling": {"unread_weight": 300}}
    (reader / "reader.json").write_text(json.dumps(stating))
    said: list[str] = []
    asked = {
        "reader": reader,
        "settling": squad_file(tmp_path, *ASKED),
        "prior_weight": 50.0,
    }  # an untrained reader is never sure by itself
    any_may_change = exported(tiny_checkpoint, tmp_path / "any", said.append, em_budget=100.0, **asked)
    stated = any_may_change.manifest["reader"]["settling"]
    assert (stated["questions"], stated["em_budget"]) == (8, 100.0)
    assert 1 <= stated["passages"] < 5
    assert any_may_change.reader is not None
    assert any_may_change.reader.settling == Settling(stated["unread_weight"])
    assert any(line.startswith("settling: 8 questions about 6 passages") for line in said)
    none_may_change = exported(tiny_checkpoint, tmp_path / "none", em_budget=0.0, **asked)
    least = none_may_change.manifest["reader"].get("settling", {"passages": 5, "changed_percent": 0.0})  # not what the adapter states
    assert least["changed_percent"] == 0.0
    assert least["passages"] >= stated["passages"]
    assert none_may_change.id != any_may_change.id
    assert none_may_change.embedder.fingerprint == any_may_change.embedder.fingerprint


def test_questions_that_a_server_would_refuse_settle_nothing(tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path) -> None:
    long = " ".join(["king"] * 17)  # the reader takes 16
    said: list[str] = []
    asked = {"reader": tiny_reader, "settling": squad_file(tmp_path, *ASKED, (long, "a red city"))}
    exported(tiny_checkpoint, tmp_path / "bundle", said.append, **asked)
    assert "settling: 1 questions left out, longer than the 16 tokens that the reader takes" in said
    asked["settling"] = squad_file(tmp_path, (long, "a red city"))
    with pytest.raises(InvalidData, match="no question has at most 16 tokens"):
        exported(tiny_checkpoint, tmp_path / "other", **asked)
    assert not (tmp_path / "other").exists()


def test_a_folder_in_beirs_layout_is_asked_its_own_questions_about_its_own_corpus(
    tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "what was red ?"}\n{"_id": "q2", "text": "was it the king ?"}\n')
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\t0\t1\n")
    asked = {"reader": tiny_reader, "settling": str(folder)}
    with pytest.raises(SourceInvalid, match=r"corpus\.jsonl"):
        exported(tiny_checkpoint, tmp_path / "early", **asked)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": str(row), "text": text}) + "\n" for row, text in enumerate(PASSAGES)))
    said: list[str] = []
    exported(tiny_checkpoint, tmp_path / "bundle", said.append, **asked)
    assert any(line.startswith("settling: 1 questions about 6 passages") for line in said)  # q2 has no judgement
