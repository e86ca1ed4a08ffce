"""What a classifier makes of labelled neighbours, as a graph of its own: from the text alone to all four readings.

    p(y|x) = weight · sum over z of p(z|x) p(y|x, z)  +  (1 - weight) · p_kNN(y|x)

The text's own graph gives p(y|x) without neighbours; a neighbour's label adds a row of the trained table to its logarithm, so the
text is never encoded again. Trained table, temperatures and weight are inside: the server finds neighbours and knows no formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from openbook_server.binding import Arrays
from openbook_training.heads import LabelHead
from openbook_training.neighbours import NEIGHBOURS, Mixture
from openbook_training.objectives import NEGATIVE, marginal_label_log_probabilities, neighbour_prior
from torch import Tensor, nn

from openbook_export.errors import CheckpointUnsupported, ExportFailed
from openbook_export.graphs import OPSET, quiet_tracing
from openbook_export.parity import check_parity, expected_outputs

LEAST = 1e-30  # stands for a probability of 0, whose logarithm there is none of
GATE_ROWS = 12


class NeighbourGraph(nn.Module):
    """A text's label probabilities with those of its neighbours, for B texts of k neighbours and C labels."""

    inputs: ClassVar = {
        "alone": {0: "batch_size"},
        "score": {0: "batch_size", 1: "neighbours"},
        "label": {0: "batch_size", 1: "neighbours"},
    }
    outputs: ClassVar = {name: {0: "batch_size"} for name in ("model", "knn", "combined")}

    def __init__(self, head: LabelHead, *, weight: float, temperature: float) -> None:
        """Args:
        head: a classifier's, trained with neighbours.
        weight: of the model beside the vote, 0 to 1.
        temperature: of the vote, in cosines.
        """
        super().__init__()
        self.shift, self.null_score = head.shift.detach().clone(), head.null_score.detach().clone()
        self.prior_temperature = head.log_temperature.detach().exp()
        self.weight, self.temperature = weight, temperature

    def forward(self, alone: Tensor, score: Tensor, label: Tensor) -> dict[str, Tensor]:
        """(B, C) probabilities, (B, k) cosines, NEGATIVE where there is no further neighbour, and (B, k) label numbers.

        Returns:
            (B, C) "model", the sum over neighbours; "knn", their vote (openbook_training.neighbours); "combined".
        """
        logits = torch.log(torch.clamp(alone, min=LEAST))
        prior = neighbour_prior(score, self.null_score, self.prior_temperature)
        model = marginal_label_log_probabilities(logits, self.shift, label, prior).exp()
        votes = torch.softmax(score / self.temperature, dim=1)
        votes_for = (label.unsqueeze(2) == torch.arange(alone.shape[1])).to(votes.dtype)  # (B, k, C)
        knn = torch.bmm(votes.unsqueeze(1), votes_for).squeeze(1)
        return {"model": model, "knn": knn, "combined": self.weight * model + (1 - self.weight) * knn}


@dataclass(slots=True)
class NeighbourPart:
    """The graph of one classifier on its way into a bundle."""

    name: str  # in golden vectors and messages: "<classifier>.neighbours"
    graph: NeighbourGraph
    labels: int
    facts: dict[str, Any]  # what the manifest states of it beside graph and measurements
    inputs: Arrays = field(init=False)
    expected: Arrays = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = _samples(self.labels, self.facts["count"])
        self.expected = expected_outputs(self.graph, self.inputs)

    def export(self, folder: Path, report: Callable[[str], None]) -> None:
        """Write the graph, in fp32 only: a vote of cosines at temperature 0.01 has no meaning in half precision.

        Raises:
            ExportFailed: it does not trace, or computes something else than PyTorch.
        """
        file = folder / f"{self.name}.fp32.onnx"
        try:
            with quiet_tracing(), torch.inference_mode():
                torch.onnx.export(
                    _Ordered(self.graph),
                    tuple(torch.from_numpy(self.inputs[name]) for name in NeighbourGraph.inputs),
                    str(file),
                    input_names=list(NeighbourGraph.inputs),
                    output_names=list(NeighbourGraph.outputs),
                    dynamic_axes={**NeighbourGraph.inputs, **NeighbourGraph.outputs},
                    opset_version=OPSET,
                    dynamo=False,
                )
        except Exception as error:  # torch raises many kinds; to the user they are one
            raise ExportFailed(f"{self.name} does not export to ONNX ({type(error).__name__}: {error})") from error
        parity = check_parity(file, "fp32", self.inputs, self.expected)
        self.facts |= {"graphs": {"fp32": file.name}, "measured": {"fp32": {"parity": parity}}}
        report(f"{file.name}: distance {parity['distance']:.6f}")


class _Ordered(nn.Module):
    """The tracer wants outputs by order."""

    def __init__(self, graph: NeighbourGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, alone: Tensor, score: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        outputs = self.graph(alone, score, label)
        return tuple(outputs[name] for name in NeighbourGraph.outputs)


def neighbour_part(name: str, head: nn.Module, settings: Mapping[str, Any]) -> NeighbourPart | None:
    """Of the classifier `name` what reads neighbours; None where it was trained without.

    Raises:
        CheckpointUnsupported: what its task.json states of neighbours is of no use.
    """
    if not isinstance(head, LabelHead) or not head.latent:
        return None
    stated = stated_neighbours(name, settings)
    weight, temperature = stated.mixture.weight, stated.mixture.temperature
    graph = NeighbourGraph(head, weight=weight, temperature=temperature).eval()
    facts = {"count": stated.count, "label_key": stated.label_column, "weight": weight, "temperature": temperature}
    return NeighbourPart(f"{name}.neighbours", graph, head.output.out_features, facts)


@dataclass(frozen=True, kw_only=True, slots=True)
class StatedNeighbours:
    """What a classifier's task.json says of neighbours."""

    count: int  # of a text
    label_column: str  # where a labelled text keeps its label
    mixture: Mixture  # of the model and the vote


def stated_neighbours(name: str, settings: Mapping[str, Any]) -> StatedNeighbours:
    """Of the classifier that messages call `name`.

    Raises:
        CheckpointUnsupported: it is of no use.
    """
    mixture, count, column = settings.get("mixture"), settings.get("neighbours", NEIGHBOURS), settings.get("label_column", "label")
    numbers = [mixture.get(key) if isinstance(mixture, dict) else None for key in ("weight", "temperature")]
    weight, temperature = (float(number) if isinstance(number, int | float) else -1.0 for number in numbers)
    if not 0 <= weight <= 1 or temperature <= 0 or type(count) is not int or count < 1 or not isinstance(column, str) or not column:
        raise CheckpointUnsupported(
            f"--task {name}: task.json states mixture {mixture!r}, neighbours {count!r} and label_column {column!r}; "
            "wanted are a weight of 0 to 1, a temperature above 0, at least one neighbour, and a name"
        )
    return StatedNeighbours(count=count, label_column=column, mixture=Mixture(weight, temperature))


def _samples(labels: int, count: int) -> Arrays:
    """Distributions from even to certain beside neighbours from none to `count`, near and far, of any labels."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(GATE_ROWS, labels)) * np.linspace(0, 12, GATE_ROWS)[:, None]
    alone = np.exp(logits - logits.max(axis=1, keepdims=True))
    score = -np.sort(-rng.uniform(0.1, 1, (GATE_ROWS, count)), axis=1)
    for row in range(GATE_ROWS):
        score[row, max(1, row * count // (GATE_ROWS - 1)) :] = NEGATIVE
    return {
        "alone": (alone / alone.sum(axis=1, keepdims=True)).astype(np.float32),
        "score": score.astype(np.float32),
        "label": rng.integers(0, labels, (GATE_ROWS, count)),
    }
