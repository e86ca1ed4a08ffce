"""Heads in a bundle: the graph computes what was trained, and the manifest says what a caller must know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from openbook_export.errors import CheckpointUnsupported, ExportFailed
from openbook_export.export import ExportOptions, export_bundle
from openbook_export.heads import load_head
from openbook_export.parity import check_parity
from openbook_server.bundle import Bundle, load_bundle
from openbook_server.command_info import _bundle as describe
from openbook_server.errors import BundleInvalid
from openbook_server.runtime import Graph, build_device
from openbook_training.checkpoint import Checkpoint, resolve_checkpoint
from openbook_training.errors import CheckpointNotFound
from openbook_training.heads import HeadModel, RowEncoder, load_head_model
from openbook_training.masked_language_model import build_masked_lm
from torch import nn

TEXTS = [
    ("red", ""),
    ("the king read a book", ""),
    ("one two three city river king book", ""),
    ("what was it, in the case of a blue book?", ""),
]
PAIRS = [(text, "the river was blue") for text, _ in TEXTS]


def silent(line: str) -> None:
    """Progress goes nowhere."""


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return resolve_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tiny_reader: Path, tiny_heads: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    return export_bundle(
        ExportOptions(checkpoint=checkpoint.name, bundle=folder, reader=tiny_reader, heads=tiny_heads, int8=True, name="tiny"), silent
    )


@pytest.mark.parametrize("name", ["topics", "claims", "words", "own_words"])
def test_a_graph_gives_the_distribution_of_the_trained_model(
    bundle: Bundle, checkpoint: Checkpoint, tiny_heads: dict[str, Path], name: str
) -> None:
    """The oracle is the model as training loads it, its adapter not merged."""
    model, settings = load_head_model(checkpoint, tiny_heads[name])
    encoder = RowEncoder(checkpoint, max_tokens=settings["max_tokens"])
    rows = encoder.rows(PAIRS if settings["pair"] else TEXTS)
    inputs = encoder.batch(rows, torch.device("cpu"))
    with torch.inference_mode():
        expected = model(inputs).exp().numpy()
    feed = {what: values.numpy() for what, values in inputs.items()}
    for precision, tolerance in (("fp32", 1e-4), ("fp16", 0.02), ("int8", 0.5)):
        actual = Graph(bundle.graph_path(name, precision), build_device("cpu", precision)).run(feed)["probability"]
        assert actual.shape == expected.shape
        assert actual.sum(1) == pytest.approx(np.ones(len(rows)), abs=1e-3)
        assert np.abs(actual - expected).sum(1).max() / 2 <= tolerance, precision
    assert np.abs(expected[0] - expected[2]).sum() > 0.05  # the text matters


def test_a_caller_learns_labels_and_limits_from_the_bundle(bundle: Bundle, tiny_heads: dict[str, Path]) -> None:
    assert set(bundle.heads) == set(tiny_heads)
    topics, claims, words = bundle.heads["topics"], bundle.heads["claims"], bundle.heads["words"]
    assert (topics.objective, topics.pair, topics.max_tokens, topics.labels) == ("classifier", False, 24, ("cold", "leafy", "warm"))
    assert (claims.objective, claims.pair, claims.labels) == ("verification", True, ("no", "yes"))
    assert words.labels == ()
    assert bundle.tasks == ("embed", "answer", "classify")
    assert topics.neighbours is not None
    assert (topics.neighbours.count, topics.neighbours.label_key) == (5, "shelf")
    assert claims.neighbours is words.neighbours is None
    measured = bundle.manifest["heads"]["topics"]["measured"]
    assert measured["fp32"]["fused"]["Attention"] == 2
    assert measured["fp32"]["parity"]["distance"] <= 1e-4
    assert set(bundle.manifest["source"]["head_digests"]) == set(tiny_heads)
    assert str(tiny_heads["topics"].parent) not in json.dumps(bundle.manifest)
    facts = describe(bundle.folder)
    assert facts["topics"] == ("classifier, 3 labels, 24 tokens a text, 5 neighbours labelled by 'shelf', graphs fp16, fp32, int8")
    assert facts["claims"].startswith("verification, 2 labels, 40 tokens a pair")
    assert facts["words"].startswith("vocab_head, the vocabulary, 24 tokens a text")


def test_heads_change_nothing_of_embedder_and_reader(bundle: Bundle, tiny_bundle: Path) -> None:
    plain = load_bundle(tiny_bundle)
    assert bundle.embedder == plain.embedder
    for file in ("embedder.fp32.onnx", "embedder.fp16.onnx", "reader.fp32.onnx", "reader.int8.onnx"):
        assert bundle.manifest["files"][file] == plain.manifest["files"][file]


def test_golden_vectors_and_digests_cover_the_heads(bundle: Bundle, tmp_path: Path) -> None:
    golden = bundle.golden()
    assert golden["topics.neighbours/combined"].shape == golden["topics.neighbours/alone"].shape == (6, 3)
    for name in bundle.heads:
        assert golden[f"{name}/probability"].shape[0] == len(golden[f"{name}/input_ids"])
    arrays = {name.removeprefix("topics/"): values for name, values in golden.items() if name.startswith("topics/")}
    wrong = arrays | {"probability": arrays["probability"][::-1]}
    with pytest.raises(ExportFailed, match=r"is not the model it was exported from: distance 0\.\d+; allowed: .*distance at most 0.001"):
        check_parity(bundle.graph_path("topics", "fp32"), "fp32", arrays, wrong)
    copy = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    (copy / "topics.fp16.onnx").unlink()
    with pytest.raises(BundleInvalid, match=r"lacks topics.fp16.onnx"):
        load_bundle(copy)
    with pytest.raises(BundleInvalid, match=r"it has no sentiment, only embedder, reader, claims, .*`openbook export --task` adds one"):
        bundle.graph_path("sentiment", "fp32")


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
def test_a_masked_language_model_tells_the_first_hidden_token(checkpoint: Checkpoint, tmp_path: Path, whole: bool) -> None:
    """The oracle is the model as training has it; what is hidden further on changes nothing but what is read."""
    torch.manual_seed(5)
    trained = build_masked_lm(checkpoint, lora_rank=0 if whole else 2, lora_alpha=2).eval()
    for parameter in trained.head.transform.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, parameter in trained.backbone.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
            parameter.data = parameter.data.half().float()  # as it is saved
    trained.save(tmp_path / "trained", checkpoint)
    source = str(tmp_path / "trained" / "checkpoint") if whole else checkpoint.name
    bundle = export_bundle(ExportOptions(checkpoint=source, bundle=tmp_path / "bundle", heads={"fill": tmp_path / "trained"}), silent)
    head = bundle.heads["fill"]
    assert (head.objective, head.pair, head.labels, head.max_tokens) == ("masked_lm", False, (), 128)
    golden = bundle.golden()
    encoder = RowEncoder(checkpoint, max_tokens=64)
    assert (golden["fill/input_ids"] == encoder.mask).sum(axis=1).tolist() == [1] * len(golden["fill/input_ids"])
    inputs = encoder.batch(encoder.rows(TEXTS[1:]), torch.device("cpu"))
    hidden = [2, 3, 1]
    inputs["input_ids"][range(3), hidden] = encoder.mask
    inputs["input_ids"][1, 6] = encoder.mask  # another one, after the first
    with torch.inference_mode():
        expected = trained(inputs, torch.arange(3), torch.tensor(hidden)).exp().numpy()
    feed = {what: values.numpy() for what, values in inputs.items()}
    for precision, tolerance in (("fp32", 1e-4), ("fp16", 0.02)):
        actual = Graph(bundle.graph_path("fill", precision), build_device("cpu", precision)).run(feed)["probability"]
        assert np.abs(actual - expected).sum(1).max() / 2 <= tolerance, precision
    assert np.abs(expected[0] - expected[2]).sum() > 0.05


def test_a_masked_language_model_of_another_checkpoint_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    build_masked_lm(checkpoint, lora_rank=2, lora_alpha=2).save(tmp_path / "trained", checkpoint)
    file = tmp_path / "trained" / "masked_lm.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_digest": "0" * 64}))
    with pytest.raises(CheckpointNotFound, match=r"was trained on .* with digest 0000"):
        load_head(checkpoint, "fill", tmp_path / "trained")


def stating(folder: Path, **changes: object) -> None:
    """Change what task.json states."""
    file = folder / "task.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base_digest": "0" * 64, "base_checkpoint": "other"}, CheckpointNotFound, r"was trained on 'other' with digest 0000"),
        ({"labels": [1, 2, 3]}, CheckpointUnsupported, r"--task topics=.*'labels' is no list of texts"),
        ({"pair": "no", "objective": None}, CheckpointUnsupported, r"'objective' is None, 'pair' is 'no'"),
        ({"max_tokens": 2}, CheckpointUnsupported, r"max_tokens 2 holds no token"),
        ({"mixture": {}}, CheckpointUnsupported, r"task.json states mixture {}, neighbours 5"),
        ({"labels": 3}, CheckpointNotFound, r"does not load"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_with_a_reason(
    checkpoint: Checkpoint, tiny_heads: dict[str, Path], tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    folder = Path(shutil.copytree(tiny_heads["topics"], tmp_path / "topics"))
    stating(folder, **changes)
    with pytest.raises(error, match=message):
        load_head(checkpoint, "topics", folder)


def test_a_missing_or_damaged_head_leaves_no_bundle(checkpoint: Checkpoint, tiny_heads: dict[str, Path], tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(tiny_heads["topics"], tmp_path / "damaged"))
    (damaged / "head.safetensors").write_bytes(b"short")
    for folder, message in (
        (tmp_path / "absent", "--task topics=.*absent: it holds no task.json, which `openbook train` of classifier"),
        (damaged, "does not load"),
    ):
        with pytest.raises(CheckpointNotFound, match=message):
            export_bundle(ExportOptions(checkpoint=checkpoint.name, bundle=tmp_path / "bundle", heads={"topics": folder}), silent)
    assert {file.name for file in tmp_path.iterdir()} == {"damaged"}


def test_a_folder_that_is_loaded_and_saved_again_holds_the_same_head(
    checkpoint: Checkpoint, tiny_heads: dict[str, Path], tmp_path: Path
) -> None:
    model, settings = load_head_model(checkpoint, tiny_heads["words"])
    again = tmp_path / "again"
    model.save(again, checkpoint, settings)
    reloaded, _ = load_head_model(checkpoint, again)
    assert isinstance(reloaded, HeadModel)
    for (name, one), other in zip(model.head.named_parameters(), reloaded.head.parameters(), strict=True):
        assert torch.equal(one, other), name
