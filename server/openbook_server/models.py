"""The graphs of one bundle in an engine that may hold those of several: they share its device, its queue and its lanes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from openbook_server.backlog import Arrays, Lane
from openbook_server.engine import Engine, Outcome, Runnable
from openbook_server.rows import Row
from openbook_server.work import Work

Expect = Callable[[str, int, int], None]  # of a model, with the tokens of a row, how many rows are yet to come
_numbers = itertools.count(1)


class Models:
    """Runs the rows of one bundle, by the names its graphs have there: embedder, embedder.passages, reader and so on."""

    def __init__(
        self, engine: Engine, graphs: Mapping[str, Runnable], *, invariant: Collection[str] = (), lane: Lane = Lane.FOREGROUND
    ) -> None:
        """Add them to `engine`.

        Args:
            invariant: those that give a row the same bytes whatever shares its batch.
            lane: the most urgent one that rows get, whatever is asked for; it may be changed at any time.
        """
        number = next(_numbers)
        self._engine, self._invariant, self.lane = engine, frozenset(invariant), lane
        self._names = {model: f"{model}@{number}" for model in graphs}
        engine.add({self._names[model]: graph for model, graph in graphs.items()})

    async def submit(
        self, model: str, rows: Sequence[Row], *, deadline: float, lane: Lane = Lane.FOREGROUND, alone: bool = False
    ) -> Outcome:
        """As `Engine.submit`."""
        return await self._engine.submit(self._names[model], rows, deadline=deadline, lane=max(lane, self.lane), alone=alone)

    async def read(self, model: str, rows: Sequence[Row], work: Work) -> list[Arrays]:
        """What a request reads, in any model but the embedder: the outputs of each row; raises as `submit`."""
        alone, begun = self.alone(model, work), work.begun
        outcome = await self._engine.submit(self._names[model], rows, deadline=work.deadline, lane=self.lane, alone=alone, begun=begun)
        work.read_ms += work.lap()
        work.queue_ms += 1000 * outcome.queued_seconds
        return outcome.rows

    def alone(self, model: str, work: Work) -> bool:
        """Whether a request's rows must run alone for their results to have the bytes that it was promised."""
        return work.batch_invariant and model not in self._invariant

    @contextmanager
    def attended(self, deadline: float) -> Iterator[Expect]:
        """As `Engine.attended`, where rows of the foreground are run, of one request that is due then."""
        if self.lane is not Lane.FOREGROUND:
            yield lambda model, tokens, rows: None
            return
        with self._engine.attended() as expect:
            yield lambda model, tokens, rows: expect(self._names[model], tokens, rows, deadline)

    def check(self, model: str, lengths: Sequence[int], *, deadline: float, begun: bool = False) -> None:
        """As `Engine.check`."""
        self._engine.check(self._names[model], lengths, deadline=deadline, begun=begun)

    def close(self) -> None:
        """Take the graphs out of the engine; nobody may wait for rows of theirs."""
        self._engine.remove(self._names.values())


def model_of(graph: str) -> str:
    """Which of a bundle's models an engine's graph is."""
    return graph.partition("@")[0]
