"""How a file's bytes become text: as its byte order mark says, else in UTF-8; what loses more than a few characters so is no text."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

_MOST_LOST = 0.01  # of a text's characters: beyond it hardly a sentence is whole
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before that of UTF-16, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_AS_BROWSERS_READ = dict.fromkeys(("iso-8859-1", "latin1", "us-ascii"), "windows-1252")  # what pages declare so


def decoded(data: bytes, declared: Callable[[bytes], str | None] = lambda data: None) -> str:
    """The text of a whole file; each character that is lost is U+FFFD.

    Args:
        declared: the encoding that its content names, if any; not asked where a byte order mark or valid UTF-8 leave no doubt.
    """
    if encoding := _marked(data):
        return data.decode(encoding, "replace")
    try:
        return data.decode()
    except UnicodeDecodeError:
        named = declared(data) or ""
    try:
        return data.decode(_AS_BROWSERS_READ.get(named, named) or "utf-8", "replace")
    except (LookupError, UnicodeError):  # no encoding that is known, or none of texts
        return data.decode(errors="replace")


def opened(path: Path, *, newline: str) -> TextIO:
    """A file to be read line by line, which end as `newline` says to `open`; each character that is lost is U+FFFD."""
    with path.open("rb") as stream:
        beginning = stream.read(4)
    return path.open(encoding=_marked(beginning) or "utf-8", errors="replace", newline=newline)


def loss(text: str) -> str | None:
    """What is wrong with a text of which too much was lost; None where it is not."""
    if (lost := text.count("\ufffd")) > _MOST_LOST * len(text):
        return f"{lost} of {len(text)} characters are not UTF-8; convert it, say: iconv -f WINDOWS-1252 -t UTF-8"
    return None


def _marked(data: bytes) -> str | None:
    return next((encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)), None)
