"""How a file's bytes become text: as its byte order mark says, or the zeros of UTF-16 where most letters are Latin, else in UTF-8; what
loses more than a few characters so is no text."""

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
_BEGINNING = 4_096  # bytes that tell how a file is encoded
_MANY, _FEW = 0.4, 0.05  # of every second byte, zeros: in UTF-16 of Latin letters one half has many, the other hardly any
_AS_BROWSERS_READ = {  # what pages declare so
    **dict.fromkeys(("iso-8859-1", "latin1", "us-ascii"), "windows-1252"),
    **dict.fromkeys(("gb2312", "gbk"), "gb18030"),
    **dict.fromkeys(("utf-16", "utf-16le", "utf-16be"), "utf-8"),  # who can read the declaration so far reads no UTF-16
}


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
        named = (declared(data) or "").lower()
    try:
        return data.decode(_AS_BROWSERS_READ.get(named, named) or "utf-8", "replace")
    except (LookupError, UnicodeError):  # no encoding that is known, or none of texts
        return data.decode(errors="replace")


def opened(path: Path, *, newline: str) -> TextIO:
    """A file to be read line by line, which end as `newline` says to `open`; each character that is lost is U+FFFD."""
    with path.open("rb") as stream:
        beginning = stream.read(_BEGINNING)
    return path.open(encoding=_marked(beginning) or "utf-8", errors="replace", newline=newline)


def loss(text: str) -> str | None:
    """What is wrong with a text of which too much was lost; None where it is not."""
    if (lost := text.count("\ufffd")) > _MOST_LOST * len(text):
        return f"{lost} of {len(text)} characters are not UTF-8; convert it, say: iconv -f WINDOWS-1252 -t UTF-8"
    return None


def _marked(data: bytes) -> str | None:
    """The encoding that a file's beginning leaves no doubt about, None where it is any other."""
    if marked := next((encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)), None):
        return marked
    pairs = len(data[:_BEGINNING]) // 2
    first, second = (data[at : 2 * pairs : 2].count(0) for at in (0, 1))
    for encoding, many, few in (("utf-16-le", second, first), ("utf-16-be", first, second)):
        if many > _MANY * pairs and few <= _FEW * pairs:
            return encoding
    return None
