"""The graphs of models that write text: what an encoder leaves to be attended to, and one step of a decoder.

Names follow optimum: `past_key_values.<layer>.key` goes in, `present.<layer>.key` comes out, longer by the tokens that were read; of an
encoder-decoder `.decoder.` and `.encoder.` stand between. A decoder has one graph for the first tokens, past of length 0, and for every
later one. An encoder's graph gives the keys and values that the decoder's cross-attention reads, which are computed once however many
tokens are written: those of several passages, laid end to end, are fusion-in-decoder. Where the decoder points into what was read, the
pointer's keys are of one head more, `present.pointer.encoder.key`, and the step takes the tokens that were read, `encoder_input_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from openbook_server.decoding import SOURCE_IDS
from openbook_training.pointer import PointerGenerator, Source
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from openbook_export.graphs import OPSET, quiet_tracing

KINDS = ("key", "value")
POINTER = "pointer.encoder.key"
# How the modules are named in BERT, T5 and BART that make keys and values of an encoder's states for a decoder's layer.
PROJECTIONS = (
    ("crossattention.self.key", "crossattention.self.value"),
    ("EncDecAttention.k", "EncDecAttention.v"),
    ("encoder_attn.k_proj", "encoder_attn.v_proj"),
)


class WritingGraph(nn.Module):
    """What is exported: tensors by name in, by the order of `inputs`; tensors by the order of `outputs` out.

    Both say which axes are left open. B rows share a batch; T tokens are read, P were read before, S are attended to in an encoder.
    """

    inputs: Mapping[str, dict[int, str]]
    outputs: Mapping[str, dict[int, str]]

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.config = network.config


class CrossGraph(WritingGraph):
    """(B, S) input_ids and attention_mask to each decoder layer's (B, heads, S, d) keys and values of them."""

    def __init__(self, network: Any, heads: int) -> None:
        super().__init__(network)
        self._heads = heads
        keys, values = ([name for name, _ in network.named_modules() if name.endswith(kind)] for kind in zip(*PROJECTIONS, strict=True))
        self._projections = [name for pair in zip(keys, values, strict=True) for name in pair]
        self.inputs = {name: {0: "batch_size", 1: "source_length"} for name in ("input_ids", "attention_mask")}
        names = _names("present", len(keys), ".encoder") + [f"present.{POINTER}"] * _points(network)
        self.outputs = {name: {0: "batch_size", 2: "source_length"} for name in names}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        states = self.network.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        projected = (self.network.get_submodule(name)(states) for name in self._projections)
        # With unflatten onnxruntime's shape inference would stop, and with it attention fusion.
        heads = [values.view(*input_ids.shape, self._heads, values.shape[2] // self._heads).transpose(1, 2) for values in projected]
        return (*heads, self.network.pointer.keys(states)[:, None]) if _points(self.network) else tuple(heads)


class StepGraph(WritingGraph):
    """(B, T) tokens after (B, heads, P, d) keys and values, beside (B, heads, S, d) of what was read, to (B, T, V) logits."""

    def __init__(self, network: Any, layers: int) -> None:
        super().__init__(network)
        self._layers = layers
        tokens = {"input_ids": {0: "batch_size", 1: "length"}, "encoder_attention_mask": {0: "batch_size", 1: "source_length"}}
        past = {name: {0: "batch_size", 2: "past_length"} for name in _names("past_key_values", layers, ".decoder")}
        names = _names("past_key_values", layers, ".encoder") + [f"past_key_values.{POINTER}"] * _points(network)
        source = {name: {0: "batch_size", 2: "source_length"} for name in names}
        self.inputs = tokens | past | source
        if _points(network):
            self.inputs |= {SOURCE_IDS: {0: "batch_size", 1: "source_length"}}
        present = {name: {0: "batch_size", 2: "past_and_length"} for name in _names("present", layers, ".decoder")}
        self.outputs = {"logits": {0: "batch_size", 1: "length"}} | present

    def forward(self, input_ids: Tensor, encoder_attention_mask: Tensor, *keys_and_values: Tensor) -> tuple[Tensor, ...]:
        half = 2 * self._layers
        cache = EncoderDecoderCache(_cache(keys_and_values[:half]), _cache(keys_and_values[half : 2 * half]))
        cache.is_updated = dict.fromkeys(range(self._layers), True)  # cross-attention takes what is there
        unread: Any = keys_and_values[half].new_zeros((input_ids.shape[0], encoder_attention_mask.shape[1], 1))
        source = BaseModelOutput(unread)
        if _points(self.network):
            keys, ids = cast(tuple[Any, Any], keys_and_values[2 * half :])
            source = Source(unread, pointer_keys=keys[:, 0], pointer_ids=ids)
        output = self.network(
            encoder_outputs=source,
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, *_flat(output.past_key_values.self_attention_cache)


class TextGraph(WritingGraph):
    """GPT-2: (B, T) tokens and positions after (B, heads, P, d) keys and values, (B, P + T) mask, to (B, T, V) logits."""

    def __init__(self, network: Any, layers: int) -> None:
        super().__init__(network)
        tokens = {name: {0: "batch_size", 1: "length"} for name in ("input_ids", "position_ids")}
        past = {name: {0: "batch_size", 2: "past_length"} for name in _names("past_key_values", layers)}
        self.inputs = tokens | {"attention_mask": {0: "batch_size", 1: "past_and_length"}} | past
        present = {name: {0: "batch_size", 2: "past_and_length"} for name in _names("present", layers)}
        self.outputs = {"logits": {0: "batch_size", 1: "length"}} | present

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, *keys_and_values: Tensor) -> tuple[Tensor, ...]:
        before = keys_and_values[0].shape[2]
        places = torch.arange(before + input_ids.shape[1], device=input_ids.device)
        seen = (places[None] <= places[before:, None])[None, None] & (attention_mask[:, None, None] == 1)  # (B, 1, T, P + T)
        # transformers builds its own mask with vmap, which cannot be traced; it takes one of four axes as it is.
        mask = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)
        output = self.network(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, past_key_values=_cache(keys_and_values), use_cache=True
        )
        return output.logits, *_flat(output.past_key_values)


def write_graph(graph: WritingGraph, example: Mapping[str, Tensor], file: Path) -> None:
    """Trace `graph` on an example of every input into `file`; the axes it names are left open.

    optimum does the same for encoders (see graphs.write_onnx), but refuses BERT2BERT with a past and has no encoder of this kind.
    """
    with quiet_tracing(), torch.inference_mode():
        torch.onnx.export(
            graph,
            tuple(example[name] for name in graph.inputs),
            str(file),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes={**graph.inputs, **graph.outputs},
            opset_version=OPSET,
            dynamo=False,
        )


def _points(network: Any) -> bool:
    return isinstance(network, PointerGenerator)


def _names(what: str, layers: int, half: str = "") -> list[str]:
    return [f"{what}.{layer}{half}.{kind}" for layer in range(layers) for kind in KINDS]


def _cache(flat: tuple[Tensor, ...]) -> DynamicCache:
    return DynamicCache.from_legacy_cache(tuple(zip(flat[::2], flat[1::2], strict=True)))  # type: ignore[arg-type]


def _flat(cache: Any) -> tuple[Tensor, ...]:
    return tuple(value for layer in cache.layers for value in (layer.keys, layer.values))
