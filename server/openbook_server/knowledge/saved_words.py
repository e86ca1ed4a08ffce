"""The part of an index of words that is on the disk: tantivy's files, and a note with the digest of each.

Tantivy checks little of what it reads, and a damaged file can end the process; so nothing is opened before every digest
matches. The note is written last: files without a fitting one are torn, and built again from the store.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tantivy

from openbook_server.bundle import file_digest
from openbook_server.durable import publish
from openbook_server.knowledge.lexical import stems
from openbook_server.knowledge.snapshots import not_saved

log = logging.getLogger(__name__)

_NOTE, _ROWS = "openbook.json", "rows.npy"
_VERSION = 2  # of the schema below and of `stems`; an index of another one is built again
_HEAP_BYTES = 32 * 1024 * 1024  # of tantivy's writer
_SELECTED = 5_000  # rows that are named to tantivy one by one; more are picked from what it finds
_Query = tantivy.Query


def _schema() -> Any:
    builder = tantivy.SchemaBuilder().add_unsigned_field("row", indexed=True, fast=True)
    return builder.add_text_field("text", tokenizer_name="whitespace", index_option="freq").build()


@dataclass(frozen=True, slots=True)
class SavedWords:
    """An index as it was saved; it never changes, and can be searched while the next one is written."""

    index: Any
    searcher: Any
    rows: frozenset[int]
    stems: int  # of all rows together
    digests: Mapping[str, str] = field(repr=False)  # sha256 of each file

    def holding(self, stem: str) -> int:
        """Rows in which the stem stands."""
        return int(self.searcher.doc_freq("text", stem))

    def search(self, boosts: Mapping[str, float], limit: int, gone: set[int], allowed: frozenset[int] | None) -> dict[int, float]:
        """Row -> BM25, the part of each stem times its boost, of the best `limit` rows that are allowed (None = all) and not gone."""
        query = _Query.boolean_query(
            [
                (tantivy.Occur.Should, _Query.boost_query(_Query.term_query(self.index.schema, "text", stem), boost))
                for stem, boost in boosts.items()
            ]
        )
        if allowed is not None and len(allowed) <= _SELECTED:
            among = _Query.const_score_query(_Query.term_set_query(self.index.schema, "row", sorted(allowed)), 0.0)
            query = _Query.boolean_query([(tantivy.Occur.Must, query), (tantivy.Occur.Must, among)])
        depth = limit
        while True:
            hits = self.searcher.search(query, limit=depth, count=False).hits
            rows = self.searcher.fast_field_values("row", [address for _, address in hits])
            found = dict(zip(rows, (score for score, _ in hits), strict=True))
            kept = {row: score for row, score in found.items() if row not in gone and (allowed is None or row in allowed)}
            if len(kept) >= limit or len(hits) < depth:
                return kept
            depth *= 4


def load(folder: Path, last: int) -> SavedWords | None:
    """What is saved in `folder`; None, and nothing left there, where that is nothing, is damaged, or is ahead of the store.

    Args:
        last: number of the row that was stored last. One with a higher number was lost, say because a backup was restored, and
            another one will get its number.
    """
    if not folder.exists():
        return None
    try:
        note = json.loads((folder / _NOTE).read_text())
        problem = _problem(folder, note)
        if not problem:
            saved = _opened(folder, tantivy.Index.open(str(folder)), note["stems"], note["files"])
            highest = max(saved.rows, default=0)
            if highest <= last:
                return saved
            problem = f"it goes to passage {highest}, the store to {last}, perhaps from a backup"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"unreadable ({error})"
    log.warning("the index of words is built again: %s", problem)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _problem(folder: Path, note: Mapping[str, Any]) -> str | None:
    if note["version"] != _VERSION:
        return f"it is of version {note['version']}, this server writes {_VERSION}"
    if not {_ROWS, "meta.json"} <= note["files"].keys():
        return "its note names no rows"
    for name, sha256 in note["files"].items():
        file = folder / Path(name).name
        if not file.is_file() or file_digest(file) != sha256:
            return f"{name} is missing or damaged"
    return None


def _opened(folder: Path, index: Any, stems: int, digests: Mapping[str, str]) -> SavedWords:
    index.reload()
    rows = np.load(folder / _ROWS, allow_pickle=False)
    return SavedWords(index, index.searcher(), frozenset(rows.tolist()), stems, digests)


def save(folder: Path, base: SavedWords | None, texts: Iterable[tuple[int, str]]) -> SavedWords:
    """Add rows to what is saved in `folder`, or, without `base`, put an index of these rows alone in its place.

    Raises:
        KnowledgeBaseDamaged: the disk is full or the folder cannot be written. With `base`, what is on the disk may be torn then.
    """
    target = folder if base else folder.with_suffix(".new")
    try:
        if base is None:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            index = tantivy.Index(_schema(), path=str(target))
        else:
            index = base.index
        count = base.stems if base else 0
        rows = list(base.rows) if base else []
        writer = index.writer(_HEAP_BYTES, 1)
        for row, text in texts:
            found = stems(text)
            document = tantivy.Document()
            document.add_unsigned("row", row)
            document.add_text("text", " ".join(found))
            writer.add_document(document)
            rows.append(row)
            count += len(found)
        writer.commit()
        writer.wait_merging_threads()
        np.save(target / _ROWS, np.array(sorted(rows), np.int64))
        known = base.digests if base else {}
        digests = {file.name: _digest_of(file, known) for file in target.iterdir() if file.suffix != ".lock" and file.name != _NOTE}
        aside = target / (_NOTE + ".new")
        aside.write_text(json.dumps({"version": _VERSION, "stems": count, "files": digests}))
        publish(aside, target / _NOTE)
        if base is None:
            shutil.rmtree(folder, ignore_errors=True)
            target.rename(folder)
            index = tantivy.Index.open(str(folder))
        return _opened(folder, index, count, digests)
    except (OSError, ValueError) as error:  # tantivy raises either
        raise not_saved(folder, error) from error


def _digest_of(file: Path, known: Mapping[str, str]) -> str:
    """Tantivy's own files are named by a number of 32 digits that is never used twice, and do not change."""
    unchanging = len(file.stem) == 32
    return known[file.name] if unchanging and file.name in known else file_digest(file)
