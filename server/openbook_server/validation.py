"""What a request must be before any stage sees it; everything behind this line may trust its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TypeVar

from openbook_server.config import ServerConfig
from openbook_server.errors import InvalidRequest, MessageTooLarge
from openbook_server.priority import computed
from openbook_server.rows import Row
from openbook_server.tokenization import TextEncoder

SPLIT = "split it, or set truncate"  # the way out where a longer text may be cut
_LONG_CHARACTERS = 128  # of a request: what is longer is not tokenised only to be refused
_AT_ONCE = 16_384  # characters that are tokenised at a time: some ten milliseconds

Model = TypeVar("Model")


@dataclass(frozen=True, slots=True)
class Validated:
    """The good texts of a request and the errors of the bad ones."""

    kept: list[int]  # positions in the request
    texts: list[str]
    rows: list[Row]  # tokenised, special tokens included
    errors: dict[int, InvalidRequest]  # by position


async def validate_texts(
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
        MessageTooLarge: too many texts.
        InvalidRequest: no texts, or the only one is bad.
    """
    if not texts:
        raise InvalidRequest(field, "no texts in the request; send at least one")
    if len(texts) > config.max_texts:
        raise MessageTooLarge(field, f"{len(texts)} texts exceed the limit of {config.max_texts} a request; send several requests")
    errors = dict(found)
    for at, text in enumerate(texts):
        if at in found:
            continue
        name = f"{field}[{at}]"
        if (field, at) in not_utf8:
            errors[at] = InvalidRequest(name, "not valid UTF-8; encode the text as UTF-8 before sending it")
        elif (error := text_error(name, text, config)) is not None:
            errors[at] = error
    kept = [at for at in range(len(texts)) if at not in errors]
    rows = dict(zip(kept, await _tokenised([texts[at] for at in kept], encoder), strict=True))
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


async def _tokenised(texts: Sequence[str], encoder: TextEncoder) -> list[Row]:
    """A row a text. Short requests are tokenised here and now, which costs least; long ones a part at a time in another thread, so that the
    others are served meanwhile and a caller who hangs up costs no more than the part under way."""
    if sum(map(len, texts)) <= _AT_ONCE:
        return encoder.texts(texts)
    rows: list[Row] = []
    part: list[str] = []
    for number, text in enumerate(texts, 1):
        part.append(text)
        if number == len(texts) or sum(map(len, part)) > _AT_ONCE:
            rows += await computed(partial(encoder.texts, part))
            part = []
    return rows


def text_error(name: str, text: str, config: ServerConfig) -> InvalidRequest | None:
    """What is wrong with a text, named so, before it is tokenised."""
    if not text.strip():
        return InvalidRequest(name, "empty; send some text")
    if len(text) > config.max_text_bytes or len(text.encode()) > config.max_text_bytes:
        return InvalidRequest(name, f"{len(text.encode())} bytes exceed the limit of {config.max_text_bytes}; shorten it")
    return None


def refused_first(texts: Sequence[str], config: ServerConfig) -> bool:
    """Whether the queue is asked before the texts are tokenised; too many of them are another error's."""
    return sum(map(len, texts)) > _LONG_CHARACTERS and len(texts) <= config.max_texts


def choose(field: str, name: str, models: Mapping[str, Model]) -> tuple[str, Model]:
    """The model that a request names, or the only one where it names none.

    Args:
        models: by name, at least one.

    Raises:
        InvalidRequest: there is none of that name, or there are several and none is named.
    """
    known = ", ".join(models)
    if not name and len(models) > 1:
        raise InvalidRequest(field, f"empty, and this bundle has several; name one of {known}")
    name = name or next(iter(models))
    if name not in models:
        raise InvalidRequest(field, f"this bundle has no {name!r}; name one of {known}")
    return name, models[name]


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
