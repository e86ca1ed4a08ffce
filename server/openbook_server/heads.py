"""The heads of a bundle: models that label texts, or tell words, and what a caller of each must know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openbook_server.manifest import MANIFEST, get, graphs_of, invalid, positive
from openbook_server.writers import RESERVED

CLASSIFYING = ("classifier", "verification", "vocab_head")


@dataclass(frozen=True, kw_only=True, slots=True)
class NeighboursInfo:
    """What a caller of a classifier's graph for labelled neighbours must know; it is run in fp32 on the processor."""

    count: int  # neighbours that a text was read beside in training
    label_key: str  # of the metadata that hold a neighbour's label
    graphs: Mapping[str, str]  # precision -> file name


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadInfo:
    """What a caller of another task's graph must know."""

    objective: str  # classifier, verification, vocab_head or masked_lm
    pair: bool  # takes pairs of texts
    max_tokens: int  # longest text or pair, special tokens included; the longer side of a pair is cut
    labels: tuple[str, ...]  # of the distribution's columns; none: the columns are the tokenizer's ids
    graphs: Mapping[str, str]  # precision -> file name
    neighbours: NeighboursInfo | None  # what makes more of the graph's result; None = texts are labelled by themselves

    @property
    def classifies(self) -> bool:
        """Whether a server labels texts with it: whole texts or pairs, not hidden words."""
        return self.objective in CLASSIFYING


def neighbours_graph(name: str) -> str:
    """What a bundle calls a classifier's graph for neighbours; no head has a dot in its name."""
    return f"{name}.neighbours"


def parse_heads(manifest: Mapping[str, Any], folder: Path) -> dict[str, HeadInfo]:
    """The heads that a manifest states, by name.

    Raises:
        BundleInvalid: one is malformed, or has the name of a model of its own.
    """
    tables = get(manifest, "heads", dict, folder) if "heads" in manifest else {}
    heads = {}
    for name in tables:
        if name in RESERVED:
            raise invalid(folder, f'{MANIFEST} key "heads" names one {name!r}, which is a model of its own')
        table = get(tables, name, dict, folder)
        labels = get(table, "labels", list, folder)
        if not all(isinstance(label, str) for label in labels):
            raise invalid(folder, f'{MANIFEST} key "labels" of {name!r} holds something other than texts')
        heads[name] = HeadInfo(
            objective=get(table, "objective", str, folder),
            pair=get(table, "pair", bool, folder),
            max_tokens=positive(table, "max_tokens", folder),
            labels=tuple(labels),
            graphs=graphs_of(table, folder),
            neighbours=_neighbours(get(table, "neighbours", dict, folder), folder) if "neighbours" in table else None,
        )
    return heads


def _neighbours(table: Mapping[str, Any], folder: Path) -> NeighboursInfo:
    return NeighboursInfo(
        count=positive(table, "count", folder),
        label_key=get(table, "label_key", str, folder),
        graphs=graphs_of(table, folder),
    )
