"""elasticsearch://HOST:PORT/ALIAS, taken apart and checked."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from openbook_server.errors import InvalidRequest

SCHEMES = {"elasticsearch": "http", "elasticsearchs": "https"}
API_KEY = "OPENBOOK_ELASTICSEARCH_API_KEY"  # environment variable
PORT = 9_200
_FORM = "elasticsearch[s]://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/ALIAS[?shards=1&replicas=1&active_copies=1&timeout=30&ca=FILE]"
_ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]{0,149}")
_OWN = re.compile(r".*-(previous|kept|\d+-[0-9a-f]{12}(-.*)?)")  # names that generations of other aliases get, see `generations`


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a knowledge base is, and how it is to be made where there is none."""

    hosts: tuple[tuple[str, int], ...]  # one after the other is tried
    alias: str
    tls: bool = False
    user: str = ""
    password: str = field(default="", repr=False)
    api_key: str = field(default="", repr=False)
    ca: str = ""  # file with the certificates to trust; empty = the system's
    timeout: float = 30.0  # seconds, of one request
    shards: int | None = None  # of a new index: about one for each 20 million passages, or node; None = as the live one's, at first 1
    replicas: int | None = None  # copies of each shard of a new index, beside the first; 0 = a lost node takes its passages with it
    active_copies: int | None = None  # that must be there for a write to a new index; more = writes wait while a node is gone

    @property
    def name(self) -> str:
        """The address without user, password and options: fit for messages and logs."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"{'elasticsearchs' if self.tls else 'elasticsearch'}://{hosts}/{self.alias}"


def parse_address(target: str) -> Address:
    """Take an address apart; an API key comes from the environment.

    Raises:
        InvalidRequest: it is none; the message holds no password.
    """
    scheme, _, rest = target.partition(":")
    if scheme not in SCHEMES:
        raise _wrong(f"{scheme}:// is no scheme that is known here")
    if not rest.startswith("//"):  # what follows may hold a password
        raise _wrong(f"after {scheme}: two slashes are missing")
    location, _, query = rest.removeprefix("//").partition("?")
    authority, _, alias = location.partition("/")
    credentials, _, hosts = authority.rpartition("@")
    user, _, password = credentials.partition(":")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if "@" in alias or "@" in query:  # quoting anything from here on would quote a password
        raise _wrong("a password's / ? # @ and : must be written as %2F %3F %23 %40 and %3A")
    if not _ALIAS.fullmatch(alias):
        raise _wrong(f"{alias!r} is no name of an alias: lower-case letters, digits and ._- are allowed, at most 150")
    if _OWN.fullmatch(alias):
        raise _wrong(f"{alias!r} is a name that generations of another knowledge base get; choose another one")
    limits = {"shards": (1, 1_024), "replicas": (0, 16), "active_copies": (1, 17), "timeout": (1, 600)}
    unknown = sorted(options.keys() - limits.keys() - {"ca"})
    if unknown:
        raise _wrong(f"unknown option {unknown[0]!r}")
    numbers: dict[str, int] = {}
    for name, (low, high) in limits.items():
        given = options.get(name)
        if given is None:
            continue
        if not (given.isascii() and given.isdigit() and len(given) < 5 and low <= int(given) <= high):
            raise _wrong(f"{name}={given} is no number from {low} to {high}")
        numbers[name] = int(given)
    address = Address(
        hosts=tuple(_host(host) for host in hosts.split(",")),
        alias=alias,
        tls=SCHEMES[scheme] == "https",
        user=unquote(user),
        password=unquote(password),
        api_key=os.environ.get(API_KEY, ""),
        ca=options.get("ca", ""),
        timeout=float(numbers.pop("timeout", 30)),
        **numbers,
    )
    replicas = 1 if address.replicas is None else address.replicas
    if (address.active_copies or 1) > replicas + 1:
        raise _wrong(f"active_copies={address.active_copies} exceed the {replicas + 1} copies that replicas={replicas} gives")
    if address.ca and not os.path.isfile(address.ca):
        raise _wrong(f"ca={address.ca} is no file")
    if address.ca and not address.tls:
        raise _wrong(f"ca={address.ca} is for elasticsearchs://, as nothing is encrypted without")
    return address


def _host(text: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port or PORT
    except ValueError:
        host, port = None, PORT
    if not host:
        raise _wrong("a host is missing or its port is no number")
    return host, port


def _wrong(problem: str) -> InvalidRequest:
    return InvalidRequest("KB", f"{problem}; an address is {_FORM}")
