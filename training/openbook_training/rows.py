"""Rows of a data file with the place each stands at, so that a bad one can be named and left out alone.

Covered, all in UTF-8: .csv with a header line, .jsonl (an object a line), .txt (a text a line); .parquet; and Hugging Face datasets
(`NAME:SPLIT`, or a folder).
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar, cast

from rich.console import Console

from openbook_training.errors import InvalidData

T = TypeVar("T")
NAMED = 10  # bad rows that are named one by one; the rest are counted
LONGEST = 1_000_000  # characters of a field of a .csv file; a quote that is never closed takes in the lines below up to it
_DATASET = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?:.+")  # NAME:SPLIT or OWNER/NAME:SPLIT; all else is meant as a path
_KINDS = ".csv, .jsonl, .txt and .parquet, and .json of SQuAD's shape where questions are wanted"
_SURROGATE = re.compile("[\ud800-\udfff]")
_HUB_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row: what its columns hold, or why it cannot be read."""

    place: str  # file and line, or lines, or dataset and row
    values: dict[str, Any] = field(default_factory=dict)
    problem: str = ""  # "" = readable


def read_rows(source: str) -> Iterator[Row]:
    """The rows of a file (.csv, .jsonl, .parquet, .txt: column "text") or of a Hugging Face dataset, in order; empty lines are none.

    Raises:
        InvalidData: the source is missing, or is not of its kind as a whole.
    """
    path = Path(source)
    readers = {".csv": _csv_rows, ".jsonl": _json_rows, ".txt": _text_rows}
    if path.suffix not in readers:
        yield from _stored_rows(source)
        return
    if not path.is_file():
        raise InvalidData(f"data file {source!r} does not exist")
    try:
        yield from readers[path.suffix](path)
    except (OSError, csv.Error) as error:
        raise InvalidData(f"{source}: cannot be read ({error})") from error


def build_rows(rows: Iterable[Row], build: Callable[[Row], T]) -> tuple[list[T], list[str]]:
    """What `build` makes of each row, and of every row that is unreadable, or that it refuses, the place and the reason.

    A row with half a character is unreadable, wherever it is from: no tokenizer takes it, and no file. `build` refuses by raising
    ValueError, or one of the kinds that a row of an unexpected shape raises by itself.
    """
    built: list[T] = []
    problems: list[str] = []
    for row in rows:
        problem = row.problem or _no_text(row.values)
        try:
            if not problem:
                built.append(build(row))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        if problem:
            problems.append(f"{row.place}: {problem}")
    return built, problems


def column_text(row: Row, column: str) -> str:
    """The text in a column, without the white space around it.

    Raises:
        ValueError: there is none.
    """
    text = row.values.get(column)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"no text in column {column!r}")
    return text.strip()


def report_left_out(console: Console, source: str, used: int, problems: Sequence[str]) -> None:
    """Say which rows were left out and why: the first ones each, the others as a number.

    Raises:
        InvalidData: no row is left.
    """
    if not used:
        raise InvalidData(f"{source}: no usable row in it" + (f"; {problems[0]}" if problems else ""))
    name_first(console, f"{source}: {len(problems)} of {used + len(problems)} rows left out", problems)


def name_first(console: Console, what: str, problems: Sequence[str]) -> None:
    """Say what is wrong with rows, where anything is: the first ones each, the others as a number."""
    if not problems:
        return
    console.print(f"{what}:", soft_wrap=True, markup=False)
    for problem in problems[:NAMED]:
        console.print(f"  {problem}", soft_wrap=True, markup=False)
    if len(problems) > NAMED:
        console.print(f"  and {len(problems) - NAMED} more", soft_wrap=True)


def dataset_rows(source: str) -> Iterable[dict[str, Any]]:
    """The rows of a Hugging Face dataset, `NAME:SPLIT`, of a .parquet file, or of a folder that its library reads or has saved (without
    a split, the train split).

    Raises:
        InvalidData: the source does not exist, the library is not installed, the hub does not answer, or it has no such dataset.
    """
    name, split = _name_and_split(source)
    path = Path(name)
    stored = bool(name) and path.exists()
    if path.is_file() and path.suffix != ".parquet":
        raise InvalidData(f"data file {source!r} is of no kind that is read here: {_KINDS}")
    if not stored and not _DATASET.fullmatch(source):
        raise InvalidData(f"data file {source!r} does not exist; a Hugging Face dataset is named NAME:SPLIT")
    try:
        import datasets  # noqa: F401
    except ModuleNotFoundError as error:
        way_out = "in a clone of openbook: pip install '.[datasets]'"
        raise InvalidData(f"{source!r} is read by the library of Hugging Face datasets; to install it, {way_out}") from error
    if not stored:
        _ask_hub(name)
    try:
        return _loaded(name, split)
    except Exception as error:  # the library raises a dozen kinds; all mean the same to the user
        cause: BaseException = error
        while cause.__cause__:  # what it raises says no more than that it failed
            cause = cause.__cause__
        raise InvalidData(f"{source!r}: neither a file of a known kind nor a readable Hugging Face dataset ({cause})") from error


def _name_and_split(source: str) -> tuple[str, str]:
    """What stands before the ":" and behind it; of a source that lies on the disk the longest path, for its name may hold one too."""
    ends = [len(source), *(at for at in reversed(range(len(source))) if source[at] == ":")]
    stored = (at for at in ends if source[:at] and Path(source[:at]).exists())
    at = next(stored, source.find(":"))
    return (source[:at], source[at + 1 :]) if at >= 0 else (source, "")


def _loaded(name: str, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    path = Path(name)
    rows: Any
    if path.is_file():
        rows = datasets.load_dataset("parquet", data_files=name, split=split or "train")
    elif (path / "dataset_dict.json").is_file():  # saved by the library, a folder a split
        rows = datasets.load_from_disk(str(path / (split or "train")))
    elif (path / "state.json").is_file():
        rows = datasets.load_from_disk(name)
        if split and split != str(rows.split):
            raise ValueError(f"it was saved as one part and has no split {split!r}; leave it out")
    else:
        rows = datasets.load_dataset(name, split=split or "train")
    return cast("Iterable[dict[str, Any]]", rows)


def _ask_hub(name: str) -> None:
    """Ask the hub once whether it is there: the library, which cannot be told to ask less often, tries for half a minute.

    Raises:
        InvalidData: it does not answer.
    """
    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are warnings, with a traceback's worth of words each
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_SECONDS)
    except huggingface_hub.errors.HfHubHTTPError:
        pass  # it has answered; what is wrong, loading tells
    except Exception as error:  # of which kind depends on the library's version
        raise InvalidData(
            f"{name!r} is no folder, and the Hugging Face hub does not answer ({type(error).__name__}); with HF_HUB_OFFLINE=1 a dataset "
            "that was loaded before is taken from its cache"
        ) from error


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LONGEST)
    # Bytes that are no UTF-8 come through as surrogates, so that one row in another encoding fails alone.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, strict=True)  # else a quote that is never closed takes in the rows behind it, and nobody is told
        header = next(filter(None, reader), [])
        if _half(header):
            raise csv.Error("its header is not UTF-8")
        while True:
            first = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:  # the next line begins anew
                problem = f"is not CSV ({error}); is a quote not closed, or in the middle of a value?"
                yield Row(place=_lines(path, first, reader.line_num), problem=problem)
                continue
            if cells is None:
                return
            if cells:
                extra = len(cells) - len(header)
                problem = f"{extra} fields more than the header names" if extra > 0 else ""
                values = dict(zip_longest(header, cells[: len(header)]))  # a row that ends early lacks its last ones
                yield Row(place=_lines(path, first, reader.line_num), values=values, problem=problem)


def _lines(path: Path, first: int, last: int) -> str:
    return f"{path}: line {first}" if first >= last else f"{path}: lines {first} to {last}"


def _no_text(values: Mapping[str, Any]) -> str:
    """Which of a row's values hold what is no text, and why; "" where none does."""
    for name, value in values.items():
        if found := _half([name, value]):
            foreign = "\udc80" <= found <= "\udcff"  # how a byte that is no UTF-8 comes through
            return f"{name!r} is not UTF-8" if foreign else f"{name!r} holds half a character ({ascii(found)[1:-1]}, a lone surrogate)"
    return ""


def _half(value: Any) -> str:
    """A lone surrogate in a value, or in what it is made of, however deep; "" where there is none."""
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, str) and (found := _SURROGATE.search(part)):
            return found[0]
        if isinstance(part, dict):
            parts += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            parts += part
    return ""


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:  # bytes, so that one line in another encoding fails alone
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}: line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Row(place=place, problem=f"is not JSON ({error})")
                continue
            yield Row(place=place, values=values) if isinstance(values, dict) else Row(place=place, problem="is no JSON object")


def _text_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Row(place=f"{path}: line {number}", values={"text": line.strip()})


def _stored_rows(source: str) -> Iterator[Row]:
    rows = dataset_rows(source)
    features = getattr(rows, "features", None) or {}
    names = {column: kind.names for column, kind in features.items() if hasattr(kind, "names")}  # classes, stored as numbers
    for number, row in enumerate(rows, 1):
        values = dict(row)
        for column, known in names.items():
            value = values.get(column)
            if isinstance(value, int):
                values[column] = known[value] if 0 <= value < len(known) else None  # -1 stands for "no label"
        yield Row(place=f"{source}: row {number}", values=values)
