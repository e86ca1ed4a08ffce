"""A masked language model: the backbone with a vocabulary head on the states of its tokens.

    token ids -> backbone (with low-rank updates) -> states at [MASK] -> linear -> token embeddings -> log-probabilities

The head is tied to the backbone's table of token embeddings (heads.py). A folder holds the adapter (adapter_model.safetensors),
or, where all weights were trained, a whole checkpoint of its own (checkpoint/); the head (head.safetensors); and what both belong to
(masked_lm.json).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openbook_training.adapters import add_adapter, load_adapter, save_adapter, stated_settings
from openbook_training.checkpoint import Checkpoint, resolve_checkpoint
from openbook_training.errors import CheckpointNotFound
from openbook_training.heads import HEAD, TASK, VocabHead
from openbook_training.pretrained import load_backbone, model_inputs

SETTINGS, WHOLE = "masked_lm.json", "checkpoint"


class MaskedLanguageModel(nn.Module):
    """p(token at a position | the tokens around it)."""

    def __init__(self, backbone: nn.Module, head: VocabHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, inputs: dict[str, Tensor], rows: Tensor, columns: Tensor) -> Tensor:
        """(B, L) inputs and the (targets,) rows and columns of positions, to (targets, vocabulary) float32 log-probabilities."""
        return self.predicted(self.states(inputs)[rows, columns])

    def states(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, L) inputs to (B, L, d)."""
        states: Tensor = self.backbone(**model_inputs(self.backbone.config, **inputs)).last_hidden_state
        return states

    def predicted(self, states: Tensor) -> Tensor:
        """(targets, d) states of positions to (targets, vocabulary) float32 log-probabilities."""
        with torch.autocast(states.device.type, enabled=False):  # bf16 keeps 8 bits of a logit
            log_probabilities: Tensor = self.head(states.float())
        return log_probabilities

    def save(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Write the folder that `build_masked_lm` goes on from."""
        if isinstance(self.backbone, PeftModel):
            save_adapter(self.backbone, folder, checkpoint)
        else:
            checkpoint = dataclasses.replace(_save_whole(self.backbone, folder / WHOLE, checkpoint), name=WHOLE)
        own = {name: value.detach().contiguous() for name, value in self.head.state_dict().items() if name != "output.weight"}
        save_file(own, folder / HEAD)
        stated = {"base_checkpoint": checkpoint.name, "base_digest": checkpoint.digest()}
        (folder / SETTINGS).write_text(json.dumps(stated, indent=2) + "\n")


def _save_whole(backbone: Any, folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint that embeds texts as the one did that it began with."""
    backbone.save_pretrained(folder)
    for file in checkpoint.folder.glob("*token*.json"):
        shutil.copy(file, folder)
    (folder / "1_Pooling").mkdir()
    pooling = {f"pooling_mode_{mode}": mode.startswith(checkpoint.pooling) for mode in ("cls_token", "mean_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": backbone.config.hidden_size} | pooling) + "\n"
    )
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": checkpoint.max_tokens}) + "\n")
    return resolve_checkpoint(str(folder))


def build_masked_lm(
    checkpoint: Checkpoint, *, lora_rank: int, lora_alpha: int, folder: str = "", frequencies: Tensor | None = None
) -> MaskedLanguageModel:
    """A model to train: what `folder` holds, or else a new head on the checkpoint.

    Args:
        lora_rank: of the updates that are trained; 0 trains all weights of the backbone.
        folder: `<output>/best` of a masked_lm run on this checkpoint, or on what became this checkpoint; or of a vocab_head run whose
            head is tied, which is of the same shape.
        frequencies: (vocabulary,) log-probabilities that a new head begins at.

    Raises:
        CheckpointNotFound: the folder is incomplete, damaged, or was trained on another checkpoint.
    """
    backbone = load_backbone(checkpoint, one_segment=True)  # of the passages that `realm` reads beside a text
    head = VocabHead(backbone.embeddings.word_embeddings.weight, tied=True)
    if frequencies is not None:
        with torch.no_grad():
            head.output.bias.copy_(frequencies)
    if folder:
        stated_settings(Path(folder), TASK if (Path(folder) / TASK).is_file() else SETTINGS, checkpoint)
        try:
            missing, unexpected = head.load_state_dict(load_file(Path(folder) / HEAD), strict=False)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise CheckpointNotFound(f"{folder}: {HEAD} does not load ({reason}); copy the whole folder that was written") from error
        if unexpected or missing != ["output.weight"]:
            raise CheckpointNotFound(
                f"{folder}: {HEAD} holds other tensors than a language model's head: {', '.join([*missing, *unexpected])}"
            )
    if folder and not (Path(folder) / WHOLE).is_dir():
        return MaskedLanguageModel(load_adapter(backbone, folder), head)
    adapted = add_adapter(backbone, backbone, rank=lora_rank, alpha=lora_alpha) if lora_rank else backbone
    return MaskedLanguageModel(adapted, head)
