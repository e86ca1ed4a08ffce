"""The method Classify: which classifier, what each text is read beside, and the reply."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from openbook.v1 import openbook_pb2 as pb

from openbook_server.bundle import Bundle
from openbook_server.classification import Classification, Classified
from openbook_server.config import ServerConfig
from openbook_server.errors import InvalidRequest, NoKnowledgeBase, NotInBundle
from openbook_server.heads import HeadInfo
from openbook_server.knowledge import KnowledgeBase, SearchOptions
from openbook_server.options import DEFAULT_TOP_K, parse_filter, parse_mode
from openbook_server.replies import to_hit, to_item_errors, to_provenance, to_timings
from openbook_server.tokenization import TextEncoder
from openbook_server.validation import SPLIT, Validated, bounded, choose, refused_first, validate_texts
from openbook_server.wire import Parsed
from openbook_server.work import Work

DEFAULT_LABELS, MAX_LABELS = 5, 1_000
VERIFIER = "verification"


class ClassifyService:
    """Serves the classifiers of one bundle, with the neighbours and the evidence of one knowledge base where there is one."""

    def __init__(
        self,
        bundle: Bundle,
        knowledge_base: KnowledgeBase | None,
        *,
        config: ServerConfig,
        encoder: TextEncoder,
        classification: Classification,
    ) -> None:
        self._bundle, self._knowledge_base, self._config = bundle, knowledge_base, config
        self._encoder, self._classification = encoder, classification
        self._heads = {name: head for name, head in bundle.heads.items() if head.classifies}

    def describe(self) -> list[pb.DescribeResponse.Classifier]:
        """Every classifier, as Describe tells it."""
        return [
            pb.DescribeResponse.Classifier(
                name=name,
                objective=head.objective,
                labels=head.labels,
                max_text_tokens=self._max_tokens(head) - self._encoder.special_tokens,
                neighbours=head.neighbours.count if head.neighbours else 0,
                label_key=head.neighbours.label_key if head.neighbours else "",
            )
            for name, head in self._heads.items()
        ]

    async def classify(self, parsed: Parsed[pb.ClassifyRequest], work: Work) -> pb.ClassifyResponse:
        request = parsed.message
        work.batch_invariant = request.batch_invariant
        name, head = self._chosen(request.classifier)
        max_labels = bounded("max_labels", request.max_labels if request.HasField("max_labels") else None, DEFAULT_LABELS, 1, MAX_LABELS)
        options = self._options(request, head)
        label_key = request.label_key or (head.neighbours.label_key if head.neighbours else "")
        if refused_first(request.texts, self._config):
            self._classification.check(name, len(request.texts), work.deadline)
        valid = await self._validate(parsed, head)
        work.tokenise_ms += work.lap()
        if not valid.rows:
            classified: Sequence[Classified] = []
        elif head.objective == VERIFIER and (request.evidence or options is None):
            evidence = [request.evidence[at].passages if request.evidence else () for at in valid.kept]
            classified = await self._classification.beside_evidence(name, valid.texts, valid.rows, evidence, work)
        elif options is None:
            classified = await self._classification.texts(name, valid.rows, work)
        elif head.objective == VERIFIER:
            classified = await self._classification.beside_found_evidence(name, valid.texts, valid.rows, options, work)
        else:
            classified = await self._classification.beside_neighbours(name, valid.texts, valid.rows, options, label_key, work)
        results = [pb.ClassifyResult() for _ in request.texts]
        for at, one in zip(valid.kept, classified, strict=True):
            results[at].CopyFrom(self._result(head, one, max_labels, request))
        return pb.ClassifyResponse(
            results=results,
            errors=to_item_errors(valid.errors),
            classifier=name,
            provenance=to_provenance(self._bundle, self._knowledge_base),
            timings=to_timings(work),
        )

    def _chosen(self, name: str) -> tuple[str, HeadInfo]:
        if not self._heads:
            raise NotInBundle("this bundle has no classifier; `openbook export --task NAME=FOLDER` adds one that `openbook train` wrote")
        return choose("classifier", name, self._heads)

    def _options(self, request: pb.ClassifyRequest, head: HeadInfo) -> SearchOptions | None:
        """How neighbours or evidence are to be found; None where nothing is."""
        verifies, count = head.objective == VERIFIER, head.neighbours.count if head.neighbours else 0
        mode = parse_mode(request.mode)
        if request.evidence and not verifies:
            raise InvalidRequest("evidence", f"only a verifier reads evidence, and this is a {head.objective}; leave it out")
        if request.evidence and len(request.evidence) != len(request.texts):
            raise InvalidRequest("evidence", f"{len(request.evidence)} entries for {len(request.texts)} texts; send one for each, or none")
        if not verifies and mode not in ("dense", None) and request.mode != pb.SEARCH_MODE_UNSPECIFIED:
            raise InvalidRequest("mode", f"{mode} finds no neighbours: they are the nearest by their vectors; use dense, or none")
        default = DEFAULT_TOP_K if verifies else count or DEFAULT_TOP_K
        top_k = bounded("top_k", request.top_k if request.HasField("top_k") else None, default, 1, self._config.max_top_k)
        condition = parse_filter(request.filter) if request.HasField("filter") else None
        if mode is None or request.evidence or not (verifies or count):
            return None
        if self._knowledge_base is None:
            if not verifies:
                return None
            raise NoKnowledgeBase(", send evidence, or choose mode none")
        return SearchOptions(top_k=top_k, mode=mode if verifies else "dense", condition=condition)

    def _max_tokens(self, head: HeadInfo) -> int:
        """Of a text or claim that is taken in whole, special tokens included."""
        embedder: int = self._bundle.embedder.max_tokens
        if head.objective == VERIFIER:  # at most half of the room, so that evidence is what is cut, as in training
            half = (head.max_tokens - self._encoder.pair_special_tokens) // 2
            return min(half + self._encoder.special_tokens, embedder)
        return min(head.max_tokens, embedder) if head.neighbours else head.max_tokens

    async def _validate(self, parsed: Parsed[pb.ClassifyRequest], head: HeadInfo) -> Validated:
        request, limit = parsed.message, self._max_tokens(head)
        truncate = request.truncate and head.objective != VERIFIER
        if truncate and head.neighbours:  # the embedder reads on where the classifier stops, as in training
            limit = self._bundle.embedder.max_tokens
        return await validate_texts(
            "texts",
            list(request.texts),
            parsed.not_utf8,
            config=self._config,
            encoder=self._encoder,
            max_tokens=limit,
            truncate=truncate,
            way_out="shorten the claim" if head.objective == VERIFIER else SPLIT,
            found={at: error for at in range(len(request.evidence)) if (error := self._evidence_error(parsed, at)) is not None},
        )

    def _evidence_error(self, parsed: Parsed[pb.ClassifyRequest], at: int) -> InvalidRequest | None:
        passages, field = parsed.message.evidence[at].passages, f"evidence[{at}]"
        size, limit = sum(len(passage.encode()) for passage in passages), self._config.max_text_bytes
        if ("evidence", at) in parsed.not_utf8:
            return InvalidRequest(field, "not valid UTF-8; encode the passages as UTF-8 before sending them")
        if not any(passage.strip() for passage in passages):
            return InvalidRequest(field, "empty; send a passage, or choose mode none to read the claim alone")
        if size > limit:
            return InvalidRequest(field, f"{size} bytes exceed the limit of {limit}; the model reads only the beginning, send that")
        return None

    def _result(self, head: HeadInfo, one: Classified, max_labels: int, request: pb.ClassifyRequest) -> pb.ClassifyResult:
        best = np.argsort(-one.probabilities, kind="stable")[:max_labels].tolist()
        result = pb.ClassifyResult(
            labels=[
                pb.Label(
                    label=head.labels[number] if head.labels else self._encoder.token(number),
                    probability=float(one.probabilities[number]),
                    **{name: float(values[number]) for name, values in one.readings.items()},
                )
                for number in best
            ],
            passages=one.passages,
        )
        if request.explain:
            hits = [to_hit(hit, omit_text=request.omit_text) for hit in one.hits]
            if head.objective == VERIFIER:
                result.evidence.extend(hits)
            else:
                result.neighbours.extend(
                    pb.Neighbour(label=head.labels[number], hit=hit) for number, hit in zip(one.labels, hits, strict=True)
                )
        return result
