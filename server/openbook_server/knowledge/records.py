"""What goes into a knowledge base and what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from openbook_server.knowledge.filters import Filter
from openbook_server.knowledge.lexical import searched_text, stem_lines

SearchMode = Literal["hybrid", "late_interaction", "dense", "lexical", "random"]
Fusion = Literal["weighted", "reciprocal_rank"]
State = Literal["live", "kept", "new"]  # answers; answered before and was replaced; never answered yet


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions:
    """How passages are found; docs/search.md explains each."""

    top_k: int  # hits a question, at least 1; fewer where the knowledge base is smaller or no word matches
    mode: SearchMode = "hybrid"
    fusion: Fusion = "weighted"  # of hybrid's two rankings
    ef: int | None = None  # candidates the graph keeps; by default `KnowledgeBase.ef`
    condition: Filter | None = None  # only passages of documents whose metadata match
    min_score: float | None = None  # only hits that score as much or more
    diversity: float = 0.0  # 0 to 1: how much a hit loses for being like a better one

    @property
    def by_vectors(self) -> bool:
        """Whether the nearest vectors propose passages: questions must be embedded."""
        return self.mode in ("hybrid", "late_interaction", "dense")

    @property
    def by_words(self) -> bool:
        """Whether the words do."""
        return self.mode in ("hybrid", "lexical")


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """What a user hands in."""

    id: str  # given by the source where it has one
    text: str
    title: str = ""
    source: str = ""  # file, URL or dataset row it came from
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """The unit that is retrieved: `document.text[start : start + len(text)]`."""

    id: str  # "<document id>#<number>"
    document_id: str
    text: str
    start: int  # code points into the document's text
    title: str = ""
    source: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    tokens: bytes = field(default=b"", compare=False, repr=False)  # of the text, see `TextEncoder.kept`; empty = nobody made them
    _stem_lines: str = field(default="", init=False, compare=False, repr=False)  # once asked for

    @property
    def stem_lines(self) -> str:
        """The stems of the text's sentences; made when first asked for, and about as long as the text."""
        if not self._stem_lines:
            object.__setattr__(self, "_stem_lines", stem_lines(self.text))
        return self._stem_lines

    @property
    def searched_text(self) -> str:
        """What words are looked for in."""
        return searched_text(self.title, self.text)


class PassageVectors(NamedTuple):
    """What an embedder gives of some passages."""

    whole: NDArray[np.float32]  # (passages, dim) unit vectors
    windows: Sequence[bytes]  # of each, its windows and perhaps their tokens, see `windows.pack`; b"" where the embedder gives none


class Hit(NamedTuple):
    """A passage that a search found; docs/search.md gives the scale of each score. A tuple, for ten are made a question, and a
    frozen dataclass takes three times as long to make."""

    passage: Passage
    score: float  # what retrieval orders hits by
    dense_score: float | None = None  # inner product of unit vectors
    window_score: float | None = None  # inner product with the nearest of its windows
    lexical_score: float | None = None  # BM25
    overlap_score: float | None = None  # what of the question stands in it word by word
    token_score: float | None = None  # cosine of the question's tokens with those nearest to them in one window, weighed; see `windows`
    answer_probability: float | None = None  # that the question's answer stands in it, where it was read


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    documents: int
    passages: int


@dataclass(frozen=True, slots=True)
class BundlePlace:
    """Which bundle, and where it was seen last; both empty where nobody said."""

    id: str = ""
    folder: str = ""  # absolute


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationState:
    """One generation."""

    name: str
    state: State
    previous: bool  # the one that was live before the live one
    fingerprint: str  # of its embedder
    dim: int
    graph_dims: int  # asked for; 0 = as few as the data allow; in Elasticsearch all of them
    bundle: BundlePlace
    passages: int  # that it has vectors of
    lacking: int  # that it has none of
    vector_bytes: int  # on the disk, about; a folder's generations of one embedder share them; in Elasticsearch, of the whole index
    snapshot_bytes: int

    def __str__(self) -> str:
        done = f"{self.passages} passages" + (f", lacks {self.lacking}" if self.lacking else "")
        size = f"{(self.vector_bytes + self.snapshot_bytes) / 1e6:.1f} MB on the disk"
        place = f"bundle {self.bundle.id[:12]} in {self.bundle.folder}" if self.bundle.id else "bundle unknown"
        state = self.state + (", live before" if self.previous else "")
        return f"{state}; {done}; embedder {self.fingerprint[:12]}, {self.dim} dimensions; {size}; {place}"
