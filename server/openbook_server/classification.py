"""One classified request, end to end: what Classify does between tokens and probabilities.

    classifier       embed -> search labelled passages -> the text's graph -> the neighbours' graph
    verifier         (embed -> search ->) claim and evidence as one pair -> its graph
    vocabulary head  its graph

A classifier's neighbours are passages of the knowledge base whose documents carry one of its labels in their metadata: a labelled
text that is stored takes part from then on, without training or export, and one that is deleted no longer does. They are found by the
embedder that found them in training. Texts come in validated; gRPC is not known here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from openbook_server.backlog import Arrays
from openbook_server.bundle import Bundle
from openbook_server.knowledge import Hit, SearchOptions, filters
from openbook_server.models import Models
from openbook_server.pipeline import Pipeline
from openbook_server.priority import computed
from openbook_server.rows import Row
from openbook_server.tokenization import Pair, TextEncoder
from openbook_server.turns import in_turns
from openbook_server.work import Work

SEPARATOR = " "  # between passages of evidence, as between the sentences that a verifier was trained on
NO_NEIGHBOUR = -1e9  # the score that the neighbours' graph takes for "there is no further one"

Probabilities = NDArray[np.float32]


class Voting(Protocol):
    """A classifier's graph for neighbours."""

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> Arrays: ...


@dataclass(frozen=True, slots=True)
class Classified:
    """What became of one text."""

    probabilities: Probabilities  # (labels,)
    readings: Mapping[str, Probabilities]  # "alone", "model" and "knn", (labels,) each, where it has neighbours
    passages: int  # neighbours that took part, or passages of evidence of which something was read
    hits: Sequence[Hit] = ()  # those of them that were found in the knowledge base
    labels: Sequence[int] = ()  # of neighbours, an entry a hit
    read: Sequence[int] = ()  # places of those of the evidence


class Classification:
    """Owns nothing but the order; the stages are handed in."""

    def __init__(
        self, bundle: Bundle, encoder: TextEncoder, pipeline: Pipeline, models: Models, neighbour_graphs: Mapping[str, Voting]
    ) -> None:
        """`neighbour_graphs` are those of classifiers, by the names of these."""
        self._bundle, self._encoder, self._pipeline, self._models = bundle, encoder, pipeline, models
        self._neighbour_graphs = neighbour_graphs

    def check(self, name: str, texts: int, deadline: float) -> None:
        """Refuse texts that are not yet tokenised where the engine would refuse even the shortest; raises as `Models.check`."""
        self._models.check(name, [1] * texts, deadline=deadline)

    async def texts(self, name: str, rows: Sequence[Row], work: Work) -> list[Classified]:
        """Label each text by itself."""
        return [Classified(alone, {}, 0) for alone in await self._alone(name, rows, work)]

    async def beside_neighbours(
        self, name: str, texts: Sequence[str], rows: Sequence[Row], options: SearchOptions, label_key: str, work: Work
    ) -> list[Classified]:
        """Label each text with the help of the labelled passages that are nearest to it.

        Args:
            rows: of the texts, as the embedder reads them; what is too long for the classifier is cut for it.
            options: `top_k` is the number of neighbours, `condition` what their documents must match beside the label.
            label_key: of the metadata that hold labels.
        """
        head = self._bundle.heads[name]
        labelled = filters.OneOf(label_key, head.labels)
        condition = labelled if options.condition is None else filters.All((labelled, options.condition))
        with self._models.attended(work.deadline) as expect:
            tokens = min(head.max_tokens, max(len(row.ids) for row in rows))
            expect(name, tokens, len(rows))
            options = replace(options, condition=condition)
            found = await self._pipeline.search(texts, rows, options, work)
            expect(name, tokens, 0)
            alone = await self._alone(name, rows, work)
        numbers = {label: number for number, label in enumerate(head.labels)}
        found = [
            [hit for hit in hits if hit.passage.metadata.get(label_key) in numbers] for hits in found
        ]  # one may have been written anew
        labels = [[numbers[hit.passage.metadata[label_key]] for hit in hits] for hits in found]
        graph = self._neighbour_graphs[name]
        classified = await computed(lambda: [_beside(graph, *one, options.top_k) for one in zip(alone, found, labels, strict=True)])
        work.rank_ms += work.lap()
        return classified

    async def beside_evidence(
        self, name: str, claims: Sequence[str], rows: Sequence[Row], evidence: Sequence[Sequence[str]], work: Work
    ) -> list[Classified]:
        """Label each claim beside its passages, which are read as one text, as in training, and cut where they are too long."""
        head = self._bundle.heads[name]
        pairs: list[Pair | None] = []
        async for claim, passages in in_turns(zip(claims, evidence, strict=True)):  # evidence may be long
            pairs += self._encoder.pairs(claim, [SEPARATOR.join(passages)], head.max_tokens) if passages else [None]
        work.tokenise_ms += work.lap()
        read = [pair.row if pair is not None else row for pair, row in zip(pairs, rows, strict=True)]
        labelled = await self._run(name, read, work)
        parts = [passages_read(pair, passages) if pair is not None else [] for pair, passages in zip(pairs, evidence, strict=True)]
        return [Classified(probabilities, {}, len(read), read=read) for probabilities, read in zip(labelled, parts, strict=True)]

    async def beside_found_evidence(
        self, name: str, claims: Sequence[str], rows: Sequence[Row], options: SearchOptions, work: Work
    ) -> list[Classified]:
        """As `beside_evidence`, of the passages that a search finds, the best first."""
        with self._models.attended(work.deadline) as expect:
            tokens = self._bundle.heads[name].max_tokens  # which several passages mostly fill
            expect(name, tokens, len(rows))
            found = await self._pipeline.search(claims, rows, options, work)
            evidence = [[hit.passage.text for hit in hits] for hits in found]
            expect(name, tokens, 0)
            classified = await self.beside_evidence(name, claims, rows, evidence, work)
        return [replace(one, hits=[hits[at] for at in one.read]) for one, hits in zip(classified, found, strict=True)]

    async def _alone(self, name: str, rows: Sequence[Row], work: Work) -> list[Probabilities]:
        """Of texts by themselves, cut where the embedder reads more of them than the classifier does."""
        limit = self._bundle.heads[name].max_tokens
        shorter = [self._encoder.cut(row, limit) if len(row.ids) > limit else row for row in rows]
        return await self._run(name, shorter, work)

    async def _run(self, name: str, rows: Sequence[Row], work: Work) -> list[Probabilities]:
        return [_floats(outputs["probability"]) for outputs in await self._models.read(name, rows, work)]


def passages_read(pair: Pair, passages: Sequence[str]) -> list[int]:
    """The places of those passages of a pair's evidence of which a token is in its row; a blank one has none."""
    tokens = range(pair.first, len(pair.row.ids) - 1)  # without the closing special token
    starts, ends = pair.characters(tokens, tokens)
    begin, read = 0, []
    for place, passage in enumerate(passages):
        token = bisect_right(ends, begin)  # the first that goes beyond where the passage begins
        if token < len(tokens) and starts[token] < begin + len(passage):
            read.append(place)
        begin += len(passage) + len(SEPARATOR)
    return read


def _beside(graph: Voting, alone: Probabilities, hits: Sequence[Hit], labels: Sequence[int], count: int) -> Classified:
    """One text at a time: what becomes of it never depends on others."""
    if not hits:
        return Classified(alone, {}, 0)
    scores = np.full((1, count), NO_NEIGHBOUR, np.float32)
    numbers = np.zeros((1, count), np.int64)
    scores[0, : len(hits)] = [hit.score for hit in hits]
    numbers[0, : len(hits)] = labels
    outputs: Arrays = graph.run({"alone": alone[None], "score": scores, "label": numbers})
    readings = {"alone": alone, "model": _floats(outputs["model"][0]), "knn": _floats(outputs["knn"][0])}
    return Classified(_floats(outputs["combined"][0]), readings, len(hits), hits, labels)


def _floats(values: NDArray[np.generic]) -> Probabilities:
    """A copy that owns its memory: the engine's is a view that would keep its whole batch alive."""
    return np.array(values, np.float32)
