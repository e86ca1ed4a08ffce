"""Padding-free graphs: the layers of a fused BERT on the tokens of a batch, end to end, instead of on padded rows.

A batch of B rows padded to length L has T tokens. Everything but attention treats tokens one by one and costs what it is
given: here T tokens, not B·L, and one reading of the weights for all rows. So rows of different lengths share a batch at the
cost of their tokens. Inputs and outputs are as before: the graph takes the padding out by itself, and puts it back for
attention and at the end (unpadding: Zeng et al. 2022, "Boosting Distributed Training Performance of the Unpadded BERT
Model", section 3). Attention is written out in ONNX's own operators, which every provider runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from openbook_server.runtime import PADDING_FREE_KEY

from openbook_export.errors import ExportFailed

MASKED = -10_000.0  # added to the scores of padding, as onnxruntime's fused attention does: exp of it is 0
PREFIX = "/unpadded/"  # of the names of what is added
TOKENS = PREFIX + "tokens"  # (1, T, d) embeddings
STATES = PREFIX + "states"  # (1, T, d) of the last layer
KEPT = PREFIX + "kept"  # (T,) where the tokens stand among B·L places
PLACES = PREFIX + "places"  # (B, L) which token stands there; 0 for padding
BIAS = PREFIX + "bias"  # (B, 1, 1, L) 0, or MASKED for padding
ATTENTION_BIAS = 5  # which input of onnxruntime's attention is added to scores, (1, heads, L, L); most have none


def unpad(fused: Path, unpadded: Path) -> None:
    """Write the padding-free form of the graph in `fused`.

    Raises:
        ExportFailed: the graph has not one attention node of onnxruntime for two layer normalisations.
    """
    model = onnx.load(fused)
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    normalised = [node.output[0] for node in model.graph.node if node.op_type == "SkipLayerNormalization"]
    if not attentions or len(normalised) != 2 * len(attentions):
        raise ExportFailed(f"{fused.name}: {len(attentions)} attention nodes and {len(normalised)} layer normalisations are no fused BERT")
    embedded, last = attentions[0].input[0], normalised[-1]
    writer = _Writer(model.graph, attentions[0].input[1])
    for node in list(model.graph.node):
        if node == attentions[0]:
            writer.take_out(embedded)
        if node.op_type == "SkipLayerNormalization":
            _rename(node, embedded, TOKENS)
        if node.op_type == "Attention":
            _rename(node, embedded, TOKENS)
            writer.attention(node)
        else:
            writer.nodes.append(node)
        if node.output[0] == last:  # who takes the states, the graph's caller among them, finds them (B, L, d) as before
            node.output[0] = STATES
            writer.put_back(STATES, last)
    del model.graph.node[:], model.graph.value_info[:]  # shapes inside are others now
    model.graph.node.extend(writer.nodes)
    helper.set_model_props(model, {PADDING_FREE_KEY: "1"})
    onnx.save(model, unpadded)


def _rename(node: onnx.NodeProto, old: str, new: str) -> None:
    for at, name in enumerate(node.input):
        if name == old:
            node.input[at] = new


class _Writer:
    """The nodes of the new graph, in the order they run."""

    def __init__(self, graph: onnx.GraphProto, weights: str) -> None:
        """`weights` names those of an attention node, (d, 3 d)."""
        self._graph, self.nodes, self._layer = graph, list[onnx.NodeProto](), 0
        self._dim = next(tensor.dims[0] for tensor in graph.initializer if tensor.name == weights)
        self._flat = self._constant("flat", np.array([1, -1, self._dim]))
        self._first = self._constant("first", np.array([0]))

    def take_out(self, embedded: str) -> None:
        """From (B, L, d) embeddings and the mask: TOKENS, KEPT, PLACES and BIAS."""
        flat = self._add("Reshape", "attention_mask", self._constant("all", np.array([-1])))
        self._add("Squeeze", self._add("NonZero", flat), self._first, name=KEPT)
        before = self._add("Sub", self._add("CumSum", flat, self._constant("axis", np.array(0))), flat)  # tokens before each place
        self._add("Reshape", self._add("Mul", before, flat), self._add("Shape", "attention_mask"), name=PLACES)
        padding = self._add("Sub", self._constant("one", np.float32(1)), self._add("Cast", "attention_mask", to=onnx.TensorProto.FLOAT))
        bias = self._add("Mul", padding, self._constant("masked", np.float32(MASKED)))
        self._add("Unsqueeze", bias, self._constant("middle", np.array([1, 2])), name=BIAS)
        self._add("Gather", self._add("Reshape", embedded, self._flat), KEPT, axis=1, name=TOKENS)

    def put_back(self, tokens: str, name: str = "") -> str:
        """(1, T, n) to (B, L, n)."""
        return self._add("Squeeze", self._add("Gather", tokens, PLACES, axis=1), self._first, name=name)

    def attention(self, fused: onnx.NodeProto) -> None:
        """What an attention node computes, on tokens: (1, T, d) in and out, padded in between."""
        self._layer += 1
        states, weights, bias = fused.input[:3]
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in fused.attribute}
        heads = attributes["num_heads"]
        size = self._dim // heads
        padded = self.put_back(self._add("Add", self._add("MatMul", states, weights), bias))
        parts = [f"{padded}/{part}" for part in ("query", "key", "value")]
        self.nodes.append(helper.make_node("Split", [padded, self._constant("thirds", np.array([self._dim] * 3))], parts, axis=2))
        by_head = self._constant("by_head", np.array([0, 0, heads, size]))
        query, key, value = (
            self._add("Transpose", self._add("Reshape", part, by_head), perm=order)
            for part, order in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
        )
        scale = self._constant("scale", np.float32(attributes.get("scale", size**-0.5)))
        scores = self._add("Add", self._add("Mul", self._add("MatMul", query, key), scale), BIAS)
        if len(fused.input) > ATTENTION_BIAS:
            scores = self._add("Add", scores, fused.input[ATTENTION_BIAS])
        mixed = self._add("MatMul", self._add("Softmax", scores, axis=-1), value)
        rows = self._add("Transpose", mixed, perm=[0, 2, 1, 3])
        self._add("Gather", self._add("Reshape", rows, self._flat), KEPT, axis=1, name=fused.output[0])

    def _constant(self, name: str, value: np.ndarray | np.generic) -> str:
        name = f"{PREFIX}{self._layer}/{name}"
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node with one output; returns the output's name."""
        name = name or f"{PREFIX}{len(self.nodes)}/{operator}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name
