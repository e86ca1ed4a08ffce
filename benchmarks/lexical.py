"""Which engine for BM25? The knowledge base's index of words, on tantivy, beside SQLite's FTS5, on the same texts and questions.

    python benchmarks/lexical.py [--passages 100000] [--queries 200]

Texts and questions are those of growth.py (the law of Zipf and Mandelbrot, stop words left out). Both engines stem and score by
BM25, both OR the words of a question and return the best 100 passages. Measured of each: passages written a second until
they can be searched and are on the disk, bytes a passage there, p50 and p99 of a question on one thread, and how many of FTS5's
best ten are among the engine's. FTS5 commits after each thousand passages. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from driver import percentile
from growth import CHUNK, PASSAGE_WORDS, QUESTION_WORDS, WARM_UP, texts
from openbook_server.knowledge.lexical import question_words
from openbook_server.knowledge.words import WordIndex
from report import add_results_arguments, publish, run_benchmark

DEPTH = 100  # candidates a question, as in hybrid search
COMPARED = 10
COLUMNS = {  # of the table
    "written_per_second": "written/s",
    "disk_bytes_a_passage": "bytes a passage",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "questions_per_second": "questions/s",
    "overlap_at_10": "overlap@10",
}
Search = Callable[[str], list[int]]


def fts5(folder: Path, passages: Sequence[str]) -> Search:
    connection = sqlite3.connect(folder / "words.sqlite", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE VIRTUAL TABLE words USING fts5(text, content='', tokenize='porter unicode61')")
    for at in range(0, len(passages), CHUNK):
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO words (rowid, text) VALUES (?, ?)", enumerate(passages[at : at + CHUNK], at))
        connection.execute("COMMIT")

    def search(question: str) -> list[int]:
        expression = " OR ".join(f'"{word}"' for word in question_words(question))
        rows = connection.execute("SELECT rowid FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?", (expression, DEPTH))
        return [number for (number,) in rows]

    return search


def tantivy(folder: Path, passages: Sequence[str]) -> Search:
    def stored(rows: Sequence[int]) -> dict[int, str]:
        return {row: passages[row] for row in rows}

    index = WordIndex(folder, stored, frozenset(), 0)
    for at in range(0, len(passages), CHUNK):
        part = passages[at : at + CHUNK]
        index.add(range(at, at + len(part)), part)
        index.settle(stored)
    index.flush(stored)
    return lambda question: list(index.search(question, DEPTH))


def measure(build: Callable[[Path, Sequence[str]], Search], passages: Sequence[str], questions: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        began = time.perf_counter()
        search = build(folder, passages)
        written = time.perf_counter() - began
        took, found = [], []
        for question in questions:
            began = time.perf_counter()
            found.append(search(question))
            took.append(1000 * (time.perf_counter() - began))
        took = sorted(took[WARM_UP:])
        return {
            "written_per_second": len(passages) / written,
            "disk_bytes_a_passage": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / len(passages),
            "questions_per_second": 1000 * len(took) / sum(took),
            "p50_ms": percentile(took, 50),
            "p99_ms": percentile(took, 99),
            "found": found,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument("--queries", type=int, default=200, help="(default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    if arguments.passages < 1 or arguments.queries <= WARM_UP:
        parser.error(f"--passages takes 1 or more, --queries more than {WARM_UP}")
    rng = np.random.default_rng(0)
    passages = texts(arguments.passages, PASSAGE_WORDS, rng)
    questions = texts(arguments.queries, QUESTION_WORDS, rng)
    engines = {"fts5": measure(fts5, passages, questions), "tantivy": measure(tantivy, passages, questions)}
    reference = [set(found[:COMPARED]) for found in engines["fts5"]["found"]]
    for engine in engines.values():
        common = [len(best & set(found[:COMPARED])) / max(1, len(best)) for best, found in zip(reference, engine.pop("found"), strict=True)]
        engine["overlap_at_10"] = float(np.mean(common))
    print(f"{'':<10}" + "".join(f"{title:>20}" for title in COLUMNS.values()))
    for name, engine in engines.items():
        print(f"{name:<10}" + "".join(f"{engine[key]:>20,.2f}" for key in COLUMNS))
    publish(
        {"passages": arguments.passages, "engines": engines, "cores": os.cpu_count(), "python": platform.python_version()},
        arguments,
        "lexical",
    )


if __name__ == "__main__":
    run_benchmark(main)
