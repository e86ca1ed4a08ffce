"""Models that write text, from the folder that `openbook train` left to graphs that write the same.

The gate is what a user gets: greedy decoding in onnxruntime, step by step with keys and values handed on, gives PyTorch's tokens and, at
every step, PyTorch's logits within the tolerance of the precision (openbook_server.golden.TOLERANCES).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openbook_server.binding import Arrays
from openbook_server.decoding import SOURCE_IDS
from openbook_server.golden import TOLERANCES
from openbook_server.runtime import Graph, build_device
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.generator import AnswerEncoder, FusionInDecoder, load_generator
from openbook_training.language_model import load_language_model
from torch import Tensor, nn

from openbook_export.decoders import CrossGraph, StepGraph, TextGraph, WritingGraph, write_graph
from openbook_export.errors import CheckpointUnsupported, ExportFailed
from openbook_export.models import read_json
from openbook_export.optimise import fuse_writer, fused_nodes, limit_padding, to_float16
from openbook_export.samples import PASSAGES, QUESTIONS

CPU = torch.device("cpu")
PRECISIONS = ("fp32", "fp16")
TEXT_TOKENS = 16  # that a language model writes in the gate
READ = (slice(0, 3), slice(3, 5))  # tokens of a golden row: its past, and what is read in one step

Chain = Callable[[Mapping[str, Graph]], tuple[float, bool]]


@dataclass(slots=True)
class Part:
    """One graph of a model that writes."""

    graph: WritingGraph
    inputs: dict[str, Tensor]  # a small batch of every input: traced with, and kept as golden vectors
    norms: int  # normalisations that it computes
    attention: int  # attention nodes that must be fused; onnxruntime has no fusion for a past that grows, nor for T5's position bias
    heads: tuple[int, int]  # attention heads and hidden size
    files: dict[str, str] = field(default_factory=dict)  # precision -> file name
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)

    def golden(self) -> tuple[Arrays, Arrays]:
        """Inputs, and of the outputs what the server compares: a decoder's logits, an encoder's keys and values."""
        with torch.inference_mode():
            outputs = dict(zip(self.graph.outputs, self.graph(*(self.inputs[name] for name in self.graph.inputs)), strict=True))
        kept = {"logits": outputs["logits"]} if "logits" in outputs else outputs
        return {name: value.numpy() for name, value in self.inputs.items()}, {name: value.numpy() for name, value in kept.items()}


@dataclass(frozen=True, slots=True)
class Writer:
    """A generator or a language model, ready to export."""

    name: str  # generator or language_model
    parts: dict[str, Part]  # by the name that its graph gets in the bundle
    facts: dict[str, Any]  # what the manifest states of it
    tokenizer: Any
    digest: str
    chain: Chain  # the gate: the largest difference between logits, and whether all tokens are the same


def load_writer(name: str, folder: Path) -> Writer:
    """The model in `folder`; `name` is generator or language_model.

    Raises:
        CheckpointNotFound: `openbook train generator` or `causal_lm` left no such folder, or it is damaged.
        CheckpointUnsupported: of another architecture than BERT2BERT, T5, BART (generator) and GPT-2 (language model).
    """
    return _generator(folder) if name == "generator" else _language_model(folder)


def export_writer(writer: Writer, folder: Path, report: Callable[[str], None]) -> None:
    """Write the graphs and the tokenizer of `writer` into `folder`, and hold them to the gate.

    Raises:
        ExportFailed: a graph does not trace, lacks fused nodes, or writes something else than PyTorch.
    """
    for name, part in writer.parts.items():
        raw = folder / f"{name}.raw.onnx"
        try:
            write_graph(part.graph, part.inputs, raw)
        except Exception as error:  # torch raises many kinds; to the user they are one
            raise ExportFailed(f"the {name} does not export to ONNX ({type(error).__name__}: {error})") from error
        part.files = {precision: f"{name}.{precision}.onnx" for precision in PRECISIONS}
        fused = folder / part.files["fp32"]
        fuse_writer(raw, fused, heads=part.heads, norms=part.norms, attention=part.attention)
        raw.unlink()
        to_float16(fused, folder / part.files["fp16"])
        if name == "generator_encoder":  # decoders are never padded beyond what they hold
            for file in part.files.values():
                limit_padding(folder / file, writer.facts["max_tokens"])
    for precision in PRECISIONS:
        device = build_device("cpu", precision)
        graphs = {name: Graph(folder / part.files[precision], device) for name, part in writer.parts.items()}
        try:
            difference, same = writer.chain(graphs)
        except Exception as error:  # onnxruntime raises a dozen kinds, none of them public
            raise ExportFailed(f"the exported {writer.name} does not run in {precision}: {error}") from error
        parity = {"difference": difference, "same_tokens": same}
        if not TOLERANCES[precision].allows({"difference": difference}) or (precision == "fp32" and not same):
            raise ExportFailed(
                f"the {writer.name} in {precision} is not the model it was exported from: logits differ by {difference:.6f}, "
                f"{'the same' if same else 'other'} tokens; allowed: {TOLERANCES[precision]}, and the same tokens in fp32"
            )
        for part in writer.parts.values():
            part.measured[precision] = {"fused": fused_nodes(folder / part.files[precision]), "parity": parity}
        report(f"{writer.name} in {precision}: difference {difference:.6f}, {'the same' if same else 'other'} greedy tokens")
    writer.tokenizer.backend_tokenizer.no_truncation()
    writer.tokenizer.backend_tokenizer.save(str(folder / writer.facts["tokenizer"]))


def _generator(folder: Path) -> Writer:
    model, encoder, settings = load_generator(str(folder))
    network = model.network
    kind = network.config.model_type
    halves = {"encoder-decoder": "bert", "t5": "t5", "bart": "bart"}
    if kind not in halves or (kind == "encoder-decoder" and network.encoder.config.model_type != "bert"):
        raise CheckpointUnsupported(f"--generator {folder}: its architecture is {kind!r}; export verifies BERT2BERT, T5 and BART")
    pairs = encoder.inputs([(QUESTIONS[0], [PASSAGES[0], PASSAGES[2]])], CPU)
    source = {"input_ids": pairs.ids[:, :48], "attention_mask": pairs.mask[:, :48]}
    config = network.config.encoder if kind == "encoder-decoder" else network.config
    reading, writing = (int(getattr(config, f"{half}_attention_heads", config.num_attention_heads)) for half in ("encoder", "decoder"))
    with torch.inference_mode():
        cross = CrossGraph(network, writing).eval()  # keys and values for the decoder to attend to
        keys = cross(**source)
        layers = len(keys) // 2  # an odd one is the pointer's
        steps = StepGraph(network, layers).eval()
        tokens = torch.cat([torch.full((2, 1), encoder.start), source["input_ids"][:, 1:5]], dim=1)
        nothing = [value[:, :, :0] for value in keys[: 2 * layers]]
        beside = (*keys, source["input_ids"]) if SOURCE_IDS in steps.inputs else keys
        past = steps(tokens[:, READ[0]], source["attention_mask"], *nothing, *beside)[1:]
    golden = (tokens[:, READ[1]], source["attention_mask"], *past, *beside)
    outside = _norms(network) - _norms(network.get_encoder())
    attention, dim = 0 if kind == "t5" else int(config.num_hidden_layers), int(config.hidden_size)
    parts = {
        "generator_encoder": Part(cross, source, _norms(network.get_encoder()), attention, (reading, dim)),
        "generator_decoder": Part(steps, dict(zip(steps.inputs, golden, strict=True)), outside, 0, (writing, dim)),
    }
    facts = {
        "architecture": "bert2bert" if kind == "encoder-decoder" else kind,
        "passages": settings.passages,
        "max_tokens": settings.max_tokens,
        "max_answer_tokens": settings.max_answer_tokens,
        "start_token": encoder.start,
        "end_token": encoder.end,
        "tokenizer": "generator.tokenizer.json",
    }

    def chain(graphs: Mapping[str, Graph]) -> tuple[float, bool]:
        asked = [(question, _beside(at, settings.passages)) for at, question in enumerate(QUESTIONS)]
        measured = [
            _same_answer(model, encoder, question, graphs["generator_encoder"], graphs["generator_decoder"], settings.max_answer_tokens)
            for question in asked
        ]
        return max(difference for difference, _ in measured), all(same for _, same in measured)

    return Writer("generator", parts, facts, encoder.tokenizer, resolve_checkpoint(str(folder)).digest(), chain)


def _beside(at: int, count: int) -> list[str]:
    return [PASSAGES[(at + number) % len(PASSAGES)] for number in range(min(count, 3))]


@torch.inference_mode()
def _same_answer(
    model: FusionInDecoder, encoder: AnswerEncoder, question: tuple[str, Sequence[str]], cross: Graph, steps: Graph, limit: int
) -> tuple[float, bool]:
    """Write one answer in both: the largest difference between their logits, and whether the graphs choose PyTorch's tokens."""
    inputs = encoder.inputs([question], CPU)
    fused, mask = model.fused(inputs)
    found = cross.run({"input_ids": inputs.ids.numpy(), "attention_mask": inputs.mask.numpy()})
    lengths = inputs.mask.sum(1).tolist()
    joined = [
        np.concatenate([values[pair : pair + 1, :, :length] for pair, length in enumerate(lengths)], axis=2) for values in found.values()
    ]
    source = dict(zip([name for name in steps.input_names if ".encoder." in name], joined, strict=True))
    decoded = _renamed(source, ".encoder.", ".decoder.")
    past: Arrays = {name: values[:, :, :0] for name, values in decoded.items() if name in steps.input_names}
    source["encoder_attention_mask"] = np.ones((1, sum(lengths)), np.int64)
    if SOURCE_IDS in steps.input_names:
        source[SOURCE_IDS] = inputs.ids[inputs.mask.bool()].numpy()[None]
    written, worst, same = [encoder.start], 0.0, True
    for _ in range(limit):
        outputs = model.network(encoder_outputs=fused, attention_mask=mask, decoder_input_ids=torch.tensor([written]), use_cache=False)
        expected = outputs.logits[0, -1].numpy()
        actual = steps.run({"input_ids": np.array([written[-1:]]), **source, **past})
        worst, same = _compared(worst, same, expected, actual["logits"][0, -1])
        past = _renamed(actual, "present.", "past_key_values.")
        written.append(int(expected.argmax()))
        if written[-1] == encoder.end:
            break
    return worst, same


def _language_model(folder: Path) -> Writer:
    stored = resolve_checkpoint(str(folder))
    kind = read_json(stored.folder / "config.json").get("model_type")
    if kind != "gpt2":
        raise CheckpointUnsupported(f"--language-model {folder}: its architecture is {kind!r}; export verifies GPT-2")
    model, prompts, settings = load_language_model(str(folder))
    network = model.network
    config = network.config
    steps = TextGraph(network, config.num_hidden_layers).eval()
    room = config.max_position_embeddings - TEXT_TOKENS
    if room < READ[1].stop:
        raise CheckpointUnsupported(f"--language-model {folder}: {config.max_position_embeddings} positions are too few to verify it")
    encode = prompts.tokenizer.backend_tokenizer.encode
    start = prompts.start
    rows = [
        [start, *encode(PASSAGES[at % len(PASSAGES)]).ids, *prompts.newline, *encode(question).ids][:room]
        for at, question in enumerate(QUESTIONS)
    ]
    first, rest = (torch.tensor([row[read] for row in rows[:2]]) for read in READ)
    heads, dim = int(config.num_attention_heads), int(config.hidden_size)
    nothing = [torch.zeros(2, heads, 0, dim // heads)] * (2 * config.num_hidden_layers)
    mask, places = torch.ones(2, READ[1].stop, dtype=torch.long), torch.arange(READ[1].stop).expand(2, -1)
    with torch.inference_mode():
        past = steps(first, places[:, READ[0]], mask[:, READ[0]], *nothing)[1:]
    mask = mask.clone()
    mask[1, 0] = 0  # as where a shorter row of the batch is padded on the left
    golden = dict(zip(steps.inputs, (rest, places[:, READ[1]], mask, *past), strict=True))
    facts = {
        "architecture": "gpt2",
        "max_tokens": int(config.max_position_embeddings),
        **{name: getattr(settings, name) for name in ("stride_tokens", "context_tokens", "passages", "passage_tokens", "query_tokens")},
        "start_token": start,
        "end_token": int(start if prompts.tokenizer.eos_token_id is None else prompts.tokenizer.eos_token_id),
        "tokenizer": "language_model.tokenizer.json",
    }

    def chain(graphs: Mapping[str, Graph]) -> tuple[float, bool]:
        measured = [_same_text(network, row, graphs["language_model"], heads, dim) for row in rows]
        return max(difference for difference, _ in measured), all(same for _, same in measured)

    part = Part(steps, golden, _norms(network), 0, (heads, dim))
    return Writer("language_model", {"language_model": part}, facts, prompts.tokenizer, stored.digest(), chain)


@torch.inference_mode()
def _same_text(network: Any, row: Sequence[int], steps: Graph, heads: int, dim: int) -> tuple[float, bool]:
    """Read `row` at once and go on token by token, in both; as `_same_answer`."""
    past: Arrays = {
        name: np.zeros((1, heads, 0, dim // heads), np.float32) for name in steps.input_names if name.startswith("past_key_values.")
    }
    read, written, worst, same = list(row), list(row), 0.0, True
    for _ in range(TEXT_TOKENS):
        expected = network(torch.tensor([written])).logits[0].numpy()
        before = len(written) - len(read)
        actual = steps.run(
            {
                "input_ids": np.array([read]),
                "position_ids": np.arange(before, len(written))[None],
                "attention_mask": np.ones((1, len(written)), np.int64),
                **past,
            }
        )
        worst, same = _compared(worst, same, expected[before:], actual["logits"][0])
        past = _renamed(actual, "present.", "past_key_values.")
        read = [int(expected[-1].argmax())]
        written += read
    return worst, same


def _compared(worst: float, same: bool, expected: np.ndarray, actual: np.ndarray) -> tuple[float, bool]:
    difference = float(np.abs(expected - actual).max())
    return max(worst, difference if np.isfinite(difference) else np.inf), same and bool((expected.argmax(-1) == actual.argmax(-1)).all())


def _renamed(arrays: Mapping[str, Any], before: str, after: str) -> Arrays:
    return {name.replace(before, after): values for name, values in arrays.items() if before in name}


def _norms(module: nn.Module) -> int:
    """Normalisations that a forward pass computes once each."""
    return sum(type(part).__name__.endswith(("LayerNorm", "RMSNorm")) for part in module.modules())
