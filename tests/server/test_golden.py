"""A graph that computes something other than PyTorch did is found out, at export and at every start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from openbook_server.bundle import Bundle, load_bundle
from openbook_server.errors import BundleInvalid
from openbook_server.golden import TOLERANCES, compare, largest_difference, largest_distance, lowest_cosine, verify_golden
from openbook_server.runtime import HIDDEN_STATES, Graph, choose_device


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_golden_vectors_match_in_every_precision(bundle: Bundle, precision: str) -> None:
    device = choose_device("cpu", precision)
    graphs = {model: Graph(bundle.graph_path(model, precision), device) for model in ("embedder", "reader")}
    measured = verify_golden(bundle, graphs, device)
    assert set(measured) == {"embedder_cosine", "reader_difference"}
    assert measured["embedder_cosine"] > 0.9
    del graphs["reader"]
    assert set(verify_golden(bundle, graphs, device)) == {"embedder_cosine"}


class Wrong:
    """A graph whose floats are off."""

    def __init__(self, graph: Graph, change: float, *, states: bool = False) -> None:
        """`states`: those of the hidden states alone."""
        self._graph, self._change, self._states = graph, change, states
        self.buckets, self.gives_states = graph.buckets, graph.gives_states

    def run(self, inputs: dict[str, np.ndarray], *, states: bool = False) -> dict[str, np.ndarray]:
        outputs = self._graph.run(inputs, states=states)
        off = {name for name, values in outputs.items() if values.dtype != np.int64 and (name == HIDDEN_STATES or not self._states)}
        return {name: values + np.float32(self._change) if name in off else values for name, values in outputs.items()}


@pytest.mark.parametrize("change", [0.01, float("nan")])
def test_a_graph_that_computes_something_else_is_refused(bundle: Bundle, change: float) -> None:
    device = choose_device("cpu")
    embedder, reader = (Graph(bundle.graph_path(model, "fp32"), device) for model in ("embedder", "reader"))
    with pytest.raises(BundleInvalid, match=r"fails its golden vectors on cpu in fp32: embedder_cosine"):
        verify_golden(bundle, {"embedder": Wrong(embedder, change), "reader": reader}, device)  # type: ignore[dict-item]  # stands for a graph
    with pytest.raises(BundleInvalid, match=r"reader_difference"):
        verify_golden(bundle, {"embedder": embedder, "reader": Wrong(reader, change)}, device)  # type: ignore[dict-item]  # the same
    with pytest.raises(BundleInvalid, match="does not fit its graphs"):
        verify_golden(bundle, {"embedder": reader}, device)
    with pytest.raises(BundleInvalid, match="embedder_cosine"):  # vectors of passages' windows would be wrong
        verify_golden(bundle, {"embedder": Wrong(embedder, 100 * change, states=True)}, device)  # type: ignore[dict-item]  # the same


def test_a_vector_that_is_no_unit_vector_counts_as_wrong() -> None:
    unit = np.eye(3, dtype=np.float32)
    assert lowest_cosine(unit, unit) == 1.0
    assert lowest_cosine(unit, 2 * unit) == -1.0
    assert lowest_cosine(unit, unit * np.float32("nan")) == -1.0
    assert lowest_cosine(unit, unit[:2]) == -1.0


def test_readers_are_compared_by_scores_and_by_where_the_best_span_is() -> None:
    scores = {
        "span_start": np.array([[4, 5]]),
        "span_end": np.array([[4, 6]]),
        "span_score": np.array([[3.0, 2.9]], np.float32),
        "null_score": np.array([1.0], np.float32),
        "log_normaliser": np.array([4.0], np.float32),
    }
    swapped = scores | {"span_start": np.array([[5, 4]]), "span_end": np.array([[6, 4]])}
    elsewhere = scores | {"span_start": np.array([[7, 8]])}
    assert largest_difference(scores, scores) == 0.0
    assert largest_difference(scores, swapped) == pytest.approx(0.1, abs=1e-6)  # a near tie may turn
    assert largest_difference(scores, elsewhere) == float("inf")
    assert largest_difference(scores, scores | {"null_score": np.array([1.5], np.float32)}) == 0.5


def test_distributions_are_compared_by_their_total_variation() -> None:
    one = np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]], np.float32)
    other = np.array([[0.4, 0.3, 0.3], [1.0, 0.0, 0.0]], np.float32)
    assert compare({"probability": one}, {"probability": one}) == {"distance": 0.0}
    assert largest_distance(one, other) == pytest.approx(0.1, abs=1e-6)
    assert largest_distance(one, one[::-1]) == pytest.approx(0.5, abs=1e-6)
    assert largest_distance(one, one * np.float32("nan")) == float("inf")
    assert TOLERANCES["fp32"].allows({"distance": 0.0005})
    assert not TOLERANCES["fp32"].allows({"distance": 0.002})
