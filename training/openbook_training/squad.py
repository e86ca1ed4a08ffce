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
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from openbook_training.errors import InvalidData
from openbook_training.rows import Row, build_rows, read_rows, report_left_out

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)  # how a passage is named
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question, the passage it was asked about, and its accepted answers, none of them empty (none: the passage has no answer)."""

    id: str
    text: str
    context: str
    answers: tuple[str, ...]
    title: str = ""  # of the document that the passage is from, where the data state it

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


def holds_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether an accepted answer stands in `text`, both in normal form and word by word."""
    return holds_normalised(normalise(text), map(normalise, answers))


def holds_normalised(text: str, answers: Iterable[str]) -> bool:
    """`holds_answer` of a text and answers that are in normal form already; an answer that is empty in it stands nowhere."""
    words = f" {text} "
    return any(f" {wanted} " in words for wanted in answers if wanted)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the prediction equals an accepted answer in normal form; an unanswerable question wants ""."""
    return float(any(normalise(prediction) == normalise(answer) for answer in answers or ("",)))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best token-overlap F1 (0 to 1) of the prediction with any accepted answer."""
    return max(_pair_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers or ("",))


def answer_scores(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """ "em" and "f1" (0 to 1) of each prediction against its question's accepted answers."""
    pairs = list(zip(predictions, accepted, strict=True))
    return {"em": [exact_match(*pair) for pair in pairs], "f1": [f1(*pair) for pair in pairs]}


def _pair_f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    same = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * same / (len(predicted) + len(gold))


def load_questions(source: str, console: Console | None = None) -> list[Question]:
    """Read questions from a file (.json, .jsonl) or a Hugging Face dataset (`NAME:SPLIT`).

    A row that holds no question is left out, and named on `console` (default: the error stream).

    Raises:
        InvalidData: the source is missing, or holds no usable row.
    """
    rows = _nested_rows(Path(source)) if source.endswith(".json") else read_rows(source)
    questions, problems = build_rows(rows, lambda row: _question(row.values))
    report_left_out(console or Console(stderr=True), source, len(questions), problems)
    return questions


def _question(row: Mapping[str, Any]) -> Question:
    answers = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]
    texts = {name: row[name] for name in ("question", "context")} | {"title": row.get("title") or ""}
    wrong = [name for name, text in texts.items() if not isinstance(text, str)]
    if wrong or not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{(wrong or ['answers'])[0]} is no text")
    text, context = texts["question"].strip(), texts["context"]
    if not (_visible(text) and _visible(context)):
        raise ValueError("empty question or context")
    title = texts["title"].replace("_", " ")  # SQuAD's are the names of Wikipedia's pages
    accepted = tuple(answer for answer in dict.fromkeys(answers) if answer.strip())
    return Question(id=str(row["id"]), text=text, context=context, answers=accepted, title=title)


def _visible(text: str) -> bool:
    """Whether there is more in it than white space and characters without a width, of which tokenizers make nothing."""
    return any(character.isprintable() and not character.isspace() for character in text)


def spread(questions: list[T], count: int) -> list[T]:
    """At most `count` of them, evenly spread: files are sorted by article, and the first ones are no sample. All where count is 0."""
    return questions[:: -(-len(questions) // count)] if count and questions else questions


def hold_out(questions: list[Question], count: int) -> tuple[list[Question], list[Question]]:
    """Split off about `count` questions with all their passages, the same ones on every machine."""
    held = held_out_rows([[question.context] for question in questions], str, count)
    return [q for row, q in enumerate(questions) if row not in held], [q for row, q in enumerate(questions) if row in held]


def held_out_rows(passages: Sequence[Collection[K]], text_of: Callable[[K], str], count: int) -> set[int]:
    """About `count` rows of questions, with all that share a passage with one of them, the same ones on every machine.

    Args:
        passages: of each question, at least one.
        text_of: by which passages are put into an order that does not depend on that of the data.
    """
    asking: dict[K, list[int]] = {}
    for row, names in enumerate(passages):
        for name in names:
            asking.setdefault(name, []).append(row)
    held: set[int] = set()
    for name in sorted(asking, key=lambda name: hashlib.sha256(text_of(name).encode()).digest()):
        if len(held) >= count:
            break
        reach = [name]
        while reach:
            fresh = [row for row in asking[reach.pop()] if row not in held]
            held.update(fresh)
            reach += [other for row in fresh for other in passages[row]]
    return held


def _nested_rows(path: Path) -> Iterator[Row]:
    """SQuAD's own format; a part that is not of its shape becomes one row with a problem."""
    if not path.is_file():
        raise InvalidData(f"data file {str(path)!r} does not exist")
    try:
        content = json.loads(path.read_bytes())
        articles = content.get("data") if isinstance(content, dict) else None
        if not isinstance(articles, list):
            raise TypeError('it is no object with a list of articles, "data"')
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InvalidData(f"{path}: not a SQuAD JSON file ({error})") from error
    for number, article in enumerate(articles, 1):
        for at, paragraph in enumerate(_items(article, "paragraphs"), 1):
            for question, row in enumerate(_items(paragraph, "qas"), 1):
                yield _nested_row(f"{path}: article {number}, paragraph {at}, question {question}", article, paragraph, row)


def _items(table: Any, key: str) -> list[Any]:
    """What is listed under `key`; where that is not of SQuAD's shape, one thing that is no row either, so that it is counted."""
    items = table.get(key) if isinstance(table, dict) else None
    return items if isinstance(items, list) else [None]


def _nested_row(place: str, article: Any, paragraph: Any, row: Any) -> Row:
    try:
        answers = [] if row.get("is_impossible") else [answer["text"] for answer in row["answers"]]
        values = {**row, "context": paragraph["context"], "title": article.get("title"), "answers": answers}
    except (KeyError, TypeError, AttributeError) as error:
        return Row(place=place, problem=f"not of SQuAD's shape ({type(error).__name__}: {error})")
    return Row(place=place, values=values)
