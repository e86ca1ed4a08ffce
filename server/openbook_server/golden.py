"""Does a graph compute what PyTorch computed? The same comparison at export and at every start of a server.

Each kind of output is compared by what matters of it: vectors by their cosine, span scores in nats, distributions by
their total variation distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openbook_server.binding import Arrays
from openbook_server.bundle import GOLDEN, Bundle
from openbook_server.errors import BundleInvalid
from openbook_server.runtime import HIDDEN_STATES, Device, Graph

DISTRIBUTIONS = ("probability", "model", "knn", "combined")  # outputs of graphs that label texts, by themselves and with neighbours
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # of a graph that reads texts, as `rows.collate` makes them


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far a graph may be from PyTorch fp32."""

    cosine: float  # at least, for every vector
    difference: float  # at most, in nats, for every logit, span score, null score and normaliser
    distance: float  # at most, between 0 and 1, for every distribution

    def allows(self, measured: Mapping[str, float]) -> bool:
        """Whether what `compare` measured is near enough."""
        return (
            measured.get("cosine", 1.0) >= self.cosine
            and measured.get("difference", 0.0) <= self.difference
            and measured.get("distance", 0.0) <= self.distance
        )

    def __str__(self) -> str:
        return f"cosine at least {self.cosine}, difference at most {self.difference}, distance at most {self.distance}"


TOLERANCES = {
    "fp32": Tolerance(cosine=0.9999, difference=0.001, distance=0.001),  # measured 1e-5, 6e-7: other kernels add in another order
    "fp16": Tolerance(cosine=0.999, difference=0.1, distance=0.02),  # 11 bits of mantissa, heads in fp32; measured 7e-4 apart
    "bf16": Tolerance(cosine=0.999, difference=0.5, distance=0.1),  # 8 bits of mantissa; measured 0.07
    "int8": Tolerance(cosine=0.95, difference=3.0, distance=0.3),  # an explicit choice; measured 0.99, 0.9, 0.02, and texts exist at 0.956
}


def verify_golden(bundle: Bundle, graphs: Mapping[str, Graph], device: Device) -> dict[str, float]:
    """Run the bundle's golden inputs through graphs of it and compare with what PyTorch gave at export.

    Args:
        graphs: by model name; models that are not loaded are not checked.

    Returns:
        What `compare` measures, each under "<model>_<measure>".

    Raises:
        BundleInvalid: a graph is further off than the precision's tolerance, or an array is missing.
    """
    golden, tolerance = bundle.golden(), TOLERANCES[device.precision]
    measured: dict[str, dict[str, float]] = {}
    try:
        for model, graph in graphs.items():
            expected = {name.removeprefix(f"{model}/"): value for name, value in golden.items() if name.startswith(f"{model}/")}
            measured[model] = compare(expected, _run_as_served(graph, expected))
            if graph.gives_states:
                measured[model]["cosine"] = min(measured[model]["cosine"], _cosine_of_states(graph, expected))
    except Exception as error:  # onnxruntime's own kinds among them
        reason = str(error).strip().split("\n", 1)[0]
        raise BundleInvalid(
            f"bundle {bundle.folder}: {GOLDEN} does not fit its graphs ({reason}); write it again with `openbook export`"
        ) from error
    flat = {f"{model}_{what}": value for model, values in measured.items() for what, value in values.items()}
    if not all(tolerance.allows(values) for values in measured.values()):
        numbers = ", ".join(f"{name} {value:.6f}" for name, value in flat.items())
        raise BundleInvalid(
            f"bundle {bundle.folder} fails its golden vectors on {device.name} in {device.precision}: {numbers}; allowed: {tolerance}; "
            "use another --device or --precision, or export again"
        )
    return flat


def _run_as_served(graph: Graph, golden: Arrays) -> Arrays:
    """A graph's outputs for golden inputs, each row padded as the engine pads it: what is checked is what callers get, and padding
    to the longest row, which is most of golden.npz, costs nothing. Graphs that write text are run as they were at export."""
    if not set(INPUTS) <= set(golden):
        return graph.run(golden)
    lengths = golden["attention_mask"].sum(axis=1).tolist()
    outputs: dict[str, NDArray[np.generic]] = {}
    for rows in graph.buckets.batches(lengths, golden["attention_mask"].size):
        length = min(graph.buckets.padded_length(lengths[rows[0]]), golden["attention_mask"].shape[1])
        for name, values in graph.run({name: golden[name][rows, :length] for name in INPUTS}).items():
            outputs.setdefault(name, np.empty((len(lengths), *values.shape[1:]), values.dtype))[rows] = values
    return outputs


def _cosine_of_states(graph: Graph, golden: Arrays) -> float:
    """Of a text's vector and the mean of the states that come when they are asked for, which passages' windows are pooled from."""
    tokens = int(golden["attention_mask"][0].sum())
    length = min(graph.buckets.padded_length(tokens), golden["attention_mask"].shape[1])
    states = graph.run({name: golden[name][:1, :length] for name in INPUTS}, states=True)[HIDDEN_STATES]
    mean = np.asarray(states[0, :tokens], np.float32).mean(axis=0)
    return lowest_cosine(golden["sentence_embedding"][:1], (mean / np.linalg.norm(mean))[None])


def compare(expected: Arrays, actual: Arrays) -> dict[str, float]:
    """How far a graph's outputs are from what they should be.

    Returns:
        "cosine" (the lowest) where the output is a vector or what an encoder leaves for a decoder, "difference" (the largest, in nats)
        where it is spans or logits, "distance" (the largest) where it is a distribution.

    Raises:
        KeyError: an output is missing.
    """
    if "sentence_embedding" in expected:
        return {"cosine": lowest_cosine(expected["sentence_embedding"], actual["sentence_embedding"])}
    if "logits" in expected:
        difference = float(np.abs(expected["logits"].astype(np.float64) - actual["logits"].astype(np.float64)).max())
        return {"difference": difference if np.isfinite(difference) else float("inf")}
    if left := sorted(name for name in expected if name.startswith("present.")):
        one, other = (np.concatenate([of[name].reshape(len(of[name]), -1) for name in left], axis=1) for of in (expected, actual))
        return {"cosine": lowest_cosine(*(of / np.linalg.norm(of, axis=1, keepdims=True) for of in (one, other)))}
    if distributions := [name for name in DISTRIBUTIONS if name in expected]:
        return {"distance": max(largest_distance(expected[name], actual[name]) for name in distributions)}
    return {"difference": largest_difference(expected, actual)}


def lowest_cosine(expected: NDArray[np.generic], actual: NDArray[np.generic]) -> float:
    """Lowest cosine between rows of two (batch, dim) arrays, -1.0 if any value is not finite or a row is no unit vector."""
    one, other = expected.astype(np.float64), actual.astype(np.float64)
    norms = np.linalg.norm(other, axis=1)
    if one.shape != other.shape or not np.isfinite(norms).all() or abs(norms - 1).max() > 1e-3:
        return -1.0
    return float(((one * other).sum(1) / (np.linalg.norm(one, axis=1) * norms)).min())


def largest_difference(expected: Mapping[str, NDArray[np.generic]], actual: Mapping[str, NDArray[np.generic]]) -> float:
    """Largest absolute difference, in nats, between two readers' scores; infinite where a best span is not listed at all.

    Compared are null scores, normalisers, the ranked span scores, and the score that each pair's expected best span got.
    The order of spans whose scores are closer than the tolerance is not.
    """
    worst = [np.abs(expected[name].astype(np.float64) - actual[name].astype(np.float64)).max() for name in ("null_score", "log_normaliser")]
    worst.append(np.abs(expected["span_score"].astype(np.float64) - actual["span_score"].astype(np.float64)).max())
    same = (actual["span_start"] == expected["span_start"][:, :1]) & (actual["span_end"] == expected["span_end"][:, :1])
    found = np.where(same, actual["span_score"].astype(np.float64), -np.inf).max(axis=1)
    worst.append(np.abs(found - expected["span_score"][:, 0].astype(np.float64)).max())
    largest = float(np.max(worst))
    return largest if np.isfinite(largest) else float("inf")


def largest_distance(expected: NDArray[np.generic], actual: NDArray[np.generic]) -> float:
    """Largest total variation distance, 0 to 1, between rows of two (batch, classes) distributions; infinite where a value is no number."""
    distances = np.abs(expected.astype(np.float64) - actual.astype(np.float64)).sum(axis=1) / 2
    largest = float(np.max(distances))
    return largest if np.isfinite(largest) else float("inf")
