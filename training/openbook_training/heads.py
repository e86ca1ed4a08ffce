"""A head on the pooled text vector: the model of every objective that labels texts or predicts words.

    token ids -> backbone with low-rank updates -> pooled (B, d) -> head -> log-probabilities

The backbone stays as it is, so that one embedder serves beside any number of heads. A folder holds the adapter
(adapter_model.safetensors), the head (head.safetensors) and what both need to be used (task.json).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openbook_training.adapters import add_adapter, read_adapter, save_adapter, stated_settings
from openbook_training.checkpoint import Checkpoint
from openbook_training.errors import CheckpointNotFound
from openbook_training.objectives import marginal_label_log_probabilities, neighbour_prior
from openbook_training.pair_template import set_pair_template
from openbook_training.pooling import pool
from openbook_training.pretrained import check_length, fast_tokenizer, load_backbone, model_inputs

HEAD, TASK = "head.safetensors", "task.json"
NULL_SCORE = 0.5  # cosine at which a neighbour and the null passage begin as equals; trained

TokenRow = tuple[list[int], list[int]]  # ids of one text or pair, and of each 1 where it is the second text's


class RowEncoder:
    """Texts, or pairs of them, as token ids, cut at the longer side to `max_tokens`."""

    def __init__(self, checkpoint: Checkpoint, *, max_tokens: int, own_template: bool = False) -> None:
        """`own_template`: pairs are as the tokenizer itself makes them, for a model that brings its tokenizer into a bundle; else as in
        `pair_template`."""
        check_length(checkpoint, "max_tokens", max_tokens)
        tokenizer = fast_tokenizer(checkpoint)
        self.pad, self.mask = tokenizer.pad_token_id or 0, tokenizer.mask_token_id
        self.special = frozenset(tokenizer.all_special_ids)  # they are no words, [UNK] among them
        self.tokenizer = tokenizer.backend_tokenizer
        if not own_template:
            set_pair_template(self.tokenizer, checkpoint.name)
        self.tokenizer.enable_truncation(max_tokens, strategy="longest_first")

    def rows(self, texts: Sequence[tuple[str, str]]) -> list[TokenRow]:
        """Of (text, "") a text alone, of (text, other) the pair."""
        inputs = [pair if pair[1] else pair[0] for pair in texts]
        return [(encoding.ids, encoding.type_ids) for encoding in self.tokenizer.encode_batch(inputs)]

    def batch(self, rows: Sequence[TokenRow], device: torch.device) -> dict[str, Tensor]:
        """Inputs (B, L), padded on the right; `model_inputs` are those that a model takes."""
        longest = max(len(ids) for ids, _ in rows)
        return {
            "input_ids": torch.tensor([ids + [self.pad] * (longest - len(ids)) for ids, _ in rows], device=device),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows], device=device),
            "token_type_ids": torch.tensor([types + [0] * (longest - len(types)) for _, types in rows], device=device),
        }


class LabelHead(nn.Module):
    """p(y|x): a linear layer on the text's vector, and with `temperature` a sum over labelled neighbours around it.

    p(y|x, z) adds to the text's logits one row of a table, chosen by the neighbour's label: the text is encoded once
    however many neighbours it has, where encoding "x [SEP] z" would cost k passes of twice the length. What z says beyond
    its label and its score is not seen. The table begins as log(labels) on the diagonal, so that a neighbour's label
    begins at a probability of about one half.
    """

    def __init__(self, dim: int, labels: int, *, temperature: float = 0.0) -> None:
        super().__init__()
        self.output = nn.Linear(dim, labels)
        self.latent = bool(temperature)
        if temperature:
            self.shift = nn.Parameter(math.log(labels) * torch.eye(labels))
            self.null_score = nn.Parameter(torch.tensor(NULL_SCORE))
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, pooled: Tensor, neighbours: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, d) vectors, and with neighbours their scores and label numbers, both (B, k), to (B, labels) log-probabilities."""
        logits: Tensor = self.output(pooled)
        if neighbours is None:
            return torch.log_softmax(logits, dim=1)
        prior = neighbour_prior(neighbours[0], self.null_score, self.log_temperature.exp())
        return marginal_label_log_probabilities(logits, self.shift, neighbours[1], prior)


class VocabHead(nn.Module):
    """A distribution over the vocabulary from the text's vector: linear, then the token embeddings.

    Tied (Press & Wolf 2017), the last layer is the backbone's own table of token embeddings, which stays as it is; then only
    the linear layer, which turns a text's vector into the space of tokens, and a bias are trained. The linear layer begins
    at zero: a bias of log frequencies then begins at the unigram distribution, and what is learned is what the text adds.
    """

    def __init__(self, embeddings: nn.Parameter, *, tied: bool) -> None:
        super().__init__()
        tokens, dim = embeddings.shape
        self.transform = nn.Linear(dim, dim)
        nn.init.zeros_(self.transform.weight)
        nn.init.zeros_(self.transform.bias)
        self.output = nn.Linear(dim, tokens)
        self.output.weight = embeddings if tied else nn.Parameter(embeddings.detach().clone())
        nn.init.zeros_(self.output.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, d) vectors to (B, tokens) log-probabilities."""
        return torch.log_softmax(self.output(self.transform(pooled)), dim=1)


class HeadModel(nn.Module):
    """Backbone, pooling and head."""

    def __init__(self, backbone: nn.Module, pooling: str, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.pooling, self.head = backbone, pooling, head

    def forward(self, inputs: dict[str, Tensor], *more: Any) -> Tensor:
        """(B, L) inputs and what the head takes beside the vector, to (B, classes) float32 log-probabilities."""
        states = self.backbone(**model_inputs(self.backbone.config, **inputs)).last_hidden_state.float()
        with torch.autocast(states.device.type, enabled=False):  # bf16 keeps 8 bits of a logit
            log_probabilities: Tensor = self.head(pool(states, inputs["attention_mask"], self.pooling), *more)
        return log_probabilities

    def save(self, folder: Path, checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
        """Write the folder that `load_head` reads; `settings` go into task.json."""
        save_adapter(cast(PeftModel, self.backbone), folder, checkpoint)
        trained = {name: value.detach().contiguous() for name, value in self.head.named_parameters() if value.requires_grad}
        save_file(trained, folder / HEAD)
        stated = {"base_checkpoint": checkpoint.name, "base_digest": checkpoint.digest()}
        (folder / TASK).write_text(json.dumps(settings | stated, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def build_head_model(checkpoint: Checkpoint, head: nn.Module, backbone: Any, *, lora_rank: int, lora_alpha: int) -> HeadModel:
    """`head` on `backbone`, which gets trainable low-rank updates."""
    return HeadModel(add_adapter(backbone, backbone, rank=lora_rank, alpha=lora_alpha), checkpoint.pooling, head)


def load_head_model(checkpoint: Checkpoint, folder: Path) -> tuple[HeadModel, dict[str, Any]]:
    """The model that `HeadModel.save` left in `folder`, and its task.json.

    Raises:
        CheckpointNotFound: the folder is incomplete, damaged, or was trained on another checkpoint.
    """
    settings = stated_settings(folder, TASK, checkpoint)
    try:
        backbone = load_backbone(checkpoint, one_segment=settings.get("one_segment") is True)
        adapted = read_adapter(backbone, str(folder))  # freezes the backbone, token embeddings included
        head = _head(settings, backbone)
        stored = load_file(folder / HEAD)
        trained = {name for name, value in head.named_parameters() if value.requires_grad}
        if set(stored) != trained:
            raise ValueError(f"{HEAD} holds {', '.join(sorted(stored))}; expected {', '.join(sorted(trained))}")
        head.load_state_dict(stored, strict=False)  # what is not stored is the backbone's
        model = HeadModel(adapted, checkpoint.pooling, head)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        raise CheckpointNotFound(f"{folder} does not load ({reason}); copy the whole folder that `openbook train` wrote") from error
    return model.eval(), settings


def _head(settings: dict[str, Any], backbone: Any) -> nn.Module:
    if "labels" in settings:
        return LabelHead(backbone.config.hidden_size, len(settings["labels"]), temperature=float(settings["temperature"]))
    return VocabHead(backbone.embeddings.word_embeddings.weight, tied=bool(settings["tied"]))
