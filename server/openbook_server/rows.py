"""What graphs run: rows of token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Countable(Protocol):
    """A row, as far as a queue cares."""

    @property
    def tokens(self) -> int:
        """What it counts for in a batch."""


@dataclass(frozen=True, slots=True)
class Row:
    """One text, or one (question, passage) pair, ready for a graph."""

    ids: Sequence[int]
    types: Sequence[int] | None = None  # of each token 1 where it is the second text's, else 0; None = there is one text
    text_from: int = 1  # of a passage, the first token after its title

    @property
    def tokens(self) -> int:
        return len(self.ids)


def collate(rows: Sequence[Row], length: int) -> dict[str, NDArray[np.int64]]:
    """Rows as the (rows, length) int64 arrays that a graph takes, zero-padded on the right."""
    ids = np.zeros((len(rows), length), np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    types = np.zeros((len(rows), length), np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = row.ids
        mask[at, : len(row.ids)] = 1
        if row.types is not None:
            types[at, : len(row.types)] = row.types
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
