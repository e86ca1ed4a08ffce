"""Searches wait for the knowledge base as rows wait for the device: in an engine of their own, whose sessions are the threads that search.

So who is due first is searched for first, who hung up or would be too late is not searched for at all, and a request whose turn would come
too late is refused at once, by what its way to search has cost lately. A row here is what is searched for at once of one request's
questions; it shares a batch with none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openbook_server.buckets import Buckets
from openbook_server.engine import Engine
from openbook_server.knowledge import Hit, KnowledgeBase, SearchOptions, depth
from openbook_server.knowledge.projection import Vectors
from openbook_server.knowledge.windows import Tokens

SEARCHED_AT_ONCE = 32  # questions of a request; more at once save little
_MOST = 2**20  # rows that may wait; more requests are not taken in anyway


@dataclass(frozen=True, slots=True)
class Searched:
    """Some questions of a request."""

    questions: Sequence[str]
    vectors: Vectors | None
    options: SearchOptions
    asked_tokens: Tokens  # of each question, for a closer look

    @property
    def tokens(self) -> int:
        return _tokens(len(self.questions), self.options)


class _Search:
    """One way to search, as the engine runs it."""

    buckets = Buckets((), 1)

    def __init__(self, knowledge_base: KnowledgeBase) -> None:
        self._search = knowledge_base.search

    def run_rows(self, rows: Sequence[Searched], length: int) -> dict[str, Any]:
        return {"found": [self._found(row) for row in rows]}

    def _found(self, row: Searched) -> list[list[Hit]] | Exception:
        """A failure is a result: it is for who asked to hear of, as it is, and the engine has nothing to try again."""
        try:
            return self._search(row.questions, row.vectors, row.options, row.asked_tokens)
        except Exception as error:
            return error


class Searches:
    """What is searched for in one knowledge base, on as many threads as it likes."""

    def __init__(self, knowledge_base: KnowledgeBase) -> None:
        self._search, self._ways = _Search(knowledge_base), set[str]()
        # A budget of one token: every row is a batch.
        self._engine = Engine({}, max_batch_tokens=1, max_queued=_MOST, sessions=knowledge_base.search_threads, name="search")

    def check(self, count: int, options: SearchOptions, *, deadline: float) -> None:
        """Refuse so many questions that are yet to come, before work is spent on them; as `Engine.check`."""
        sizes = [len(range(count)[at : at + SEARCHED_AT_ONCE]) for at in range(0, count, SEARCHED_AT_ONCE)]
        self._engine.check(self._way(options), [_tokens(size, options) for size in sizes], deadline=deadline)

    async def search(
        self,
        questions: Sequence[str],
        vectors: Vectors | None,
        options: SearchOptions,
        tokens: Tokens,
        *,
        deadline: float,
        begun: bool,
    ) -> tuple[list[list[Hit]], float]:
        """What the knowledge base finds for each question, at least one, and the seconds that they waited for their turn; cancelling
        withdraws those that still do.

        Raises:
            Overloaded, DeadlineExceeded, NotServing: as `Engine.submit`.
            OpenBookError: as the knowledge base does.
        """
        parts = [slice(at, at + SEARCHED_AT_ONCE) for at in range(0, len(questions), SEARCHED_AT_ONCE)]
        rows = [Searched(questions[part], None if vectors is None else vectors[part], options, tokens[part]) for part in parts]
        outcome = await self._engine.submit(self._way(options), rows, deadline=deadline, begun=begun)
        hits: list[list[Hit]] = []
        for row in outcome.rows:
            found: Any = row["found"]
            if isinstance(found, Exception):
                raise found
            hits += found
        return hits, outcome.queued_seconds

    def close(self) -> None:
        """Finish the searches that wait."""
        self._engine.close()

    def _way(self, options: SearchOptions) -> str:
        """The graph's name, for each way costs something else; a filter has to be looked up."""
        way = options.mode + ("" if options.condition is None else ", filtered")
        if way not in self._ways:
            self._ways.add(way)
            self._engine.add({way: self._search})
        return way


def _tokens(questions: int, options: SearchOptions) -> int:
    """What a search counts for, in a cost law of tokens: every question looks at as many candidates."""
    return questions * depth(options)
