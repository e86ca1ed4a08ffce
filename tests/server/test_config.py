"""Settings of a server: which values are refused, and that other commands with the same flag refuse them too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from openbook import cli
from openbook_server.config import RANGES, ServerConfig
from openbook_server.errors import InvalidRequest


@pytest.mark.parametrize("name", RANGES)
def test_a_value_outside_its_range_is_refused_by_the_name_of_its_flag(name: str) -> None:
    low, high = RANGES[name]
    flag = "--" + name.replace("_", "-")
    for value in (low - 1, high + 1, math.nan):
        settings: dict[str, Any] = {name: value}
        with pytest.raises(InvalidRequest, match=f"{flag}: {value} is outside {low} to {high}"):
            ServerConfig(**settings)
    for value in (low, high):
        settings = {name: value}
        assert getattr(ServerConfig(**settings), name) == value


def test_every_number_has_a_range() -> None:
    numbers = {name for name in ServerConfig.__slots__ if type(getattr(ServerConfig(), name)) in {int, float}}
    assert numbers - set(RANGES) == {"max_answers", "max_deadline_seconds"}  # which nobody can set


def test_an_empty_host_is_refused() -> None:
    for host in ("", "[]"):
        with pytest.raises(InvalidRequest, match="--host: empty"):
            ServerConfig(host=host)


@pytest.mark.parametrize(
    ("host", "address"),
    [("::1", "[::1]:7"), ("[::1]", "[::1]:7"), ("127.0.0.1", "127.0.0.1:7"), ("localhost", "localhost:7")],
)
def test_an_ipv6_host_may_be_given_as_it_stands_before_a_port(host: str, address: str) -> None:
    config = ServerConfig(host=host)
    assert config.host == host.strip("[]")
    assert config.address(7) == address


def test_index_refuses_the_threads_that_serve_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["index", str(tmp_path / "bundle"), str(tmp_path / "kb"), str(tmp_path), "--threads", "-4"]) == 1
    assert capsys.readouterr().err == "openbook index: --threads: -4 is outside 0 to 1024\n"
