"""Checkpoints that are found, and those that are refused because they would be trained or served as something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.errors import CheckpointNotFound, InvalidConfig
from openbook_training.heads import RowEncoder
from openbook_training.reader import PairEncoder, build_reader, forward
from openbook_training.retriever import build_retriever
from transformers import AutoConfig, AutoModel

SENTENCE = "sentence_transformers.models."


@pytest.mark.parametrize("kind", ["distilbert", "mpnet", "roberta"])
def test_a_checkpoint_without_segments_becomes_a_reader_that_is_told_none(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "pad_token_id": 0}
    small = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32} if kind == "distilbert" else small
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / kind))
    sizes = {"vocab_size": 150, "max_position_embeddings": 64, **({"type_vocab_size": 1} if kind == "roberta" else {})}
    AutoModel.from_config(AutoConfig.for_model(kind, **small, **sizes)).save_pretrained(folder)
    checkpoint = resolve_checkpoint(str(folder))
    encoder = PairEncoder(checkpoint, max_tokens=32, stride=4, max_question_tokens=8)
    pairs = list(encoder.pairs("what was red ?", ["red blue green"], 0))
    start, end = forward(build_reader(checkpoint, lora_rank=2, lora_alpha=2), pairs, encoder, torch.device("cpu"))
    assert not encoder.has_segments
    assert start.shape == end.shape == (1, len(pairs[0].ids))
    if kind == "distilbert":
        with pytest.raises(CheckpointNotFound, match="not of BERT's shape"):
            build_retriever(resolve_checkpoint(str(folder)), lora_rank=2, lora_alpha=2)
    else:
        assert build_retriever(resolve_checkpoint(str(folder)), lora_rank=2, lora_alpha=2)
        with pytest.raises(InvalidConfig, match="max_tokens: 64 is above 63, the positions"):
            RowEncoder(resolve_checkpoint(str(folder)), max_tokens=64)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": "{"}, r"config.json is damaged"),
        ({"config.json": "[]"}, r"config.json holds no JSON object"),
        ({"config.json": '{"max_position_embeddings": "many"}'}, r"config.json states max_position_embeddings 'many'"),
        ({"sentence_bert_config.json": "3"}, r"sentence_bert_config.json holds no JSON object"),
        ({"1_Pooling/config.json": "{"}, r"1_Pooling/config.json is damaged"),
        ({"1_Pooling/config.json": '{"pooling_mode_max_tokens": true}'}, r"config.json pools by max_tokens; only mean or cls alone"),
        ({"1_Pooling/config.json": '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}'}, r"pools by cls and mean"),
        ({"modules.json": '[{"type": "x"}]'}, r"modules.json is damaged \(KeyError: 'path'\)"),
        ({"modules.json": "{"}, r"modules.json is damaged"),
        (
            {
                "modules.json": json.dumps(
                    [{"type": SENTENCE + kind, "path": ""} for kind in ("Transformer", "Pooling", "Dense", "Normalize")]
                ),
            },
            r"names the modules Transformer, Pooling, Dense, Normalize; only",
        ),
    ],
)
def test_an_embedder_that_would_not_be_served_as_it_was_made_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, files: dict[str, str], message: str
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    with pytest.raises(CheckpointNotFound, match=message):
        resolve_checkpoint(str(folder))


@pytest.mark.parametrize("pooling", ['{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}', '{"pooling_mode": "cls"}'])
def test_the_pooling_is_the_one_that_the_modules_name(tiny_checkpoint: Path, tmp_path: Path, pooling: str) -> None:
    folder = tmp_path / "made"
    shutil.copytree(tiny_checkpoint, folder / "0_Transformer")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(pooling)
    paths = {"Transformer": "0_Transformer", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    (folder / "modules.json").write_text(json.dumps([{"type": SENTENCE + kind, "path": path} for kind, path in paths.items()]))
    found = resolve_checkpoint(str(folder))
    assert (found.folder, found.pooling, found.max_tokens) == (folder / "0_Transformer", "cls", 128)
