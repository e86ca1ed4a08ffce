"""Heads that `openbook train` left, ready to export: classifiers, verifiers, the vocabulary head, masked language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from openbook_server.binding import Arrays
from openbook_server.heads import CLASSIFYING
from openbook_training.checkpoint import Checkpoint, folder_digest
from openbook_training.errors import CheckpointNotFound
from openbook_training.heads import TASK, RowEncoder, load_head_model
from openbook_training.masked_language_model import SETTINGS, build_masked_lm
from peft import PeftModel
from tokenizers import Tokenizer

from openbook_export.errors import CheckpointUnsupported
from openbook_export.graphs import HeadGraph, MaskedGraph, TaskGraph
from openbook_export.models import ReaderModel, longest_text
from openbook_export.neighbours import NeighbourPart, neighbour_part
from openbook_export.parity import pair_inputs, text_inputs


@dataclass(frozen=True, slots=True)
class Head:
    """A head's graph with the adapter merged, and what a bundle states of it."""

    graph: TaskGraph
    digest: str  # of the adapter's and the head's weights
    facts: dict[str, Any]
    mask_id: int | None = None  # of the token that hides others, in what the graph reads
    neighbours: NeighbourPart | None = None  # what makes more of the graph's result

    @property
    def classifies(self) -> bool:
        """Whether a server labels texts with it."""
        return self.facts["objective"] in CLASSIFYING

    def inputs(self, tokenizer: Tokenizer) -> Arrays:
        """Sample rows for the parity gate, in every one of which something is hidden where the graph tells what."""
        inputs = (pair_inputs if self.facts["pair"] else text_inputs)(tokenizer, self.facts["max_tokens"])
        if self.mask_id is not None:
            lengths = inputs["attention_mask"].sum(axis=1)
            rows = np.arange(len(lengths))
            inputs["input_ids"][rows, 1 + rows % (lengths - 2)] = self.mask_id
        return inputs


def load_head(checkpoint: Checkpoint, name: str, folder: Path) -> Head:
    """The head in `folder`, trained on `checkpoint`.

    Args:
        name: what the bundle will call it, for the messages.

    Raises:
        CheckpointNotFound: the folder is incomplete or damaged, or was trained on another checkpoint.
        CheckpointUnsupported: what it states of itself cannot be put into a bundle.
    """
    if (folder / SETTINGS).is_file():
        return _masked_language_model(checkpoint, name, folder)
    if not (folder / TASK).is_file():
        raise CheckpointNotFound(
            f"--task {name}={folder}: it holds no {TASK}, which `openbook train` of classifier, verification or vocab_head leaves in "
            f"<output>/best, nor {SETTINGS}, which masked_lm does"
        )
    model, settings = load_head_model(checkpoint, folder)
    backbone: Any = model.backbone
    merged = backbone.merge_and_unload()
    facts = stated_facts(f"{name}={folder}", settings, longest_text(merged))
    graph = HeadGraph(merged, checkpoint.pooling, model.head)
    return Head(graph, folder_digest(folder), facts, neighbours=neighbour_part(name, model.head, settings))


def require_one_template(reader: ReaderModel | None, heads: Mapping[str, Head]) -> None:
    """Raises:
    CheckpointUnsupported: a head and the reader were trained to see other numbers of separators in a pair; a bundle has one tokenizer.
    """
    pairs = [name for name, head in heads.items() if head.facts["pair"]]
    if reader is not None and reader.separators != 1 and pairs:
        raise CheckpointUnsupported(
            f"--task {pairs[0]} reads pairs with one separator between the texts, --reader with {reader.separators}, and a bundle has one "
            "tokenizer; leave one of them out, or take a reader that `openbook train reader` wrote"
        )


def stated_facts(name: str, settings: Mapping[str, Any], positions: int) -> dict[str, Any]:
    """Objective, whether it reads pairs, longest input and labels of the head that messages call `name`, from its task.json.

    Args:
        positions: of the backbone; no longer input is stated.

    Raises:
        CheckpointUnsupported: one of them is missing or of another kind.
    """
    labels: Any = settings.get("labels", [])
    limit: Any = settings.get("max_tokens")
    stated = {"objective": str, "pair": bool, "max_tokens": int}
    wrong = [f"{key!r} is {settings.get(key)!r}" for key, kind in stated.items() if type(settings.get(key)) is not kind]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        wrong.append("'labels' is no list of texts")
    if wrong or limit < 3:
        raise CheckpointUnsupported(f"--task {name}: task.json: {', '.join(wrong) or f'max_tokens {limit} holds no token'}")
    return {"objective": settings["objective"], "pair": settings["pair"], "max_tokens": min(limit, positions), "labels": labels}


def _masked_language_model(checkpoint: Checkpoint, name: str, folder: Path) -> Head:
    mask_id = RowEncoder(checkpoint, max_tokens=checkpoint.max_tokens).mask
    if mask_id is None:
        raise CheckpointUnsupported(f"--task {name}={folder}: the tokenizer of {checkpoint.name!r} has no [MASK] token")
    model = build_masked_lm(checkpoint, lora_rank=0, lora_alpha=0, folder=str(folder)).eval()
    backbone: Any = model.backbone
    merged = backbone.merge_and_unload() if isinstance(backbone, PeftModel) else backbone
    limit = min(checkpoint.max_tokens, longest_text(merged))
    facts = {"objective": "masked_lm", "pair": False, "max_tokens": limit, "labels": []}
    return Head(MaskedGraph(merged, mask_id, model.head), folder_digest(folder), facts, mask_id)
