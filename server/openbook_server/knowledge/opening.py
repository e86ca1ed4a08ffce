"""From what a user names to an open knowledge base."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Protocol

from openbook_server.bundle import Bundle, load_bundle
from openbook_server.errors import BundleInvalid, InvalidRequest, KnowledgeBaseDamaged, KnowledgeBaseRefused
from openbook_server.knowledge import inventory
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.interface import KnowledgeBase
from openbook_server.knowledge.records import BundlePlace, GenerationState
from openbook_server.targets import is_address

log = logging.getLogger(__name__)


def open_knowledge_base(
    target: str | Path, bundle: Bundle, *, create: bool = False, new_generation: bool = False, graph_dims: int | None = None
) -> KnowledgeBase:
    """Open the knowledge base that a bundle's embedder queries.

    Args:
        target: a folder, or elasticsearch://HOST:PORT/ALIAS.
        create: make an empty one where there is none.
        new_generation: open the one of this bundle, live or not; it is added where there is none.
        graph_dims: see `EmbeddedKnowledgeBase`; only in a folder.

    Raises:
        As `EmbeddedKnowledgeBase` and `ElasticsearchKnowledgeBase` do.
    """
    return _opener(target)(
        fingerprint=bundle.embedder.fingerprint,
        dim=bundle.embedder.dim,
        create=create,
        graph_dims=graph_dims,
        bundle=place_of(bundle),
        new_generation=new_generation,
    )


def _opener(target: str | Path) -> Callable[..., KnowledgeBase]:
    """What opens a knowledge base in that place; the two kinds take the same arguments."""
    if not is_address(target):
        return partial(EmbeddedKnowledgeBase, Path(target))
    _require_client()
    from openbook_server.knowledge.elastic.knowledge_base import ElasticsearchKnowledgeBase

    return partial(ElasticsearchKnowledgeBase, str(target))


class Closed(Protocol):
    """A knowledge base without a bundle to ask it with."""

    def facts(self, *keys: str) -> dict[str, str]:
        """As `KnowledgeBase.facts`."""

    def bundles(self) -> tuple[str, dict[str, BundlePlace]]:
        """Name of the live generation, "" where there is none; and the bundle that goes with each generation, by name."""

    def states(self) -> list[GenerationState]:
        """As `KnowledgeBase.generation_states`."""

    def remove(self, name: str) -> None:
        """As `KnowledgeBase.remove_generation`; raises KnowledgeBaseLocked where a process has the folder open."""


def look(target: str | Path) -> AbstractContextManager[Closed | None]:
    """What is at a folder or an address; None where there is nothing yet.

    Raises:
        KnowledgeBaseDamaged and others: what is there is no knowledge base, or cannot be reached.
    """
    if not is_address(target):
        return inventory.look(Path(target))
    _require_client()
    from openbook_server.knowledge.elastic import inventory as elastic_inventory

    return elastic_inventory.look(str(target))


def recorded_facts(target: str | Path, *keys: str) -> dict[str, str]:
    """Facts of a knowledge base, without opening it; none where there is none, or opening it will say what is wrong."""
    try:
        with look(target) as found:
            return found.facts(*keys) if found is not None else {}
    except KnowledgeBaseDamaged:
        return {}


def bundle_to_serve(target: str | Path, named: Bundle) -> Bundle:
    """The bundle that goes with the live generation of a knowledge base, where an operator named `named`.

    That is the named one, unless the knowledge base knows it as the bundle of another generation: then a new pair of bundle and
    generation took the place of that one while a server ran, and the command line is the one from before.

    Raises:
        BundleInvalid: the bundle that goes with the live generation is not where it was, or is another one by now.
    """
    try:
        with look(target) as found:
            live, known = found.bundles() if found is not None else ("", {})
    except KnowledgeBaseDamaged:
        return named  # opening it says what is wrong
    place = known.get(live, BundlePlace())
    if place.id in ("", named.id) or named.id not in {bundle.id for bundle in known.values()}:
        return named
    log.warning(
        "%s: its live generation %s goes with the bundle in %s: serving that one, not the one in %s, which goes with an older "
        "generation (openbook generations rollback goes back to it)",
        unsecret(target),
        live,
        place.folder,
        named.folder,
    )
    return recorded_bundle(live, place, f"openbook serve BUNDLE {unsecret(target)}")


def recorded_bundle(generation: str, place: BundlePlace, way_out: str) -> Bundle:
    """The bundle that goes with a generation.

    Raises:
        BundleInvalid: it is not where it was, or is another one by now; the message names the command that mends it.
    """
    try:
        bundle = load_bundle(Path(place.folder)) if place.id else None
        problem = "" if bundle is not None and bundle.id == place.id else "there is another one by now"
    except BundleInvalid as error:
        bundle, problem = None, str(error)
    if bundle is None or problem:
        where = f"bundle {place.id[:12]}, which was in {place.folder}: {problem}" if place.id else "a bundle that nobody recorded"
        raise BundleInvalid(f"generation {generation} goes with {where}; name its folder: {way_out}")
    return bundle


def open_generation(target: str | Path, name: str) -> tuple[KnowledgeBase, Bundle]:
    """A generation of a knowledge base, live or not, and the bundle that goes with it; a folder must be open in no process.

    Raises:
        InvalidRequest: there is none of that name.
        BundleInvalid: the bundle is not where it was.
    """
    with look(target) as found:
        _, known = found.bundles() if found is not None else ("", {})
    if name not in known:
        raise InvalidRequest("NAME", f"{name!r} is none of {', '.join(known)}")
    bundle = recorded_bundle(name, known[name], f"openbook index BUNDLE {unsecret(target)} --new-generation")
    return _opener(target)(fingerprint=bundle.embedder.fingerprint, dim=bundle.embedder.dim, name=name), bundle


def unsecret(target: str | Path) -> str:
    """What a user named, fit for a message: an address without user, password and options."""
    if not is_address(target):
        return str(target)
    from openbook_server.knowledge.elastic.address import parse_address

    return parse_address(str(target)).name


def place_of(bundle: Bundle) -> BundlePlace:
    """As a generation records the bundle that it is served with."""
    return BundlePlace(bundle.id, str(bundle.folder.resolve()))


def describe_address(address: str) -> dict[str, str | int]:
    """What there is to say of elasticsearch://HOST:PORT/ALIAS without a bundle."""
    _require_client()
    from openbook_server.knowledge.elastic.inventory import describe

    return describe(address)


def _require_client() -> None:
    """Most servers do without the client, so it comes with an extra."""
    try:
        import elasticsearch  # noqa: F401
    except ImportError as error:
        way_out = "in a clone of openbook: pip install '.[elasticsearch]'"
        raise KnowledgeBaseRefused(f"elasticsearch:// needs Elasticsearch's client; {way_out}") from error
