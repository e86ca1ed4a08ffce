"""Which constants rank best? Fusion weight, prior weight and null bias, chosen on questions nothing was trained on.

    python benchmarks/calibrate.py BUNDLE KB TRAIN.jsonl [--held-out 300] [--retrieval 6000]

TRAIN.jsonl holds the questions the reader was trained with; those that `openbook train reader` held out (whole passages, the
same ones for the same file) are used here, the benchmark's are not. KB must hold their passages. Three choices are made:
over `--retrieval` questions of the file, the weights of tokens, BM25, coverage and pairs beside the cosine of the nearest window, by the
likelihood of the question's own passage among those that are looked at so; the weight of BM25 in the choice of those, by R@1 and R@5,
among the candidates that the choice of now leaves; and, for the reader,
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
from numpy.typing import NDArray
from openbook_export.settling import found_by, read
from openbook_server.bundle import load_bundle
from openbook_server.knowledge import Hit, open_knowledge_base, relevance
from openbook_server.knowledge.fusion import LEXICAL_WEIGHT, SHORTLIST, TOKEN_WEIGHT
from openbook_server.knowledge.overlap import COVERAGE_WEIGHT, PAIR_WEIGHT, shared
from openbook_server.ranking import Reading, rank_answers
from openbook_server.runtime import Graph, choose_device
from openbook_server.tokenization import TextEncoder, load_tokenizer
from openbook_training.squad import Question, exact_match, f1, hold_out, load_questions
from report import run_benchmark

WEIGHTS = ("window", "tokens", "BM25", "coverage", "pairs")
NOW = (1.0, TOKEN_WEIGHT, LEXICAL_WEIGHT, COVERAGE_WEIGHT, PAIR_WEIGHT)
FIRST_GUESS = (20.0, 20.0, 0.1, 5.0, 0.5)
SHORTLIST_WEIGHTS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1)
PRIOR_WEIGHTS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0)
NULL_BIASES = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0)
ABSENT_SHARE = 0.1  # weight of questions whose passages were taken away, as in training
DEPTH = 100
TOP_K = 5


def shortlisted(hits: Sequence[Hit], weight: float) -> list[Hit]:
    """Those that would be looked at if BM25 had that weight in their choice."""
    return sorted(hits, key=lambda hit: -(hit.dense_score or 0.0) - weight * (hit.lexical_score or 0.0))[:SHORTLIST]


class Ranking:
    """A question's candidates as numbers: what they are ranked by, and which of them are its own."""

    def __init__(self, question: Question, hits: Sequence[Hit]) -> None:
        if any(hit.window_score is None or hit.token_score is None for hit in hits):
            raise SystemExit("passages have no windows or no tokens: export the bundle again, and index with it")
        overlap = shared(question.text, [hit.passage.stem_lines for hit in hits])
        self.features = np.array(  # (hits, 5), as `WEIGHTS` names them
            [(hit.window_score, hit.token_score, hit.lexical_score or 0.0, *part) for hit, part in zip(hits, overlap, strict=True)], float
        )
        self.own = np.array([hit.passage.text in question.context for hit in hits])


def fitted(rankings: Sequence[Ranking]) -> NDArray[np.float64]:
    """The weights that maximise the mean log Σ_own softmax(features · weights), by Fisher's scoring, scaled so that the window's is 1."""
    usable = [ranking for ranking in rankings if ranking.own.any()]
    weights = np.array(FIRST_GUESS)
    for _ in range(30):
        gradient, information = np.zeros(len(weights)), np.zeros((len(weights),) * 2)
        for ranking in usable:
            scores = ranking.features @ weights
            odds = np.exp(scores - scores.max())
            everyone, own = odds / odds.sum(), odds * ranking.own / (odds @ ranking.own)
            mean = everyone @ ranking.features
            gradient += own @ ranking.features - mean
            information += (ranking.features * everyone[:, None]).T @ ranking.features - np.outer(mean, mean)
        weights = weights + np.linalg.solve(information, gradient)
    return weights / weights[0]


def recall(rankings: Sequence[Ranking], weights: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """R@1 and R@5 in percent of candidates ranked with these weights."""
    best = [ranking.own[np.argsort(-ranking.features @ np.asarray(weights), kind="stable")] for ranking in rankings]
    return 100 * float(np.mean([own[0] for own in best])), 100 * float(np.mean([own[:5].any() for own in best]))


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
    parser.add_argument("--retrieval", type=int, default=6_000, help="questions for the weights of search (default: %(default)s)")
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    device = choose_device("auto")
    embedder = Graph(bundle.graph_path("embedder", device.precision), device)
    reader = Graph(bundle.graph_path("reader", device.precision), device)
    encoder = TextEncoder(load_tokenizer(bundle.tokenizer_path))
    knowledge_base = open_knowledge_base(arguments.knowledge_base, bundle)

    def search(questions: Sequence[Question], top_k: int) -> list[list[Hit]]:
        return found_by(knowledge_base, bundle, embedder, encoder, [question.text for question in questions], top_k)

    everything = load_questions(arguments.train)
    asked = random.Random(0).sample(everything, min(arguments.retrieval, len(everything)))
    rankings = [Ranking(question, hits) for question, hits in zip(asked, search(asked, SHORTLIST), strict=True)]
    chosen = fitted(rankings)
    tried = {"the window alone": (1.0, 0.0, 0.0, 0.0, 0.0), "weights of now": NOW, "weights fitted": chosen}
    for name, weights in tried.items():
        at_1, at_5 = recall(rankings, weights)
        stated = ", ".join(f"{what} {weight:.4f}" for what, weight in zip(WEIGHTS, weights, strict=True))
        print(f"{name} ({stated}): R@1 {at_1:.1f} R@5 {at_5:.1f}")
    choice = {}
    candidates = search(asked, DEPTH)  # whose tokens are weighed by what they tell of all of these
    for weight in SHORTLIST_WEIGHTS:
        left = [Ranking(question, shortlisted(hits, weight)) for question, hits in zip(asked, candidates, strict=True)]
        choice[weight] = recall(left, chosen)
        print(f"BM25 weight {weight} in the choice of {SHORTLIST}: R@1 {choice[weight][0]:.1f} R@5 {choice[weight][1]:.1f}")

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
                "weights": dict(zip(WEIGHTS, chosen.round(4).tolist(), strict=True)),
                "shortlist_weight": max(choice, key=lambda weight: sum(choice[weight])),
                "prior_weight": prior,
                "null_bias": bias,
                "questions": [len(asked), len(present), len(absent)],
            }
        )
    )
    knowledge_base.close()


if __name__ == "__main__":
    run_benchmark(main)
