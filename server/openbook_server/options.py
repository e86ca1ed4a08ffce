"""How a request wants passages found: options, checked, as the knowledge base takes them; of some methods filter and mode alone."""

from __future__ import annotations

import math

from openbook.v1 import openbook_pb2 as pb

from openbook_server.errors import InvalidRequest
from openbook_server.knowledge import Filter, SearchOptions, filters
from openbook_server.knowledge.records import Fusion, SearchMode
from openbook_server.validation import bounded

DEFAULT_TOP_K = 5
MODES: dict[int, SearchMode | None] = {
    pb.SEARCH_MODE_UNSPECIFIED: "hybrid",
    pb.SEARCH_MODE_HYBRID: "hybrid",
    pb.SEARCH_MODE_DENSE: "dense",
    pb.SEARCH_MODE_LEXICAL: "lexical",
    pb.SEARCH_MODE_NONE: None,
    pb.SEARCH_MODE_RANDOM: "random",
    pb.SEARCH_MODE_LATE_INTERACTION: "late_interaction",
}
FUSIONS: dict[int, Fusion] = {
    pb.FUSION_UNSPECIFIED: "weighted",
    pb.FUSION_WEIGHTED: "weighted",
    pb.FUSION_RECIPROCAL_RANK: "reciprocal_rank",
}
MAX_CONDITIONS, MAX_DEPTH = 64, 8  # of one filter
MAX_VALUES = 1_000  # of one `one_of`
MAX_EF = 4_096  # candidates of the dense index; beyond it an exact scan is cheaper


def parse_options(request: pb.SearchRequest | pb.AnswerRequest, max_top_k: int) -> SearchOptions | None:
    """A request's search options; None where it wants no retrieval.

    Raises:
        InvalidRequest: one is out of range or unknown; the field names it.
    """
    mode = parse_mode(request.mode)
    if request.fusion not in FUSIONS:
        raise InvalidRequest("fusion", f"{request.fusion} is no Fusion; see openbook.proto")
    if not 0 <= request.diversity <= 1:  # NaN is refused too
        raise InvalidRequest("diversity", f"{request.diversity} is outside 0 to 1")
    min_score = request.min_score if request.HasField("min_score") else None
    if min_score is not None and math.isnan(min_score):
        raise InvalidRequest("min_score", "NaN is no score")
    top_k = bounded("top_k", request.top_k if request.HasField("top_k") else None, DEFAULT_TOP_K, 1, max_top_k)
    ef = bounded("ef", request.ef, 0, top_k, MAX_EF) if request.HasField("ef") else None
    condition = parse_filter(request.filter) if request.HasField("filter") else None
    if mode is None:
        return None
    return SearchOptions(
        top_k=top_k,
        mode=mode,
        fusion=FUSIONS[request.fusion],
        ef=ef,
        condition=condition,
        min_score=min_score,
        diversity=request.diversity,
    )


def parse_mode(mode: int) -> SearchMode | None:
    """A request's mode; None where it wants no retrieval.

    Raises:
        InvalidRequest: there is no such mode.
    """
    if mode not in MODES:
        raise InvalidRequest("mode", f"{mode} is no SearchMode; see openbook.proto")
    return MODES[mode]


def parse_filter(message: pb.Filter) -> Filter:
    """A request's filter.

    Raises:
        InvalidRequest: a condition is missing or malformed, or there are too many; the field names where.
    """
    count = 0

    def parse(part: pb.Filter, field: str, depth: int) -> Filter:
        nonlocal count
        count += 1
        if count > MAX_CONDITIONS or depth > MAX_DEPTH:
            raise InvalidRequest(field, f"a filter has at most {MAX_CONDITIONS} conditions, nested {MAX_DEPTH} deep; simplify it")
        kind = part.WhichOneof("condition")
        field = f"{field}.{kind}"
        if kind == "equals":
            return filters.OneOf(_key(field, part.equals.key), (_text(f"{field}.value", part.equals.value),))
        if kind == "one_of":
            if len(part.one_of.values) > MAX_VALUES:
                raise InvalidRequest(f"{field}.values", f"{len(part.one_of.values)} exceed the limit of {MAX_VALUES}")
            values = tuple(_text(f"{field}.values[{at}]", value) for at, value in enumerate(part.one_of.values))
            return filters.OneOf(_key(field, part.one_of.key), values)
        if kind == "range":
            bounds = part.range
            low = bounds.at_least if bounds.HasField("at_least") else -math.inf
            high = bounds.at_most if bounds.HasField("at_most") else math.inf
            if math.isnan(low) or math.isnan(high):
                raise InvalidRequest(field, "NaN is no bound")
            return filters.Range(_key(field, bounds.key), low, high)
        if kind in {"all", "any"}:
            inner = getattr(part, kind).filters
            parts = tuple(parse(item, f"{field}[{at}]", depth + 1) for at, item in enumerate(inner))
            return filters.All(parts) if kind == "all" else filters.Any(parts)
        if kind == "not":
            return filters.Not(parse(getattr(part, "not"), field, depth + 1))
        raise InvalidRequest(field.removesuffix(".None"), "an empty condition; set one of equals, one_of, range, all, any, not")

    return parse(message, "filter", 1)


def _key(field: str, key: str) -> str:
    if not key:
        raise InvalidRequest(f"{field}.key", "empty; name a key of the metadata")
    return _text(f"{field}.key", key)


def _text(field: str, text: str) -> str:
    if "\0" in text:  # as of documents: SQLite would compare what stands before it
        raise InvalidRequest(field, "holds a NUL character; leave it out")
    return text
