"""docs/reference.md names what programs rely on: every reason of an error, every metric, every method of the clients."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from openbook import errors as client_errors
from openbook.client import AsyncClient, Client
from openbook_server import errors

ROOT = Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def kinds(of: type[Exception]) -> set[type[Exception]]:
    found = {of, *(kind for child in of.__subclasses__() for kind in kinds(child))}
    return {kind for kind in found if kind.__module__ == of.__module__}


@pytest.mark.parametrize("kind", sorted(kinds(errors.OpenBookError), key=lambda kind: kind.__name__))
def test_every_reason_stands_in_it_with_its_status(kind: type[errors.OpenBookError]) -> None:
    lines = [line for line in REFERENCE.splitlines() if f"`{kind.reason}`" in line]
    assert lines
    assert all(f"`{kind.status.name}`" in line for line in lines if line.startswith("|"))


def test_every_metric_stands_in_it() -> None:
    source = (ROOT / "server" / "openbook_server" / "metrics.py").read_text()
    names = set(re.findall(r'"(openbook_\w+)"', source))
    assert len(names) > 15
    assert {name for name in names if f"`{name}`" not in REFERENCE} == set()


def test_every_method_and_error_of_the_clients_stands_in_it() -> None:
    for client in (Client, AsyncClient):
        methods = {name for name, _ in inspect.getmembers(client) if not name.startswith("_")} - {"close"}
        assert {name for name in methods if f"`{name}`" not in REFERENCE} == set()
    assert {kind.__name__ for kind in kinds(client_errors.ClientError) if f"`{kind.__name__}`" not in REFERENCE} == set()
