"""Checkpoint in, bundle out: trace, fuse, convert, compare, describe.

    checkpoint -> PyTorch fp32 -> <model>.raw.onnx -> fused -> fp32 (padding-free), fp16 (, int8)
                       |                                     |                     |      |
                       +---------- expected outputs ---------+----- parity gate ---+------+   -> manifest.json, golden.npz

The bundle folder appears when the last gate is passed, or not at all. On one machine the same checkpoint, options and
versions give the same bytes, and so the same bundle id.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openbook_server.binding import Arrays
from openbook_server.bundle import FORMAT, GOLDEN, TOKENIZER, Bundle, bundle_id, embedder_fingerprint, file_digest, load_bundle
from openbook_server.golden import verify_golden
from openbook_server.manifest import MANIFEST
from openbook_server.runtime import HIDDEN_STATES, Graph, build_device
from openbook_training.checkpoint import Checkpoint, resolve_checkpoint
from openbook_training.errors import InvalidData
from openbook_training.squad import Question, load_questions, spread
from tokenizers import Tokenizer

from openbook_export.errors import ExportFailed
from openbook_export.graphs import SPANS, EmbedderGraph, ReaderGraph, TaskGraph, write_onnx
from openbook_export.heads import Head, load_head, require_one_template
from openbook_export.models import EmbedderModel, ReaderModel, load_embedder, load_reader, load_tokenizer
from openbook_export.neighbours import NeighbourPart
from openbook_export.optimise import fuse, fused_nodes, limit_padding, to_float16, to_int8
from openbook_export.parity import check_parity, expected_outputs, pair_inputs, text_inputs, write_golden
from openbook_export.quality import check_quality, pair_encoder, pytorch_scores
from openbook_export.settling import load_sample, settling_facts
from openbook_export.staging import staged
from openbook_export.unpad import unpad
from openbook_export.writers import Writer, export_writer, load_writer

# Of a token's state, those whose signs a knowledge base keeps, 32 bytes a token; in docs/search.md is what more or fewer would do.
TOKEN_DIMS = 256
_RECORDED = ("openbook", "torch", "transformers", "peft", "optimum", "optimum-onnx", "onnx", "onnxruntime", "tokenizers", "numpy")
_LICENSE = re.compile(r"\A---\n(?:(?!---).*\n)*?license:\s*(\S+)\s*$", re.MULTILINE)  # a key of the card's front matter


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What to export, and how strictly."""

    checkpoint: str  # `package:NAME`, a folder, or a hub id
    bundle: Path  # where the bundle goes
    embedder: Path | None = None  # adapter that `openbook train retriever` wrote; None = the checkpoint as it is
    reader: Path | None = None  # adapter or question-answering checkpoint; None = a bundle that only embeds
    heads: Mapping[str, Path] = field(default_factory=dict)  # what else was trained on the checkpoint, by the name it gets in the bundle
    generator: Path | None = None  # what `openbook train generator` wrote
    language_model: Path | None = None  # what `openbook train causal_lm` wrote
    int8: bool = False  # also write int8 graphs; faster on a CPU without bf16, and less exact
    name: str = ""  # "" = the checkpoint's
    license: str = ""  # "" = what the model cards of the checkpoint, the reader and the heads state
    prior_weight: float | None = None  # None = what the reader states
    null_bias: float | None = None  # None = what the reader states
    quality: str = ""  # SQuAD-shaped file to compare EM and F1 on; "" = not measured
    quality_questions: int = 300  # of it, evenly spread
    quality_budget: float = 0.5  # points of F1 that an exported reader may lose; a graph that is right loses about 0.1
    settling: str = ""  # questions and corpus to choose by when a server may stop reading; "" = what the reader states
    settling_questions: int = 1_000  # of them, evenly spread; 0 = all
    em_budget: float = 0.5  # best answers in a hundred that stopping may change
    force: bool = False  # replace an existing bundle


@dataclass(slots=True)
class _Exported:
    """One model's way through the export."""

    name: str
    graph: TaskGraph
    inputs: Arrays
    facts: dict[str, Any]  # what the manifest states of it beside graphs and measurements
    padding_free: bool = False  # fp32, which processors run; worth it for texts of all lengths, not for pairs that are long
    expected: Arrays = field(init=False)
    files: dict[str, str] = field(default_factory=dict)  # precision -> file name
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)  # precision -> fused nodes, parity, quality

    def __post_init__(self) -> None:
        self.expected = expected_outputs(self.graph, self.inputs)


def export_bundle(options: ExportOptions, report: Callable[[str], None]) -> Bundle:
    """Write the bundle and open it again as the server will.

    Args:
        report: is told what was finished, one line each.

    Raises:
        ExportError: see errors.py; the destination is as it was before.
        TrainingError: no such checkpoint, quality file or questions to settle by (openbook_training.errors).
    """
    checkpoint = resolve_checkpoint(options.checkpoint)
    questions = _spread(load_questions(options.quality), options.quality_questions) if options.quality else []
    asked = load_sample(options.settling, options.settling_questions) if options.settling and options.reader else None
    with staged(options.bundle.absolute(), is_ours=_is_bundle, force=options.force) as folder:
        embedder = load_embedder(checkpoint, options.embedder)
        reader = load_reader(checkpoint, options.reader) if options.reader else None
        tokenizer, sep_id = load_tokenizer(checkpoint, reader.separators if reader else 1)
        tokenizer.save(str(folder / TOKENIZER))
        models = [_embedder(embedder, checkpoint, tokenizer)]
        if reader is not None:
            models.append(_reader(reader, tokenizer, sep_id, options))
        heads = {name: load_head(checkpoint, name, trained) for name, trained in options.heads.items()}
        require_one_template(reader, heads)
        models += [_Exported(name, head.graph.eval(), head.inputs(tokenizer), head.facts) for name, head in heads.items()]
        writing = {"generator": options.generator, "language_model": options.language_model}
        writers = [load_writer(name, trained) for name, trained in writing.items() if trained]
        adapters = {"embedder": options.embedder, "reader": options.reader, **options.heads, **writing}
        report(" and ".join([f"loaded {options.checkpoint}", *(f"{name} {trained}" for name, trained in adapters.items() if trained)]))
        for model in models:
            _export_model(model, folder, int8=options.int8, report=report)
        if questions and reader is not None:
            _measure_quality(models[1], reader, checkpoint, questions, folder, options.quality_budget, report)
        neighbours = {name: head.neighbours for name, head in heads.items() if head.neighbours is not None}
        if neighbours and options.embedder:  # the untouched embedder's cosines are what their constants were chosen for
            report(f"{', '.join(neighbours)}: without neighbours, for --embedder finds others than they were trained with")
            neighbours = {}
        for part in neighbours.values():
            part.export(folder, report)
        for writer in writers:
            export_writer(writer, folder, report)
        golden = {model.name: (model.inputs, model.expected) for model in models}
        golden |= {part.name: (part.inputs, part.expected) for part in neighbours.values()}
        golden |= {name: part.golden() for writer in writers for name, part in writer.parts.items()}
        write_golden(folder / GOLDEN, golden)

        def describe() -> None:
            _write_manifest(folder, _manifest(options, checkpoint, embedder, reader, heads, neighbours, models, writers, folder))

        describe()
        if asked is not None:  # by the bundle itself, which is another one then
            models[1].facts |= settling_facts(load_bundle(folder), asked, options.em_budget, report)
            describe()
        _open_as_the_server_will(folder)
        report("the bundle loads and its golden vectors match")
    return load_bundle(options.bundle)


def _embedder(embedder: EmbedderModel, checkpoint: Checkpoint, tokenizer: Tokenizer) -> _Exported:
    graph = EmbedderGraph(embedder.model, checkpoint.pooling)
    facts: dict[str, Any] = {"dim": int(graph.config.hidden_size), "max_tokens": embedder.max_tokens, "pooling": checkpoint.pooling}
    if HIDDEN_STATES in graph.outputs:
        facts["token_dims"] = min(TOKEN_DIMS, graph.config.hidden_size)
    if embedder.dims:
        facts["matryoshka_dims"] = list(embedder.dims)
    return _Exported("embedder", graph.eval(), text_inputs(tokenizer, embedder.max_tokens), facts, padding_free=True)


def _reader(reader: ReaderModel, tokenizer: Tokenizer, sep_id: int, options: ExportOptions) -> _Exported:
    graph = ReaderGraph(reader.model, sep_id=sep_id, max_answer_tokens=reader.max_answer_tokens)
    facts: dict[str, Any] = {
        "max_tokens": reader.max_tokens,
        "max_question_tokens": reader.max_question_tokens,
        "max_answer_tokens": reader.max_answer_tokens,
        "spans": SPANS,
        "prior_weight": float(reader.prior_weight if options.prior_weight is None else options.prior_weight),
        "null_bias": float(reader.null_bias if options.null_bias is None else options.null_bias),
    }
    own = options.prior_weight is None and options.null_bias is None  # what it was calibrated with
    if reader.settling and own and not options.settling:
        facts["settling"] = dict(reader.settling)
    return _Exported("reader", graph.eval(), pair_inputs(tokenizer, reader.max_tokens), facts)


def _export_model(model: _Exported, folder: Path, *, int8: bool, report: Callable[[str], None]) -> None:
    raw = folder / f"{model.name}.raw.onnx"
    try:
        write_onnx(model.graph, raw)
    except Exception as error:  # torch and optimum raise many kinds; to the user they are one
        raise ExportFailed(f"the {model.name} does not export to ONNX ({type(error).__name__}: {error})") from error
    gc.collect()  # the tracer leaves cycles that hold a copy of the weights
    model.files = {precision: f"{model.name}.{precision}.onnx" for precision in ("fp32", "fp16", *(("int8",) if int8 else ()))}
    fused = folder / f"{model.name}.fused.onnx"
    fuse(raw, fused, model.graph.config)
    raw.unlink()
    to_float16(fused, folder / model.files["fp16"])
    if int8:
        to_int8(fused, folder / model.files["int8"])
    if model.padding_free:
        unpad(fused, folder / model.files["fp32"])
        fused.unlink()
    else:
        fused.rename(folder / model.files["fp32"])
    for precision, name in model.files.items():
        limit_padding(folder / name, model.facts["max_tokens"])
        parity = check_parity(folder / name, precision, model.inputs, model.expected)
        model.measured[precision] = {"fused": fused_nodes(folder / name), "parity": parity}
        alone = "" if parity["batch_invariant"] else "; a row's result depends on its batch"
        report(f"{name}: " + ", ".join(f"{what} {value:.6f}" for what, value in parity.items() if type(value) is float) + alone)


def _measure_quality(
    model: _Exported,
    reader: ReaderModel,
    checkpoint: Checkpoint,
    questions: list[Question],
    folder: Path,
    budget: float,
    report: Callable[[str], None],
) -> None:
    encoder = pair_encoder(checkpoint, reader)
    reference = pytorch_scores(reader, encoder, questions)
    report(f"PyTorch: EM {reference['em']:.2f} F1 {reference['f1']:.2f} on {len(questions)} questions")
    for precision, name in model.files.items():
        scores = check_quality(folder / name, precision, reference, encoder, questions, budget)
        model.measured[precision]["quality"] = {"questions": len(questions), "budget_f1": budget, "pytorch": reference, "graph": scores}
        report(f"{name}: EM {scores['em']:.2f} F1 {scores['f1']:.2f}")


def _manifest(
    options: ExportOptions,
    checkpoint: Checkpoint,
    embedder: EmbedderModel,
    reader: ReaderModel | None,
    heads: Mapping[str, Head],
    neighbours: Mapping[str, NeighbourPart],
    models: list[_Exported],
    writers: list[Writer],
    folder: Path,
) -> dict[str, Any]:
    source = {"checkpoint": _public_name(checkpoint.name), "digest": checkpoint.digest()}
    adapters = {"embedder_digest": embedder.digest} if embedder.digest else {}
    adapters |= {"reader_digest": reader.digest} if reader else {}
    adapters |= {f"{writer.name}_digest": writer.digest for writer in writers}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": options.name or source["checkpoint"].removeprefix("package:"),
        "license": options.license or _stated_license(checkpoint.folder, *_trained(options)),
        "source": source | adapters,
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _RECORDED},
        "tasks": [
            "embed",
            *(["answer"] if reader else []),
            *(["classify"] if any(head.classifies for head in heads.values()) else []),
            *(["generate"] if writers else []),
        ],
        "files": {
            file.name: {"sha256": file_digest(file), "bytes": file.stat().st_size}
            for file in sorted(folder.iterdir())
            if file.is_file() and file.name != MANIFEST
        },
    }
    if heads:
        manifest["heads"] = {}
        manifest["source"]["head_digests"] = {name: head.digest for name, head in heads.items()}
    for model in models:
        (manifest["heads"] if model.name in heads else manifest)[model.name] = model.facts | {
            "graphs": model.files,
            "measured": model.measured,
        }
    for name, part in neighbours.items():
        manifest["heads"][name]["neighbours"] = part.facts
    for writer in writers:
        parts = {name: {"graphs": part.files, "measured": part.measured} for name, part in writer.parts.items()}
        manifest[writer.name] = writer.facts | parts
    manifest["embedder"]["fingerprint"] = embedder_fingerprint(manifest)
    return manifest | {"id": bundle_id(manifest)}


def _trained(options: ExportOptions) -> list[Path | None]:
    return [options.embedder, options.reader, *options.heads.values(), options.generator, options.language_model]


def _is_bundle(folder: Path) -> bool:
    """Whether a folder, of any version of the format, holds what its manifest lists and nothing else."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {MANIFEST, *manifest["files"]}
        return isinstance(manifest["format"], int) and {entry.name for entry in folder.iterdir()} <= listed
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _open_as_the_server_will(folder: Path) -> None:
    bundle, device = load_bundle(folder), build_device("cpu", "fp32")
    verify_golden(bundle, {model: Graph(bundle.graph_path(model, "fp32"), device) for model in bundle.graphs}, device)


def _public_name(checkpoint: str) -> str:
    """A bundle travels; a path of the machine that wrote it says nothing elsewhere."""
    return Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint


def _stated_license(*folders: Path | None) -> str:
    """The licences that the model cards (README.md) of what is exported state, as an SPDX expression."""
    stated = []
    for folder in folders:
        card = folder / "README.md" if folder else None
        found = _LICENSE.search(card.read_text(encoding="utf-8", errors="replace")) if card and card.is_file() else None
        if found and found[1] not in stated:
            stated.append(found[1])
    return " AND ".join(stated) or "unknown"


def _spread(questions: list[Question], count: int) -> list[Question]:
    """At most `count` of the questions that have an answer, evenly spread over the file."""
    answerable = [question for question in questions if question.answers]
    if not answerable:
        raise InvalidData("--quality: no question of the file has an answer")
    return spread(answerable, count)
