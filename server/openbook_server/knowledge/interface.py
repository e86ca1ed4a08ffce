"""What every knowledge base does, wherever its passages are kept; the rest of the server knows no more of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from openbook_server.knowledge.records import Counts, Document, Hit, Passage, SearchOptions
from openbook_server.knowledge.watch import Estimate


class KnowledgeBase(Protocol):
    """Documents in whole, passages out. One thread writes, `search_threads` of them search; everything blocks.

    Every method may raise KnowledgeBaseDamaged, and of one on other machines KnowledgeBaseUnavailable and KnowledgeBaseRefused.
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
        self, documents: Sequence[tuple[Document, str]], passages: Sequence[Passage], vectors: NDArray[np.float32]
    ) -> None:
        """Store documents (each with its digest) and their passages; durable and searchable when this returns.

        Args:
            documents: replaced whole where their ids are stored already; ids must differ within a call.
            passages: all passages of all of them.
            vectors: (passages, dim) unit vectors.

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

    def search(self, questions: Sequence[str], vectors: NDArray[np.float32] | None, options: SearchOptions) -> list[list[Hit]]:
        """The best passages for each question, best first, ties in the order of storing.

        Args:
            vectors: (questions, dim) unit vectors; not needed for mode "lexical".
        """

    def watch(self, *, share: float, target: float) -> None:
        """From now on make a share of the dense searches again exactly, in the background, and let `ef` hold a target recall@10.

        A knowledge base that cannot search exactly at little cost watches nothing.
        """

    def optimise(self) -> None:
        """After much was written: make searches as fast as they can be."""

    def snapshot(self) -> None:
        """Leave things as the next start likes them best; nothing that was stored depends on it.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """

    def build(
        self, embed: Callable[[Sequence[Passage]], NDArray[np.float32]], report: Callable[[int, int], None], stopping: Callable[[], bool]
    ) -> bool:
        """Of a generation that was opened as a new one: embed the passages that the knowledge base holds and it lacks.

        Returns whether it may be published now. Where each generation has passages of its own this does nothing and returns
        False: that one is filled by storing the documents again.

        Args:
            embed: (passages, dim) unit vectors of some passages.
            report: told now and then how many passages the generation has, and how many there are.
            stopping: whether to stop; what was reported is stored, and building again goes on from there.
        """

    def publish(self) -> None:
        """Let everybody who opens `name` from now on have this generation; nothing to do where it is so already.

        Raises:
            KnowledgeBaseDamaged: it lacks passages that the knowledge base holds.
        """

    def close(self) -> None: ...
