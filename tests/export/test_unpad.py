"""Padding-free graphs give what padded ones give, and are told from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from openbook_export.errors import ExportFailed
from openbook_export.unpad import unpad
from openbook_server.buckets import COARSE, FINE
from openbook_server.rows import Row, collate
from openbook_server.runtime import Graph, build_device

LENGTHS = (3, 16, 9, 5, 12)


def rows() -> list[Row]:
    rng = np.random.default_rng(0)
    return [Row(rng.integers(5, 50, size=length).tolist()) for length in LENGTHS]


@pytest.fixture
def graph(tiny_bundle: Path) -> Graph:
    return Graph(tiny_bundle / "embedder.fp32.onnx", build_device("cpu", "fp32"))


def test_a_row_has_the_same_vector_whatever_its_padding_and_its_neighbours(graph: Graph) -> None:
    together = graph.run(collate(rows(), 16))["sentence_embedding"]
    for row, vector in zip(rows(), together, strict=True):
        for length in (len(row.ids), 16, 48):
            alone = graph.run(collate([row], length))["sentence_embedding"][0]
            np.testing.assert_allclose(alone, vector, atol=1e-6)
        assert graph.run(collate([row], 16))["sentence_embedding"][0].tobytes() == vector.tobytes()


def test_the_padded_graph_gives_the_same(tiny_bundle: Path, graph: Graph) -> None:
    half = Graph(tiny_bundle / "embedder.fp16.onnx", build_device("cpu", "fp16"))  # made of the same fused graph
    inputs = collate(rows(), 16)
    np.testing.assert_allclose(graph.run(inputs)["sentence_embedding"], half.run(inputs)["sentence_embedding"], atol=2e-3)


def test_a_graph_says_how_its_rows_are_padded(tiny_bundle: Path, graph: Graph) -> None:
    assert graph.buckets == COARSE
    assert Graph(tiny_bundle / "reader.fp32.onnx", build_device("cpu", "fp32")).buckets == FINE


def test_what_is_no_fused_bert_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("attention_mask", onnx.TensorProto.FLOAT, [None, None])
    nodes = [helper.make_node("Attention", ["attention_mask", "weights"], ["out"], domain="com.microsoft", num_heads=1)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "graph", [value], [])), tmp_path / "fused.onnx")
    with pytest.raises(ExportFailed, match=r"fused\.onnx: 1 attention nodes and 0 layer normalisations"):
        unpad(tmp_path / "fused.onnx", tmp_path / "unpadded.onnx")
    assert not (tmp_path / "unpadded.onnx").exists()
