"""`openbook evaluate squad-open` against a scripted client: a question that is refused fails alone, and every mean has its interval.

And against a real server: what is scored in random mode is what the questions drew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import openbook.client
import pytest
from openbook.client import Client, Document
from openbook.errors import RequestRejected
from openbook.results import AnswerResult, SearchResult
from openbook_export.command_evaluate import add_arguments, run
from openbook_export.squad_open import ModeScores, evaluate_mode
from openbook_server.bundle import load_bundle
from openbook_server.config import ServerConfig
from openbook_server.knowledge import open_knowledge_base
from openbook_server.serving import running_server
from openbook_training.beir import Query
from openbook_training.bootstrap import interval

COUNTED = ("one", "two", "three", "river", "case")


class Scripted:
    """Answers "right"; refuses "bad" as the client does, and everything where the request is wrong."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong

    def search(self, questions: Sequence[str], **options: Any) -> list[Any]:
        return self.answer(questions)

    def answer(self, questions: Sequence[str], **options: Any) -> list[Any]:
        if self.wrong:
            raise RequestRejected("is wrong", field=self.wrong)
        refused = [RequestRejected("too long", field=f"questions[{at}]") if text == "bad" else None for at, text in enumerate(questions)]
        if len(refused) == 1 and refused[0] is not None:
            raise refused[0]
        return [problem or self._answered(text) for problem, text in zip(refused, questions, strict=True)]

    @staticmethod
    def _answered(text: str) -> AnswerResult:
        empty: Any = {"answers": (), "hits": (), "timings_ms": {}, "bundle_id": "", "generation": ""}
        return AnswerResult(question=text, no_answer_probability=1.0, passages_read=1, **empty)


def evaluated(client: Scripted, texts: Sequence[str]) -> ModeScores:
    queries = [Query(id=str(at), text=text, relevant={}, answers=("right",)) for at, text in enumerate(texts)]
    settings: Any = {"top_k": 5, "rerank": 0, "read_all": False, "concurrency": 2}
    return evaluate_mode(cast(Client, client), queries, "hybrid", progress=lambda done: None, **settings)


def test_a_refused_question_fails_alone_among_others_and_as_the_only_one_of_its_message() -> None:
    row = evaluated(Scripted(), [*["who"] * 7, "bad", *["who"] * 24, "bad"]).metrics
    assert (row["questions"], row["failed"]) == (33, 2)
    assert row["p50_ms"] > 0


def test_a_request_that_no_question_is_to_blame_for_ends_the_evaluation() -> None:
    with pytest.raises(RequestRejected, match="top_k"):
        evaluated(Scripted(wrong="top_k"), ["who"])


class Searching(Scripted):
    """Knows every other question's answer, finds every third's document first and every fourth's second; the 7th is refused."""

    def __init__(self, server: str | None, **options: Any) -> None:
        super().__init__()

    def __enter__(self) -> Searching:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def describe(self) -> Any:
        bundle, knowledge_base = SimpleNamespace(id="b"), SimpleNamespace(generation="g", passages=20)
        return SimpleNamespace(bundle=bundle, knowledge_base=knowledge_base, device="cpu", precision="fp32")

    def answer(self, questions: Sequence[str], **options: Any) -> list[Any]:
        return [RequestRejected("too long", field="questions[0]") if text == "who 7" else self._found(int(text[4:])) for text in questions]

    @staticmethod
    def _found(number: int) -> AnswerResult:
        places = [f"d{number}" if number % 3 == 0 else "other", f"d{number}" if number % 4 == 0 else "another"]
        hits: Any = tuple(SimpleNamespace(document_id=place, text="nothing") for place in places)
        answers: Any = (SimpleNamespace(text="right" if number % 2 == 0 else "wrong"),)
        empty: Any = {"timings_ms": {}, "bundle_id": "", "generation": ""}
        return AnswerResult(question="", answers=answers, hits=hits, no_answer_probability=0.0, passages_read=1, **empty)


def test_recall_and_answers_are_reported_with_the_intervals_of_their_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = np.arange(20)
    rows = [{"_id": f"q{number}", "text": f"who {number}", "metadata": {"answers": ["right"]}} for number in numbers]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in numbers))
    monkeypatch.setattr(openbook.client, "Client", Searching)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["squad-open", str(tmp_path), "--modes", "hybrid"])) == 3  # a question failed
    *printed, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    answered = numbers != 7
    expected = {
        "R@1": answered & (numbers % 3 == 0),
        "R@5": answered & ((numbers % 3 == 0) | (numbers % 4 == 0)),
        "EM": answered & (numbers % 2 == 0),
    }
    metrics, intervals = report["modes"]["hybrid"], report["intervals"]["hybrid"]
    for name, right in expected.items():
        found = interval(100.0 * right)
        assert intervals[name] == {"mean": found.mean, "low": found.low, "high": found.high}
        assert metrics[name] == pytest.approx(100 * right.mean())
    assert metrics["EM"] == metrics["F1"]
    assert set(intervals) == {"EM", "F1", *(f"{what}@{depth}" for what in ("R", "answer-hit") for depth in (1, 5, 20))}
    assert (metrics["questions"], metrics["failed"]) == (20, 1)
    assert len(printed) == 3
    assert printed[1].split()[:2] == ["hybrid", f"{metrics['R@1']:.1f}"]
    low, high = intervals["R@1"]["low"], intervals["R@1"]["high"]
    assert printed[2].split()[:6] == ["95", "%", "interval", f"{low:.1f}", "to", f"{high:.1f}"]


async def test_in_random_mode_what_each_question_draws_is_read_and_scored(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question is its document's own text, so search finds that; of an even one what is read in its draw is accepted."""
    texts = [f"the {one} {two} of {three}" for one in ("red", "blue") for two in ("city", "king", "book") for three in COUNTED]

    def compare(server: str) -> None:
        drawn, accepted = list[list[str]](), list[str]()
        with Client(server) as client:
            stored = client.upsert(Document(id=f"d{at}", text=text) for at, text in enumerate(texts))
            assert {done.outcome for done in stored} == {"created"}
            for at in reversed(range(len(texts))):  # one by one, and in another order than they are evaluated in
                [found] = client.search([texts[at]], mode="random", top_k=20)
                [answered] = client.answer([texts[at]], mode="random", top_k=3, read_all=True)
                assert isinstance(found, SearchResult)
                assert isinstance(answered, AnswerResult)
                drawn.insert(0, [hit.document_id for hit in found.hits])
                accepted.insert(0, answered.answers[0].text if at % 2 == 0 else "absent")
                assert {hit.document_id for hit in answered.hits} == {*drawn[0][:3]}
        assert len({tuple(ids) for ids in drawn}) == len(texts)
        rows = [{"_id": f"q{at}", "text": text, "metadata": {"answers": [accepted[at]]}} for at, text in enumerate(texts)]
        (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "qrels").mkdir()
        (tmp_path / "qrels" / "test.tsv").write_text("".join(f"q{at}\td{at}\t1\n" for at in range(len(texts))))
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        arguments = ["squad-open", str(tmp_path), "--server", server, "--top-k", "3", "--read-all", "--modes", "random", "dense"]
        for _ in range(2):
            assert run(parser.parse_args(arguments)) == 0
            modes = json.loads(capsys.readouterr().out.splitlines()[-1])["modes"]
            for depth in (1, 5, 20):
                own = [f"d{at}" in ids[:depth] for at, ids in enumerate(drawn)]
                assert modes["random"][f"R@{depth}"] == pytest.approx(100 * np.mean(own))
            assert (modes["random"]["EM"], modes["random"]["read"]) == (50.0, 3.0)
            assert (modes["dense"]["R@1"], modes["dense"]["read"]) == (100.0, 3.0)
            assert modes["random"]["R@5"] < 50

    open_knowledge_base(str(tmp_path / "kb"), load_bundle(tiny_bundle), create=True).close()
    async with running_server(tiny_bundle, tmp_path / "kb", ServerConfig(port=0, device="cpu")) as port:
        await asyncio.to_thread(compare, f"127.0.0.1:{port}")
