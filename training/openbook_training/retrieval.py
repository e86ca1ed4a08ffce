"""Questions and the corpus they are asked of: what a retriever is trained and measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console

from openbook_training.beir import EVALUATION, Passage, load_corpus, load_queries
from openbook_training.rows import Row, build_rows, name_first, read_rows, report_left_out
from openbook_training.squad import held_out_rows, load_questions

_PEEKED = 10  # rows by which a file of questions is told from one of texts


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A question and its gold passages."""

    id: str
    text: str
    answers: tuple[str, ...]  # accepted answers; may be none
    gold: Mapping[int, float]  # grade, above 0, by row of the passage in the corpus; at least one


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    """A corpus with questions on it."""

    passages: list[Passage]
    questions: list[Asked]


def load_retrieval(source: str, console: Console, splits: Sequence[str]) -> RetrievalSet:
    """Read a folder in BEIR's layout, or SQuAD-shaped questions, whose contexts are then the corpus.

    Rows that cannot be used are left out and named on `console`.

    Args:
        splits: which questions of a folder: `beir.TRAINING` or `beir.EVALUATION`.

    Raises:
        InvalidData: the source is missing, or holds no question with a gold passage.
    """
    return _of_beir(Path(source), console, splits) if Path(source).is_dir() else _of_squad(source, console)


def load_passages(source: str, console: Console) -> list[str]:
    """Texts that nobody needs to have asked about, each once: a corpus in BEIR's layout, SQuAD-shaped questions, or texts.

    A file of texts is .txt (one a line), or has a column "text" or "context" (.csv, .jsonl, `NAME:SPLIT` of a Hugging Face dataset).

    Raises:
        InvalidData: the source is missing, or holds no usable row.
    """
    if Path(source).is_dir():
        texts = [passage.text for passage in load_corpus(Path(source), console)]
    elif source.endswith(".json"):
        texts = [question.context for question in load_questions(source, console)]
    else:
        texts, problems = build_rows(read_rows(source), _text_of)
        report_left_out(console, source, len(texts), problems)
    return list(dict.fromkeys(texts))


def load_unlabelled(source: str, console: Console) -> RetrievalSet:
    """Passages with their titles, and, where the data happen to carry them, the questions on them, to measure on.

    The source is of a kind that `load_passages` or `load_retrieval` reads.

    Raises:
        InvalidData: the source is missing, or holds no usable row.
    """
    folder = Path(source)
    if folder.is_dir():
        judged = (folder / "queries.jsonl").is_file() and any((folder / "qrels").glob("*.tsv"))
        return _of_beir(folder, console, EVALUATION) if judged else RetrievalSet(load_titled(source, console), [])
    if source.endswith(".json") or any("question" in row.values for row in islice(read_rows(source), _PEEKED)):
        return _of_squad(source, console)
    return RetrievalSet(load_titled(source, console), [])


def load_titled(source: str, console: Console) -> list[Passage]:
    """What `load_passages` reads, with the titles that the passages of a folder have.

    Raises:
        InvalidData: the source is missing, or holds no usable row.
    """
    if Path(source).is_dir():
        return load_corpus(Path(source), console)
    return [Passage(id=str(row), text=text) for row, text in enumerate(load_passages(source, console))]


def _text_of(row: Row) -> str:
    text = row.values["context"] if "context" in row.values else row.values["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError("its text is empty, or none")
    return text


def _of_beir(folder: Path, console: Console, splits: Sequence[str]) -> RetrievalSet:
    passages = load_corpus(folder, console)
    row_of = {passage.id: row for row, passage in enumerate(passages)}
    questions, problems, partly = [], [], []
    for query in load_queries(folder, console, splits):
        lacking = [id_ for id_ in query.relevant if id_ not in row_of]
        if len(lacking) == len(query.relevant):
            problems.append(f"query {query.id}: none of its relevant passages is in corpus.jsonl")
            continue
        gold = {row_of[id_]: grade for id_, grade in query.relevant.items() if id_ in row_of}
        questions.append(Asked(id=query.id, text=query.text, answers=query.answers, gold=gold))
        if lacking:
            partly.append(f"query {query.id}: of its relevant passages, {', '.join(lacking)} not in corpus.jsonl")
    report_left_out(console, str(folder), len(questions), problems)
    name_first(console, f"{folder}: {len(partly)} questions are without some of their relevant passages", partly)
    return RetrievalSet(passages, questions)


def _of_squad(source: str, console: Console) -> RetrievalSet:
    rows: dict[str, int] = {}
    passages: list[Passage] = []
    questions: list[Asked] = []
    for question in load_questions(source, console):
        row = rows.setdefault(question.context, len(passages))
        if row == len(passages):
            passages.append(Passage(id=str(row), text=question.context, title=question.title))
        questions.append(Asked(id=question.id, text=question.text, answers=question.answers, gold={row: 1.0}))
    return RetrievalSet(passages, questions)


def hold_out_passages(data: RetrievalSet, count: int) -> tuple[list[Asked], list[Asked]]:
    """(train, held out): about `count` questions set aside with all passages that they or their passages lead to.

    No training question shares a gold passage with a held-out one. The same questions on every machine.
    """
    held = held_out_rows([question.gold for question in data.questions], lambda row: data.passages[row].text, count)
    everything = list(enumerate(data.questions))
    return [question for number, question in everything if number not in held], [q for number, q in everything if number in held]
