"""The export on a tiny checkpoint: what a bundle promises, and every gate that refuses one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from openbook_export.errors import CheckpointUnsupported, ExportFailed, OutputExists
from openbook_export.export import ExportOptions, export_bundle
from openbook_export.graphs import SPANS, EmbedderGraph, ReaderGraph, SpanScoring
from openbook_export.models import load_embedder, load_reader, load_tokenizer
from openbook_export.optimise import fuse
from openbook_export.parity import check_parity, expected_outputs
from openbook_server.bundle import Bundle, load_bundle
from openbook_server.ranking import Settling
from openbook_server.rows import Row
from openbook_server.runtime import HIDDEN_STATES, LONGEST_KEY, Graph, build_device
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.errors import CheckpointNotFound, InvalidData
from openbook_training.negatives import embed
from openbook_training.objectives import null_scores, span_scores
from openbook_training.reader import PairEncoder, forward, trained_reader
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

TEXTS = ["red", "the king read", "one two three city river king book", "what was it, in the case of a blue book?"]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)


def batch(tokenizer: Tokenizer, texts: list[str] | list[tuple[str, str]], length: int) -> dict[str, np.ndarray]:
    encodings = tokenizer.encode_batch(texts)
    rows = {
        "input_ids": [encoding.ids for encoding in encodings],
        "attention_mask": [encoding.attention_mask for encoding in encodings],
        "token_type_ids": [encoding.type_ids for encoding in encodings],
    }
    return {name: np.array([[*row, *[0] * (length - len(row))] for row in values]) for name, values in rows.items()}


def graph(bundle: Bundle, model: str, precision: str = "fp32") -> Graph:
    return Graph(bundle.graph_path(model, precision), build_device("cpu", precision, 1))


def options(tmp_path: Path, checkpoint: Path, **changes: object) -> ExportOptions:
    return ExportOptions(**{"checkpoint": str(checkpoint), "bundle": tmp_path / "bundle", **changes})


def silent(line: str) -> None:
    """Progress goes nowhere."""


def test_the_reader_that_is_exported_is_the_function_that_was_trained(tiny_checkpoint: Path, tiny_reader: Path) -> None:
    """Segments included: reading them in only one of the two costs points that no other gate sees."""
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    trained = trained_reader(checkpoint, str(tiny_reader)).eval()
    exported = load_reader(checkpoint, tiny_reader).model
    encoder = PairEncoder(checkpoint, max_tokens=32, stride=4, max_question_tokens=8)
    pairs = [pair for row, text in enumerate(TEXTS) for pair in encoder.pairs("what was red ?", [text], row)]
    with torch.inference_mode():
        before = forward(trained, pairs, encoder, torch.device("cpu"))
        after = forward(exported, pairs, encoder, torch.device("cpu"))
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_a_reader_trained_with_segments_keeps_them(tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_reader, tmp_path / "reader")
    settings = json.loads((folder / "reader.json").read_text())
    del settings["one_segment"]
    (folder / "reader.json").write_text(json.dumps(settings))
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    of_two, of_one = (
        load_reader(checkpoint, source).model.get_submodule("bert.embeddings.token_type_embeddings").weight
        for source in (folder, tiny_reader)
    )
    assert not torch.equal(of_two[0], of_two[1])
    assert torch.equal(of_one[0], of_one[1])


def test_the_embedder_gives_the_vectors_of_pytorch(bundle: Bundle, tiny_checkpoint: Path) -> None:
    wanted = embed(resolve_checkpoint(str(tiny_checkpoint)), TEXTS)
    inputs = batch(Tokenizer.from_file(str(bundle.tokenizer_path)), TEXTS, 24)
    for precision, cosine in (("fp32", 0.9999), ("fp16", 0.999)):
        vectors = graph(bundle, "embedder", precision).run(inputs)["sentence_embedding"]
        assert vectors.dtype == np.float32
        assert (vectors * wanted).sum(1).min() >= cosine


def test_a_graph_whose_windows_are_others_fails_parity(bundle: Bundle, tiny_checkpoint: Path) -> None:
    inputs = dict(batch(Tokenizer.from_file(str(bundle.tokenizer_path)), TEXTS, 24))
    expected = expected_outputs(EmbedderGraph(load_embedder(resolve_checkpoint(str(tiny_checkpoint))).model, "mean").eval(), inputs)
    for precision in ("fp32", "fp16", "int8"):
        check_parity(bundle.graph_path("embedder", precision), precision, inputs, expected)
    with pytest.raises(ExportFailed, match="is not the model it was exported from"):
        check_parity(
            bundle.graph_path("embedder", "fp32"), "fp32", inputs, expected | {HIDDEN_STATES: expected[HIDDEN_STATES][:, :, ::-1].copy()}
        )


def test_the_reader_gives_the_spans_and_normaliser_of_the_training_objective(
    bundle: Bundle, tiny_checkpoint: Path, tiny_reader: Path
) -> None:
    """The oracle is the objective that the reader was trained with, on PyTorch's logits of every pair alone."""
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
    reader = load_reader(checkpoint, tiny_reader)
    pairs = [("who read ?", text) for text in TEXTS]
    outputs = graph(bundle, "reader").run(batch(tokenizer, pairs, 40))
    for row, pair in enumerate(pairs):
        encoding = tokenizer.encode(*pair)
        one = {name: torch.tensor(values) for name, values in batch(tokenizer, [pair], len(encoding.ids)).items()}
        with torch.inference_mode():
            logits = reader.model(**one)
        passage = torch.tensor([[kind == 1 for kind in encoding.type_ids[:-1]] + [False]])
        spans = span_scores(logits.start_logits, logits.end_logits, passage, 5)[0]
        null = null_scores(logits.start_logits, logits.end_logits)
        ranked = sorted(
            ((float(spans[first, extra]), first, first + extra) for first in range(len(encoding.ids)) for extra in range(5)), reverse=True
        )
        valid = [span for span in ranked if span[0] > -1e8][:SPANS]
        assert outputs["span_score"][row][: len(valid)] == pytest.approx([score for score, _, _ in valid], abs=1e-3)
        assert (outputs["span_score"][row][len(valid) :] == -1e9).all()
        assert (outputs["span_start"][row][0], outputs["span_end"][row][0]) == valid[0][1:]
        assert outputs["null_score"][row] == pytest.approx(float(null), abs=1e-3)
        everything = torch.logsumexp(torch.cat([spans.flatten(), null]), dim=0)
        assert outputs["log_normaliser"][row] == pytest.approx(float(everything), abs=1e-3)


@pytest.mark.parametrize("model", ["embedder", "reader"])
@pytest.mark.parametrize("length", [20, 21])
def test_a_row_gives_the_same_bytes_whatever_shares_its_batch(bundle: Bundle, model: str, length: int) -> None:
    """One row alone is where onnxruntime's reductions would add in another order."""
    texts = [" ".join(TEXTS[2].split()[: count % 7 + 1]) for count in range(17)]
    rows = batch(Tokenizer.from_file(str(bundle.tokenizer_path)), texts if model == "embedder" else [("who ?", t) for t in texts], length)
    run = graph(bundle, model).run
    alone = [run({name: values[row : row + 1] for name, values in rows.items()}) for row in range(17)]
    for size in (2, 3, 5, 8, 17):
        together = run({name: values[:size] for name, values in rows.items()})
        for name, values in together.items():
            for row in range(size):
                assert values[row].tobytes() == alone[row][name][0].tobytes(), (name, size, row)


def test_a_passage_without_tokens_scores_as_no_answer() -> None:
    ids = torch.tensor([[2, 9, 3, 3, 0]])
    types, mask = torch.tensor([[0, 0, 0, 1, 0]]), torch.tensor([[1, 1, 1, 1, 0]])
    logits = torch.arange(5.0)[None]
    _, _, scores, null, normaliser = SpanScoring(sep_id=3, max_answer_tokens=2)(logits, logits, ids, mask, types)
    assert (scores == -1e9).all()
    assert normaliser == null == 0.0


def test_the_tokenizer_neither_pads_nor_truncates(bundle: Bundle) -> None:
    tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
    assert tokenizer.padding is None
    assert tokenizer.truncation is None


def test_the_manifest_says_what_was_fused_and_how_far_every_graph_is_from_pytorch(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest["embedder"]["measured"]["fp32"]["fused"]["PaddingFreeAttention"] == 2
    assert manifest["embedder"]["measured"]["fp32"]["parity"]["cosine"] >= 0.9999
    assert manifest["embedder"]["measured"]["fp32"]["parity"]["batch_invariant"] is True
    assert manifest["reader"]["measured"]["fp16"]["parity"]["difference"] <= 0.1
    assert set(manifest["reader"]["graphs"]) == {"fp32", "fp16", "int8"}
    assert manifest["versions"]["onnxruntime"]
    assert manifest["source"]["checkpoint"] == "checkpoint"
    assert str(bundle.folder.parent) not in json.dumps(manifest)


def test_no_graph_names_a_path_of_the_machine_that_wrote_it(bundle: Bundle) -> None:
    root = str(Path(torch.__file__).parent.parent).encode()
    for file in bundle.folder.glob("*.onnx"):
        assert root not in file.read_bytes()
        assert onnx.load(file).producer_name in {"openbook", "onnx.quantize"}


def test_the_same_export_gives_the_same_bundle_id(bundle: Bundle, tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path) -> None:
    again = export_bundle(options(tmp_path, tiny_checkpoint, reader=tiny_reader, int8=True, name="tiny", license="Apache-2.0"), silent)
    assert again.id == bundle.id


def test_a_bundle_without_a_reader_only_embeds(tiny_checkpoint: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    bundle = export_bundle(options(tmp_path, tiny_checkpoint), lines.append)
    assert bundle.reader is None
    assert bundle.tasks == ("embed",)
    assert bundle.name == "checkpoint"
    assert bundle.license == "unknown"
    assert {file.name for file in bundle.folder.iterdir()} == {
        "manifest.json",
        "tokenizer.json",
        "golden.npz",
        "embedder.fp32.onnx",
        "embedder.fp16.onnx",
    }
    assert any("embedder.fp16.onnx: cosine" in line for line in lines)


def test_the_licence_is_what_the_model_cards_state(tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path) -> None:
    checkpoint, reader = shutil.copytree(tiny_checkpoint, tmp_path / "model"), shutil.copytree(tiny_reader, tmp_path / "reader")
    (checkpoint / "README.md").write_text("---\nlanguage: en\nlicense: mit\ntags:\n- x\n---\nlicense: none of this\n")
    (reader / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n")
    assert export_bundle(options(tmp_path, checkpoint, reader=reader), silent).license == "mit AND cc-by-sa-4.0"


@pytest.mark.parametrize("positions", [90, 96])
def test_texts_of_every_length_that_a_model_has_positions_for_are_embedded(tiny_checkpoint: Path, tmp_path: Path, positions: int) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    config = BertConfig.from_pretrained(folder, max_position_embeddings=positions)
    BertModel(config).save_pretrained(folder)
    bundle = export_bundle(options(tmp_path, folder), silent)
    assert bundle.embedder.max_tokens == positions
    for precision in ("fp32", "fp16"):
        embedder = graph(bundle, "embedder", precision)
        for tokens in (positions - 1, positions):
            row = Row([2, *[40] * (tokens - 2), 3])
            as_served = embedder.run_rows([row], embedder.buckets.padded_length(tokens))["sentence_embedding"]
            np.testing.assert_allclose(as_served, embedder.run_rows([row], tokens)["sentence_embedding"], atol=2e-3)
    stated = embedder_files_state_longest(bundle)
    assert stated == ({"90"} if positions == 90 else set())  # where buckets end there by themselves, files stay as they were


def embedder_files_state_longest(bundle: Bundle) -> set[str]:
    return {
        entry.value
        for precision in ("fp32", "fp16")
        for entry in onnx.load(bundle.graph_path("embedder", precision)).metadata_props
        if entry.key == LONGEST_KEY
    }


def test_calibrated_constants_come_from_the_reader_unless_given(tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path) -> None:
    reader = shutil.copytree(tiny_reader, tmp_path / "reader")
    settling = {"unread_weight": 3}
    settings_of(reader, prior_weight=2.5, null_bias=-1.0, settling=settling)
    info = export_bundle(options(tmp_path, tiny_checkpoint, reader=reader, null_bias=0.5), silent).reader
    assert info is not None
    assert (info.prior_weight, info.null_bias, info.settling) == (2.5, 0.5, None)  # settling was calibrated with another bias
    info = export_bundle(options(tmp_path / "own", tiny_checkpoint, reader=reader), silent).reader
    assert info is not None
    assert (info.null_bias, info.settling) == (-1.0, Settling(3.0))
    assert (info.max_tokens, info.max_question_tokens, info.max_answer_tokens) == (64, 16, 5)


def test_a_whole_question_answering_checkpoint_is_a_reader_too(tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    merged = load_reader(checkpoint, tiny_reader).model
    whole = shutil.copytree(tiny_checkpoint, tmp_path / "whole")
    merged.save_pretrained(whole)  # type: ignore[operator]  # a transformers model; nn.Module types its attributes as Tensor
    reloaded = load_reader(checkpoint, whole)
    assert torch.equal(reloaded.model.qa_outputs.weight, merged.qa_outputs.weight)  # type: ignore[union-attr]  # the same
    assert (reloaded.max_tokens, reloaded.max_question_tokens) == (128, 42)  # 384 cut to the positions that it has, and a third


def settings_of(reader: Path, **changes: object) -> None:
    """Change what reader.json states."""
    file = reader / "reader.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_adapter_of_another_checkpoint_is_refused(tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path) -> None:
    reader = shutil.copytree(tiny_reader, tmp_path / "reader")
    settings_of(reader, base_digest="0" * 64, base_checkpoint="other")
    with pytest.raises(CheckpointUnsupported, match=r"was trained on 'other' with digest 0000"):
        export_bundle(options(tmp_path, tiny_checkpoint, reader=reader), silent)
    assert [file.name for file in tmp_path.iterdir()] == ["reader"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "reader.json").unlink(), "lacks reader.json"),
        (lambda folder: (folder / "reader.json").write_text("{}"), "lacks reader.json with a base_digest"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "lacks adapter_model.safetensors"),
        (lambda folder: (folder / "reader.json").write_text("{"), "unreadable"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"short"), "does not load"),
        (lambda folder: settings_of(folder, max_tokens="many"), "no number"),
        (lambda folder: settings_of(folder, max_tokens=18), "leave no room for a passage"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "neither adapter_config.json"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_damaged_reader_is_refused_with_a_reason(
    tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path, damage: object, message: str
) -> None:
    reader = shutil.copytree(tiny_reader, tmp_path / "reader")
    damage(reader)  # type: ignore[operator]  # a function of the folder
    with pytest.raises(CheckpointUnsupported, match=message):
        load_reader(resolve_checkpoint(str(tiny_checkpoint)), reader)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "config.json",
            '"model_type": "bert"',
            '"model_type": "electra"',
            "model_type 'electra'; export fuses and verifies bert, camembert",
        ),
        ("tokenizer.json", "{", "[", "does not load"),
    ],
)
def test_a_checkpoint_of_another_kind_or_a_damaged_one_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, file: str, old: str, new: str, message: str
) -> None:
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    with pytest.raises((CheckpointUnsupported, CheckpointNotFound), match=message):
        export_bundle(options(tmp_path, copy), silent)
    assert not (tmp_path / "bundle").exists()


def without_weights(folder: Path, part: str) -> Path:
    """`folder`, whose weights with `part` in their names are gone."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_are_missing_are_named_and_never_made_up(tiny_checkpoint: Path, tmp_path: Path) -> None:
    lacking = without_weights(Path(shutil.copytree(tiny_checkpoint, tmp_path / "lacking")), "encoder.layer.1.")
    message = r"lacks encoder\.layer\.1\.attention\.output\.LayerNorm\.bias, .* and 13 more, weights of a BertModel"
    with pytest.raises(CheckpointNotFound, match=message):
        export_bundle(options(tmp_path, lacking), silent)
    with pytest.raises(CheckpointNotFound, match=r"lacks encoder\.layer\.1\."):
        load_embedder(resolve_checkpoint(str(lacking)))


def test_a_reader_without_its_head_or_some_of_its_updates_is_refused(tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    with pytest.raises(CheckpointNotFound, match=r"lacks qa_outputs\.bias, qa_outputs\.weight, weights of a BertForQuestionAnswering"):
        load_reader(checkpoint, tiny_checkpoint)
    adapter = Path(shutil.copytree(tiny_reader, tmp_path / "reader"))
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value for name, value in weights.items() if "layer.1.output" not in name}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointUnsupported, match=r"adapter_model\.safetensors lacks 2 weights, the first .*layer\.1\.output"):
        load_reader(checkpoint, adapter)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Any text with the word would fail on the server, and the whole message with it."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "more"))
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    rows = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["zebrafish"])
    tokenizer.save(str(copy / "tokenizer.json"))
    with pytest.raises(CheckpointNotFound, match=rf"its tokenizer has ids up to {rows}, its model embeddings for ids below {rows};"):
        load_embedder(resolve_checkpoint(str(copy)))


@pytest.mark.parametrize(
    ("part", "change", "differing"),
    [
        ("normalizer", {"lowercase": False}, "normalizer"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre-tokenizer"),
        ("model", {"max_input_chars_per_word": 4}, "model"),
    ],
)
def test_a_reader_that_was_trained_on_other_tokens_is_refused(
    tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path, part: str, change: dict[str, object], differing: str
) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    whole = Path(shutil.copytree(tiny_checkpoint, tmp_path / "whole"))
    load_reader(checkpoint, tiny_reader).model.save_pretrained(whole)  # type: ignore[operator]
    stated = json.loads((whole / "tokenizer.json").read_text())
    stated[part] |= change
    (whole / "tokenizer.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointUnsupported, match=f"the {differing} of its tokenizer is not"):
        load_reader(checkpoint, whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "unknown"}, r"its weights do not load .KeyError: 'unknown'"),
        ({"vocab_size": "many"}, r"its weights do not load .TypeError"),
        ({"is_decoder": True}, r"config\.json states is_decoder true"),
        ({"position_embedding_type": "relative_key"}, r"config\.json states position_embedding_type 'relative_key'"),
    ],
)
def test_a_configuration_that_makes_another_model_or_none_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises((CheckpointUnsupported, CheckpointNotFound), match=message):
        load_embedder(resolve_checkpoint(str(copy)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 33, "num_attention_heads": 3}, r"has 33 dimensions; .* take one whose hidden_size is even"),
        ({"max_position_embeddings": 15}, r"has positions for 15 tokens .*; export traces texts of 16"),
    ],
)
def test_a_shape_that_cannot_be_traced_is_refused(tiny_checkpoint: Path, tmp_path: Path, shape: dict[str, int], message: str) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    BertModel(BertConfig.from_pretrained(copy, **shape)).save_pretrained(copy)
    with pytest.raises(CheckpointUnsupported, match=message):
        load_embedder(resolve_checkpoint(str(copy)))


def test_pairs_are_marked_where_the_tokenizer_itself_does_not(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text().replace('"type_id": 1', '"type_id": 0'))
    (marked, sep), (own, _) = (load_tokenizer(resolve_checkpoint(str(folder))) for folder in (copy, tiny_checkpoint))
    assert marked.encode("red", "blue").type_ids == own.encode("red", "blue").type_ids == [0, 0, 0, 1, 1]
    assert sep == 3


def test_an_export_whose_attention_is_not_fused_fails(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A graph that holds one layer, where the configuration promises two, is what a broken fusion looks like."""
    from openbook_export.graphs import write_onnx

    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    model = load_embedder(checkpoint).model
    del model.encoder.layer[1]  # type: ignore[union-attr,operator]  # a BertModel; nn.Module types its attributes as Tensor
    write_onnx(EmbedderGraph(model, "cls").eval(), tmp_path / "raw.onnx")
    with pytest.raises(ExportFailed, match=r"fused only 1 of 2 attention nodes"):
        fuse(tmp_path / "raw.onnx", tmp_path / "fused.onnx", model.config)


def test_a_graph_that_differs_from_pytorch_fails_parity(bundle: Bundle, tiny_checkpoint: Path) -> None:
    golden = bundle.golden()
    for model in ("embedder", "reader"):
        arrays = {name.removeprefix(f"{model}/"): values for name, values in golden.items() if name.startswith(model)}
        check_parity(bundle.graph_path(model, "fp32"), "fp32", arrays, arrays)
        wrong = {name: values if values.dtype == np.int64 else values[::-1] for name, values in arrays.items()}
        with pytest.raises(ExportFailed, match="is not the model it was exported from"):
            check_parity(bundle.graph_path(model, "fp32"), "fp32", arrays, wrong)


def test_a_graph_that_does_not_load_fails_the_export(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(ExportFailed, match="does not run"):
        check_parity(tmp_path / "broken.onnx", "fp32", {}, {})


def questions_file(tmp_path: Path) -> Path:
    rows = [
        {"id": str(n), "question": "who read ?", "context": f"the {word} king read a book", "answers": {"text": [word]}}
        for n, word in enumerate(["red", "blue", "green", "one"])
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_task_quality_is_measured_and_written_down(tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path) -> None:
    file = questions_file(tmp_path)
    with file.open("a") as stream:  # a passage of which the tokenizer makes nothing
        stream.write("\n" + json.dumps({"id": "nothing", "question": "who read ?", "context": "\ufffd", "answers": {"text": ["ada"]}}))
    bundle = export_bundle(options(tmp_path, tiny_checkpoint, reader=tiny_reader, quality=str(file), quality_questions=3), silent)
    quality = bundle.manifest["reader"]["measured"]["fp32"]["quality"]
    assert quality["questions"] == 3
    assert quality["graph"] == quality["pytorch"]


def test_a_loss_of_task_quality_beyond_the_budget_fails_and_leaves_nothing(
    tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openbook_export.export.pytorch_scores", lambda *arguments: {"em": 100.0, "f1": 100.0})
    file = questions_file(tmp_path)
    with pytest.raises(ExportFailed, match=r"answers worse than PyTorch: F1 .* against 100.00 on 4 questions"):
        export_bundle(options(tmp_path, tiny_checkpoint, reader=tiny_reader, quality=str(file)), silent)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_an_existing_bundle_is_replaced_only_by_force(bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    with pytest.raises(OutputExists, match="--force replaces it"):
        export_bundle(options(tmp_path, tiny_checkpoint), silent)
    assert load_bundle(tmp_path / "bundle").id == bundle.id
    assert export_bundle(options(tmp_path, tiny_checkpoint, force=True), silent).reader is None
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_is_no_bundle_is_never_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExists, match="is no bundle"):
        export_bundle(options(tmp_path, tiny_checkpoint, force=True), silent)
    assert (tmp_path / "bundle" / "thesis.txt").read_text() == "years of work"


def test_what_lies_in_a_bundle_s_folder_beside_it_is_never_removed(bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A knowledge base, say; or a folder that is somebody else's, though it has a manifest.json."""
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    (tmp_path / "bundle" / "kb").mkdir()
    with pytest.raises(OutputExists, match="holds other things beside one"):
        export_bundle(options(tmp_path, tiny_checkpoint, force=True), silent)
    shutil.rmtree(tmp_path / "bundle")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps({"name": "a web application"}))
    with pytest.raises(OutputExists, match="is no bundle"):
        export_bundle(options(tmp_path, tiny_checkpoint, force=True), silent)
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["manifest.json"]


def test_the_current_folder_does_not_become_a_bundle(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputExists, match="is the current folder"):
        export_bundle(ExportOptions(checkpoint=str(tiny_checkpoint), bundle=Path()), silent)


def test_an_interrupted_export_leaves_the_old_bundle_and_nothing_else(
    bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    shutil.copytree(bundle.folder, tmp_path / "bundle")
    monkeypatch.setattr("openbook_export.export.write_golden", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(options(tmp_path, tiny_checkpoint, force=True), silent)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert load_bundle(tmp_path / "bundle").id == bundle.id


def test_what_is_missing_is_said_before_any_work_is_done(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="no such folder"):
        export_bundle(options(tmp_path, tmp_path / "absent"), silent)
    with pytest.raises(InvalidData, match="does not exist"):
        export_bundle(options(tmp_path, tiny_checkpoint, reader=tmp_path, quality="absent.json"), silent)
    assert not list(tmp_path.iterdir())


def test_pooling_on_the_first_token_gives_its_state(tiny_checkpoint: Path) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    model, (tokenizer, _) = load_embedder(checkpoint).model, load_tokenizer(checkpoint)
    inputs = {name: torch.from_numpy(values) for name, values in batch(tokenizer, TEXTS, 24).items()}
    with torch.inference_mode():
        [(name, vectors)] = EmbedderGraph(model, "cls")(**inputs).items()  # windows are means: a model that pools otherwise gives none
        states = model(**inputs).last_hidden_state[:, 0]
    assert name == "sentence_embedding"
    assert torch.allclose(vectors, torch.nn.functional.normalize(states, dim=1), atol=1e-5)


def test_reader_outputs_are_named_once(tiny_checkpoint: Path, tiny_reader: Path) -> None:
    reader = load_reader(resolve_checkpoint(str(tiny_checkpoint)), tiny_reader)
    graph = ReaderGraph(reader.model, sep_id=3, max_answer_tokens=5).eval()
    inputs = {name: torch.ones((2, 8), dtype=torch.long) for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.inference_mode():
        assert list(graph(**inputs)) == list(ReaderGraph.outputs)
