"""The retriever: low-rank updates of the embedder, which are merged into it when a bundle is exported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from openbook_training.adapters import add_adapter, load_adapter, save_adapter, stated_settings
from openbook_training.checkpoint import Checkpoint
from openbook_training.pretrained import load_backbone

RETRIEVER_SETTINGS = "retriever.json"


def build_retriever(checkpoint: Checkpoint, *, lora_rank: int, lora_alpha: int, folder: str = "") -> PeftModel:
    """The backbone with trainable low-rank updates (Hu et al. 2021) on every linear layer: those in `folder`, or else new ones.

    No dropout: the update is small and held to the untouched vectors, and a text must not be two vectors of one batch.

    Args:
        folder: what `save_retriever` wrote, to go on from; its own rank and alpha stay.

    Raises:
        CheckpointNotFound: the folder is incomplete, damaged, or was trained on another checkpoint.
    """
    model = load_backbone(checkpoint, dropout=0.0)
    if folder:
        stated_settings(Path(folder), RETRIEVER_SETTINGS, checkpoint)
        return load_adapter(model, folder)
    return add_adapter(model, model, rank=lora_rank, alpha=lora_alpha)


def save_retriever(model: PeftModel, folder: Path, checkpoint: Checkpoint, dims: Sequence[int], *, queries_only: bool = False) -> None:
    """Write the folder that `openbook export --embedder` takes: the adapter, and in retriever.json what it belongs to.

    Args:
        dims: the lengths to which its vectors may be cut.
        queries_only: it was trained to find passages that another embedder has embedded, and must embed none itself.
    """
    save_adapter(model, folder, checkpoint)
    settings = {
        "base_checkpoint": checkpoint.name,
        "base_digest": checkpoint.digest(),
        "dims": list(dims),
        "max_tokens": checkpoint.max_tokens,
        **({"queries_only": True} if queries_only else {}),
    }
    (folder / RETRIEVER_SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
