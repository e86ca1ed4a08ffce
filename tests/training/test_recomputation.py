"""Gradient checkpointing: every model that an objective trains, with and without it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openbook_training.checkpoint import Checkpoint, resolve_checkpoint
from openbook_training.config import LoopConfig
from openbook_training.embedding import encode
from openbook_training.errors import InvalidConfig
from openbook_training.generator import AnswerEncoder, FusionInDecoder, Inputs, build_generator
from openbook_training.heads import LabelHead, RowEncoder, VocabHead, build_head_model
from openbook_training.language_model import new_model, new_tokenizer
from openbook_training.loop import Loop
from openbook_training.masked_language_model import build_masked_lm
from openbook_training.objectives import marginal_sequence_loss
from openbook_training.pretrained import load_backbone
from openbook_training.reader import build_reader
from openbook_training.realm import Masked, PassageRows, Realm
from openbook_training.retriever import build_retriever
from rich.console import Console
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, MPNetConfig, MPNetModel, T5Config, T5ForConditionalGeneration

IDS = torch.randint(5, 60, (6, 32), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "token_type_ids": torch.zeros_like(IDS)}
RANK = {"lora_rank": 2, "lora_alpha": 2}
LABELS = 3

Built = tuple[nn.Module, Callable[[Any], Tensor]]  # a model and a loss of it


def reader(checkpoint: Checkpoint) -> Built:
    return build_reader(checkpoint, **RANK), lambda model: model(**INPUTS).start_logits.square().mean()


def retriever(checkpoint: Checkpoint) -> Built:
    return build_retriever(checkpoint, **RANK), lambda model: model(**INPUTS).last_hidden_state[:, 0, :8].square().mean()


def labels(checkpoint: Checkpoint) -> Built:
    neighbours = torch.linspace(-1, 1, 24).view(6, 4), torch.arange(24).view(6, 4) % LABELS
    head = LabelHead(32, LABELS, temperature=0.05)
    return build_head_model(checkpoint, head, load_backbone(checkpoint), **RANK), lambda model: -model(INPUTS, neighbours)[:, 0].mean()


def words(checkpoint: Checkpoint) -> Built:
    backbone = load_backbone(checkpoint)
    head = VocabHead(backbone.embeddings.word_embeddings.weight, tied=True)
    return build_head_model(checkpoint, head, backbone, **RANK), lambda model: -model(INPUTS)[:, 7].mean()


def masked_lm(checkpoint: Checkpoint) -> Built:
    rows, columns = torch.arange(6), torch.arange(6) * 2
    return build_masked_lm(checkpoint, **RANK), lambda model: -model(INPUTS, rows, columns)[:, 7].mean()


def whole_masked_lm(checkpoint: Checkpoint) -> Built:
    return build_masked_lm(checkpoint, lora_rank=0, lora_alpha=1), masked_lm(checkpoint)[1]


def realm(checkpoint: Checkpoint) -> Built:
    rows = [[2, *row, 3] for row in IDS[:, :20].tolist()]
    texts = [Masked([2, *row[1:9], 4, *row[10:20], 3], [9], [row[9]]) for row in rows]
    passages = PassageRows(rows, [row[1:-1] for row in rows])

    def loss(model: Realm) -> Tensor:
        reading = model(texts, passages, 2, lambda queries: [[(x + 1) % 6, (x + 2) % 6] for x in range(6)])
        return marginal_sequence_loss(reading.prior, reading.given, reading.texts)

    both = build_retriever(checkpoint, **RANK), build_masked_lm(checkpoint, **RANK)
    return Realm(*both, RowEncoder(checkpoint, max_tokens=64), pooling="mean", null_score=0.4, temperature=0.05), loss


def written(model: FusionInDecoder) -> Tensor:
    """The loss of three answers from two passages each."""
    owner, slot = torch.arange(6) // 2, torch.arange(6) % 2
    logits = model(Inputs(IDS, torch.ones_like(IDS), owner, slot), IDS[:3, :8])
    return -torch.log_softmax(logits, dim=2)[:, :, 7].mean()


def bert2bert(checkpoint: Checkpoint) -> Built:
    return build_generator(checkpoint, AnswerEncoder(checkpoint, max_tokens=40, max_answer_tokens=8), dropout=0.1), written


def t5(checkpoint: Checkpoint) -> Built:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return FusionInDecoder(T5ForConditionalGeneration(config)), written


def bart(checkpoint: Checkpoint) -> Built:
    halves = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
    }
    return FusionInDecoder(BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=32, **halves))), written


def causal_lm(checkpoint: Checkpoint) -> Built:
    model = new_model(new_tokenizer(["red blue"], 300), layers=2, dim=32, heads=4, positions=32, dropout=0.1)
    at = torch.arange(20, 30).expand(6, -1)
    return model, lambda model: -torch.log_softmax(model(IDS, torch.ones_like(IDS), at)[1], dim=2)[:, :, 7].mean()


def set_up(model: nn.Module, folder: Path, *, checkpointing: bool) -> None:
    """What the loop makes of the setting; in training, with updates that matter."""
    task: Any = SimpleNamespace(model=model, compares_examples=False)
    Loop(task, LoopConfig(gradient_checkpointing=checkpointing, precision="fp32"), folder, Console(file=io.StringIO()))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    "build", [reader, retriever, labels, words, masked_lm, whole_masked_lm, realm, bert2bert, t5, bart, causal_lm], ids=lambda f: f.__name__
)
def test_recomputed_activations_give_the_same_loss_and_gradients_and_hold_less(
    build: Callable[[Checkpoint], Built], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    measured: list[tuple[float, dict[str, Tensor], int]] = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, loss_of = build(resolve_checkpoint(str(tiny_checkpoint)))
        set_up(model, tmp_path, checkpointing=checkpointing)
        held = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal held
            held += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = loss_of(model)
        loss.backward()
        measured.append((loss.item(), gradients(model), held))
    (plain, expected, most), (recomputed, found, least) = measured
    assert recomputed == pytest.approx(plain, rel=1e-6)
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8, msg=name)
    assert least < most / 2


def test_layers_are_recomputed_within_chunks_that_are_recomputed_themselves(tiny_checkpoint: Path, tmp_path: Path) -> None:
    measured = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_retriever(resolve_checkpoint(str(tiny_checkpoint)), **RANK)
        set_up(model, tmp_path, checkpointing=checkpointing)
        vectors = encode(model, IDS.tolist(), pooling="mean", pad=0, device=torch.device("cpu"), chunk_tokens=64, recompute=checkpointing)
        (vectors @ vectors[0]).sum().backward()
        measured.append(gradients(model))
    for name, gradient in measured[0].items():
        torch.testing.assert_close(measured[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_a_model_that_cannot_recompute_says_so(tmp_path: Path) -> None:
    cannot = MPNetModel(MPNetConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    for model in (cannot, nn.Linear(2, 2)):
        with pytest.raises(InvalidConfig, match=f"gradient_checkpointing: {type(model).__name__}"):
            set_up(model, tmp_path, checkpointing=True)
