"""Documents a row: csv, jsonl, parquet and whatever else has rows of named values."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date, time
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from openbook_server.ingest.items import Item, Unreadable, clean, readable_name, within_limits
from openbook_server.ingest.text_files import loss, opened
from openbook_server.knowledge import Document

log = logging.getLogger(__name__)

MAX_ROW_CHARACTERS = 16 * 1024 * 1024
_TOLD_SEPARATOR = re.compile(r"sep=(.)\r?\n?$")


def read_csv(path: Path, name: str) -> Iterator[Item]:
    """A document a row. Columns `id`, `title`, `text` mean just that, others are metadata; without `text`, all columns are."""
    csv.field_size_limit(MAX_ROW_CHARACTERS)
    with opened(path, newline="") as stream:
        header = stream.readline(MAX_ROW_CHARACTERS)
        if problem := loss(header):
            raise Unreadable(problem, "line 1")
        told = _TOLD_SEPARATOR.match(header)  # a spreadsheet's own first line
        # A spreadsheet's "Unicode text" has tabs, and its csv semicolons where a comma is the decimal point.
        separator = told[1] if told else max(",\t;", key=header.count)
        stream.seek(0)
        rows = csv.reader(stream, delimiter=separator, strict=True)  # else an open quote takes in the rows behind it
        try:
            columns = next(rows, [])
            columns = next(rows, []) if told else columns
        except csv.Error as error:
            raise Unreadable(str(error), "line 1") from error
        if repeated := [column for column, times in Counter(filter(None, columns)).items() if times > 1]:
            raise Unreadable(f"it names several columns {repeated[0]!r}; give each a name of its own", "line 1")
        while True:
            first = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:  # the next line begins anew
                yield Unreadable(f"{error}; is a quote not closed, or in the middle of a value?", _lines(first, rows.line_num))
                continue
            if row is None:
                return
            if row:
                yield _from_cells(columns, row, name, rows.line_num, path)


def _from_cells(columns: Sequence[str], row: Sequence[str], name: str, line: int, path: Path) -> Item:
    if problem := loss("".join(row)):
        return Unreadable(problem, f"line {line}")
    if any(cell.strip() for cell in row[len(columns) :]):
        problem = f"{len(row)} values for {len(columns)} columns; is a value that holds the separator not in quotes?"
        return Unreadable(problem, f"line {line}")
    row = [*row, *[""] * (len(columns) - len(row))]  # short ones end early
    for number, (column, cell) in enumerate(zip(columns, row, strict=False), 1):
        if cell.strip() and not column:
            _tell_nameless(str(path), number)
    return _from_row({column: cell for column, cell in zip(columns, row, strict=False) if column}, name, line, path)


def _lines(first: int, last: int) -> str:
    return f"line {last}" if first >= last else f"lines {first} to {last}"


def read_jsonl(path: Path, name: str) -> Iterator[Item]:
    """A document a line: `_id` or `id`, `title`, `text`, `metadata` as BEIR has them; other keys are metadata."""
    with opened(path, newline="\n") as stream:
        number = 0
        while line := stream.readline(MAX_ROW_CHARACTERS):
            number += 1
            if len(line) == MAX_ROW_CHARACTERS:
                while line and not line.endswith("\n"):
                    line = stream.readline(MAX_ROW_CHARACTERS)
                yield Unreadable(f"longer than {MAX_ROW_CHARACTERS} characters", f"line {number}")
                continue
            if not line.strip():
                continue
            if problem := loss(line):
                yield Unreadable(problem, f"line {number}")
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Unreadable(f"not JSON ({error})", f"line {number}")
                continue
            yield _from_row(row, name, number, path)


def read_parquet(path: Path, name: str) -> Iterator[Item]:
    """A document a row, columns as in csv."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if repeated := [column for column, times in Counter(file.schema_arrow.names).items() if times > 1]:
            raise Unreadable(f"it has several columns {repeated[0]!r}; give each a name of its own")
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for row in _rows(batch):
                number += 1
                yield Unreadable(row, f"row {number}") if isinstance(row, str) else _from_row(row, name, number, path)
    except (pyarrow.ArrowException, OSError) as error:
        raise Unreadable(f"damaged parquet file ({error})") from error


def _rows(batch: Any) -> list[dict[str, Any] | str]:
    """The rows of a batch; of one with a value that Python cannot hold (a text that is not UTF-8, the year 40000), the reason."""
    with suppress(Exception):  # of a dozen kinds, for one value: then which one it is
        return list(batch.to_pylist())
    return [_row(batch, at) for at in range(batch.num_rows)]


def _row(batch: Any, at: int) -> dict[str, Any] | str:
    try:
        row: dict[str, Any]
        [row] = batch.slice(at, 1).to_pylist()
    except Exception as error:
        return f"a value cannot be read ({type(error).__name__}: {error})"
    return row


def from_row(row: Mapping[str, Any], name: str, number: int, source: str) -> Item:
    """A document from named values: the first of `_id` and `id` that holds something, `title`, `text`.

    What else is text, number, truth or date is metadata. Without `text` all such values make the text, one a line after its name.
    """
    if not isinstance(row, dict):
        return Unreadable("not a table of named values", f"row {number}")
    given = next((row[key] for key in ("_id", "id") if not _is_nothing(row.get(key))), f"{name}:{number}")
    if not isinstance(given, str | int | float | Decimal | date):
        return Unreadable(f"its id is a {type(given).__name__}; give it a text or a number", f"row {number}")
    others = {key: value for key, value in row.items() if key not in {"_id", "id", "text"}}
    extra = dict(others.pop("metadata")) if isinstance(row.get("metadata"), dict) else {}
    if isinstance(row.get("text"), str):
        text = row["text"]
        extra |= {key: value for key, value in others.items() if key != "title"}
    elif "text" in row:
        return Unreadable("`text` is no string", f"row {number}")
    else:
        text = "\n".join(f"{key}: {value}" for key, value in _plain(others, source).items() if value.strip())
    if not text.strip():
        return Unreadable("no text in it", f"row {number}")
    title = _plain({"title": row.get("title")}, source).get("title", "")
    document = Document(
        id=readable_name(str(given)),
        text=clean(text),
        title=" ".join(clean(title).split()),
        source=readable_name(source),
        metadata={clean(key): clean(value) for key, value in _plain(extra, source).items()},
    )
    return within_limits(document, f"row {number}")


def _plain(values: Mapping[Any, Any], source: str) -> dict[str, str]:
    """Those that can be written as one text that filters compare; of the others that is told."""
    plain = {}
    for key, value in values.items():
        if key == "":
            _tell_keyless(source)
        elif isinstance(value, bool):
            plain[str(key)] = str(value).lower()  # as JSON writes it
        elif isinstance(value, str | int | float | Decimal):
            plain[str(key)] = str(value)
        elif isinstance(value, date | time):
            plain[str(key)] = value.isoformat()
        elif value is not None:
            _tell_left_out(source, str(key))
    return plain


@lru_cache(maxsize=1_024)  # once a column, not once a row
def _tell_left_out(source: str, column: str) -> None:
    log.warning("%s: %r is left out where it holds a list or a table; documents take texts, numbers and dates", source, column)


@lru_cache(maxsize=1_024)
def _tell_nameless(source: str, column: int) -> None:
    log.warning("%s: column %d has no name, and is left out", source, column)


@lru_cache(maxsize=1_024)
def _tell_keyless(source: str) -> None:
    log.warning("%s: values without a name are left out", source)


def _is_nothing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _from_row(row: Mapping[str, Any], name: str, number: int, path: Path) -> Item:
    return from_row(row, name, number, str(path))
