"""What there is of each generation of a folder: how far it is built, what it takes on the disk, what it is served with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openbook_server.errors import InvalidRequest
from openbook_server.knowledge.home import Home
from openbook_server.knowledge.records import BundlePlace, GenerationState
from openbook_server.knowledge.snapshots import snapshot_generation
from openbook_server.knowledge.store import Store, is_there


class Folder:
    """A knowledge base that nobody opens; see `opening.Closed`."""

    def __init__(self, folder: Path, store: Store) -> None:
        self._folder, self._store = folder, store

    def facts(self, *keys: str) -> dict[str, str]:
        return {key: value for key in keys if (value := self._store.meta(key)) is not None}

    def bundles(self) -> tuple[str, dict[str, BundlePlace]]:
        live = self._store.generations.live()
        known = {generation.name: generation.bundle for generation in self._store.generations.all()}
        return live.name if live is not None else "", known

    def states(self) -> list[GenerationState]:
        return describe_generations(self._folder, self._store)

    def remove(self, name: str) -> None:
        home = Home(self._folder)  # no process may have it open
        try:
            store = Store(self._folder)
            try:
                remove_generation(self._folder, store, name)
            finally:
                store.close()
        finally:
            home.close()


@contextmanager
def look(folder: Path) -> Iterator[Folder | None]:
    """What is in a folder, None where there is nothing yet. Raises KnowledgeBaseDamaged: it is damaged, or of another format."""
    if not is_there(folder):
        yield None
        return
    store = Store(folder, read_only=True, checked=True)
    try:
        yield Folder(folder, store)
    finally:
        store.close()


def describe_generations(folder: Path, store: Store) -> list[GenerationState]:
    """All of them, by number."""
    with store.standstill():
        live, previous, passages = store.generations.live(), store.generations.previous(), store.counts().passages
        filled = [(found, store.generations.count(found), store.generations.bytes_a_passage(found)) for found in store.generations.all()]
    return [
        GenerationState(
            name=generation.name,
            state="live" if generation == live else "kept" if generation.published else "new",
            previous=generation == previous,
            fingerprint=generation.fingerprint,
            dim=generation.dim,
            graph_dims=generation.graph_dims,
            bundle=generation.bundle,
            passages=count,
            lacking=passages - count,
            vector_bytes=round(count * bytes_a_passage),
            snapshot_bytes=sum(map(_bytes, _snapshots(folder, generation.name))),
        )
        for generation, count, bytes_a_passage in filled
    ]


def remove_generation(folder: Path, store: Store, name: str) -> None:
    """Remove one for good, with its snapshots, and its vectors where no other has its embedder.

    Raises:
        InvalidRequest: there is none of that name, or it is the live one.
    """
    known = {generation.name: generation for generation in store.generations.all()}
    if name not in known:
        raise InvalidRequest("name", f"{name!r} is none of {', '.join(known)}")
    if known[name] == store.generations.live():
        raise InvalidRequest("name", f"{name} is live; publish another one first")
    store.generations.remove(known[name])
    for file in _snapshots(folder, name):
        file.unlink(missing_ok=True)


def _snapshots(folder: Path, name: str) -> list[Path]:
    return [file for file in folder.glob("index-*") if snapshot_generation(file) == name]


def _bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # a newer one took its place meanwhile
        return 0
