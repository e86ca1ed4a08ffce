"""Fixtures of the server's tests: a knowledge base of three tiny documents."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from openbook_server.bundle import load_bundle
from openbook_server.ingest.embed import PassageEmbedder
from openbook_server.ingest.indexing import Indexing
from openbook_server.ingest.preparation import Splitting
from openbook_server.ingest.sources import find_sources
from openbook_server.knowledge import open_knowledge_base
from openbook_server.runtime import Graph, build_device
from openbook_server.tokenization import load_tokenizer

DOCUMENTS = """\
{"_id": "d0", "title": "red", "text": "the red city by the river was one of three"}
{"_id": "d1", "title": "blue", "text": "the blue king of the green city"}
{"_id": "d2", "text": "one book of the king", "metadata": {"shelf": "two"}}
"""


@pytest.fixture(scope="session")
def _indexed(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("knowledge")
    (folder / "documents.jsonl").write_text(DOCUMENTS)
    bundle = load_bundle(tiny_bundle)
    device = build_device("cpu", "fp32", 1)
    graph = Graph(bundle.graph_path("embedder", "fp32"), device, 1)
    tokenizer = load_tokenizer(bundle.tokenizer_path)
    embed = PassageEmbedder(tokenizer, graph, dim=bundle.embedder.dim, max_tokens=bundle.embedder.max_tokens)
    knowledge_base = open_knowledge_base(folder / "kb", bundle, create=True)
    indexing = Indexing(knowledge_base, tokenizer, embed, Splitting(20, 4))
    indexing.run(find_sources([str(folder / "documents.jsonl")]), lambda progress: None, lambda: False)
    knowledge_base.close()
    return folder / "kb"


@pytest.fixture
def tiny_knowledge_base(_indexed: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test, for one process at a time may open a knowledge base."""
    return Path(shutil.copytree(_indexed, tmp_path / "kb"))
