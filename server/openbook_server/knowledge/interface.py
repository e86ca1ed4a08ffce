"""What every knowledge base does, wherever its passages are kept; the rest of the server knows no more of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from openbook_server.knowledge.records import BundlePlace, Counts, Document, GenerationState, Hit, Passage, SearchOptions
from openbook_server.knowledge.watch import Estimate
from openbook_server.knowledge.windows import Tokens


@dataclass(frozen=True, slots=True)
class Gap:
    """Some of what a generation lacks."""

    passages: Sequence[Passage]  # to be embedded; none where something is only to be removed or copied
    fill: Callable[[NDArray[np.float32], Sequence[bytes]], None]
    """Takes their vectors, see `PassageVectors`; durable when it returns. What is gone meanwhile is left out. Raises as
    `KnowledgeBase.replace_documents`."""


class KnowledgeBase(Protocol):
    """Documents in whole, passages out. One thread writes, `search_threads` of them search; everything blocks.

    Every method may raise KnowledgeBaseDamaged and KnowledgeBaseUnavailable, and of one on other machines KnowledgeBaseRefused.
    """

    @property
    def name(self) -> str:
        """Where it is, fit for a message: without any password."""

    @property
    def generation(self) -> str:
        """Names the embedder and the parameters that its index was built with."""

    @property
    def search_threads(self) -> int:
        """How many searches at once make sense."""

    @property
    def sequence(self) -> int:
        """Number of the last write."""

    @property
    def graph_rows(self) -> int:
        """Passages in the graph of nearest neighbours; the others are compared exactly."""

    @property
    def graph_width(self) -> int:
        """Dimensions of what the graph holds of a passage; 0 = there is no graph."""

    @property
    def ef(self) -> int:
        """Candidates that a dense search keeps, unless it names a number."""

    @property
    def recall(self) -> Estimate | None:
        """What the watch found; None where it has found nothing yet, or there is none."""

    def size_bytes(self) -> int:
        """On disk, without copies."""

    def counts(self) -> Counts: ...

    def replace_documents(
        self,
        documents: Sequence[tuple[Document, str]],
        passages: Sequence[Passage],
        vectors: NDArray[np.float32],
        windows: Sequence[bytes] = (),
    ) -> None:
        """Store documents (each with its digest) and their passages; durable and searchable when this returns.

        Args:
            documents: replaced whole where their ids are stored already; ids must differ within a call.
            passages: all passages of all of them.
            vectors: (passages, dim) unit vectors.
            windows: of each passage, see `PassageVectors`; none at all means that no passage has any.

        Raises:
            KnowledgeBaseDamaged: the write failed (disk full, folder read-only); nothing of it is stored.
            KnowledgeBaseUnavailable: each document is stored whole or is as it was; to write them again is safe.
            ValueError: a vector is not of unit length (NaN included); nothing is stored.
        """

    def delete_documents(self, ids: Sequence[str]) -> int:
        """Remove documents for good; returns how many passages went with them. Durable when this returns."""

    def documents(self, ids: Sequence[str]) -> dict[str, list[Passage]]:
        """The passages, in order, of those documents that are stored and have any."""

    def page(self, after: int, size: int) -> list[tuple[int, str, str, int]]:
        """(number, id, source, passages) of at most `size` documents whose numbers are above `after`, in the order of storing."""

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """Digests of those documents that are stored."""

    def facts(self, *keys: str) -> dict[str, str]:
        """Those of the recorded facts about the knowledge base that there are."""

    def record(self, facts: Mapping[str, str]) -> None:
        """Keep facts about the knowledge base; durable when this returns."""

    def search(
        self, questions: Sequence[str], vectors: NDArray[np.float32] | None, options: SearchOptions, tokens: Tokens = ()
    ) -> list[list[Hit]]:
        """The best passages for each question, best first, ties in the order of storing.

        Args:
            vectors: (questions, dim) unit vectors; not needed where `options.by_vectors` is false.
            tokens: of each question the signs of its tokens; hybrid and late_interaction compare them with those of the passages.
        """

    def watch(self, *, share: float, target: float) -> None:
        """From now on make a share of the dense searches again exactly, in the background, and let `ef` hold a target recall@10.

        A knowledge base that cannot search exactly at little cost watches nothing.
        """

    def optimise(self) -> None:
        """After much was written: make searches as fast as they can be."""

    def sweep(self) -> None:
        """Remove what writes that were stopped left behind, where there can be such a thing; does nothing while that was done lately."""

    def snapshot(self) -> None:
        """Leave things as the next start likes them best; nothing that was stored depends on it.

        Raises:
            KnowledgeBaseDamaged: the disk is full or the folder cannot be written.
        """

    @property
    def live_generation(self) -> str:
        """Name of the generation that whoever opens `name` now gets; another process may have published it."""

    def open_beside(
        self, *, fingerprint: str, dim: int, bundle: BundlePlace, graph_dims: int | None = None, name: str | None = None
    ) -> KnowledgeBase:
        """Another generation of this knowledge base; all writing to both must be done by one thread.

        Args:
            bundle, fingerprint, dim: that it is served with, and of its embedder.
            graph_dims: see `EmbeddedKnowledgeBase`; None = as this one's.
            name: of the generation; without one, that of the bundle is found, or added, and then lacks everything.
        """

    def lacking(self, limit: int) -> Gap | None:
        """Some of what the live generation holds and this one lacks, about `limit` passages of it; None where it lacks nothing."""

    def serve_with(self, bundle: BundlePlace) -> None:
        """Record the bundle that this generation is served with."""

    def hold(self) -> None:
        """Let nobody, in whichever process, write to the live generation until this one is published or `release` is called.

        Whoever writes meanwhile waits, and is refused as unavailable when that takes long. A process that holds and dies holds nobody
        up for good.
        """

    def release(self) -> None:
        """Give back what `hold` took; nothing to do where this generation was published."""

    def publish(self) -> None:
        """Let everybody who opens `name` from now on have this generation; nothing to do where it is so already.

        Raises:
            KnowledgeBaseDamaged: it lacks passages that the knowledge base holds.
            GenerationNotReady: another process publishes as well.
        """

    def went_live(self) -> None:
        """Take writes from now on, for another process made this generation the live one.

        Raises:
            GenerationNotReady: it is not live.
        """

    def generation_states(self) -> list[GenerationState]:
        """All generations of the knowledge base, in the order in which they were made."""

    def remove_generation(self, name: str) -> None:
        """Remove one for good; it must not be open.

        Raises:
            InvalidRequest: there is none of that name, or it is the live one.
        """

    def close(self) -> None: ...
