"""docs/reference.md names what programs rely on: every reason of an error, every metric, every method of the clients."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from openbook import cli
from openbook import errors as client_errors
from openbook.client import AsyncClient, Client
from openbook_server import errors
from openbook_server.classify_service import MAX_LABELS
from openbook_server.config import ServerConfig
from openbook_server.generate_service import MAX_STOP_BYTES, MAX_STOPS, MAX_TEMPERATURE
from openbook_server.ingest.formats import READERS
from openbook_server.options import MAX_EF

ROOT = Path(__file__).parents[1]
LIMITS = ServerConfig()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def kinds(of: type[Exception]) -> set[type[Exception]]:
    found = {of, *(kind for child in of.__subclasses__() for kind in kinds(child))}
    return {kind for kind in found if kind.__module__ == of.__module__}


@pytest.mark.parametrize("kind", sorted(kinds(errors.OpenBookError), key=lambda kind: kind.__name__))
def test_every_reason_stands_in_it_with_its_status(kind: type[errors.OpenBookError]) -> None:
    lines = [line for line in REFERENCE.splitlines() if f"`{kind.reason}`" in line]
    assert lines
    assert all(f"`{kind.status.name}`" in line for line in lines if line.startswith("|"))


def test_every_format_of_sources_stands_in_the_documentation() -> None:
    documented = (ROOT / "docs" / "knowledge-base.md").read_text()
    assert {suffix for suffix in READERS if f"`{suffix}`" not in documented} == set()
    [listed] = re.findall(r"openbook index bundle kb my-documents/ +# (.*), folders", (ROOT / "README.md").read_text())
    assert {f".{name}" for name in listed.split()} == READERS.keys() - {".text", ".markdown", ".htm"}


@pytest.mark.parametrize(
    ("name", "ranges"),
    [
        ("ask", [f"1 to {LIMITS.max_top_k},", f"to {MAX_EF:,};", f"1 to {LIMITS.max_answers} "]),
        ("search", [f"1 to {LIMITS.max_top_k},", f"to {MAX_EF:,};"]),
        ("generate", [f"0 to {MAX_TEMPERATURE:g};", f"up to {MAX_STOPS} times, of {MAX_STOP_BYTES:,} bytes"]),
        ("classify", [f"1 to {MAX_LABELS:,} "]),
    ],
)
def test_manuals_give_the_server_s_limits(capsys: pytest.CaptureFixture[str], name: str, ranges: list[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    manual = " ".join(capsys.readouterr().out.split())
    assert [range_ for range_ in ranges if range_ not in manual] == []


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
