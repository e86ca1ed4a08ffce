"""Conditions on the metadata of documents, and the SQL that finds what matches them."""

from __future__ import annotations

import json
import math
import re
import sqlite3
from dataclasses import dataclass

_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
# Metadata that the disk damaged match nothing; read as they are, they would fail every filter.
_VALUE = (
    "EXISTS (SELECT 1 FROM json_each(CASE WHEN json_valid(d.metadata) THEN d.metadata ELSE '{{}}' END) m WHERE m.key = ? AND {condition})"
)


@dataclass(frozen=True, slots=True)
class OneOf:
    """The value of `key` is one of `values`."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """The value of `key` is a decimal number within both bounds, inclusive."""

    key: str
    at_least: float = -math.inf
    at_most: float = math.inf


@dataclass(frozen=True, slots=True)
class All:
    """Every one of `filters` matches; true where there is none."""

    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Any:
    """At least one of `filters` matches; false where there is none."""

    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """`filter` does not match; a document without the key matches the negation of every condition on it."""

    filter: Filter


Filter = OneOf | Range | All | Any | Not


def add_functions(connection: sqlite3.Connection) -> None:
    """Give a connection what the conditions need."""
    connection.create_function("as_number", 1, as_number, deterministic=True)


def sql(condition: Filter) -> tuple[str, list[str | float]]:
    """A boolean expression over `documents d`, and its parameters."""
    match condition:
        case OneOf(key, values):
            return _VALUE.format(condition="m.value IN (SELECT value FROM json_each(?))"), [key, json.dumps(values)]
        case Range(key, at_least, at_most):
            return _VALUE.format(condition="as_number(m.value) BETWEEN ? AND ?"), [key, at_least, at_most]
        case All(filters):
            return _joined(filters, " AND ", "1")
        case Any(filters):
            return _joined(filters, " OR ", "0")
        case Not(inner):
            text, parameters = sql(inner)
            return f"NOT {text}", parameters


def _joined(filters: tuple[Filter, ...], word: str, empty: str) -> tuple[str, list[str | float]]:
    parts = [sql(part) for part in filters]
    return f"({word.join(text for text, _ in parts) or empty})", [value for _, values in parts for value in values]


def as_number(text: object) -> float | None:
    """What a range compares: decimal numbers; None for everything else."""
    return float(text) if isinstance(text, str) and _NUMBER.fullmatch(text) else None
