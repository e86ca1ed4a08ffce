"""What there is of each generation of a folder: how far it is built, what it takes on the disk, what it is served with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openbook_server.errors import InvalidRequest
from openbook_server.knowledge.generations import BundlePlace
from openbook_server.knowledge.snapshots import snapshot_generation
from openbook_server.knowledge.store import Store

State = Literal["live", "kept", "new"]  # answers; answered before and was replaced; never answered yet


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationState:
    """One generation."""

    name: str
    state: State
    previous: bool  # the one that was live before the live one
    fingerprint: str  # of its embedder
    dim: int
    graph_dims: int  # asked for; 0 = as few as the data allow
    bundle: BundlePlace
    passages: int  # that it has vectors of
    lacking: int  # that it has none of
    vector_bytes: int  # on the disk; generations of one embedder share them
    snapshot_bytes: int

    def __str__(self) -> str:
        done = f"{self.passages} passages" + (f", lacks {self.lacking}" if self.lacking else "")
        size = f"{(self.vector_bytes + self.snapshot_bytes) / 1e6:.1f} MB of vectors and snapshots"
        place = f"bundle {self.bundle.id[:12]} in {self.bundle.folder}" if self.bundle.id else "bundle unknown"
        state = self.state + (", live before" if self.previous else "")
        return f"{state}; {done}; embedder {self.fingerprint[:12]}, {self.dim} dimensions; {size}; {place}"


def describe_generations(folder: Path, store: Store) -> list[GenerationState]:
    """All of them, by number."""
    live, previous, passages = store.generations.live(), store.generations.previous(), store.counts().passages
    states = []
    for generation in store.generations.all():
        filled = store.generations.count(generation)
        states.append(
            GenerationState(
                name=generation.name,
                state="live" if generation == live else "kept" if generation.published else "new",
                previous=generation == previous,
                fingerprint=generation.fingerprint,
                dim=generation.dim,
                graph_dims=generation.graph_dims,
                bundle=generation.bundle,
                passages=filled,
                lacking=passages - filled,
                vector_bytes=4 * generation.dim * filled,
                snapshot_bytes=sum(file.stat().st_size for file in _snapshots(folder, generation.name)),
            )
        )
    return states


def remove_generation(folder: Path, store: Store, name: str) -> None:
    """Remove one for good, with its snapshots, and its vectors where no other has its embedder.

    Raises:
        InvalidRequest: there is none of that name, or it is the live one.
    """
    known = {generation.name: generation for generation in store.generations.all()}
    if name not in known:
        raise InvalidRequest("generation", f"{name!r} is none of {', '.join(known)}")
    if known[name] == store.generations.live():
        raise InvalidRequest("generation", f"{name} is live; publish another one first")
    store.generations.remove(known[name])
    for file in _snapshots(folder, name):
        file.unlink(missing_ok=True)


def _snapshots(folder: Path, name: str) -> list[Path]:
    return [file for file in folder.glob("index-*") if snapshot_generation(file) == name]
