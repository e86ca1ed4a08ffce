"""One reader a file format: a path in, documents out, streamed where the format allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from openbook_server.ingest.items import Item, Unreadable, clean, readable_name, within_limits
from openbook_server.ingest.limits import MAX_TITLE_BYTES
from openbook_server.ingest.markup import first_heading, visible_text
from openbook_server.ingest.tables import read_csv, read_jsonl, read_parquet
from openbook_server.ingest.text_files import decoded, loss
from openbook_server.knowledge import Document

MAX_WHOLE_FILE_BYTES = 256 * 1024 * 1024  # of formats that must be read whole

Reader = Callable[[Path, str], Iterator[Item]]


def read_text(path: Path, name: str) -> Iterator[Item]:
    text = _whole(path)
    yield _document(name, text, title="", source=path)


def read_markdown(path: Path, name: str) -> Iterator[Item]:
    """The text as it stands; its first heading is the title."""
    text = _whole(path)
    yield _document(name, text, title=first_heading(text), source=path)


def read_html(path: Path, name: str) -> Iterator[Item]:
    """Visible text, a block a paragraph; scripts and styles are left out, see `visible_text`."""
    from bs4 import BeautifulSoup
    from bs4.dammit import EncodingDetector
    from bs4.exceptions import ParserRejectedMarkup

    def declared(page: bytes) -> str | None:
        return EncodingDetector.find_declared_encoding(page, is_html=True)

    try:
        soup = BeautifulSoup(_whole(path, declared), "html.parser")
    except ParserRejectedMarkup as error:
        reason, _, _ = str(error).partition("\n")
        raise Unreadable(f"damaged html ({reason})") from error
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    yield _document(name, visible_text(soup), title=title, source=path)


def read_pdf(path: Path, name: str) -> Iterator[Item]:
    """The text of all pages; a file whose pages hold none (a scan) is unreadable."""
    import logging

    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every oddity of a file that it can read
    _check_size(path)
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("encrypted with a password")
        title = str(reader.metadata.title or "") if reader.metadata else ""
        text = "\n\n".join(page.extract_text() for page in reader.pages)
    except Unreadable:
        raise
    except DependencyError as error:
        raise Unreadable("encrypted with AES; to have it read: pip install cryptography") from error
    except Exception as error:  # pypdf raises all kinds on damaged files
        raise Unreadable(f"damaged pdf ({type(error).__name__}: {error})") from error
    yield _document(name, text, title=title, source=path)


READERS: Mapping[str, Reader] = {
    ".txt": read_text,
    ".text": read_text,
    ".rst": read_text,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def _document(name: str, text: str, *, title: str, source: Path) -> Item:
    if not text.strip():
        raise Unreadable("no text in it")
    title = " ".join(clean(title).split()).encode()[:MAX_TITLE_BYTES].decode(errors="ignore")  # a file is not refused for a long one
    return within_limits(Document(id=readable_name(name), text=clean(text), title=title, source=readable_name(str(source))))


def _whole(path: Path, declared: Callable[[bytes], str | None] = lambda data: None) -> str:
    """The text of a file, each line ended by a line feed; `declared`: see `decoded`."""
    _check_size(path)
    text = decoded(path.read_bytes(), declared)
    if problem := loss(text):
        raise Unreadable(problem)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > MAX_WHOLE_FILE_BYTES:
        raise Unreadable(f"{size} bytes exceed the limit of {MAX_WHOLE_FILE_BYTES}; split it, or turn it into jsonl, which is streamed")
