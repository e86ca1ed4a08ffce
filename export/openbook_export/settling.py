"""When may a server stop reading a question's passages? Chosen for a bundle, for a stated budget of exact match.

Nobody need know the answers: what counts is how often the best answer is another one than after reading every passage found. Stopping
early costs at most so many points of EM, and this can be counted, where EM on a few hundred questions hides a loss behind what is gained
by chance.

The best answer is settled where it would stay the best though every unread passage weighed as much as some do (a quantile of what passages
weigh) and all of that were for the second (`openbook_server.ranking.is_settled`). Of these weights the least is chosen, which reads the
fewest passages, for which at most the budget of best answers change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from openbook_server.bundle import Bundle, ReaderInfo
from openbook_server.embedder import OUTPUT, TOKENS
from openbook_server.ingest.embed import PassageEmbedder, outputs_of
from openbook_server.ingest.indexing import Indexing
from openbook_server.ingest.preparation import choose_splitting
from openbook_server.ingest.sources import find_sources
from openbook_server.knowledge import Hit, KnowledgeBase, SearchOptions, open_knowledge_base, relevance
from openbook_server.pipeline import READ_FIRST, reading_of
from openbook_server.ranking import RankedAnswer, Reading, Settling, is_settled, log_weight, normalise, rank_answers
from openbook_server.runtime import Graph, build_device
from openbook_server.states import QuestionGraph
from openbook_server.tokenization import TextEncoder, load_tokenizer
from openbook_training.beir import load_queries
from openbook_training.errors import InvalidData
from openbook_training.squad import load_questions, spread
from rich.console import Console

TOP_K = 5  # passages found for a question, as `Answer` does unless told otherwise
QUANTILES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)  # of the weights of passages
_SPLITS = ("dev", "train", "test")  # tables of a folder's qrels/, the first that is there: test questions are kept for tests

Read = tuple[Sequence[Hit], Sequence[Reading]]  # a question's passages, and what was read in them


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was chosen, and what it does to the questions that it was chosen on."""

    settling: Settling | None  # None: nothing reads less than everything within the budget
    passages: float  # read a question
    changed: float  # percent of the best answers that are others than after reading everything


@dataclass(frozen=True, slots=True)
class Sample:
    """What will be asked, and about what."""

    source: str
    questions: list[str]
    passages: Mapping[str, str] | None  # title by text; None: those of corpus.jsonl in the folder `source`


def load_sample(source: str, count: int) -> Sample:
    """Questions and a corpus like those that a bundle will serve.

    Args:
        source: a folder in BEIR's layout, or questions in SQuAD's shape, whose passages are the corpus; the more of them, the
            more like serving.
        count: questions, evenly spread; 0 = all.

    Raises:
        InvalidData: the source is missing or holds nothing usable.
        SourceInvalid: a folder has no corpus.jsonl.
    """
    console = Console(stderr=True)
    if Path(source).is_dir():
        find_sources([_corpus(source)])
        return Sample(source, spread([query.text for query in load_queries(Path(source), console, _SPLITS)], count), None)
    questions = load_questions(source, console)
    passages = {question.context: question.title for question in questions}
    return Sample(source, spread([question.text for question in questions], count), passages)


def settling_facts(bundle: Bundle, sample: Sample, budget: float, report: Callable[[str], None]) -> dict[str, Any]:
    """What the manifest states of when to stop reading, chosen on the sample for a bundle with a reader; {} where reading all is best.

    The corpus is indexed with the bundle's embedder in a folder that is gone afterwards, and searched as a server does (hybrid, five
    passages), all on the processor in fp32.

    Args:
        budget: best answers in a hundred that may change; it bounds the points of EM that are lost.

    Raises:
        InvalidData: the server would refuse every question.
    """
    device = build_device("cpu", "fp32")
    embedder, reader = (Graph(bundle.graph_path(name, "fp32"), device) for name in ("embedder", "reader"))
    tokenizer = load_tokenizer(bundle.tokenizer_path)
    encoder = TextEncoder(tokenizer, bundle.tokenizer_digest)
    questions = _short_enough(sample, bundle, encoder, report)
    with TemporaryDirectory(prefix="openbook-settling-") as name:
        corpus = _corpus(sample.source if sample.passages is None else name)
        if sample.passages is not None:
            rows = enumerate(sample.passages.items())
            lines = [json.dumps({"_id": str(row), "title": title, "text": text}) + "\n" for row, (text, title) in rows]
            Path(corpus).write_text("".join(lines), encoding="utf-8")
        knowledge_base = open_knowledge_base(Path(name) / "kb", bundle, create=True)
        report(f"settling: indexing the passages of {sample.source}, which takes the longest")
        try:
            embed = PassageEmbedder(tokenizer, embedder, bundle.embedder, sessions=device.sessions)
            indexing = Indexing(knowledge_base, encoder, embed, choose_splitting(bundle, {}))
            indexing.run(find_sources([corpus]), lambda progress: None, lambda: False)
            report(f"settling: {len(questions)} questions about {knowledge_base.counts().passages} passages")
            found = found_by(knowledge_base, bundle, embedder, encoder, questions, TOP_K)
        finally:
            knowledge_base.close()
    chosen = Settled.of(bundle, found, read(bundle, reader, encoder, questions, found)).choose(budget)
    if chosen.settling is None:
        report(f"settling: none reads less and changes at most {budget:g} % of the best answers; every passage will be read")
        return {}
    report(
        f"settling: {chosen.passages:.2f} passages read a question, {chosen.changed:.2f} % of the best answers are others than after "
        f"reading all of {TOP_K}; {budget:g} % may be"
    )
    measured = {"questions": len(questions), "em_budget": float(budget), "passages": chosen.passages, "changed_percent": chosen.changed}
    return {"settling": asdict(chosen.settling) | measured}


class Settled:
    """Questions all of whose passages were read, and what a server would have read of them."""

    def __init__(self, rows: Sequence[Read], *, prior_weight: float, null_bias: float) -> None:
        self._rows, self._prior, self._bias = rows, prior_weight, null_bias
        self._whole = [self._text(row, len(row[0])) for row in rows]

    @classmethod
    def of(cls, bundle: Bundle, found: Sequence[Sequence[Hit]], readings: Sequence[Sequence[Reading]]) -> Settled:
        """With the constants of the bundle's reader."""
        reader = _reader_of(bundle)
        return cls(list(zip(found, readings, strict=True)), prior_weight=reader.prior_weight, null_bias=reader.null_bias)

    def choose(self, budget: float, report: Callable[[Calibration], None] = lambda tried: None) -> Calibration:
        """The settling that reads least while at most `budget` percent of the answers change; `report` is told of each that is tried."""
        chosen = Calibration(None, float(np.mean([len(hits) for hits, _ in self._rows])), 0.0)
        weights = [log_weight(one, self._bias) for _, readings in self._rows for one in readings]
        for weight in np.quantile(weights, QUANTILES).tolist() if weights else ():
            tried = self._effect(Settling(round(weight, 3)))
            report(tried)
            if tried.changed <= budget and tried.passages < chosen.passages:
                chosen = tried
        return chosen

    def _effect(self, settling: Settling) -> Calibration:
        counts = [self._passages_read(row, settling) for row in self._rows]
        changed = [self._text(row, count) != whole for row, count, whole in zip(self._rows, counts, self._whole, strict=True)]
        return Calibration(settling, float(np.mean(counts)), 100 * float(np.mean(changed)))

    def _passages_read(self, row: Read, settling: Settling) -> int:
        """How many the server would read, round by round."""
        hits, readings = row
        for count in READ_FIRST if hits else ():
            if is_settled(self._answers(row, count), readings[:count], self._priors(hits), null_bias=self._bias, settling=settling):
                return min(count, len(hits))
        return len(hits)

    def _answers(self, row: Read, count: int) -> list[RankedAnswer]:
        """The best two."""
        hits, readings = row[0][:count], row[1][:count]
        texts = [hit.passage.text for hit in hits]
        answers, _ = rank_answers(texts, readings, self._priors(hits), null_bias=self._bias, max_answers=2)
        return answers

    def _text(self, row: Read, count: int) -> str:
        answers = self._answers(row, count) if row[0] else []
        return normalise(answers[0].text) if answers else ""

    def _priors(self, hits: Sequence[Hit]) -> list[float]:
        return [self._prior * relevance(hit) for hit in hits]


def found_by(
    knowledge_base: KnowledgeBase, bundle: Bundle, embedder: Graph, encoder: TextEncoder, questions: Sequence[str], top_k: int
) -> list[list[Hit]]:
    """What hybrid search finds for each question, as in a server."""
    rows = outputs_of(QuestionGraph(embedder, bundle.embedder.token_dims), encoder.texts(questions))
    vectors = np.stack([row[OUTPUT] for row in rows]).astype(np.float32)
    return knowledge_base.search(questions, vectors, SearchOptions(top_k=top_k), [row[TOKENS] for row in rows])


def read(
    bundle: Bundle, graph: Graph, encoder: TextEncoder, questions: Sequence[str], found: Sequence[Sequence[Hit]]
) -> list[list[Reading]]:
    """What the reader makes of each question's hits."""
    most = _reader_of(bundle).max_tokens
    pairs = [encoder.pairs(question, [hit.passage.text for hit in hits], most) for question, hits in zip(questions, found, strict=True)]
    outputs = iter(outputs_of(graph, [pair.row for group in pairs for pair in group]))
    return [
        [reading_of(pair, next(outputs), at, hit.passage.text) for at, (pair, hit) in enumerate(zip(group, hits, strict=True))]
        for group, hits in zip(pairs, found, strict=True)
    ]


def _short_enough(sample: Sample, bundle: Bundle, encoder: TextEncoder, report: Callable[[str], None]) -> list[str]:
    """The questions that a server would not refuse."""
    most = min(bundle.embedder.max_tokens - encoder.special_tokens, _reader_of(bundle).max_question_tokens)
    rows = encoder.texts(sample.questions)
    kept = [question for question, row in zip(sample.questions, rows, strict=True) if row.tokens - encoder.special_tokens <= most]
    if not kept:
        raise InvalidData(f"{sample.source}: no question has at most {most} tokens, the reader's limit")
    if left_out := len(rows) - len(kept):
        report(f"settling: {left_out} questions left out, longer than the {most} tokens that the reader takes")
    return kept


def _corpus(folder: str) -> str:
    return str(Path(folder) / "corpus.jsonl")


def _reader_of(bundle: Bundle) -> ReaderInfo:
    if bundle.reader is None:
        raise ValueError(f"bundle {bundle.name} has no reader")
    return bundle.reader
