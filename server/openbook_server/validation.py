"""What a request must be before any stage sees it; everything behind this line may trust its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from openbook_server.config import ServerConfig
from openbook_server.errors import InvalidRequest
from openbook_server.rows import Row
from openbook_server.tokenization import TextEncoder

SPLIT = "split it, or set truncate"  # the way out where a longer text may be cut
LONG_CHARACTERS = 128  # of a request: what is longer is not tokenised only to be refused


@dataclass(frozen=True, slots=True)
class Validated:
    """The good texts of a request and the errors of the bad ones."""

    kept: list[int]  # positions in the request
    texts: list[str]
    rows: list[Row]  # tokenised, special tokens included
    errors: dict[int, InvalidRequest]  # by position


def validate_texts(
    field: str,
    texts: Sequence[str],
    not_utf8: frozenset[tuple[str, int]],
    *,
    config: ServerConfig,
    encoder: TextEncoder,
    max_tokens: int,
    truncate: bool = False,
    way_out: str = "shorten it",
    found: Mapping[int, InvalidRequest] = MappingProxyType({}),
) -> Validated:
    """Sort a request's texts into good ones, tokenised, and bad ones, each with its error.

    Args:
        field: name in the request, for messages.
        not_utf8: what `wire` found undecodable.
        max_tokens: of a row, special tokens included.
        truncate: cut longer rows instead of refusing them.
        way_out: what to do about a longer row.
        found: what is wrong with what belongs to a text, by position.

    Raises:
        InvalidRequest: no texts, too many of them, or the only one is bad.
    """
    if not texts:
        raise InvalidRequest(field, "no texts in the request; send at least one")
    if len(texts) > config.max_texts:
        raise InvalidRequest(field, f"{len(texts)} texts exceed the limit of {config.max_texts} a request; send several requests")
    errors = dict(found)
    for at, text in enumerate(texts):
        if at in found:
            continue
        name = f"{field}[{at}]"
        if (field, at) in not_utf8:
            errors[at] = InvalidRequest(name, "not valid UTF-8; encode the text as UTF-8 before sending it")
        elif not text.strip():
            errors[at] = InvalidRequest(name, "empty; send some text")
        elif len(text) > config.max_text_bytes or len(text.encode()) > config.max_text_bytes:
            errors[at] = InvalidRequest(name, f"{len(text.encode())} bytes exceed the limit of {config.max_text_bytes}; shorten it")
    kept = [at for at in range(len(texts)) if at not in errors]
    rows = dict(zip(kept, encoder.texts([texts[at] for at in kept]), strict=True))
    for at in list(rows):
        tokens = len(rows[at].ids)
        if tokens <= encoder.special_tokens:
            errors[at] = InvalidRequest(f"{field}[{at}]", "holds no word the model knows (only spaces or control characters)")
        elif tokens > max_tokens and truncate:
            rows[at] = encoder.cut(rows[at], max_tokens)
        elif tokens > max_tokens:
            room = max_tokens - encoder.special_tokens
            errors[at] = InvalidRequest(f"{field}[{at}]", f"{tokens - encoder.special_tokens} tokens exceed the limit of {room}; {way_out}")
    if errors and len(texts) == 1:
        raise errors[0]
    kept = [at for at in kept if at not in errors]
    return Validated(kept, [texts[at] for at in kept], [rows[at] for at in kept], dict(sorted(errors.items())))


def bounded(field: str, value: int | None, default: int, low: int, high: int) -> int:
    """An optional whole number of a request.

    Raises:
        InvalidRequest: it lies outside [low, high].
    """
    if value is None:
        return min(default, high)
    if not low <= value <= high:
        raise InvalidRequest(field, f"{value} is outside {low} to {high}")
    return value
