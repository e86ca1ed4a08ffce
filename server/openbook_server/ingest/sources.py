"""Sources as a user names them: files, folders, `hf:NAME`, `python-docs:`; documents and unreadable items out, in a fixed order."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openbook_server.errors import SourceInvalid
from openbook_server.ingest.formats import READERS, Item, Unreadable, from_row
from openbook_server.ingest.python_docs import python_docs

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


def find_sources(names: Sequence[str]) -> list[Source]:
    """Expand folders (recursively, sorted; hidden files left out) and check that every source exists.

    Raises:
        SourceInvalid: one does not exist, has no name, is of no known format, or is an empty folder.
    """
    sources: list[Source] = []
    for name in names:
        path = Path(name)
        if name == PYTHON_DOCS:
            sources.append(Source(name, None, sum(len(document.text) for document in python_docs())))
        elif name.startswith(HUGGING_FACE):
            if not name.removeprefix(HUGGING_FACE).partition(":")[0]:
                raise SourceInvalid(f"source {name!r} needs a name, hf:NAME[:SPLIT]")
            sources.append(Source(name, None, 0))
        elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            sources.append(Source(HUGGING_FACE + name, None, 0))
        elif path.is_dir():
            visible = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file, path)]
            asked = [file for file in visible if file.name == _QUERIES and (file.parent / _CORPUS).is_file()]
            if asked:
                log.info("%s: %s beside %s holds questions, not documents (BEIR's layout), and is left out", name, _QUERIES, _CORPUS)
            files = [file for file in visible if file.suffix.lower() in READERS and file not in asked]
            others = sorted({file.suffix or file.name for file in visible if file.suffix.lower() not in READERS})
            if others:
                count = len(visible) - len(files) - len(asked)
                log.info("%s: %d files of other formats are left out (%s)", name, count, " ".join(others[:10]))
            if not files:
                raise SourceInvalid(f"source {name!r}: no file in it of a known format ({_formats()})")
            sources += [Source(str(file.relative_to(path)), file, file.stat().st_size) for file in files]
        elif path.is_file() and path.suffix.lower() in READERS:
            sources.append(Source(path.name, path, path.stat().st_size))
        elif path.exists():
            raise SourceInvalid(f"source {name!r} is of no known format ({_formats()})")
        else:
            raise SourceInvalid(f"source {name!r} does not exist; give files, folders, hf:NAME[:SPLIT] or {PYTHON_DOCS}")
    # Files of one name in several folders are told apart by their whole path: one must not replace the other.
    times = Counter(source.name for source in sources)
    return [replace(source, name=str(source.path)) if source.path and times[source.name] > 1 else source for source in sources]


def read_source(source: Source) -> Iterator[Item]:
    """The documents of one source; what cannot be read comes out as `Unreadable`, whole files included."""
    try:
        if source.name == PYTHON_DOCS:
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


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _formats() -> str:
    return " ".join(sorted(suffix.removeprefix(".") for suffix in READERS))
