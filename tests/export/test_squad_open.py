"""`openbook evaluate squad-open` against a scripted client: a question that is refused fails alone, wherever it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
from openbook.client import Client
from openbook.errors import RequestRejected
from openbook.results import AnswerResult
from openbook_export.squad_open import evaluate_mode
from openbook_training.beir import Query


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


def evaluated(client: Scripted, texts: Sequence[str]) -> dict[str, float]:
    queries = [Query(id=str(at), text=text, relevant={}, answers=("right",)) for at, text in enumerate(texts)]
    settings: Any = {"top_k": 5, "rerank": 0, "read_all": False, "concurrency": 2}
    return evaluate_mode(cast(Client, client), queries, "hybrid", progress=lambda done: None, **settings)


def test_a_refused_question_fails_alone_among_others_and_as_the_only_one_of_its_message() -> None:
    row = evaluated(Scripted(), [*["who"] * 7, "bad", *["who"] * 24, "bad"])
    assert (row["questions"], row["failed"]) == (33, 2)
    assert row["p50_ms"] > 0


def test_a_request_that_no_question_is_to_blame_for_ends_the_evaluation() -> None:
    with pytest.raises(RequestRejected, match="top_k"):
        evaluated(Scripted(wrong="top_k"), ["who"])
