"""Heads that `openbook train` left, ready to export: classifiers, verifiers, the vocabulary head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openbook_training.checkpoint import Checkpoint
from openbook_training.heads import load_head_model

from openbook_export.errors import CheckpointUnsupported
from openbook_export.graphs import HeadGraph


@dataclass(frozen=True, slots=True)
class Head:
    """A head's graph with the adapter merged, and what a bundle states of it."""

    graph: HeadGraph
    digest: str  # of the adapter's and the head's weights
    facts: dict[str, Any]


def load_head(checkpoint: Checkpoint, name: str, folder: Path) -> Head:
    """The head in `folder`, trained on `checkpoint`.

    Args:
        name: what the bundle will call it, for the messages.

    Raises:
        CheckpointNotFound: the folder is incomplete or damaged, or was trained on another checkpoint.
        CheckpointUnsupported: what it states of itself cannot be put into a bundle.
    """
    model, settings = load_head_model(checkpoint, folder)
    backbone: Any = model.backbone
    merged = backbone.merge_and_unload()
    labels: Any = settings.get("labels", [])
    limit: Any = settings.get("max_tokens")
    stated = {"objective": str, "pair": bool, "max_tokens": int}
    wrong = [f"{key!r} is {settings.get(key)!r}" for key, kind in stated.items() if type(settings.get(key)) is not kind]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        wrong.append("'labels' is no list of texts")
    if wrong or limit < 3:
        raise CheckpointUnsupported(f"--task {name}={folder}: task.json: {', '.join(wrong) or f'max_tokens {limit} holds no token'}")
    facts = {
        "objective": settings["objective"],
        "pair": settings["pair"],
        "max_tokens": min(limit, int(merged.config.max_position_embeddings)),
        "labels": labels,
    }
    digest = Checkpoint(name=name, folder=folder, pooling="", max_tokens=0).digest()
    return Head(HeadGraph(merged, checkpoint.pooling, model.head), digest, facts)
