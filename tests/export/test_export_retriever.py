"""The retriever's adapter in a bundle: merged into the embedder, named by its fingerprint, refused where it does not belong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from openbook_export.errors import CheckpointUnsupported
from openbook_export.export import ExportOptions, export_bundle
from openbook_export.models import load_embedder
from openbook_server.bundle import load_bundle
from openbook_server.ingest.embed import PassageEncoder
from openbook_server.knowledge import Passage
from openbook_server.runtime import Graph, build_device
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.embedding import TextEncoder, encode
from openbook_training.retriever import build_retriever, save_retriever
from peft import PeftModel
from tokenizers import Tokenizer

TEXTS = ["red", "the king read a book by the river", "one two three"]


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path) -> PeftModel:
    """A retriever whose update matters, with the rounding that saving in half precision brings."""
    torch.manual_seed(2)
    model = build_retriever(resolve_checkpoint(str(tiny_checkpoint)), lora_rank=2, lora_alpha=2).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
            parameter.data = parameter.data.half().float()
    return model


@pytest.fixture(scope="module")
def adapter(trained: PeftModel, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retriever") / "best"
    save_retriever(trained, folder, resolve_checkpoint(str(tiny_checkpoint)), [32, 8])
    return folder


def vectors(model: torch.nn.Module, checkpoint: Path) -> np.ndarray:
    encoder = TextEncoder(resolve_checkpoint(str(checkpoint)))
    with torch.inference_mode():
        return encode(model, encoder.rows(TEXTS, 128), pooling="mean", pad=0, device=torch.device("cpu")).numpy()


def test_the_embedder_that_is_exported_is_the_one_that_was_trained(
    trained: PeftModel, adapter: Path, tiny_checkpoint: Path, tiny_reader: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    options = ExportOptions(checkpoint=str(tiny_checkpoint), bundle=tmp_path / "bundle", embedder=adapter, reader=tiny_reader)
    bundle, untouched = export_bundle(options, lambda line: None), load_bundle(tiny_bundle)
    encodings = [Tokenizer.from_file(str(bundle.tokenizer_path)).encode(text).ids for text in TEXTS]
    width = max(map(len, encodings))
    ids = np.array([row + [0] * (width - len(row)) for row in encodings])
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in encodings])
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    served = Graph(bundle.graph_path("embedder", "fp32"), build_device("cpu", "fp32", 1)).run(inputs)["sentence_embedding"]
    assert np.allclose(served, vectors(trained, tiny_checkpoint), atol=1e-4)
    assert not np.allclose(served, vectors(load_embedder(resolve_checkpoint(str(tiny_checkpoint))).model, tiny_checkpoint), atol=0.05)
    assert bundle.embedder.fingerprint != untouched.embedder.fingerprint
    assert bundle.manifest["source"]["digest"] == untouched.manifest["source"]["digest"]
    assert len(bundle.manifest["source"]["embedder_digest"]) == 64
    assert bundle.manifest["embedder"]["matryoshka_dims"] == [32, 8]
    reader = bundle.manifest["reader"]["graphs"]["fp32"]  # an adapter of the untouched base, whatever the embedder became
    assert bundle.manifest["files"][reader]["sha256"] == untouched.manifest["files"][reader]["sha256"]


def restate(folder: Path, **changes: object) -> None:
    """Change what retriever.json states."""
    file = folder / "retriever.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder; `openbook train retriever` leaves one"),
        (lambda folder: (folder / "retriever.json").unlink(), "lacks retriever.json"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "lacks adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "lacks adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"short"), "the adapter does not load"),
        (lambda folder: (folder / "retriever.json").write_text("{}"), "lacks retriever.json with a base_digest"),
        (lambda folder: restate(folder, base_digest="0" * 64, base_checkpoint="other"), "was trained on 'other' with digest 0000"),
        (lambda folder: restate(folder, dims="all"), "states no max_tokens or no dims"),
        (lambda folder: restate(folder, max_tokens=129), r"states max_tokens 129 and dims \[32, 8\]; the checkpoint has 128 positions"),
        (lambda folder: restate(folder, dims=[64]), r"dims \[64\]; the checkpoint has 128 positions and 32 dimensions"),
    ],
)
def test_an_adapter_that_is_damaged_or_of_another_checkpoint_is_refused_with_a_reason(
    adapter: Path, tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    copy = shutil.copytree(adapter, tmp_path / "best")
    damage(copy)
    with pytest.raises(CheckpointUnsupported, match=message) as raised:
        load_embedder(resolve_checkpoint(str(tiny_checkpoint)), copy)
    assert "--embedder" in str(raised.value)


@pytest.mark.parametrize("title", ["", "red king", "one two three city river king book " * 12])
def test_training_puts_titles_before_passages_as_the_server_does(tiny_checkpoint: Path, title: str) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    passage = Passage(id="d#0", document_id="d", start=0, text="the river was blue " * 9, title=title)
    encoder = TextEncoder(checkpoint)
    for limit in (128, 40):
        [served] = PassageEncoder(tokenizer, limit)([passage])
        assert encoder.rows([encoder.passage_text(title, passage.text)], limit) == [served.ids]


def test_an_adapter_that_embeds_questions_alone_is_refused(trained: PeftModel, tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    save_retriever(trained, tmp_path / "best", checkpoint, [32], queries_only=True)
    with pytest.raises(CheckpointUnsupported, match="for questions alone"):
        load_embedder(checkpoint, tmp_path / "best")
