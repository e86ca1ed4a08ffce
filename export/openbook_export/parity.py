"""Does an exported graph compute what PyTorch fp32 computes? The gate that every graph passes, and the golden vectors.

Compared are real texts (`samples`) of several lengths, from three tokens to the model's limit, padded together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from openbook_server.binding import Arrays
from openbook_server.golden import TOLERANCES, compare, lowest_cosine
from openbook_server.rows import Row
from openbook_server.runtime import HIDDEN_STATES, Graph, build_device
from openbook_server.states import pooled, spans_of
from tokenizers import Encoding, Tokenizer
from torch import nn

from openbook_export.errors import ExportFailed
from openbook_export.samples import LONG, PASSAGES, QUESTIONS

GOLDEN_ROWS = 6  # of each model; the server runs them at every start, so there are few


def text_inputs(tokenizer: Tokenizer, max_tokens: int) -> Arrays:
    """The sample texts as one padded batch, shortest first; the last row has exactly `max_tokens` tokens."""
    return _padded([_cut(tokenizer.encode(text), max_tokens) for text in (*QUESTIONS, *PASSAGES, LONG)])


def pair_inputs(tokenizer: Tokenizer, max_tokens: int) -> Arrays:
    """Sample questions beside sample passages as one padded batch, shortest first; the last row has exactly `max_tokens` tokens."""
    pairs = [(question, PASSAGES[at % len(PASSAGES)]) for at, question in enumerate(QUESTIONS)] + [(QUESTIONS[0], LONG)]
    return _padded([_cut(tokenizer.encode(*pair), max_tokens) for pair in pairs])


@torch.inference_mode()
def expected_outputs(graph: nn.Module, inputs: Mapping[str, NDArray[np.generic]]) -> Arrays:
    """What PyTorch fp32 gives for `inputs`."""
    outputs = graph(**{name: torch.from_numpy(values) for name, values in inputs.items()})
    return {name: values.numpy() for name, values in outputs.items()}


def check_parity(file: Path, precision: str, inputs: Arrays, expected: Arrays) -> dict[str, float | bool]:
    """Load the graph in `file`, run it on the CPU, and compare.

    Returns:
        What openbook_server.golden.compare measures, and "batch_invariant": whether a row alone gives the same bytes as
        among the others at the same padded length.

    Raises:
        ExportFailed: it does not load or run, or is out of the precision's tolerance (openbook_server.golden.TOLERANCES,
            which the server applies too).
    """
    try:
        graph = Graph(file, build_device("cpu", precision))
        actual = graph.run(inputs, states=graph.gives_states)
    except Exception as error:  # onnxruntime raises a dozen kinds, none of them public
        raise ExportFailed(f"the exported {file.name} does not run: {error}") from error
    measured = compare(expected, actual)
    if HIDDEN_STATES in expected:
        measured["cosine"] = min(measured["cosine"], _window_cosine(expected, actual, inputs["attention_mask"]))
    if not TOLERANCES[precision].allows(measured):
        numbers = ", ".join(f"{what} {value:.6f}" for what, value in measured.items())
        raise ExportFailed(f"{file.name} is not the model it was exported from: {numbers}; allowed: {TOLERANCES[precision]}")
    return {**measured, "batch_invariant": _is_batch_invariant(graph, inputs, actual)}


def _window_cosine(expected: Arrays, actual: Arrays, mask: NDArray[np.generic]) -> float:
    """The lowest between windows pooled from the states that were expected, and from those that came."""
    units = []
    for outputs in (expected, actual):
        rows = [Row([0] * int(length)) for length in mask.sum(axis=1)]
        windows = np.concatenate([pooled(outputs[HIDDEN_STATES][at], spans_of(row)) for at, row in enumerate(rows)])
        units.append(windows / np.linalg.norm(windows, axis=1, keepdims=True))
    return lowest_cosine(*units)


def _is_batch_invariant(graph: Graph, inputs: Arrays, together: Arrays) -> bool:
    for row in range(0, len(next(iter(inputs.values()))), 3):
        alone = graph.run({name: values[row : row + 1] for name, values in inputs.items()})
        if any(values[0].tobytes() != together[name][row].tobytes() for name, values in alone.items()):
            return False
    return True


def write_golden(file: Path, models: Mapping[str, tuple[Arrays, Arrays]]) -> None:
    """Keep rows of all lengths, with what PyTorch gave for them, for the server to run again at every start.

    Args:
        models: (inputs, expected outputs) by model name.
    """
    kept: Arrays = {}
    for model, (inputs, expected) in models.items():
        rows = len(next(iter(inputs.values())))
        chosen = np.unique(np.linspace(0, rows - 1, GOLDEN_ROWS).round().astype(int))
        kept |= {f"{model}/{name}": values[chosen] for name, values in (inputs | expected).items() if name != HIDDEN_STATES}
    np.savez(file, allow_pickle=False, **kept)


def _cut(encoding: Encoding, max_tokens: int) -> tuple[list[int], list[int]]:
    """(ids, segments) of at most `max_tokens` tokens, the closing [SEP] kept."""
    ids, types = encoding.ids, encoding.type_ids
    return ([*ids[: max_tokens - 1], ids[-1]], [*types[: max_tokens - 1], types[-1]]) if len(ids) > max_tokens else (ids, types)


def _padded(rows: Sequence[tuple[list[int], list[int]]]) -> Arrays:
    rows = sorted(rows, key=lambda row: len(row[0]))
    shape = (len(rows), len(rows[-1][0]))
    batch = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    for at, (ids, types) in enumerate(rows):
        batch["input_ids"][at, : len(ids)] = ids
        batch["attention_mask"][at, : len(ids)] = 1
        batch["token_type_ids"][at, : len(ids)] = types
    return dict(batch)
