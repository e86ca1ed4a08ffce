"""Questions with answers: reading SQuAD-shaped files, and scoring predictions as SQuAD does.

Covered: SQuAD 1.1/2.0 JSON, JSON lines of `{"id", "question", "context", "answers": {"text", "answer_start"}}`, and any
Hugging Face dataset with those columns. Metrics after Rajpurkar et al. 2016, section 6.1.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openbook_training.errors import InvalidData
from openbook_training.rows import dataset_rows

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question, the passage it was asked about, and its accepted answers (none: the passage has no answer)."""

    id: str
    text: str
    context: str
    answers: tuple[str, ...]

    def gold_spans(self) -> list[tuple[int, int]]:
        """Every place in the context where an accepted answer stands as a word of its own, as (start, end) characters."""
        return occurrences(self.context, self.answers)


def occurrences(text: str, answers: Iterable[str]) -> list[tuple[int, int]]:
    """All (start, end) at which one of `answers` stands in `text`, not inside a longer word where a free-standing one exists."""
    found: set[tuple[int, int]] = set()
    for answer in {answer.strip() for answer in answers if answer.strip()}:
        spans = [(match.start(), match.end()) for match in re.finditer(re.escape(answer), text)]
        free = [span for span in spans if _stands_alone(text, *span)]
        found.update(free or spans)
    return sorted(found)


def _stands_alone(text: str, start: int, end: int) -> bool:
    before = start > 0 and text[start - 1].isalnum() and text[start].isalnum()
    after = end < len(text) and text[end].isalnum() and text[end - 1].isalnum()
    return not before and not after


def normalise(answer: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in answer.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the prediction equals an accepted answer in normal form; an unanswerable question wants ""."""
    return float(any(normalise(prediction) == normalise(answer) for answer in answers or ("",)))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best token-overlap F1 (0 to 1) of the prediction with any accepted answer."""
    return max(_pair_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers or ("",))


def _pair_f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    same = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * same / (len(predicted) + len(gold))


def load_questions(source: str) -> list[Question]:
    """Read questions from a file (.json, .jsonl) or a Hugging Face dataset (`NAME:SPLIT`).

    Raises:
        InvalidData: the source is missing, or a row is malformed (the message names file, row and reason).
    """
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        rows: Iterable[dict[str, Any]] = _nested_rows(path)
    elif path.suffix == ".jsonl" and path.is_file():
        rows = _flat_rows(path)
    elif path.suffix in {".json", ".jsonl"}:
        raise InvalidData(f"data file {source!r} does not exist")
    else:
        rows = dataset_rows(source)
    questions = []
    for number, row in enumerate(rows, 1):
        try:
            answers = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]
            question = Question(
                id=str(row["id"]), text=row["question"].strip(), context=row["context"], answers=tuple(dict.fromkeys(answers))
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidData(f"{source}: row {number}: {type(error).__name__} {error}; see openbook_training.squad") from error
        if not question.text or not question.context:
            raise InvalidData(f"{source}: row {number}: empty question or context")
        questions.append(question)
    if not questions:
        raise InvalidData(f"{source}: no questions in it")
    return questions


def spread(questions: list[Question], count: int) -> list[Question]:
    """At most `count` of them, evenly spread: files are sorted by article, and the first ones are no sample. All where count is 0."""
    return questions[:: -(-len(questions) // count)] if count and questions else questions


def hold_out(questions: list[Question], count: int) -> tuple[list[Question], list[Question]]:
    """Split off about `count` questions with all their passages, the same ones on every machine."""
    by_passage: dict[str, list[Question]] = {}
    for question in questions:
        by_passage.setdefault(question.context, []).append(question)
    held: set[str] = set()
    taken = 0
    for context in sorted(by_passage, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if taken >= count:
            break
        held.add(context)
        taken += len(by_passage[context])
    return [q for q in questions if q.context not in held], [q for q in questions if q.context in held]


def _nested_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        articles = json.loads(path.read_text())["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidData(f"{path}: not a SQuAD JSON file ({error})") from error
    for article in articles:
        for paragraph in article["paragraphs"]:
            for row in paragraph["qas"]:
                answers = [] if row.get("is_impossible") else [answer["text"] for answer in row["answers"]]
                yield {"id": row["id"], "question": row["question"], "context": paragraph["context"], "answers": answers}


def _flat_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise InvalidData(f"{path}: line {number} is not JSON ({error})") from error
