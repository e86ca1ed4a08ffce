"""What the index proposes for questions; ranked by the code that ranks every knowledge base's.

A passage that a search finds may belong to no document any more, or not yet: a write is under way, or was stopped. Whether
it is live says its document's record, read from the same copies of the shards and not newer than the last refresh, for a
record and its passages become visible together. Whoever meets one that is not live asks again for live passages alone (`doubt`),
until none is met and what is live did not change meanwhile; entries that were put into the index by hand count as not live.
"""

from __future__ import annotations

import re
import unicodedata
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook_server.errors import InvalidRequest, KnowledgeBaseUnavailable
from openbook_server.knowledge import lexical
from openbook_server.knowledge.elastic import schema
from openbook_server.knowledge.elastic.connection import Connection
from openbook_server.knowledge.elastic.doubt import Doubt, live_query, look
from openbook_server.knowledge.elastic.entries import PASSAGE_FIELDS, Key, parse_passage, parse_passage_key, parse_record, parse_windows
from openbook_server.knowledge.fusion import Candidates, depth, looks_closely, rank
from openbook_server.knowledge.graph import EF
from openbook_server.knowledge.records import Hit, Passage, SearchOptions
from openbook_server.knowledge.windows import Signs, Tokens, nearness

MOST = 10_000  # candidates of one search: Elasticsearch's own limit
_ROUNDS = 20  # of asking again; two are enough unless documents near the question are written one after the other
_ASKED_AT_ONCE = 32  # questions in one request
_RANKED_AT_ONCE = 8  # questions whose passages are loaded side by side
_APART = re.compile(r"[\s\-\u2010-\u2015/]+")  # what no analyser keeps in a word

Query = dict[str, Any]
Vector = NDArray[np.float32]


class Searcher:
    """Searches of one index; thread-safe."""

    def __init__(self, connection: Connection, index: str) -> None:
        self._connection, self._index = connection, index
        # The same copies of the shards for all that belongs together: copies are refreshed at different moments.
        self._preference = uuid.uuid4().hex
        self._pool = ThreadPoolExecutor(_RANKED_AT_ONCE, thread_name_prefix="rank")

    def search(self, questions: Sequence[str], vectors: Vector | None, options: SearchOptions, tokens: Tokens) -> list[list[Hit]]:
        """See `KnowledgeBase.search`."""
        if options.by_vectors and vectors is None:
            raise ValueError(f"mode {options.mode!r} needs the questions' vectors")
        if depth(options) > MOST:
            raise InvalidRequest("top_k", f"{options.top_k} needs more candidates than the {MOST} that Elasticsearch gives; ask for fewer")
        hits: list[list[Hit]] = []
        for part in (slice(at, at + _ASKED_AT_ONCE) for at in range(0, len(questions), _ASKED_AT_ONCE)):
            hits += self._search(questions[part], vectors[part] if vectors is not None else None, options, tokens[part])
        return hits

    def _search(self, questions: Sequence[str], vectors: Vector | None, options: SearchOptions, tokens: Tokens) -> list[list[Hit]]:
        hits: list[list[Hit]] = [[] for _ in questions]
        left = list(range(len(questions)))
        doubt: Doubt = {}
        for _ in range(_ROUNDS):
            met: list[set[str]] = [set() for _ in left]  # documents of which something was found that is not live
            proposed = self._propose(
                [questions[i] for i in left],
                vectors[left] if vectors is not None else None,
                [tokens[i] if tokens else None for i in left],
                met,
                options,
                doubt,
            )

            def ranked(question: int, candidates: Candidates[Key]) -> list[Hit]:
                return rank(questions[question], candidates, options)

            for question, row in zip(left, self._pool.map(ranked, left, proposed), strict=True):
                hits[question] = row
            if not doubt and not any(met):
                return hits
            now = look(self._connection, self._index, self._preference, {*doubt}.union(*met))
            changed = any(now[key] != live for key, live in doubt.items())  # so what was left out may be live by now
            left = [question for question, keys in zip(left, met, strict=True) if keys or changed]
            if not left:
                return hits
            doubt = now
        raise KnowledgeBaseUnavailable(
            f"{self._connection.name}: documents near the question were written {_ROUNDS} times while it was searched for; try again later"
        )

    def _propose(
        self,
        questions: Sequence[str],
        vectors: Vector | None,
        tokens: Tokens,
        met: Sequence[set[str]],
        options: SearchOptions,
        doubt: Doubt,
    ) -> list[Candidates[Key]]:
        dense: list[dict[Key, float]] = [{} for _ in questions]
        words: list[dict[Key, float]] = [{} for _ in questions]
        drawn: list[dict[Key, float]] = [{} for _ in questions]
        searches: list[tuple[dict[Key, float], set[str], Query]] = []
        allowed = [] if options.condition is None else [schema.condition_query(options.condition)]
        if doubt:
            allowed.append(live_query(doubt, self._connection.name))
        for at, question in enumerate(questions):
            if options.by_vectors and vectors is not None:
                searches.append((dense[at], met[at], _nearest(vectors[at], depth(options), options.ef, allowed)))
            if options.by_words and (worded := _worded(question, depth(options), allowed)):
                searches.append((words[at], met[at], worded))
            if options.mode == "random":
                searches.append((drawn[at], met[at], _drawn(question, depth(options), allowed)))
        self._run(searches)
        if options.mode == "hybrid" and vectors is not None:  # what only the words found gets its exact cosine
            missing = [[key for key in row if key not in dense[at]] for at, row in enumerate(words)]
            self._run([(dense[at], met[at], _exact(vectors[at], keys)) for at, keys in enumerate(missing) if keys])
        return [
            self._candidates(
                dense[at],
                words[at],
                drawn[at],
                met[at],
                vectors[at] if looks_closely(options) and vectors is not None else None,
                tokens[at],
            )
            for at in range(len(questions))
        ]

    def _candidates(
        self,
        dense: dict[Key, float],
        words: dict[Key, float],
        drawn: dict[Key, float],
        met: set[str],
        vector: Vector | None,
        tokens: Signs | None,
    ) -> Candidates[Key]:
        """`vector` and `tokens` of a question whose candidates' windows will be looked at."""
        windows: dict[Key, bytes] = {}
        return Candidates(
            dense,
            words,
            lambda keys: self._passages(keys, met, windows if vector is not None else None),
            self._vectors,
            lambda keys: nearness(vector, tokens, keys, windows),
            drawn,
        )

    def _run(self, searches: Sequence[tuple[dict[Key, float], set[str], Query]]) -> None:
        """Make searches in one request; each adds the passages that it finds, with their scores, to the mapping before it, and what
        routed other entries to the set."""
        if not searches:
            return
        header: Query = {"preference": self._preference, "allow_partial_search_results": False}
        lines: list[Query] = [
            line
            for _, _, query in searches
            # word statistics of all shards together, so that a score does not depend on where a passage lies
            for line in (header if "knn" in query else header | {"search_type": "dfs_query_then_fetch"}, {"_source": False, **query})
        ]
        body = self._connection.call(lambda client: client.msearch(index=self._index, searches=lines))
        for (found, met, query), reply in zip(searches, body["responses"], strict=True):
            for hit in reply["hits"]["hits"]:
                key = parse_passage_key(hit)
                if key is None:
                    met.add(hit["_routing"])
                else:
                    found[key] = schema.inner_product(hit["_score"]) if "knn" in query else max(hit["_score"], 0.0)

    def _passages(self, keys: Sequence[Key], met: set[str], windows: dict[Key, bytes] | None) -> Mapping[Key, Passage]:
        """Those that are live; their windows are added to `windows`, where they are wanted, and the others' documents to `met`."""
        if not keys:
            return {}
        documents = list(dict.fromkeys(document for _, document in keys))
        wanted: list[Query] = [{"_id": document, "routing": document} for document in documents]
        fields = PASSAGE_FIELDS if windows is None else [*PASSAGE_FIELDS, "windows"]
        wanted += [{"_id": schema.passage_key(document, number), "routing": document, "_source": fields} for number, document in keys]
        entries = self._connection.call(
            lambda client: client.mget(index=self._index, docs=wanted, realtime=False, preference=self._preference)
        )["docs"]
        records = {entry["_id"]: parse_record(entry) for entry in entries[: len(documents)] if entry["found"]}
        found = {}
        for key, entry in zip(keys, entries[len(documents) :], strict=True):
            record = records.get(key[1])
            if entry["found"] and record is not None and record.holds(key[0]):
                found[key] = parse_passage(entry, record)
                if windows is not None:
                    windows[key] = parse_windows(entry)
            else:
                met.add(key[1])
        return found

    def _vectors(self, keys: Sequence[Key]) -> Mapping[Key, Vector]:
        if not keys:
            return {}
        ids = [schema.passage_key(document, number) for number, document in keys]
        body = self._connection.call(
            lambda client: client.search(
                index=self._index,
                query={"ids": {"values": ids}},
                size=len(ids),
                source=False,
                fields=[{"field": "vector"}],
                preference=self._preference,
                allow_partial_search_results=False,
            )
        )
        hits = [(parse_passage_key(hit), hit["fields"]["vector"]) for hit in body["hits"]["hits"]]
        return {key: np.array(vector, np.float32) for key, vector in hits if key is not None}

    def close(self) -> None:
        self._pool.shutdown()


def _nearest(vector: Vector, count: int, ef: int | None, allowed: list[Query]) -> Query:
    candidates = min(MOST, max(ef or EF, count))
    return {"knn": {**_knn(vector, count, candidates), "filter": allowed}, "size": count}


def _exact(vector: Vector, keys: Sequence[Key]) -> Query:
    """Inner products of just these passages: so few that Elasticsearch compares them all instead of walking its graph."""
    ids = [schema.passage_key(document, number) for number, document in keys]
    return {"knn": {**_knn(vector, len(ids), len(ids)), "filter": {"ids": {"values": ids}}}, "size": len(ids)}


def _knn(vector: Vector, count: int, candidates: int) -> Query:
    return {"field": "vector", "query_vector": vector.astype(np.float64).round(9).tolist(), "k": count, "num_candidates": candidates}


def _worded(question: str, count: int, allowed: list[Query]) -> Query | None:
    """BM25 over the words, OR-ed; a question is never a query language. None where it has no words.

    The index's analyser keeps some words whole that are cut here ("Ann's", "3.5"), and leaves letters and their marks as they are stored,
    together or apart. So such a word is looked for in every form, and the best one counts.
    """
    left = {word.lower(): word for word in lexical.question_words(question)}
    if not left:
        return None
    plain, forms = [], []
    for written in _APART.split(unicodedata.normalize("NFC", question)):
        parts = lexical.words(written)
        if asked := [left.pop(part.lower()) for part in parts if part.lower() in left]:
            if len(parts) == 1 and asked[0].isascii():
                plain += asked
            else:
                texts = (" ".join(asked), written)
                forms.append(list(dict.fromkeys([*texts, *(unicodedata.normalize("NFD", text) for text in texts)])))
    words = [_match(" ".join(plain)), *({"dis_max": {"queries": [_match(form) for form in word]}} for word in forms)]
    return _best({"bool": {"must": [{"bool": {"should": words}}], "filter": allowed}}, count)


def _drawn(question: str, count: int, allowed: list[Query]) -> Query:
    """Passages in the order of random numbers, which Elasticsearch makes of question, passage's number, shard and index."""
    passages = {"bool": {"filter": [{"exists": {"field": "vector"}}, *allowed]}}
    random = {"random_score": {"seed": question, "field": "number"}, "boost_mode": "replace"}
    return _best({"function_score": {"query": passages, **random}}, count)


def _best(query: Query, count: int) -> Query:
    return {"query": query, "size": count, "sort": [{"_score": "desc"}, {"number": "asc"}], "track_total_hits": False}


def _match(text: str) -> Query:
    return {"match": {"words": {"query": text}}}
