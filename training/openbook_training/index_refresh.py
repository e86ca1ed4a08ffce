"""How an index of passages keeps up with a retriever in training: which vectors propose passages, and when they are made anew.

    none        the index of the run's beginning proposes throughout; p(z|x) is computed with d(z) as it is now all the same
                (a stale index, the ablation of Guu et al. 2020, table 2, at its extreme)
    query_side  d(z) stays as it was at the beginning, in p(z|x) too: only q(x) learns (Lewis et al. 2020; Izacard et al. 2022, section 2.4)
    rerank      the index of the beginning proposes more than are read; the best of them by d(z) as it is now are read
                (Izacard et al. 2022, section 2.4)
    full        the index is made anew in the run, on a schedule or when it has drifted (Guu et al. 2020, section 3.3)

Guu et al. make the new index on other machines while training goes on; here training waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from openbook_training.config import no_share
from openbook_training.negatives import ranked
from openbook_training.passage_index import Allowed, PassageIndex, index_file, load_index, weights_digest
from openbook_training.processes import process
from openbook_training.progress import progress
from openbook_training.realm import Realm
from openbook_training.squad import spread

MODES = ("none", "query_side", "rerank", "full")
PROBE_QUERIES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """The table [index]: how the vectors of the passages keep up."""

    refresh: str = "full"  # none, query_side, rerank or full; the module says what each means
    every_steps: int = 0  # full: make the index anew after every so many steps; 0 = not by the step
    below_cosine: float = 0.0  # full: make it anew when the probe passages' mean cosine to their vectors in it is below; 0 = never
    below_overlap: float = 0.0  # full: ... when the probe's overlap@k with a fresh search is below, 0 to 1; 0 = never
    probe_steps: int = 25  # how often drift is measured; 0 = never, but in evaluations
    probe_passages: int = 128  # that it is measured on
    proposed: int = 32  # rerank: passages that the index proposes of each text

    def problems(self) -> list[str]:
        """What cannot work."""
        found = [] if self.refresh in MODES else [f"refresh: {self.refresh!r} is none of {', '.join(MODES)}"]
        due = bool(self.every_steps or self.below_cosine or self.below_overlap)
        if self.refresh == "full" and not due:
            found.append("refresh: full needs every_steps, below_cosine or below_overlap, to say when the index is made anew")
        if self.refresh != "full" and due:
            found.append(
                f"refresh: every_steps, below_cosine and below_overlap make the index anew; {self.refresh!r} never does: leave them 0"
            )
        found += no_share(self, "below_cosine", "below_overlap")
        if (self.below_cosine or self.below_overlap) and not self.probe_steps:
            found.append("probe_steps: 0 never measures the drift that below_cosine and below_overlap wait for")
        if not self.probe_passages:
            found.append("probe_passages: 0 leaves nothing to measure drift on")
        return found


class IndexKeeper:
    """The index that a run searches, made and replaced in its folder."""

    def __init__(
        self,
        config: IndexConfig,
        folder: Path,
        rows: Sequence[list[int]],
        queries: Sequence[list[int]],
        *,
        k: int,
        base: str,
        passages: str,
        precision: str,
        console: Console,
    ) -> None:
        """Args:
        rows: token ids of all passages, as they are embedded.
        queries: token ids of texts to measure drift with; the first ones are used.
        k: passages that a text is read beside.
        base: digest of the checkpoint that the retriever belongs to.
        passages: digest of the passages.
        """
        self._config, self._folder, self._rows, self._k, self._console = config, folder, rows, k, console
        self._base, self._passages, self._bf16 = f"{base}/{precision}", passages, precision == "bf16"
        self._probe = spread(list(range(len(rows))), config.probe_passages)
        self._queries = queries[:PROBE_QUERIES]
        self._index: PassageIndex | None = None
        self._saved = ""  # embedder of the index that the last checkpoint on the disk names
        self._observed: dict[str, float] = {}

    @property
    def index(self) -> PassageIndex:
        """The one that is searched now."""
        if self._index is None:
            raise RuntimeError("no index yet; begin() makes the first one")
        return self._index

    @property
    def fixed(self) -> bool:
        """Whether d(z) are taken from the index as they are."""
        return self._config.refresh == "query_side"

    def begin(self, model: Realm) -> bool:
        """Make the first index, or find the one that an earlier start of this run made; False where there is one already."""
        if self._index is not None:
            return False
        embedder = weights_digest(self._base, model.retriever)
        if index_file(self._folder, embedder).is_file():
            self._index = load_index(self._folder, embedder, self._passages)
        else:
            self._index = self._made(model, embedder)
        return True

    def before_step(self, model: Realm, step: int) -> None:
        """Measure drift and make the index anew, where either is due."""
        config = self._config
        stale = bool(config.every_steps and step and step % config.every_steps == 0)
        if not stale and step and config.probe_steps and step % config.probe_steps == 0 and not self.fixed:
            cosine, overlap = self._drift(model)
            self._observed = {"drift/probe_cosine": 100 * cosine, "drift/probe_overlap": 100 * overlap}
            stale = cosine < config.below_cosine or overlap < config.below_overlap
        if stale and (embedder := weights_digest(self._base, model.retriever)) != self.index.embedder:
            old = self.index.embedder
            self._index = self._made(model, embedder)  # whole on the disk before the old one is let go
            self._console.print(f"step {step}: the index was made anew")
            # Only the first process writes checkpoints, and so knows which index the last one names.
            for file in self._folder.glob("index-*.safetensors") if process().is_main_process else ():
                if file not in {index_file(self._folder, name) for name in (embedder, old, self._saved)}:
                    file.unlink(missing_ok=True)

    def observed(self) -> dict[str, float]:
        """What was measured before this step, once."""
        observed, self._observed = self._observed, {}
        return observed

    def state(self) -> dict[str, Any]:
        """For a checkpoint: by whose vectors the run goes on."""
        self._saved = self.index.embedder
        return {"embedder": self._saved}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises:
        InvalidData: the run folder lacks the vectors that the checkpoint names, or they are another embedder's.
        """
        self._saved = str(state["embedder"])
        self._index = load_index(self._folder, self._saved, self._passages)

    def propose(self, model: Realm, queries: np.ndarray, allowed: Allowed) -> list[list[int]]:
        """Of each of the (texts, d) queries the passages to read, best first."""
        if self._config.refresh != "rerank":
            return self.index.search(queries, self._k, allowed)
        found = self.index.search(queries, self._config.proposed, allowed)
        rows = sorted({row for of_text in found for row in of_text})
        vectors = dict(zip(rows, self.embed(model, [self._rows[row] for row in rows]), strict=True)) if rows else {}
        return [sorted(of_text, key=lambda row: -float(vectors[row] @ x))[: self._k] for x, of_text in zip(queries, found, strict=True)]

    def embed(self, model: Realm, rows: Sequence[list[int]], report: Callable[[int], None] = lambda done: None) -> np.ndarray:
        """(len(rows), d) float32 by the retriever as it is now."""
        device = model.null_score.device.type
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=self._bf16):
            return model.embed(rows, report).cpu().numpy()

    def fresh(self, model: Realm) -> PassageIndex:
        """An index by the retriever as it is now, kept nowhere, to measure with; the fixed one where d(z) are fixed."""
        return self.index if self.fixed else PassageIndex(self.embed(model, self._rows), "", self._passages)

    def _made(self, model: Realm, embedder: str) -> PassageIndex:
        with progress(self._console, "embedding passages for the index", len(self._rows)) as update:
            made = PassageIndex(self.embed(model, self._rows, update), embedder, self._passages)
        made.save(self._folder)
        return made

    def _drift(self, model: Realm) -> tuple[float, float]:
        """Mean cosine of the probe passages to their vectors in the index, and overlap@k among them with a fresh search."""
        vectors = self.embed(model, [*(self._rows[row] for row in self._probe), *self._queries])
        now, queries = vectors[: len(self._probe)], vectors[len(self._probe) :]
        then = self.index.vectors[self._probe]
        return float((now * then).sum(axis=1).mean()), overlap(queries, then, now, self._k)


def overlap(queries: np.ndarray, one: np.ndarray, other: np.ndarray, k: int) -> float:
    """Mean share, 0 to 1, of the k best rows of `one` that are among the k best rows of `other`, over (queries, d) queries."""
    k = min(k, len(one))
    pairs = zip(ranked(queries, one, k), ranked(queries, other, k), strict=True)
    return float(np.mean([len(set(a) & set(b)) / k for a, b in pairs]))
