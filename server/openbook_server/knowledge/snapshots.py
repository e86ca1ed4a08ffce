"""Snapshots of the graph: written aside, checked, then named; never loaded unless their digest matches.

`index-<generation>-<sequence>.hnsw` holds the graph as of a sequence number of the store, `….json` beside it the size,
the digest and that number; it is written last, so a graph without it is a torn snapshot. A damaged graph can crash
hnswlib, so nothing is loaded before its sha256 matches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import hnswlib

from openbook_server.knowledge.vectors import VectorIndex

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A graph that was loaded, and up to where the store is in it."""

    graph: hnswlib.Index
    sequence: int


def save_snapshot(folder: Path, index: VectorIndex, *, generation: str, sequence: int) -> None:
    """Write the index's graph durably and remove older snapshots; a crash at any point leaves a loadable state.

    Raises:
        OSError: the disk is full or the folder cannot be written; the older snapshots are still there.
    """
    file = folder / f"index-{generation}-{sequence}.hnsw"
    aside = file.with_suffix(".new")
    try:
        labels = index.save_graph(aside)
        if aside.stat().st_size <= index.dim * 4 * len(labels):  # save_index does not report a full disk
            raise OSError(f"{aside} was written only in part; is the disk full?")
        header = {"generation": generation, "sequence": sequence, "dim": index.dim, "rows": len(labels)}
        header |= {"bytes": aside.stat().st_size, "sha256": _digest(aside)}
        _sync(aside)
        aside.replace(file)
        note = file.with_suffix(".json.new")
        note.write_text(json.dumps(header))
        _sync(note)
        note.replace(file.with_suffix(".json"))
        _sync(folder)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"the index snapshot could not be saved in {folder}: {error}") from error
    for old in folder.glob("index-*"):
        if old.name.split(".")[0] != file.stem:
            old.unlink(missing_ok=True)


def load_snapshot(folder: Path, *, generation: str, dim: int, sequence: int) -> Snapshot | None:
    """The newest snapshot of this generation that passes its check and is not ahead of the store, or None.

    Args:
        sequence: of the store; a snapshot past it belongs to another history (a restored backup, say).
    """
    notes = sorted(folder.glob(f"index-{generation}-*.json"), key=lambda note: note.stat().st_mtime, reverse=True)
    for note in notes:
        file = note.with_suffix(".hnsw")
        try:
            header = json.loads(note.read_text())
            problem = _problem(file, header, generation, dim, sequence)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"unreadable ({error})"
        if problem:
            log.warning("index snapshot %s is not used: %s", file.name, problem)
            continue
        graph = hnswlib.Index("ip", dim)
        graph.load_index(str(file), max_elements=2 * header["rows"] + 1_000)
        return Snapshot(graph, header["sequence"])
    return None


def _problem(file: Path, header: dict[str, object], generation: str, dim: int, sequence: int) -> str | None:
    if (header["generation"], header["dim"]) != (generation, dim):
        return "it belongs to another generation"
    if int(str(header["sequence"])) > sequence:
        return f"it is of sequence {header['sequence']}, the store is at {sequence}"
    if not file.is_file():
        return "the graph is missing"
    if file.stat().st_size != header["bytes"]:
        return f"{file.stat().st_size} bytes, expected {header['bytes']}"
    if _digest(file) != header["sha256"]:
        return "its sha256 does not match"
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
