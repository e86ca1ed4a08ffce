"""The tables of a bundle's manifest, read with every mistake named: the key, what it is, what was expected, and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from openbook_server.errors import BundleInvalid

MANIFEST = "manifest.json"
AGAIN = "write it again with `openbook export`"
_MOST = 2**20  # of tokens, dimensions, spans, passages: more than any model has, and few enough to make room for
HEAVIEST = 1_000_000  # weights of scores are smaller, either way
_T = TypeVar("_T")


def invalid(folder: Path, problem: str, way_out: str = AGAIN) -> BundleInvalid:
    """The error to raise of the bundle in `folder`."""
    return BundleInvalid(f"bundle {folder}: {problem}; {way_out}")


def unreadable(file: Path, error: OSError) -> BundleInvalid:
    """The error to raise of a file of a bundle that the system does not let us read."""
    way_out = "give this user the right to read it" if isinstance(error, PermissionError) else AGAIN
    return invalid(file.parent, f"{file.name} cannot be read: {error.strerror or error}", way_out)


def get(table: Mapping[str, Any], key: str, kind: type[_T], folder: Path) -> _T:
    """The value of a key.

    Raises:
        BundleInvalid: it is missing, or of another type.
    """
    value = table.get(key)
    if type(value) is not kind:  # exactly: True is no number here
        found = type(value).__name__ if key in table else "missing"
        raise invalid(folder, f'{MANIFEST} key "{key}" is {found}, expected {kind.__name__}')
    return value


def positive(table: Mapping[str, Any], key: str, folder: Path) -> int:
    """As `get`, of a number from 1 up."""
    return _whole(table, key, folder, 1)


def natural(table: Mapping[str, Any], key: str, folder: Path) -> int:
    """As `get`, of a number from 0 up."""
    return _whole(table, key, folder, 0)


def _whole(table: Mapping[str, Any], key: str, folder: Path, least: int) -> int:
    value = get(table, key, int, folder)
    if value < least:
        raise invalid(folder, f'{MANIFEST} key "{key}" is {value}, expected {least} or more')
    if value > _MOST:
        raise invalid(folder, f'{MANIFEST} key "{key}" is {value:.6g}, expected at most {_MOST}')
    return value


def weight(table: Mapping[str, Any], key: str, folder: Path) -> float:
    """As `get`, of a number that scores can be weighted by."""
    value = get(table, key, float, folder)
    if not abs(value) < HEAVIEST:
        raise invalid(folder, f'{MANIFEST} key "{key}" is {value:.6g}, expected less than {HEAVIEST} either way')
    return value


def graphs_of(table: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The "graphs" of a model: precision -> file name, fp32 among them.

    Raises:
        BundleInvalid: as `get`, or there is no fp32 graph.
    """
    graphs: dict[str, Any] = get(table, "graphs", dict, folder)
    if "fp32" not in graphs:
        raise invalid(folder, f'{MANIFEST} key "graphs" has no fp32 graph')
    return {precision: get(graphs, precision, str, folder) for precision in graphs}
