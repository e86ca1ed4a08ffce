"""Checkpoints that are found, and those that are refused because they would be trained or served as something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from openbook_training.checkpoint import positions, resolve_checkpoint
from openbook_training.errors import CheckpointNotFound, InvalidConfig
from openbook_training.heads import RowEncoder
from openbook_training.reader import PairEncoder, build_reader, forward
from openbook_training.retriever import build_retriever
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

SENTENCE = "sentence_transformers.models."


@pytest.mark.parametrize("kind", ["distilbert", "mpnet", "roberta", "xlm-roberta"])
def test_a_checkpoint_without_segments_becomes_a_reader_that_is_told_none(tiny_kinds: dict[str, Path], kind: str) -> None:
    checkpoint = resolve_checkpoint(str(tiny_kinds[kind]))
    encoder = PairEncoder(checkpoint, max_tokens=32, stride=4, max_question_tokens=8)
    pairs = list(encoder.pairs("what was red ?", ["red blue green"], 0))
    told: list[str] = []
    model = build_reader(checkpoint, lora_rank=2, lora_alpha=2)
    model.register_forward_pre_hook(lambda module, args, inputs: told.extend(inputs), with_kwargs=True)
    start, end = forward(model, pairs, encoder, torch.device("cpu"))
    assert told == ["input_ids", "attention_mask"]
    assert start.shape == end.shape == (1, len(pairs[0].ids))
    assert build_retriever(checkpoint, lora_rank=2, lora_alpha=2)


def test_a_checkpoint_unlike_bert_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    AutoModel.from_config(AutoConfig.for_model("gpt2", vocab_size=150, n_embd=32, n_layer=1, n_head=2)).save_pretrained(folder)
    with pytest.raises(CheckpointNotFound, match="is not of BERT's shape .*; take one of a BERT, DistilBERT, RoBERTa or MPNet"):
        build_retriever(resolve_checkpoint(str(folder)), lora_rank=2, lora_alpha=2)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"model_type": "bert", "pad_token_id": 0, "max_position_embeddings": 512}, 512),
        ({"model_type": "distilbert", "max_position_embeddings": 512}, 512),
        ({"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 514}, 512),
        ({"model_type": "camembert", "max_position_embeddings": 514}, 512),
        ({"model_type": "xlm-roberta", "pad_token_id": 0, "max_position_embeddings": 514}, 513),
        ({"model_type": "mpnet", "pad_token_id": 0, "max_position_embeddings": 514}, 512),
        ({"model_type": "t5"}, None),
    ],
)
def test_positions_are_those_that_tokens_can_have(config: dict[str, object], longest: int | None) -> None:
    assert positions(config) == longest


@pytest.mark.parametrize("kind", ["distilbert", "mpnet", "roberta", "xlm-roberta"])
def test_no_text_is_longer_than_the_positions_of_its_model(tiny_kinds: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(tiny_kinds[kind], tmp_path / kind))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    checkpoint = resolve_checkpoint(str(folder))
    assert checkpoint.max_tokens == 128
    model, ids = AutoModel.from_pretrained(folder), torch.full((1, 128), 40)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids[:, :1].expand(1, 129), attention_mask=torch.ones((1, 129)))
    with pytest.raises(InvalidConfig, match="max_tokens: 129 is above 128, the positions"):
        RowEncoder(checkpoint, max_tokens=129)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": "{"}, r"config.json is damaged"),
        ({"config.json": "[]"}, r"config.json holds no JSON object"),
        ({"config.json": '{"max_position_embeddings": "many"}'}, r"config.json states max_position_embeddings 'many'"),
        ({"config.json": '{"model_type": "roberta", "pad_token_id": "<pad>"}'}, r"config.json states pad_token_id '<pad>'"),
        ({"sentence_bert_config.json": "3"}, r"sentence_bert_config.json holds no JSON object"),
        ({"sentence_roberta_config.json": '{"max_seq_length": "many"}'}, r"sentence_roberta_config.json states max_seq_length 'many'"),
        ({"config_sentence_transformers.json": "[]"}, r"config_sentence_transformers.json holds no JSON object"),
        (
            {"config_sentence_transformers.json": '{"prompts": {"query": "query: "}, "default_prompt_name": "query"}'},
            r"has a default prompt, 'query': sentence-transformers puts 'query: ' before every text",
        ),
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


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlm-roberta_config.json"])
def test_the_longest_text_is_what_the_transformer_s_folder_states(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "0_Transformer")
    (tmp_path / "modules.json").write_text(json.dumps([{"type": f"{SENTENCE}Transformer", "path": "0_Transformer"}]))
    (tmp_path / "0_Transformer" / name).write_text('{"max_seq_length": 32}')
    assert resolve_checkpoint(str(tmp_path)).max_tokens == 32


def test_prompts_of_which_none_is_the_default_and_lower_case_that_the_tokenizer_makes_are_taken(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "made"))
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "query: ", "": ""}, "default_prompt_name": ""}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64, "do_lower_case": true}')
    assert resolve_checkpoint(str(folder)).max_tokens == 64
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointNotFound, match=r"sentence_bert_config\.json states do_lower_case, and tokenizer\.json keeps capitals;"):
        resolve_checkpoint(str(folder))


def test_nothing_is_trained_on_weights_that_are_made_up(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "renamed"))
    weights = {f"model.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    checkpoint = resolve_checkpoint(str(folder))
    for build in (build_reader, build_retriever):
        with pytest.raises(CheckpointNotFound, match=r"lacks \S*embeddings\.\S+, .* more, weights of a Bert"):
            build(checkpoint, lora_rank=2, lora_alpha=2)
