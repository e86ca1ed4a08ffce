"""The vectors of all passages by one state of the embedder, on the disk under the digest of that state, and exact search among them.

A file is written aside and renamed, so that it is there whole or not at all, and says itself whose vectors it holds: training never
searches vectors of another embedder unawares.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from openbook_training.errors import InvalidData
from openbook_training.negatives import ranked
from openbook_training.run_folder import publish

Allowed = Callable[[int, int], bool]  # whether a query, by its number, may see a passage, by its row
MARGIN = 8  # passages looked at beyond those wanted, for those that a text may not see


@dataclass(frozen=True, slots=True)
class PassageIndex:
    """Vectors of passages, and what they are of."""

    vectors: np.ndarray  # (passages, d) float32 of unit length
    embedder: str  # digest of the weights that made them
    passages: str  # digest of the texts

    def search(self, queries: np.ndarray, k: int, allowed: Allowed) -> list[list[int]]:
        """Of each of the (queries, d) the k best rows of `vectors`, best first; fewer where too many are not allowed."""
        found = enumerate(ranked(queries, self.vectors, k + MARGIN))
        return [[z for z in best if allowed(query, z)][:k] for query, best in found]

    def save(self, folder: Path) -> None:
        """Write the file; one of this embedder that is there already is replaced in one step."""
        file = index_file(folder, self.embedder)
        aside = file.with_suffix(f".{os.getpid()}")  # of its own for each process of a distributed run
        save_file({"vectors": self.vectors}, aside, metadata={"embedder": self.embedder, "passages": self.passages})
        publish(aside, file)


def index_file(folder: Path, embedder: str) -> Path:
    """Where the vectors of an embedder are kept."""
    return folder / f"index-{embedder[:16]}.safetensors"


def load_index(folder: Path, embedder: str, passages: str) -> PassageIndex:
    """The vectors that this embedder made of these passages.

    Raises:
        InvalidData: there are none, they are damaged, or of another embedder or other passages.
    """
    file = index_file(folder, embedder)
    try:
        with safe_open(file, "np") as stored:
            stated = stored.metadata() or {}
            vectors = stored.get_tensor("vectors")
    except (OSError, SafetensorError) as error:
        reason = f"{file} cannot be read ({error})"
        raise InvalidData(f"{reason}; copy the whole run folder, or begin again with another output") from error
    for name, wanted in (("embedder", embedder), ("passages", passages)):
        if stated.get(name) != wanted:
            raise InvalidData(
                f"{file} holds vectors of the {name} {stated.get(name)}, and this run needs those of {wanted}; "
                "remove the file, or begin again with another output"
            )
    return PassageIndex(vectors, embedder, passages)


def texts_digest(texts: Sequence[str]) -> str:
    """Names a list of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def weights_digest(base: str, model: nn.Module) -> str:
    """Names an embedder: the digest of its checkpoint with the values of all weights that are trained."""
    digest = hashlib.sha256(base.encode())
    for name, value in model.named_parameters():
        if value.requires_grad:
            digest.update(name.encode() + b"\0" + value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()
