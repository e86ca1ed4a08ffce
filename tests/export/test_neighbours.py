"""What a classifier makes of neighbours, exported: the graph gives what training reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from openbook_export.errors import CheckpointUnsupported, ExportFailed
from openbook_export.neighbours import NeighbourPart, neighbour_part
from openbook_export.parity import check_parity
from openbook_server.runtime import Graph, build_device
from openbook_training.heads import LabelHead
from openbook_training.neighbours import Mixture, Neighbours, knn_probabilities
from openbook_training.objectives import NEGATIVE

DIM, LABELS, COUNT = 8, 5, 4
SETTINGS = {"neighbours": COUNT, "label_column": "topic", "mixture": {"weight": 0.7, "temperature": 0.05}}


@pytest.fixture
def head() -> LabelHead:
    torch.manual_seed(3)
    head = LabelHead(DIM, LABELS, temperature=0.1)
    for parameter in (head.output.weight, head.output.bias, head.shift):
        torch.nn.init.normal_(parameter, std=1.5)
    return head.eval()


def part_of(head: LabelHead) -> NeighbourPart:
    part = neighbour_part("topics", head, SETTINGS)
    assert part is not None
    return part


def test_the_graph_gives_every_reading_that_training_reports(head: LabelHead, tmp_path: Path) -> None:
    part, lines = part_of(head), list[str]()
    part.export(tmp_path, lines.append)
    assert part.facts["measured"]["fp32"]["parity"]["batch_invariant"]
    assert lines[0].startswith("topics.neighbours.fp32.onnx: distance 0.0000")
    rng = np.random.default_rng(1)
    pooled = torch.from_numpy(rng.normal(size=(6, DIM)).astype(np.float32))
    scores = -np.sort(-rng.uniform(0.3, 0.9, (6, COUNT)).astype(np.float32), axis=1)
    scores[2, 1:] = NEGATIVE  # a single neighbour
    neighbours = Neighbours(scores, rng.integers(0, LABELS, (6, COUNT)))
    with torch.inference_mode():
        alone = head(pooled).exp().numpy()
        model = head(pooled, (torch.from_numpy(scores), torch.from_numpy(neighbours.labels))).double().exp().numpy()
    knn = knn_probabilities(neighbours, LABELS, 0.05)
    graph = Graph(tmp_path / "topics.neighbours.fp32.onnx", build_device("cpu", "fp32"))
    actual = graph.run({"alone": alone, "score": scores, "label": neighbours.labels})
    for name, expected in (("model", model), ("knn", knn), ("combined", Mixture(0.7, 0.05).probabilities(model, knn))):
        assert actual[name] == pytest.approx(expected, abs=2e-6), name
    assert np.abs(model - alone).sum(axis=1).max() > 0.2  # neighbours matter


def test_a_graph_with_other_constants_is_found_out(head: LabelHead, tmp_path: Path) -> None:
    part = part_of(head)
    part.export(tmp_path, lambda line: None)
    part.expected["knn"] = part.expected["knn"][::-1]
    with pytest.raises(ExportFailed, match=r"topics.neighbours.fp32.onnx is not the model it was exported from: distance [01]\.\d+"):
        check_parity(tmp_path / "topics.neighbours.fp32.onnx", "fp32", part.inputs, part.expected)


def test_a_folder_of_before_they_were_stated_has_the_recipes_own_settings(head: LabelHead) -> None:
    part = neighbour_part("topics", head, {"mixture": SETTINGS["mixture"]})
    assert part is not None
    assert (part.facts["count"], part.facts["label_key"]) == (16, "label")
    assert neighbour_part("claims", LabelHead(DIM, LABELS), {}) is None


@pytest.mark.parametrize(
    "changes", [{"mixture": None}, {"mixture": {"weight": 1.5, "temperature": 0.1}}, {"neighbours": 0}, {"label_column": ""}]
)
def test_useless_settings_are_refused_by_value(head: LabelHead, changes: dict[str, object]) -> None:
    with pytest.raises(CheckpointUnsupported, match=r"--task topics: task.json states mixture .* wanted are a weight of 0 to 1"):
        neighbour_part("topics", head, SETTINGS | changes)
