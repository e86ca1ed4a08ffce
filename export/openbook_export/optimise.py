"""Fused, half-precision and int8 graphs from an exported one, by onnxruntime's transformer optimiser."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.onnx_model import OnnxModel
from onnxruntime.transformers.optimizer import optimize_model
from openbook_server.buckets import COARSE
from openbook_server.runtime import LONGEST_KEY

from openbook_export.errors import ExportFailed
from openbook_export.graphs import HEADS
from openbook_export.unpad import ATTENTION_BIAS, PREFIX

PRODUCER = "openbook"


def fuse(raw: Path, fused: Path, config: Any) -> None:
    """Fuse attention, layer norms and activations of the encoder in `raw`; write `fused`.

    Args:
        config: the transformers configuration: heads, layers, hidden size.

    Raises:
        ExportFailed: fewer were fused than the model has: a graph several times too slow must not pass for an optimised one.
    """
    _require_fused(_optimise(raw, fused, config.num_attention_heads, config.hidden_size), config)


def fuse_writer(raw: Path, fused: Path, *, heads: tuple[int, int], norms: int, attention: int) -> None:
    """Fuse what can be fused in the encoder or decoder of a model that writes.

    Args:
        heads: attention heads and hidden size.
        norms: normalisations that it has.
        attention: attention nodes that must be fused.

    Raises:
        ExportFailed: fewer were fused.
    """
    counts = _optimise(raw, fused, *heads)
    normal = sum(count for kind, count in counts.items() if kind.endswith("LayerNormalization"))
    if normal != norms or counts.get("Attention", 0) != attention:
        raise ExportFailed(
            f"onnxruntime's optimiser fused {normal} of {norms} normalisations and {counts.get('Attention', 0)} of {attention} attention "
            f"nodes of {fused.name}. The pinned versions of requirements/all.txt fuse all of them"
        )


def _optimise(raw: Path, fused: Path, heads: int, hidden_size: int) -> dict[str, int]:
    """Write what onnxruntime's optimiser makes of `raw`; returns what it fused."""
    options = FusionOptions("bert")
    options.use_raw_attention_mask(True)  # the default keeps a row's length only, and so assumes right padding
    with _quiet_optimiser():
        # Level 0: onnxruntime's own passes run at load, for the machine that loads it.
        model = optimize_model(str(raw), "bert", heads, hidden_size, optimization_options=options, opt_level=0)
    _drop_names_of_this_machine(model.model)
    model.save_model_to_file(str(fused))
    return fused_nodes(fused)


def fused_nodes(file: Path) -> dict[str, int]:
    """How many nodes of each kind that onnxruntime added to ONNX, layer normalisations and padding-free attentions there are in `file`."""
    nodes = onnx.load(file, load_external_data=False).graph.node
    counts = Counter(node.op_type for node in nodes if node.domain == "com.microsoft" or node.op_type.endswith("LayerNormalization"))
    counts["PaddingFreeAttention"] = sum(node.op_type == "Softmax" and node.name.startswith(PREFIX) for node in nodes)
    return dict(sorted((+counts).items()))


def _require_fused(counts: dict[str, int], config: Any) -> None:
    layers = config.num_hidden_layers
    found = {
        "attention": (counts.get("Attention", 0), layers),
        "layer normalisation": (sum(count for kind, count in counts.items() if kind.endswith("LayerNormalization")), 2 * layers + 1),
    }
    if getattr(config, "hidden_act", None) == "gelu" or getattr(config, "activation", None) == "gelu":  # the latter is DistilBERT's name
        found["gelu"] = (sum(count for kind, count in counts.items() if kind.endswith("Gelu")), layers)
    missing = [f"{fused} of {wanted} {name} nodes" for name, (fused, wanted) in found.items() if fused != wanted]
    if missing:
        raise ExportFailed(
            f"onnxruntime's optimiser fused only {' and '.join(missing)}; the graph would run several times slower. "
            "The pinned versions of requirements/all.txt fuse all of them"
        )


def to_float16(fused: Path, half: Path) -> None:
    """Weights and the transformer in fp16, inputs and outputs as before.

    Pooling and span scoring stay fp32: -1e9, which stands for log 0, is not representable in fp16, nor is a sum of many exponentials.
    """
    model = OnnxModel(onnx.load(fused))
    with _quiet_optimiser():
        model.convert_float_to_float16(
            keep_io_types=True, node_block_list=[node.name for node in model.nodes() if node.name.startswith(HEADS)]
        )
        model.save_model_to_file(str(half))


def to_int8(fused: Path, quantised: Path) -> None:
    """Weights in int8 per channel, activations quantised as they come; a text's vector then depends on its batch."""
    # In int8 the operator takes nothing that is added to scores (MPNet's bias), and onnxruntime would leave that out without a word.
    biased = [node.name for node in onnx.load(fused).graph.node if node.op_type == "Attention" and len(node.input) > ATTENTION_BIAS]
    with _quiet_optimiser():
        quantize_dynamic(
            fused,
            quantised,
            op_types_to_quantize=["MatMul", "Attention"],
            nodes_to_exclude=biased,
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of fused nodes, which it knows nothing of
        )


def limit_padding(file: Path, max_tokens: int) -> None:
    """State in a graph how long its rows may get, where the server's buckets do not end there: the model may have no more positions."""
    if max_tokens % COARSE.last_step == 0:
        return
    model = onnx.load(file)
    model.metadata_props.add(key=LONGEST_KEY, value=str(max_tokens))
    onnx.save(model, file)


def _drop_names_of_this_machine(model: onnx.ModelProto) -> None:
    """Export notes source files in every node; the same checkpoint gives the same bytes wherever it is exported."""
    model.producer_name = PRODUCER
    model.doc_string = model.graph.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]


@contextlib.contextmanager
def _quiet_optimiser() -> Iterator[None]:
    """The optimiser logs every fusion, and warns of ones that a graph has no use for; the counts above are what matters."""
    loggers = [
        logging.getLogger(),
        *(logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("onnxruntime")),
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
