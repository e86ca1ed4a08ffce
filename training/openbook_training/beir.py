"""Retrieval data in BEIR's layout (Thakur et al. 2021): corpus.jsonl, queries.jsonl and qrels/*.tsv in one folder.

Of several tables in qrels/ one is read: for training train.tsv, for evaluation test.tsv, or dev.tsv where there is no test. A folder with
one table has but one set of questions, whatever it is called, and it is the user who says what for. A row that cannot be used is left out
and named; only a folder without a usable row is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from openbook_training.errors import InvalidData
from openbook_training.rows import Row, build_rows, read_rows, report_left_out

TRAINING, EVALUATION = ("train",), ("test", "dev")  # tables of qrels/ that are wanted where there are several, the first that is there


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """A passage of a corpus."""

    id: str
    text: str
    title: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """A question whose relevant passages are known."""

    id: str
    text: str
    answers: tuple[str, ...]  # accepted answers, from `metadata.answers`; often none
    relevant: Mapping[str, float]  # grade, above 0, by passage id


T = TypeVar("T", Passage, Query)


def load_corpus(folder: Path, console: Console) -> list[Passage]:
    """The passages, each id once.

    Raises:
        InvalidData: there is no corpus.jsonl, or no usable row in it.
    """

    def build(row: Mapping[str, Any]) -> Passage:
        title = row.get("title") or ""
        if not isinstance(title, str):
            raise ValueError("'title' is no text")
        return Passage(id=_text(row, "_id"), text=_text(row, "text"), title=title.strip())

    return _build(folder / "corpus.jsonl", build, console)


def load_queries(folder: Path, console: Console, splits: Sequence[str]) -> list[Query]:
    """The queries that one table of qrels/ judges; every other row of queries.jsonl belongs to another split and is none of ours.

    Args:
        splits: TRAINING or EVALUATION.

    Raises:
        InvalidData: a file is missing, nothing in it is usable, or of several tables none is of `splits`.
    """
    table = _table(folder, splits)
    console.print(f"{folder}: questions of qrels/{table.name}", soft_wrap=True, markup=False)
    relevant = _judgements(table, console)

    def build(row: Mapping[str, Any]) -> Query:
        answers = (row.get("metadata") or {}).get("answers", ())
        if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError("metadata.answers is no list of texts")
        id_ = _text(row, "_id")
        accepted = tuple(answer for answer in answers if answer.strip())
        return Query(id=id_, text=_text(row, "text"), answers=accepted, relevant=relevant.get(id_, {}))

    queries = [query for query in _build(folder / "queries.jsonl", build, console) if query.relevant]
    if not queries:
        raise InvalidData(f"{folder}: qrels/{table.name} judges no query of queries.jsonl")
    lacking = relevant.keys() - {query.id for query in queries}
    report_left_out(console, str(table), len(queries), [f"query {id_}: no usable row of queries.jsonl" for id_ in sorted(lacking)])
    return queries


def _table(folder: Path, splits: Sequence[str]) -> Path:
    tables = {file.stem: file for file in sorted((folder / "qrels").glob("*.tsv"))}
    if not tables:
        raise InvalidData(f"{folder} has no qrels/*.tsv; it should be in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/)")
    wanted = [split for split in splits if split in tables] if len(tables) > 1 else list(tables)
    if not wanted:
        there, none = (", ".join(f"{name}.tsv" for name in names) for names in (tables, splits))
        raise InvalidData(f"{folder}: qrels/ holds {there}, and none is {none}; make a folder with the one that is meant")
    return tables[wanted[0]]


def _judgements(table: Path, console: Console) -> dict[str, dict[str, float]]:
    """Of each query the passages with a grade above 0; a pair's first judgement counts, as the first row of an id does elsewhere."""
    grades: dict[str, dict[str, float]] = {}
    used, problems = 0, []
    for number, line in enumerate(table.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        fields = line.split("\t")
        if not line.strip() or (number == 1 and fields[-1] == "score"):
            continue
        try:
            query, passage, score = fields
            if not math.isfinite(grade := float(score)):
                raise ValueError
        except ValueError:  # of four fields too: TREC's qrels have one between query and passage
            problems.append(f"{table}: line {number}: expected query-id, corpus-id and score between tabs, and no more")
            continue
        judged = grades.setdefault(query, {})
        if passage in judged:
            problems.append(f"{table}: line {number}: query {query} and passage {passage} are judged further up")
            continue
        used += 1
        judged[passage] = grade
    report_left_out(console, str(table), used, problems)
    relevant = {query: {passage: grade for passage, grade in judged.items() if grade > 0} for query, judged in grades.items()}
    return {query: judged for query, judged in relevant.items() if judged}


def _build(file: Path, build: Callable[[Mapping[str, Any]], T], console: Console) -> list[T]:
    """What the rows of a file become, each id once."""
    seen: set[str] = set()

    def build_once(row: Row) -> T:
        one = build(row.values)
        if one.id in seen:
            raise ValueError(f"its _id {one.id!r} stands further up")
        seen.add(one.id)
        return one

    built, problems = build_rows(read_rows(str(file)), build_once)
    report_left_out(console, str(file), len(built), problems)
    return built


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    text = str(value).strip() if isinstance(value, str | int) else ""
    if not text:
        raise ValueError(f"{name!r} is {'empty' if name in row else 'missing'}")
    return text
