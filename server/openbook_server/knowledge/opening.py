"""From what a user names to an open knowledge base."""

from __future__ import annotations

import logging
from pathlib import Path

from openbook_server.bundle import Bundle, load_bundle
from openbook_server.errors import BundleInvalid, InvalidRequest, KnowledgeBaseDamaged, KnowledgeBaseRefused
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.generations import BundlePlace
from openbook_server.knowledge.interface import KnowledgeBase
from openbook_server.knowledge.store import FILE, Store

log = logging.getLogger(__name__)


def open_knowledge_base(
    target: str | Path, bundle: Bundle, *, create: bool = False, new_generation: bool = False, graph_dims: int | None = None
) -> KnowledgeBase:
    """Open the knowledge base that a bundle's embedder queries.

    Args:
        target: a folder, or elasticsearch://HOST:PORT/ALIAS.
        create: make an empty one where there is none.
        new_generation: open the one that is being built beside the one in use, see `KnowledgeBase.build` and `publish`.
        graph_dims: see `EmbeddedKnowledgeBase`; only in a folder.

    Raises:
        As `EmbeddedKnowledgeBase` and `ElasticsearchKnowledgeBase` do.
    """
    fingerprint, dim = bundle.embedder.fingerprint, bundle.embedder.dim
    if "://" not in str(target):
        return EmbeddedKnowledgeBase(
            Path(target),
            fingerprint=fingerprint,
            dim=dim,
            create=create,
            graph_dims=graph_dims,
            bundle=place_of(bundle),
            new_generation=new_generation,
        )
    if graph_dims is not None:
        raise InvalidRequest("--graph-dims", "Elasticsearch keeps whole vectors; leave it out")
    _require_client()
    from openbook_server.knowledge.elastic.knowledge_base import ElasticsearchKnowledgeBase

    return ElasticsearchKnowledgeBase(str(target), fingerprint=fingerprint, dim=dim, create=create, new_generation=new_generation)


def recorded_facts(target: str | Path, *keys: str) -> dict[str, str]:
    """Facts of a knowledge base in a folder, without opening it; none where there is none, or opening it will say what is wrong."""
    store = _peek(target)
    if store is None:
        return {}
    found = {key: store.meta(key) for key in keys}
    store.close()
    return {key: value for key, value in found.items() if value is not None}


def bundle_to_serve(target: str | Path, named: Bundle) -> Bundle:
    """The bundle that goes with the live generation of a knowledge base, where an operator named `named`.

    That is the named one, unless the knowledge base knows it as the bundle of another generation: then a new pair of bundle and
    generation took the place of that one while a server ran, and the command line is the one from before.

    Raises:
        BundleInvalid: the bundle that goes with the live generation is not where it was, or is another one by now.
    """
    store = _peek(target)
    if store is None:
        return named
    live, known = store.generations.live(), store.generations.all()
    store.close()
    if live is None or live.bundle.id in ("", named.id) or named.id not in {generation.bundle.id for generation in known}:
        return named
    log.warning(
        "%s: its live generation %s goes with the bundle in %s: serving that one, not the one in %s, which goes with an older "
        "generation (openbook generations rollback goes back to it)",
        target,
        live.name,
        live.bundle.folder,
        named.folder,
    )
    return recorded_bundle(live.name, live.bundle, f"openbook serve BUNDLE {target}")


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


def open_generation(folder: Path, name: str) -> tuple[EmbeddedKnowledgeBase, Bundle]:
    """A generation of a folder that no process has open, live or not, and the bundle that goes with it."""
    store = Store(folder, read_only=True)
    [generation] = [known for known in store.generations.all() if known.name == name]
    store.close()
    bundle = recorded_bundle(name, generation.bundle, f"openbook index BUNDLE {folder} --new-generation")
    fingerprint, dim = bundle.embedder.fingerprint, bundle.embedder.dim
    return EmbeddedKnowledgeBase(folder, fingerprint=fingerprint, dim=dim, name=name), bundle


def _peek(target: str | Path) -> Store | None:
    if "://" in str(target) or not (Path(target) / FILE).is_file():
        return None
    try:
        return Store(Path(target), read_only=True, checked=True)
    except KnowledgeBaseDamaged:
        return None


def place_of(bundle: Bundle) -> BundlePlace:
    """As a generation records the bundle that it is served with."""
    return BundlePlace(bundle.id, str(bundle.folder.resolve()))


def describe_address(address: str) -> dict[str, str | int]:
    """What there is to say of elasticsearch://HOST:PORT/ALIAS without a bundle."""
    _require_client()
    from openbook_server.knowledge.elastic.knowledge_base import describe

    return describe(address)


def _require_client() -> None:
    """Most servers do without the client, so it comes with an extra."""
    try:
        import elasticsearch  # noqa: F401
    except ImportError as error:
        raise KnowledgeBaseRefused("elasticsearch:// needs Elasticsearch's client: pip install 'openbook[elasticsearch]'") from error
