"""Sources as a user names them: files, folders, `hf:NAME`, `python-docs:`; documents and unreadable items out, in a fixed order."""

from __future__ import annotations

import importlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openbook_server.errors import SourceInvalid
from openbook_server.ingest.formats import READERS
from openbook_server.ingest.items import Item, Unreadable
from openbook_server.ingest.python_docs import python_docs
from openbook_server.ingest.tables import from_row

log = logging.getLogger(__name__)

PYTHON_DOCS = "python-docs:"
HUGGING_FACE = "hf:"
_CORPUS, _QUERIES = "corpus.jsonl", "queries.jsonl"  # of a data set in BEIR's layout


@dataclass(frozen=True, slots=True)
class Source:
    """One file, data set or collection, ready to be read."""

    name: str  # for messages and, where documents have no ids of their own, for their ids
    path: Path | None  # of a file
    bytes: int  # of the file, or of the collection's text; 0 where it is not known beforehand
    closed: str = ""  # why a folder or a file below a named folder cannot be looked into
    alone: str = ""  # its name where no other source of the run has the same, if one has


def find_sources(names: Sequence[str]) -> list[Source]:
    """Expand folders (recursively, sorted; hidden files left out) and check that every source exists.

    What may not be looked into below a folder is a source too, which reads as unreadable. What is named twice, as itself and in its
    folder or through a link, is one source, under the first name.

    Raises:
        SourceInvalid: one does not exist or cannot be looked at, has no name, is of no known format, or is an empty folder.
        ModuleNotFoundError: one needs a module that is not installed.
    """
    found: dict[str, Source] = {}
    for name in names:
        try:
            for source in _found(name):
                found.setdefault(os.path.realpath(source.path) if source.path else source.name, source)
        except OSError as error:
            raise SourceInvalid(f"source {name!r} cannot be read: {error.strerror or error}") from error
    for module in sorted({_module(source) for source in found.values()} - {""}):
        importlib.import_module(module)  # told before anything is made or sent
    # Files of one name in several folders are told apart by their whole path: one must not replace the other.
    times = Counter(source.name for source in found.values())
    return [
        replace(source, name=str(source.path), alone=source.name) if source.path and times[source.name] > 1 else source
        for source in found.values()
    ]


def _found(name: str) -> list[Source]:
    if not name:
        raise SourceInvalid(f"source {name!r} names nothing; for the folder that you are in give .")
    path = Path(name)
    if name == PYTHON_DOCS:
        return [Source(name, None, sum(len(document.text) for document in python_docs()))]
    if name.startswith(HUGGING_FACE):
        if not name.removeprefix(HUGGING_FACE).partition(":")[0]:
            raise SourceInvalid(f"source {name!r} needs a name, hf:NAME[:SPLIT]")
        return [Source(name, None, 0)]
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return [Source(HUGGING_FACE + name, None, 0)]
    if path.is_dir():
        return _below(path, name)
    if path.is_file() and path.suffix.lower() in READERS:
        return [Source(path.name, path, path.stat().st_size)]
    if path.exists():
        raise SourceInvalid(f"source {name!r} is of no known format ({_formats()})")
    raise SourceInvalid(f"source {name!r} does not exist; give files, folders, hf:NAME[:SPLIT] or {PYTHON_DOCS}")


def _module(source: Source) -> str:
    """Of the extra `datasets`, what reads a source; nothing for most."""
    if source.path is None:
        return "datasets" if source.name.startswith(HUGGING_FACE) else ""
    return "pyarrow" if source.path.suffix.lower() == ".parquet" and not source.closed else ""


def _below(folder: Path, name: str) -> list[Source]:
    visible, closed = _visible(folder)
    asked = [file for file in visible if file.name == _QUERIES and (file.parent / _CORPUS).is_file()]
    if asked:
        log.info("%s: %s beside %s holds questions, not documents (BEIR's layout), and is left out", name, _QUERIES, _CORPUS)
    files = [file for file in visible if file.suffix.lower() in READERS and file not in asked]
    others = sorted({file.suffix or file.name for file in visible if file.suffix.lower() not in READERS})
    if others:
        count = len(visible) - len(files) - len(asked)
        log.info("%s: %d files of other formats are left out (%s)", name, count, " ".join(others[:10]))
    if not files and not closed:
        raise SourceInvalid(f"source {name!r}: no file in it of a known format ({_formats()})")
    return [
        Source(str(at.relative_to(folder)), at, 0 if at in closed else at.stat().st_size, closed.get(at, ""))
        for at in sorted([*files, *closed])
    ]


def _visible(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """The files below a folder, and why what is neither file nor folder, or cannot be looked into, is left out; nothing that is hidden.

    Links to folders are not followed, for they may lead in circles.

    Raises:
        OSError: nor can the folder itself be looked into.
    """
    files: list[Path] = []
    closed: dict[Path, str] = {}

    def note(error: OSError) -> None:
        at = Path(error.filename or folder)
        if at == folder:
            raise error
        closed[at] = error.strerror or str(error)

    for root, folders, names in os.walk(folder, onerror=note):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (Path(root, name) for name in folders if Path(root, name).is_symlink()):
            if not link.resolve().is_relative_to(folder.resolve()):  # else what it leads to is read without it
                closed[link] = "a link to a folder, which is not followed; name that folder as a source"
        for file in (Path(root, name) for name in names if not name.startswith(".")):
            try:
                if file.is_file():
                    files.append(file)
                elif file.suffix.lower() in READERS:
                    closed[file] = "it leads nowhere" if file.is_symlink() and not file.exists() else "it is no regular file"
            except OSError as error:  # its folder can be listed and not entered, or a link leads in a circle
                note(error)
    return files, closed


def read_source(source: Source) -> Iterator[Item]:
    """The documents of one source; what cannot be read comes out as `Unreadable`, whole files included."""
    try:
        if source.closed:
            yield Unreadable(source.closed)
        elif source.name == PYTHON_DOCS:
            yield from python_docs()
        elif source.path is None:
            yield from _hugging_face(source.name.removeprefix(HUGGING_FACE))
        else:
            yield from READERS[source.path.suffix.lower()](source.path, source.name)
    except Unreadable as problem:
        yield problem
    except OSError as error:
        yield Unreadable(error.strerror or str(error))
    except SourceInvalid:
        raise
    except Exception as error:  # libraries raise all kinds on what they do not expect: the other sources are good
        yield Unreadable(f"cannot be read, or no further ({type(error).__name__}: {error})")


def displaced(id_: str, before: str) -> str:
    """What is to be told where a document takes the place of one from the source `before`; nothing where the source gave it its id."""
    path, _, row = id_.rpartition(":")
    if not before.endswith(path if path and row.isdigit() else id_):
        return ""
    return f"{id_} takes the place of {before}: files of one name are one document. Where both shall stay, name both in one command"


def _hugging_face(name: str) -> Iterator[Item]:
    import datasets

    datasets.disable_progress_bars()
    path, _, split = name.partition(":")
    try:
        data: Any = (
            datasets.load_from_disk(path) if Path(path).is_dir() else datasets.load_dataset(path, split=split or None, streaming=True)
        )
    except Exception as error:  # the library raises a dozen kinds, all of which mean the same to the user
        raise SourceInvalid(f"source 'hf:{name}' cannot be loaded: {type(error).__name__}: {error}") from error
    parts = data.items() if isinstance(data, dict) else [(split or "rows", data)]
    for part, rows in parts:
        if split and part != split:
            continue
        for number, row in enumerate(rows, 1):
            yield from_row(row, f"{path}:{part}", number, f"hf:{path}:{part}")


def _formats() -> str:
    return " ".join(sorted(suffix.removeprefix(".") for suffix in READERS))
