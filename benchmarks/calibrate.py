"""Which constants rank best? Fusion weight, prior weight and null bias, chosen on questions nothing was trained on.

    python benchmarks/calibrate.py BUNDLE KB TRAIN.jsonl [--held-out 300] [--retrieval 1500]

TRAIN.jsonl holds the questions the reader was trained with; those that `openbook train reader` held out (whole passages, the
same ones for the same file) are used here, the benchmark's are not. KB must hold their passages. Two choices are made:
the weights of BM25 beside the cosine, by R@1 and R@5 over `--retrieval` questions of the file, first of all candidates compared word by
word, then of the choice whom to compare, among the candidates that the choice of now leaves; and, for the reader,
prior_weight by F1 where the passages found hold the answer, then null_bias by the mean log-probability of the accepted
answer there, and of "no answer" where they do not. The last line is JSON; prior_weight and null_bias belong into the
adapter's reader.json. When the server may stop reading is another choice, made for those two: `settling.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from openbook_server.backlog import Arrays
from openbook_server.bundle import Bundle, load_bundle
from openbook_server.knowledge import Hit, SearchOptions, open_knowledge_base, relevance
from openbook_server.knowledge.fusion import SHORTLIST
from openbook_server.pipeline import reading_of
from openbook_server.ranking import Reading, rank_answers
from openbook_server.rows import Row, collated
from openbook_server.runtime import Graph, choose_device
from openbook_server.tokenization import TextEncoder, load_tokenizer
from openbook_training.squad import Question, exact_match, f1, hold_out, load_questions

LEXICAL_WEIGHTS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1)
PRIOR_WEIGHTS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0)
NULL_BIASES = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0)
ABSENT_SHARE = 0.1  # weight of questions whose passages were taken away, as in training
TOP_K = 5


def run_rows(graph: Graph, rows: Sequence[Row]) -> list[Arrays]:
    """A graph's outputs row by row, in the order of the rows."""
    outputs: list[Arrays] = [{}] * len(rows)
    for batch, inputs in collated(rows, graph.buckets, 2_048):
        result = graph.run(inputs)
        for place, at in enumerate(batch):
            outputs[at] = {name: values[place] for name, values in result.items()}
    return outputs


def shortlisted(hits: Sequence[Hit], weight: float) -> list[Hit]:
    """Those that would be compared word by word if BM25 had that weight in their choice."""
    return sorted(hits, key=lambda hit: -(hit.dense_score or 0.0) - weight * (hit.lexical_score or 0.0))[:SHORTLIST]


def recall(questions: Sequence[Question], found: Sequence[Sequence[Hit]], weight: float, overlap: float = 1.0) -> tuple[float, float]:
    """R@1 and R@5 in percent when hits are ranked by the nearest window's cosine (the passage's own where it has no windows) + weight ·
    BM25 + overlap (times `overlap`, which may be 0)."""
    at_1 = at_5 = 0
    for question, hits in zip(questions, found, strict=True):
        cosines = [hit.dense_score if hit.window_score is None else hit.window_score for hit in hits]
        scores = [
            (cosine or 0.0) + weight * (hit.lexical_score or 0.0) + overlap * (hit.overlap_score or 0.0)
            for cosine, hit in zip(cosines, hits, strict=True)
        ]
        order = [hits[at] for at in sorted(range(len(hits)), key=lambda at: -scores[at])]
        own = [hit.passage.text in question.context for hit in order]
        at_1 += own[0]
        at_5 += any(own[:5])
    return 100 * at_1 / len(questions), 100 * at_5 / len(questions)


def read(
    bundle: Bundle, graph: Graph, encoder: TextEncoder, questions: Sequence[str], found: Sequence[Sequence[Hit]]
) -> list[list[Reading]]:
    """What the reader makes of each question's hits."""
    assert bundle.reader is not None
    pairs = [
        encoder.pairs(question, [hit.passage.text for hit in hits], bundle.reader.max_tokens)
        for question, hits in zip(questions, found, strict=True)
    ]
    outputs = iter(run_rows(graph, [pair.row for group in pairs for pair in group]))
    return [[reading_of(pair, next(outputs), at) for at, pair in enumerate(group)] for group in pairs]


def log_likelihood(
    question: Question, hits: Sequence[Hit], readings: Sequence[Reading], prior: float, bias: float, *, absent: bool
) -> float:
    answers, nothing = rank(hits, readings, prior, bias, 50)
    if absent:
        return math.log(max(nothing, 1e-9))
    return math.log(max(sum(answer.probability for answer in answers if exact_match(answer.text, question.answers)), 1e-9))


def rank(hits: Sequence[Hit], readings: Sequence[Reading], prior: float, bias: float, count: int):  # type: ignore[no-untyped-def]
    return rank_answers(
        [hit.passage.text for hit in hits], readings, [prior * relevance(hit) for hit in hits], null_bias=bias, max_answers=count
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("knowledge_base", type=Path)
    parser.add_argument("train", help="the reader's training file")
    parser.add_argument("--held-out", type=int, default=300, help="as in the training's configuration (default: %(default)s)")
    parser.add_argument("--retrieval", type=int, default=1_500, help="questions for the fusion weight (default: %(default)s)")
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    device = choose_device("auto")
    embedder = Graph(bundle.graph_path("embedder", device.precision), device)
    reader = Graph(bundle.graph_path("reader", device.precision), device)
    encoder = TextEncoder(load_tokenizer(bundle.tokenizer_path))
    knowledge_base = open_knowledge_base(arguments.knowledge_base, bundle)

    def search(questions: Sequence[Question], top_k: int) -> list[list[Hit]]:
        texts = [question.text for question in questions]
        vectors = np.stack([row["sentence_embedding"] for row in run_rows(embedder, encoder.texts(texts))]).astype(np.float32)
        return knowledge_base.search(texts, vectors, SearchOptions(top_k=top_k))

    everything = load_questions(arguments.train)
    asked = random.Random(0).sample(everything, min(arguments.retrieval, len(everything)))
    candidates = search(asked, 100)
    fusion = {weight: recall(asked, candidates, weight) for weight in LEXICAL_WEIGHTS}
    for weight, (at_1, at_5) in fusion.items():
        before_1, before_5 = recall(asked, candidates, weight, overlap=0.0)
        print(f"BM25 weight {weight}: R@1 {at_1:.1f} R@5 {at_5:.1f}; without overlap R@1 {before_1:.1f} R@5 {before_5:.1f}")

    best_fusion = max(fusion, key=lambda weight: sum(fusion[weight]))
    choice = {weight: recall(asked, [shortlisted(hits, weight) for hits in candidates], best_fusion) for weight in LEXICAL_WEIGHTS}
    for weight, (at_1, at_5) in choice.items():
        print(f"BM25 weight {weight} in the choice of {SHORTLIST}: R@1 {at_1:.1f} R@5 {at_5:.1f}")

    usable = [question for question in everything if question.gold_spans()]
    _, held = hold_out(usable, arguments.held_out)
    found = search(held, 2 * TOP_K)
    present = [(q, hits[:TOP_K]) for q, hits in zip(held, found, strict=True) if any(hit.passage.text in q.context for hit in hits[:TOP_K])]
    absent = [
        (q, [hit for hit in hits if not any(a in hit.passage.text for a in q.answers)][:TOP_K]) for q, hits in zip(held, found, strict=True)
    ]
    absent = [(q, hits) for q, hits in absent if hits]
    sets = {}
    for name, rows in (("present", present), ("absent", absent)):
        questions, hits = [q for q, _ in rows], [h for _, h in rows]
        readings = read(bundle, reader, encoder, [q.text for q in questions], hits)
        sets[name] = list(zip(questions, hits, readings, strict=True))

    def objective(prior: float, bias: float) -> float:
        means = {
            name: float(np.mean([log_likelihood(*row, prior, bias, absent=name == "absent") for row in rows]))
            for name, rows in sets.items()
        }
        return (1 - ABSENT_SHARE) * means["present"] + ABSENT_SHARE * means["absent"]

    quality: dict[float, float] = {}
    for weight in PRIOR_WEIGHTS:
        texts = [(rank(hits, readings, weight, 0.0, 1)[0], q) for q, hits, readings in sets["present"]]
        em = 100 * float(np.mean([exact_match(answers[0].text, q.answers) for answers, q in texts]))
        quality[weight] = 100 * float(np.mean([f1(answers[0].text, q.answers) for answers, q in texts]))
        print(f"prior weight {weight}: EM {em:.1f}  F1 {quality[weight]:.1f}")
    prior = max(quality, key=lambda weight: quality[weight])  # the least of equals: dictionaries keep their order
    likelihood = {bias: objective(prior, bias) for bias in NULL_BIASES}
    bias = max(likelihood, key=lambda value: likelihood[value])
    print("null bias: log-likelihood " + ", ".join(f"{value:g} {likelihood[value]:.3f}" for value in NULL_BIASES))
    print(
        json.dumps(
            {
                "lexical_weight": best_fusion,
                "shortlist_weight": max(choice, key=lambda weight: sum(choice[weight])),
                "prior_weight": prior,
                "null_bias": bias,
                "questions": [len(asked), len(present), len(absent)],
            }
        )
    )
    knowledge_base.close()


if __name__ == "__main__":
    main()
