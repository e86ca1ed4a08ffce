"""Which generation of a store is opened, and with which parameters; recorded before it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from openbook_server.errors import FingerprintMismatch, KnowledgeBaseDamaged
from openbook_server.knowledge.generations import Generation
from openbook_server.knowledge.records import BundlePlace
from openbook_server.knowledge.store import Store


def choose_generation(
    folder: Path,
    store: Store,
    *,
    fingerprint: str,
    dim: int,
    graph_dims: int | None,
    place: BundlePlace,
    new_generation: bool,
    name: str | None,
) -> Generation:
    """The one that `EmbeddedKnowledgeBase` is asked for; its arguments, and FingerprintMismatch, are explained there."""
    generations = store.generations
    live = generations.live()
    if live is None and store.meta("format") is not None:
        raise KnowledgeBaseDamaged(f"{store.path} holds no generation that answers; restore a backup")
    if live is None:
        store.initialise(fingerprint=fingerprint, dim=dim, graph_dims=graph_dims or 0, bundle=place)
        live = generations.live()
        assert live is not None  # noqa: S101
    chosen = live
    if name is not None:
        [chosen] = [known for known in generations.all() if known.name == name]
    elif new_generation:
        for chosen in [live, *reversed(generations.all())]:
            asked = (fingerprint, chosen.graph_dims if graph_dims is None else graph_dims)
            if (chosen.fingerprint, chosen.graph_dims) == asked and chosen.bundle.id in ("", place.id):
                break
        else:
            graph_dims = live.graph_dims if graph_dims is None else graph_dims
            return generations.add(fingerprint=fingerprint, dim=dim, graph_dims=graph_dims, bundle=place)
    elif live.fingerprint != fingerprint:
        raise FingerprintMismatch(
            f"{folder} was built by embedder {live.fingerprint[:12]}, the bundle's is {fingerprint[:12]}; their vectors do not compare. "
            f"Serve the bundle it was built with, or build a new generation from what is stored: openbook index BUNDLE {folder} "
            f"--new-generation"
        )
    as_asked = replace(
        chosen,
        graph_dims=chosen.graph_dims if graph_dims is None else graph_dims,
        bundle=chosen.bundle if chosen.bundle.id else place,
    )
    if as_asked != chosen:
        generations.change(as_asked)  # where the graph is to be another, snapshots of the one before are not used any more
    return as_asked
