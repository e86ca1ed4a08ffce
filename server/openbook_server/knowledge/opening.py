"""From what a user names to an open knowledge base."""

from __future__ import annotations

from pathlib import Path

from openbook_server.bundle import Bundle
from openbook_server.errors import InvalidRequest, KnowledgeBaseRefused
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.interface import KnowledgeBase


def open_knowledge_base(
    target: str | Path, bundle: Bundle, *, create: bool = False, new_generation: bool = False, graph_dims: int | None = None
) -> KnowledgeBase:
    """Open the knowledge base that a bundle's embedder queries.

    Args:
        target: a folder, or elasticsearch://HOST:PORT/ALIAS.
        create: make an empty one where there is none.
        new_generation: open the one that is being built beside the one in use, see `KnowledgeBase.publish`; only in Elasticsearch.
        graph_dims: see `EmbeddedKnowledgeBase`; only in a folder.

    Raises:
        As `EmbeddedKnowledgeBase` and `ElasticsearchKnowledgeBase` do.
    """
    fingerprint, dim = bundle.embedder.fingerprint, bundle.embedder.dim
    if "://" not in str(target):
        if new_generation:
            raise InvalidRequest("--new-generation", f"{target} is a folder, which has one generation; index into a new folder")
        return EmbeddedKnowledgeBase(Path(target), fingerprint=fingerprint, dim=dim, create=create, graph_dims=graph_dims)
    if graph_dims is not None:
        raise InvalidRequest("--graph-dims", "Elasticsearch keeps whole vectors; leave it out")
    _require_client()
    from openbook_server.knowledge.elastic.knowledge_base import ElasticsearchKnowledgeBase

    return ElasticsearchKnowledgeBase(str(target), fingerprint=fingerprint, dim=dim, create=create, new_generation=new_generation)


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
