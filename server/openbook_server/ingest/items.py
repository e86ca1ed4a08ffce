"""What a source gives, one after the other: documents, and what cannot become one with the reason.

A reader raises `Unreadable` for a file it cannot read, and yields `Unreadable` for a row it cannot use; both are counted
and named by the caller, and the rest goes on.
"""

from __future__ import annotations

from openbook_server.ingest.limits import excess
from openbook_server.knowledge import Document


class Unreadable(Exception):
    """A file or a row that cannot become a document; `where` is a line or row, or empty for the whole file."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(reason)
        self.reason, self.where = reason, where


Item = Document | Unreadable


def within_limits(document: Document, where: str = "") -> Item:
    problem = excess(document)
    return Unreadable(": ".join(problem), where) if problem else document


def clean(text: str) -> str:
    """Without the characters that neither UTF-8 nor SQLite's own tools can carry."""
    return text.encode("utf-8", "replace").decode().replace("\0", " ")


def readable_name(name: str) -> str:
    """As `clean`, but names that differ stay different: a file's need not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
