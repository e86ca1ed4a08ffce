"""Does a row give the same bytes alone and among others? Measured at every start: it depends on graph, precision, provider and processor.

Kernels may add in another order where a batch has another size, and dynamic int8 scales what is in a batch by the largest of it. What is
measured is a sample of lengths and batches: it finds what depends on the batch by its nature, and cannot prove that nothing ever does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import numpy as np

from openbook_server.binding import Arrays
from openbook_server.bundle import Bundle
from openbook_server.embedder import GRAPH, QUESTIONS
from openbook_server.golden import INPUTS
from openbook_server.rows import Row, collate
from openbook_server.runtime import HIDDEN_STATES, Device, Graph

log = logging.getLogger(__name__)

LENGTHS = (4, 16, 48)  # tokens: kernels may be others for short rows than for long ones
LEAST_ROWS = 3  # of a batch: one in front and one at its end, which kernels may treat apart, and others
BATCH_TOKENS = 96  # of a batch; with the rows alone 400 of a graph, a tenth of a second of a processor's core at most
DEVICE_BATCH_TOKENS = 1_024  # the same where another device computes, which chooses kernels by a batch's size and takes no time for it


def measure_invariance(bundle: Bundle, graphs: Mapping[str, Graph], device: Device) -> frozenset[str]:
    """Run rows of the bundle's golden inputs alone and among others of the same padded length, and log what came of it.

    Args:
        graphs: that read texts, by model name, loaded on `device`.

    Returns:
        The models whose rows gave the same bytes; QUESTIONS stands for GRAPH where the states of tokens are wanted too.
    """
    golden, tokens = bundle.golden(), BATCH_TOKENS if device.computes_here else DEVICE_BATCH_TOKENS
    varying = {
        name: varying_outputs(graph, {of: golden[f"{name}/{of}"] for of in INPUTS}, batch_tokens=tokens) for name, graph in graphs.items()
    }
    if bundle.embedder.token_dims:
        varying[QUESTIONS] = varying[GRAPH]
    same = sorted(name for name, outputs in varying.items() if not (outputs if name == QUESTIONS else outputs - {HIDDEN_STATES}))
    others = ", ".join(sorted(varying.keys() - same))
    log.log(
        logging.INFO if others else logging.DEBUG,  # where it is as everybody expects there is nothing to say
        "%s in %s: rows give the same bytes whatever shares their batch through %s%s",
        device.name,
        device.precision,
        ", ".join(same) or "no graph",
        f"; through {others} only alone, which a request asks for with batch_invariant" if others else "",
    )
    return frozenset(same)


def varying_outputs(graph: Graph, inputs: Arrays, *, batch_tokens: int) -> set[str]:
    """Outputs of which a row has other bytes alone than in front of others or behind them, in any of `LENGTHS`.

    Args:
        inputs: (rows, length) arrays of INPUTS, padded on the right; the longest row is cut to be measured, all give the others.
        batch_tokens: of a batch, padding included.

    Returns:
        Their names, HIDDEN_STATES among them where the graph gives those.
    """
    varying = set()
    for length in sorted({graph.buckets.padded_length(min(length, inputs["input_ids"].shape[1])) for length in LENGTHS}):
        row, others = _cut(inputs, length), _others(graph, inputs, length)
        count = max(LEAST_ROWS, batch_tokens // length)
        alone = graph.run(collate([row], length), states=graph.gives_states)
        together = graph.run(collate([row, *(next(others) for _ in range(count - 2)), row], length), states=graph.gives_states)
        for name, values in alone.items():
            if any(values[0].tobytes() != together[name][at].tobytes() for at in (0, -1)):
                varying.add(name)
    return varying


def _cut(inputs: Arrays, length: int) -> Row:
    """The longest row, or as much of it as `length` tokens hold, with its closing token."""
    longest = int(np.argmax(inputs["attention_mask"].sum(axis=1)))
    tokens = int(inputs["attention_mask"][longest].sum())
    kept = [*range(min(length, tokens) - 1), tokens - 1]
    return Row(inputs["input_ids"][longest, kept].tolist(), inputs["token_type_ids"][longest, kept].tolist())


def _others(graph: Graph, inputs: Arrays, length: int) -> Iterator[Row]:
    """Rows that are padded to `length`, without end, of all the tokens that there are one after the other."""
    real = inputs["attention_mask"].astype(bool)
    ids, types = inputs["input_ids"][real], inputs["token_type_ids"][real]
    lengths = [tokens for tokens in range(1, length + 1) if graph.buckets.padded_length(tokens) == length]
    at = 0
    while True:
        for tokens in reversed(lengths):
            taken = np.arange(at, at + tokens) % len(ids)
            yield Row(ids[taken].tolist(), types[taken].tolist())
            at += tokens
