"""What subcommands share, above all those that talk to a server: arguments, exit statuses, files of texts and results, replies shown."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import reprlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from openbook.errors import ClientError, RequestRejected
from openbook.messages import FUSIONS, SearchOptions
from openbook.parts import TEXTS_A_MESSAGE
from openbook.results import Answer, Hit

FAILED, SOME_FAILED = 1, 3
TEXT_KEYS = ("text", "question", "claim")  # the first that a row has
_LONGEST_SECONDS = 7 * 24 * 3600
_AROUND = 160  # characters of a passage shown on each side of an answer


class InvalidFile(ClientError):
    """A file of texts cannot be read, or a file of results cannot be written."""


class Result(Protocol):
    """What became of one text."""

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row of a file of texts, or why it is none."""

    line: int
    id: str
    text: str
    problem: str = ""
    evidence: tuple[str, ...] = ()  # passages that came with it


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", metavar="HOST:PORT", help="default: $OPENBOOK_SERVER, or localhost:50051")
    parser.add_argument("--timeout", type=seconds, default=30.0, metavar="SECONDS", help="for each message, retries included (default: 30)")


def add_search_arguments(parser: argparse.ArgumentParser, what: str, modes: Iterable[str]) -> None:
    parser.add_argument("--top-k", type=int, metavar="N", help=f"passages {what} (default: 5; 1 to 100, or --max-top-k of the server)")
    parser.add_argument("--mode", choices=sorted(modes), help="how passages are found (default: hybrid); random draws them, a baseline")
    parser.add_argument("--fusion", choices=sorted(FUSIONS), help="how the hybrid mode makes one ranking of two (default: weighted)")
    add_filter_argument(parser)
    parser.add_argument("--min-score", type=float, metavar="SCORE", help="only passages that score as much or more")
    parser.add_argument("--diversity", type=float, metavar="0..1", help="how much a passage loses for being like a better one (default: 0)")
    parser.add_argument("--ef", type=int, metavar="N", help="candidates of the dense index, --top-k to 4,096; more: slower, more exact")
    add_invariance_argument(parser)


def add_invariance_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="the same text gives the same bytes whatever shares its batch; slower where the server's models do not (`openbook info`)",
    )


def add_filter_argument(parser: argparse.ArgumentParser) -> None:
    """`filter` becomes a list of the (key, value) pairs that must all hold."""
    parser.add_argument(
        "--filter",
        action="append",
        type=condition,
        default=[],
        metavar="KEY=VALUE",
        help="only documents whose metadata has this value; may be given several times, all must hold",
    )


def search_options(arguments: argparse.Namespace) -> SearchOptions:
    """What `add_search_arguments` took, as the client takes it."""
    return SearchOptions(
        top_k=arguments.top_k,
        mode=arguments.mode,
        fusion=arguments.fusion,
        ef=arguments.ef,
        filter=arguments.filter or None,
        min_score=arguments.min_score,
        diversity=arguments.diversity,
        batch_invariant=arguments.batch_invariant,
    )


def named(text: str) -> str:
    """What an argument of the command line names. An empty one, of a variable that is not set, would mean the folder that one is in, or
    nothing."""
    if not text:
        raise argparse.ArgumentTypeError("empty; is a variable of the shell not set?")
    return text


def folder(text: str) -> Path:
    """A folder that an argument of the command line names."""
    return Path(named(text))


def seconds(text: str) -> float:
    """A time of the command line."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0 and up to {_LONGEST_SECONDS:,}")
    return value


def condition(text: str) -> tuple[str, str]:
    """A KEY=VALUE of the command line."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no valid UTF-8") from error
    return key, value


def read_rows(name: str) -> Iterator[InputRow]:
    """Rows of a JSON-lines file, `-` for standard input: the first of `_id` and `id` that holds something, else the line's number; `text`,
    `question` or `claim`; and perhaps `evidence`, a text or a list of them. Bad rows say why.

    Raises:
        InvalidFile: the file cannot be read.
    """
    if name == "-" and sys.stdin is None:  # whatever was opened first has its descriptor
        raise InvalidFile("standard input is closed; redirect a file into it, or name one")
    try:
        with open(name, "rb") if name != "-" else os.fdopen(os.dup(0), "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _row(number, line)
    except OSError as error:
        raise InvalidFile(f"{name}: {error.strerror}") from error


def _row(number: int, line: bytes) -> InputRow:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return InputRow(number, str(number), "", f"not JSON ({error})")
    if not isinstance(row, dict):
        return InputRow(number, str(number), "", "no JSON object")
    key, given = next(((key, row[key]) for key in ("_id", "id") if row.get(key) not in (None, "")), ("", number))
    if isinstance(given, bool) or not (isinstance(given, str | int) or (isinstance(given, float) and math.isfinite(given))):
        return InputRow(number, str(number), "", f"`{key}` is {reprlib.repr(given)}; give a string or a number, or none")
    given = str(given).encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be written
    text = next((row[name] for name in TEXT_KEYS if name in row), None)
    if not isinstance(text, str):
        return InputRow(number, given, "", "none of `text`, `question` and `claim` is a string")
    evidence = row.get("evidence", [])
    evidence = [evidence] if isinstance(evidence, str) else evidence
    if not isinstance(evidence, list) or not all(isinstance(passage, str) for passage in evidence):
        return InputRow(number, given, "", "`evidence` is neither a string nor a list of strings")
    try:
        "".join([text, *evidence]).encode()
    except UnicodeEncodeError as error:
        return InputRow(number, given, "", f"text that is no valid Unicode ({error.reason})")
    return InputRow(number, given, text, evidence=tuple(evidence))


def work_through(
    command: str,
    file: str,
    out: str,
    ask: Callable[[list[InputRow]], Sequence[Result | RequestRejected]],
    *,
    counted: str,
    fields: tuple[str, ...],
) -> int:
    """Every row of a file in order, a message at a time; a bad row fails alone and is named.

    Args:
        command: the subcommand's name, for messages.
        out: gets a JSON object a row; - is standard output.
        ask: the results of some good rows.
        counted: of what this is, e.g. "questions answered".
        fields: of a request, that one row's text is in.

    Returns:
        The exit status.
    """
    asked = failed = 0
    began = shown = time.monotonic()
    rows = read_rows(file)
    with written_aside(out) as stream:
        while batch := list(itertools.islice(rows, TEXTS_A_MESSAGE)):
            for row, line in _lines(batch, ask, fields):
                asked += 1
                if "error" in line:
                    failed += 1
                    tell_failed(command, file, row, line["error"])
                stream.write(json_line(line, stream) + "\n")
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                print(f"{asked} {counted.partition(' ')[0]}, {asked / (shown - began):.1f} a second", file=sys.stderr)
    return sum_up(failed, asked, counted, began)


def tell_failed(command: str, file: str, row: InputRow, problem: str) -> None:
    print(f"openbook {command}: {file} line {row.line} (id {row.id}): {problem}", file=sys.stderr)


def sum_up(failed: int, of: int, counted: str, began: float) -> int:
    """Say what became of a file's rows; returns the exit status."""
    print(f"{of - failed} of {of} {counted} in {time.monotonic() - began:.1f} s", file=sys.stderr)
    return status(failed, of)


def status(failed: int, of: int) -> int:
    """The exit status of a command some of whose texts, documents or ids failed."""
    if failed == of:  # none at all, too: nothing was done
        return FAILED
    return SOME_FAILED if failed else 0


def _lines(
    batch: list[InputRow], ask: Callable[[list[InputRow]], Sequence[Result | RequestRejected]], fields: tuple[str, ...]
) -> list[tuple[InputRow, dict[str, Any]]]:
    good = [row for row in batch if not row.problem]
    results: Sequence[Result | RequestRejected]
    try:
        results = ask(good) if good else []
    except RequestRejected as error:
        if not error.field.startswith(fields):
            raise
        results = [error] * len(good)  # the only text of its message is bad
    answered = {row.line: result for row, result in zip(good, results, strict=True)}
    lines: list[tuple[InputRow, dict[str, Any]]] = []
    for row in batch:
        result = answered.get(row.line)
        if result is None or isinstance(result, RequestRejected):
            lines.append((row, {"id": row.id, "error": row.problem or str(result)}))
        else:
            lines.append((row, {"id": row.id, **result.to_json()}))
    return lines


@contextmanager
def written_aside(name: str, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that gets its name only when the block ends well; `-` is standard output, and what is no file (a pipe, a device) is
    written to as it is. What was written before the block failed stays beside it, under a name that is told.

    Args:
        mode: "w", or "wb" for bytes.

    Raises:
        InvalidFile: the file cannot be written.
    """
    if name == "-":
        yield sys.stdout if mode == "w" else sys.stdout.buffer
        return
    path = Path(name)
    replaced = path.is_file() or not path.exists()
    path = Path(os.path.realpath(path)) if replaced else path  # a link stays one: what it names is written
    aside = path.with_name(path.name + ".part") if replaced else path
    try:
        with aside.open(mode, encoding="utf-8" if mode == "w" else None) as stream:
            yield stream
        if replaced:
            aside.replace(path)
    except OSError as error:
        raise InvalidFile(f"{name}: {error.strerror}") from error
    finally:
        if replaced:
            with suppress(OSError):  # of the one that has its name by now
                if aside.stat().st_size:
                    print(f"what was done before is in {aside}", file=sys.stderr)
                else:
                    aside.unlink()


def json_line(value: object, stream: IO[str]) -> str:
    """A line for a stream; in JSON's own escapes where its encoding lacks a character, so that none is lost."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return line


def coloured() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def marked(hit: Hit, answer: Answer) -> str:
    """The passage around an answer, the answer marked: bold on a terminal, »…« elsewhere."""
    start, end = max(0, answer.start - _AROUND), min(len(hit.text), answer.end + _AROUND)
    before, after = hit.text[start : answer.start], hit.text[answer.end : end]
    left, right = ("\033[1;32m", "\033[0m") if coloured() else ("»", "«")
    text = ("…" if start else "") + before + left + answer.text + right + after + ("…" if end < len(hit.text) else "")
    return " ".join(text.split())


def spent(timings_ms: dict[str, float]) -> str:
    """Where the time went, in one line."""
    stages = "  ".join(f"{stage} {timings_ms[stage]:.1f}" for stage in ("tokenise", "embed", "search", "read", "rank"))
    return f"{timings_ms['total']:.1f} ms on the server: {stages} (of it waiting {timings_ms['queue']:.1f})"
