"""Snapshots of the graph: written aside, checked, then named; never loaded unless their digest matches.

`index-<generation>-<sequence>.hnsw` holds the graph as of a sequence number of the store, `….npy` beside it the projection
of its vectors, where they have one, and `….json` sizes, digests and that number; it is written last, so a graph without it
is a torn snapshot. A damaged graph can crash hnswlib, so nothing is loaded before its sha256 matches.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openbook_server.bundle import file_digest
from openbook_server.durable import publish
from openbook_server.errors import KnowledgeBaseDamaged
from openbook_server.knowledge.graph import Graph
from openbook_server.knowledge.projection import Projection
from openbook_server.knowledge.vectors import VectorIndex

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A graph that was loaded, and up to where the store is in it."""

    graph: Graph
    sequence: int


def save_snapshot(folder: Path, index: VectorIndex, *, generation: str, sequence: int, others: Sequence[str] = ()) -> None:
    """Write the index's graph durably and remove older snapshots; a crash at any point leaves a loadable state.

    Args:
        others: generations whose snapshots stay; all that remain are older ones, or of none that there is.

    Raises:
        KnowledgeBaseDamaged: the disk is full or the folder cannot be written; the older snapshots are still there.
    """
    file = folder / f"index-{generation}-{sequence}.hnsw"
    aside = file.with_suffix(".new")
    try:
        graph = index.save_graph(aside)
        header = {"generation": generation, "sequence": sequence, "dim": index.dim, "rows": len(graph.live)}
        header |= {"bytes": aside.stat().st_size, "sha256": file_digest(aside)}
        publish(aside, file)
        if graph.projection is not None:
            with aside.open("wb") as stream:
                np.save(stream, graph.projection.matrix)
            header["projection"] = {"sha256": file_digest(aside), "lost": graph.projection.lost}
            publish(aside, file.with_suffix(".npy"))
        aside.write_text(json.dumps(header))
        publish(aside, file.with_suffix(".json"))
    except (OSError, RuntimeError) as error:
        with suppress(OSError):  # a disk that takes no writes may take no removal
            aside.unlink(missing_ok=True)
        raise not_saved(file, error) from error
    for old in folder.glob("index-*"):
        if old.name.split(".")[0] != file.stem and snapshot_generation(old) not in others:
            old.unlink(missing_ok=True)


def not_saved(file: Path, error: Exception) -> KnowledgeBaseDamaged:
    """What is derived could not be written to `file`."""
    return KnowledgeBaseDamaged(
        f"{file} could not be saved: {error}; nothing that is stored is lost, but the next start takes longer; check that the disk has "
        f"room and that the folder can be written, then save again"
    )


def snapshot_generation(file: Path) -> str:
    """Which generation a file of a snapshot is of."""
    return file.name.split(".")[0].removeprefix("index-").rpartition("-")[0]


def remove_lost(folder: Path, sequence: int) -> None:
    """Remove snapshots, of whichever generation, of states that the store never was in or lost, say because a backup was restored.

    Once the store is as far as they are, nothing would tell that they hold other passages under the same numbers.

    Args:
        sequence: of the store; nobody may be writing.
    """
    for file in folder.glob("index-*"):
        if _sequence(file) > sequence:
            log.warning("index snapshot %s is removed: the store is at %d, perhaps from a backup", file.name, sequence)
            file.unlink(missing_ok=True)


def load_snapshot(folder: Path, *, generation: str, dim: int) -> Snapshot | None:
    """The newest snapshot of this generation that passes its check, or None."""
    for note in sorted(folder.glob(f"index-{generation}-*.json"), key=_sequence, reverse=True):  # never by time: clocks go backwards
        file = note.with_suffix(".hnsw")
        try:
            header = json.loads(note.read_text())
            problem = _problem(file, header, generation, dim)
            if not problem:
                return Snapshot(Graph.load(file, dim, _projection(file, header), rows=header["rows"]), header["sequence"])
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            problem = f"unreadable ({error})"
        log.warning("index snapshot %s is not used: %s", file.name, problem)
    return None


def _sequence(file: Path) -> int:
    number = file.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _problem(file: Path, header: dict[str, Any], generation: str, dim: int) -> str | None:
    if (header["generation"], header["dim"], header["sequence"]) != (generation, dim, _sequence(file)):
        return "it belongs to another generation, or to another state of it"
    if not file.is_file():
        return "the graph is missing"
    if file.stat().st_size != header["bytes"]:
        return f"{file.stat().st_size} bytes, expected {header['bytes']}"
    if file_digest(file) != header["sha256"]:
        return "its sha256 does not match"
    if "projection" in header:
        matrix = file.with_suffix(".npy")
        if not matrix.is_file() or file_digest(matrix) != header["projection"]["sha256"]:
            return "its projection is missing or damaged"
    return None


def _projection(file: Path, header: dict[str, Any]) -> Projection | None:
    """Of a snapshot that was checked."""
    if "projection" not in header:
        return None
    return Projection(np.load(file.with_suffix(".npy"), allow_pickle=False), header["projection"]["lost"])
