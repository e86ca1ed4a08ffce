"""`openbook evaluate squad-open`: ask a running server questions with known answers, and score what it finds and says.

Data in BEIR's layout: `queries.jsonl` with `_id`, `text` and `metadata.answers`, and `qrels/*.tsv` with query-id, corpus-id and
score. Retrieval is scored by document: R@k is the share of questions with a relevant document among the first k
distinct ones; answer-hit@k the share with an accepted answer, in normal form, in the text of the first k passages. Reading is
scored as SQuAD does; `read` is how many passages a question were read for that. Latency is that of single questions, one after the other.
R@k, answer-hit@k, EM and F1 come with 95 % bootstrap intervals over the questions. Every mode is one of the server's own, so
what `random` draws is read as what the others find is, and its R@k is that of chance.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from openbook_training.beir import EVALUATION, Query, load_queries
from openbook_training.bootstrap import interval
from openbook_training.errors import InvalidData
from openbook_training.squad import answer_scores, holds_answer
from rich.console import Console

if TYPE_CHECKING:
    from openbook.client import Client
    from openbook.results import Hit

DEPTHS = (1, 5, 20)
LATENCY_QUESTIONS = 100  # asked one by one for the percentiles
_BATCH = 32
MODES = {
    "hybrid": "hybrid",
    "late_interaction": "late interaction",
    "lexical": "BM25 only",
    "dense": "dense only",
    "random": "random passages",
    "none": "no retrieval",
}


@dataclass(frozen=True, slots=True)
class ModeScores:
    """What one mode reaches."""

    metrics: dict[str, float]  # percent, latencies in milliseconds, counts
    intervals: dict[str, dict[str, float]]  # {"mean", "low", "high"} of R@k, answer-hit@k, EM and F1


def load_answered(folder: Path, console: Console) -> list[Query]:
    """The queries of a folder in BEIR's layout that have accepted answers.

    Raises:
        InvalidData: a file is missing or holds nothing usable, or no query has an answer.
    """
    queries = [query for query in load_queries(folder, console, EVALUATION) if query.answers]
    if not queries:
        raise InvalidData(f"{folder / 'queries.jsonl'}: no query has metadata.answers, which reading is scored by")
    return queries


def sample(queries: Sequence[Query], limit: int) -> list[Query]:
    """The same `limit` queries on every machine; all where limit is 0."""
    if not limit or limit >= len(queries):
        return list(queries)
    return random.Random(0).sample(list(queries), limit)


def evaluate_mode(
    client: Client,
    queries: Sequence[Query],
    mode: str,
    *,
    top_k: int,
    rerank: int,
    read_all: bool,
    concurrency: int,
    progress: Callable[[int], None],
) -> ModeScores:
    """One mode of the table: every metric in percent, latencies in milliseconds, and how many questions failed.

    Args:
        top_k: passages that are read for an answer; searches go 20 deep whatever it is.
        rerank: passages of a search that are read and put in the order of that.
        read_all: read all of `top_k`, though the best answer be settled by the first ones.
        progress: told how many questions each finished batch held.
    """
    from openbook.results import AnswerResult

    read: list[int] = []  # passages of each question that was answered

    def ask(batch: Sequence[Query]) -> list[tuple[Query, Sequence[Hit], str | None]]:
        texts = [query.text for query in batch]
        searches: Sequence[object] = [None] * len(texts)
        answers: Sequence[object] = searches
        with _alone(texts):
            if mode != "none":
                searches = client.search(texts, top_k=max(DEPTHS), mode=mode, rerank=rerank)
            answers = client.answer(texts, top_k=top_k, max_answers=1, mode=mode, read_all=read_all)
        rows: list[tuple[Query, Sequence[Hit], str | None]] = []
        for query, found, answered in zip(batch, searches, answers, strict=True):
            if not isinstance(answered, AnswerResult):
                rows.append((query, (), None))
                continue
            read.append(answered.passages_read)
            hits = getattr(found, "hits", ())
            rows.append((query, hits, answered.answers[0].text if answered.answers else ""))
        progress(len(batch))
        return rows

    batches = [queries[at : at + _BATCH] for at in range(0, len(queries), _BATCH)]
    with ThreadPoolExecutor(concurrency) as pool:
        rows = [row for part in pool.map(ask, batches) for row in part]
    intervals = {name: asdict(interval(np.array(values))) for name, values in score(rows).items()}
    metrics = {name: found["mean"] for name, found in intervals.items()}
    metrics |= {"questions": len(rows), "failed": sum(text is None for _, _, text in rows), "read": sum(read) / max(1, len(read))}
    return ModeScores(metrics | latencies(client, queries[:LATENCY_QUESTIONS], mode, top_k=top_k, read_all=read_all), intervals)


def score(rows: Sequence[tuple[Query, Sequence[Hit], str | None]]) -> dict[str, list[float]]:
    """Of every (query, hits, prediction) what it scores, 0 to 100, by metric; a prediction of None, a question that failed, is wrong."""
    scores: dict[str, list[float]] = {}
    for depth in DEPTHS:
        scores[f"R@{depth}"] = [100.0 * bool(query.relevant.keys() & set(_documents(hits)[:depth])) for query, hits, _ in rows]
    for depth in DEPTHS:
        scores[f"answer-hit@{depth}"] = [
            100.0 * any(holds_answer(hit.text, query.answers) for hit in hits[:depth]) for query, hits, _ in rows
        ]
    answered = answer_scores([text or "" for _, _, text in rows], [query.answers for query, _, _ in rows])
    return scores | {what.upper(): [100 * value for value in values] for what, values in answered.items()}


@contextmanager
def _alone(texts: Sequence[str]) -> Iterator[None]:
    """Within, texts are asked; the only one of a message that is refused has failed, which ends nothing else.

    Raises:
        RequestRejected: for something else than a text.
    """
    from openbook.errors import RequestRejected

    try:
        yield
    except RequestRejected as error:
        if len(texts) > 1 or not error.field.startswith("questions["):
            raise


def latencies(client: Client, queries: Sequence[Query], mode: str, *, top_k: int, read_all: bool) -> dict[str, float]:
    """Client-side milliseconds of single questions, asked one after the other; of those that are answered."""
    took = []
    for query in queries:
        began = time.perf_counter()
        with _alone([query.text]):
            client.answer([query.text], top_k=top_k, mode=mode, read_all=read_all)
            took.append(1000 * (time.perf_counter() - began))
    took.sort()
    return {f"p{share}_ms": took[min(len(took) - 1, len(took) * share // 100)] for share in (50, 95, 99)} if took else {}


def table(rows: Mapping[str, ModeScores]) -> str:
    """A line of metrics and one of their intervals for each mode, aligned."""
    names = list(next(iter(rows.values())).metrics)
    lines = [["", *names]]
    for mode, row in rows.items():
        lines.append(
            [
                MODES[mode],
                *(f"{row.metrics[name]:.0f}" if name in {"questions", "failed"} else f"{row.metrics[name]:.1f}" for name in names),
            ]
        )
        ranges = {name: f"{found['low']:.1f} to {found['high']:.1f}" for name, found in row.intervals.items()}
        lines.append(["95 % interval", *(ranges.get(name, "") for name in names)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _documents(hits: Sequence[Hit]) -> list[str]:
    return list(dict.fromkeys(hit.document_id for hit in hits))
