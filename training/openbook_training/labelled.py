"""Texts with labels: reading them, drawing a few of each label, setting some aside to choose by."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from openbook_training.rows import NAMED, Row, build_rows, read_rows

SEPARATOR = " "  # between the passages of evidence, as the server reads them; a test holds the two together


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Where a row keeps what; a list of sentences counts as one text, and of evidence as its passages."""

    text: str
    label: str
    evidence: str = ""  # "" = texts are labelled by themselves


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """A text, what it is to be read beside, and its label."""

    place: str  # file and line: the example's name
    text: str
    label: str
    passages: tuple[str, ...] = ()  # of evidence

    @property
    def evidence(self) -> str:
        """The passages as one text, which is how they are read."""
        return SEPARATOR.join(self.passages)


def load_labelled(source: str, columns: Columns, known: Collection[str] = ()) -> tuple[list[Labelled], list[str]]:
    """Read labelled texts from a .csv or .jsonl file or a Hugging Face dataset (`NAME:SPLIT`).

    Args:
        known: the labels that are accepted; empty = all.

    Returns:
        The usable rows, and for every other one its place and what is wrong with it.

    Raises:
        InvalidData: the source as a whole cannot be read.
    """

    def build(row: Row) -> Labelled:
        text, label = _text(row.values.get(columns.text)), _label(row.values.get(columns.label))
        evidence = _passages(row.values.get(columns.evidence)) if columns.evidence else ()
        for column, value in ((columns.text, text), (columns.label, label), *(((columns.evidence, evidence),) if columns.evidence else ())):
            if not value:
                raise ValueError(_reason(column, row.values))
        if known and label not in known:
            some = ", ".join(list(known)[:NAMED]) + (", …" if len(known) > NAMED else "")
            raise ValueError(f"label {label!r} is none of the {len(known)} that the training data have: {some}")
        return Labelled(place=row.place, text=text, label=label, passages=evidence)

    return build_rows(read_rows(source), build)


def draw_shots(rows: Sequence[Labelled], shots: int, seed: int) -> list[Labelled]:
    """`shots` rows of every label, or all that there are, in the order of the file; all rows where `shots` is 0."""
    if not shots:
        return list(rows)
    chosen: set[int] = set()
    for label, numbers in _by_label(rows).items():
        chosen.update(random.Random(f"{seed}/{label}").sample(numbers, min(shots, len(numbers))))
    return [row for number, row in enumerate(rows) if number in chosen]


def hold_out_by_label(rows: Sequence[Labelled], count: int) -> tuple[list[Labelled], list[Labelled]]:
    """Split off `count` rows, of every label in proportion, the same ones on every machine; each label keeps at least one."""
    ranked: list[tuple[float, str, int]] = []
    for label, numbers in _by_label(rows).items():
        order = sorted(numbers, key=lambda number: hashlib.sha256(rows[number].text.encode()).digest())
        ranked += [((rank + 0.5) / len(order), label, number) for rank, number in enumerate(order[:-1])]
    held = {number for _, _, number in sorted(ranked)[:count]}
    return [row for number, row in enumerate(rows) if number not in held], [row for number, row in enumerate(rows) if number in held]


def _by_label(rows: Sequence[Labelled]) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        numbers.setdefault(row.label, []).append(number)
    return numbers


def _text(value: Any) -> str:
    return " ".join(_passages(value))


def _passages(value: Any) -> tuple[str, ...]:
    """A text, or the texts of a list, without blank ones."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        return ()
    return tuple(text.strip() for text in texts if text.strip())


def _label(value: Any) -> str:
    return str(value).strip() if isinstance(value, str | int) else ""


def _reason(column: str, values: dict[str, Any]) -> str:
    if column not in values:
        return f"no column {column!r}, only {', '.join(sorted(map(str, values))) or 'none'}"
    value = values[column]
    return f"{column!r} is empty" if value is None or value in ("", []) or str(value).isspace() else f"{column!r} is {value!r:.40}, no text"
