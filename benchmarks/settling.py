"""How much need be read? When the server may stop reading a question's passages, chosen for the constants that a bundle states.

    python benchmarks/settling.py BUNDLE KB TRAIN.jsonl --held-out 300 [--em-budget 0.5]
    python benchmarks/settling.py BUNDLE KB QUESTIONS.jsonl

With --held-out the questions are those of the reader's training file that `openbook train reader` set aside; without, the first
`--limit` of a file (JSON lines with `text` or `question`). Nobody need know their answers: what counts is how often the best answer is
another one than after reading all of `--top-k` passages. Stopping early costs at most so many points of EM, and this can be counted,
where EM on a few hundred questions hides a loss behind what is gained by chance. Questions about the corpus that is served do best; the
more passages of other articles are in KB, the more it is like serving.

The best answer is settled where it would stay the best though every unread passage weighed as much as some do (a quantile of what
passages weigh) and all of that were for the second. Of these weights the least is chosen, which reads the fewest passages, for which at
most `--em-budget` in a hundred best answers change. The last line is JSON; its `settling` belongs into the adapter's reader.json.
Without one the server reads every passage.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from calibrate import found_by, read
from openbook_server.bundle import load_bundle
from openbook_server.knowledge import Hit, open_knowledge_base, relevance
from openbook_server.pipeline import READ_FIRST
from openbook_server.ranking import RankedAnswer, Reading, Settling, is_settled, log_weight, normalise, rank_answers
from openbook_server.runtime import Graph, choose_device
from openbook_server.tokenization import TextEncoder, load_tokenizer
from openbook_training.squad import hold_out, load_questions
from raw import load_texts
from report import run_benchmark

QUANTILES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)  # of the weights of passages

Read = tuple[Sequence[Hit], Sequence[Reading]]  # a question's passages, and what was read in them


class Settled:
    """Questions all of whose passages were read, and what a server would have read of them."""

    def __init__(self, rows: Sequence[Read], *, prior_weight: float, null_bias: float) -> None:
        self._rows, self._prior, self._bias = rows, prior_weight, null_bias
        self._whole = [self._text(row, len(row[0])) for row in rows]

    def choose(self, budget: float) -> tuple[Settling | None, float, float]:
        """The settling that reads least while at most `budget` percent of the answers change (None if none reads less than everything),
        passages read a question, and the percentage."""
        chosen, least, changed = None, float(np.mean([len(hits) for hits, _ in self._rows])), 0.0
        weights = [log_weight(one, self._bias) for _, readings in self._rows for one in readings]
        for quantile in QUANTILES:
            settling = Settling(round(float(np.quantile(weights, quantile)), 3))
            passages, others = self._effect(settling)
            print(f"unread passages at {settling.unread_weight}: {passages:.2f} passages, {others:.2f} % changed")
            if others <= budget and passages < least:
                chosen, least, changed = settling, passages, others
        return chosen, least, changed

    def _effect(self, settling: Settling) -> tuple[float, float]:
        counts = [self._passages_read(row, settling) for row in self._rows]
        changed = [self._text(row, count) != whole for row, count, whole in zip(self._rows, counts, self._whole, strict=True)]
        return float(np.mean(counts)), 100 * float(np.mean(changed))

    def _passages_read(self, row: Read, settling: Settling) -> int:
        """How many the server would read, round by round."""
        hits, readings = row
        for count in READ_FIRST:
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
        answers = self._answers(row, count)
        return normalise(answers[0].text) if answers else ""

    def _priors(self, hits: Sequence[Hit]) -> list[float]:
        return [self._prior * relevance(hit) for hit in hits]


def held_out(train: str, count: int) -> list[str]:
    """The questions that `openbook train reader` set aside."""
    _, held = hold_out([question for question in load_questions(train) if question.gold_spans()], count)
    return [question.text for question in held]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("knowledge_base", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--held-out", type=int, default=0, help="questions set aside in training; 0 = those of the file itself")
    parser.add_argument("--limit", type=int, default=1_000, help="questions of a file without --held-out (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=5, help="passages found for each (default: %(default)s)")
    parser.add_argument("--em-budget", type=float, default=0.5, help="best answers in a hundred that may change (default: %(default)s)")
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    if bundle.reader is None:
        parser.error(f"{arguments.bundle} has no reader")
    device = choose_device("auto")
    embedder, reader = (Graph(bundle.graph_path(name, device.precision), device) for name in ("embedder", "reader"))
    encoder = TextEncoder(load_tokenizer(bundle.tokenizer_path), bundle.tokenizer_digest)
    questions = (
        held_out(str(arguments.questions), arguments.held_out) if arguments.held_out else load_texts(arguments.questions, arguments.limit)
    )
    knowledge_base = open_knowledge_base(arguments.knowledge_base, bundle)
    found = found_by(knowledge_base, bundle, embedder, encoder, questions, arguments.top_k)
    knowledge_base.close()
    rows = list(zip(found, read(bundle, reader, encoder, questions, found), strict=True))
    settled = Settled(rows, prior_weight=bundle.reader.prior_weight, null_bias=bundle.reader.null_bias)
    settling, passages, changed = settled.choose(arguments.em_budget)
    report = {"passages": passages, "changed_percent": changed, "em_budget": arguments.em_budget, "questions": len(questions)}
    print(json.dumps({"settling": asdict(settling) if settling else None, **report}))


if __name__ == "__main__":
    run_benchmark(main)
