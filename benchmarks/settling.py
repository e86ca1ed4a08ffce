"""How much need be read? When the server may stop reading a question's passages, chosen for the constants that a bundle states.

    python benchmarks/settling.py BUNDLE KB TRAIN.jsonl --held-out 300 [--em-budget 0.5]
    python benchmarks/settling.py BUNDLE KB QUESTIONS.jsonl

What `openbook export --settling` chooses (openbook_export/settling.py), for a knowledge base that is there and the device that serves it.
With --held-out the questions are those of the reader's training file that `openbook train reader` set aside; without, the first
`--limit` of a file (JSON lines with `text` or `question`). Questions about the corpus that is served do best; the more passages of other
articles are in KB, the more it is like serving. The last line is JSON; its `settling` belongs into the adapter's reader.json. Without one
the server reads every passage.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from openbook_export.settling import Calibration, Settled, found_by, read
from openbook_server.bundle import load_bundle
from openbook_server.knowledge import open_knowledge_base
from openbook_server.runtime import Graph, choose_device
from openbook_server.tokenization import TextEncoder, load_tokenizer
from openbook_training.squad import hold_out, load_questions
from raw import load_texts
from report import run_benchmark


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
    settled = Settled.of(bundle, found, read(bundle, reader, encoder, questions, found))
    chosen = settled.choose(arguments.em_budget, tell)
    report = {"passages": chosen.passages, "changed_percent": chosen.changed, "em_budget": arguments.em_budget, "questions": len(questions)}
    print(json.dumps({"settling": asdict(chosen.settling) if chosen.settling else None, **report}))


def tell(tried: Calibration) -> None:
    assert tried.settling is not None
    print(f"unread passages at {tried.settling.unread_weight}: {tried.passages:.2f} passages, {tried.changed:.2f} % changed")


if __name__ == "__main__":
    run_benchmark(main)
