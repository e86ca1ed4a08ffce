"""`openbook classify`: labels for texts, by a classifier of the server's bundle; claims beside evidence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from openbook.client import Client
from openbook.commands import (
    FAILED,
    InputRow,
    add_filter_argument,
    add_invariance_argument,
    add_server_arguments,
    json_line,
    named,
    spent,
    work_through,
)
from openbook.errors import ClientError, RequestRejected
from openbook.messages import MODES, ClassifyOptions
from openbook.results import Classified, Hit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Label a text with a classifier of the server's bundle, with the help of labelled texts in the knowledge base where it was\n"
        "trained so; or a claim, beside evidence that is given or found in the knowledge base. `openbook info HOST:PORT` lists classifiers."
    )
    parser.epilog = (
        'example: openbook classify "Where is my card?" --classifier intents --explain\n'
        '         openbook classify "The lease ended in May." --classifier claims --evidence "The lease ran until May 2020."\n'
        "         openbook classify --file texts.jsonl --out labels.jsonl\n"
        "A file has a JSON object a line: `_id` or `id`, `text` or `claim`, and, for a verifier, `evidence`, a text or a list of them\n"
        "(all rows have some, or none has); the output has a line a text, in order:\n"
        '{"id", "text", "labels": [{"label", "probability", "alone", "model", "knn"}], "passages", "neighbours", "evidence",\n'
        ' "timings_ms"}; for a bad row {"id", "error"}. alone, model and knn are there where a text has neighbours: without them, with\n'
        "each of them summed, and by their vote alone.\n"
        "exit status: 0 all labelled; 1 nothing could be done; 2 wrong usage; 3 some rows of the file failed; 130 stopped"
    )
    parser.add_argument("text", nargs="?", help="the text, or the claim")
    parser.add_argument("--file", type=named, metavar="TEXTS.jsonl", help="a file of texts; - is standard input")
    parser.add_argument(
        "--out", type=named, metavar="LABELS.jsonl", default="-", help="where labels of a file go (default: standard output)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--classifier", metavar="NAME", help="which one (default: the only one of the bundle)")
    parser.add_argument("--evidence", metavar="TEXT", action="append", help="passage that a claim is read beside; may be repeated")
    parser.add_argument("--max-labels", type=int, metavar="N", help="labels for each text, 1 to 1,000 (default: 5)")
    parser.add_argument("--explain", action="store_true", help="show the neighbours, or the evidence found, that the labels rest on")
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long for the model instead of refusing them")
    parser.add_argument("--top-k", type=int, metavar="N", help="neighbours (default: as in training), or passages of evidence (default: 5)")
    parser.add_argument("--mode", choices=sorted(MODES), help="how evidence is found (default: hybrid); none labels texts by themselves")
    parser.add_argument("--label-key", metavar="KEY", help="metadata that hold neighbours' labels (default: as in the training data)")
    add_filter_argument(parser)
    add_invariance_argument(parser)
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if (arguments.text is None) == (arguments.file is None):
        print("openbook classify: give a text, or --file TEXTS.jsonl (one of the two)", file=sys.stderr)
        return 2
    if arguments.out != "-" and not arguments.file:
        print("openbook classify: --out belongs to --file; a single result is printed (--json)", file=sys.stderr)
        return 2
    if arguments.file and arguments.evidence:
        print("openbook classify: --evidence belongs to one claim; the rows of a file bring their own", file=sys.stderr)
        return 2
    try:
        with Client(arguments.server, timeout_seconds=arguments.timeout) as client:
            if not arguments.file:
                return _one(client, arguments)

            def classify(rows: list[InputRow]) -> list[Classified | RequestRejected]:
                evidence = [row.evidence for row in rows] if any(row.evidence for row in rows) else None
                return client.classify([row.text for row in rows], **_options(arguments, evidence))

            client.describe()  # a server that is not there is told before a file is opened for writing
            return work_through(
                "classify", arguments.file, arguments.out, classify, counted="texts labelled", fields=("texts[", "evidence[")
            )
    except ClientError as error:
        print(f"openbook classify: {error}", file=sys.stderr)
        return FAILED


def _options(arguments: argparse.Namespace, evidence: Sequence[Sequence[str]] | None) -> ClassifyOptions:
    return ClassifyOptions(
        evidence=evidence,
        classifier=arguments.classifier,
        truncate=arguments.truncate,
        max_labels=arguments.max_labels,
        explain=arguments.explain,
        top_k=arguments.top_k,
        mode=arguments.mode,
        filter=arguments.filter or None,
        label_key=arguments.label_key,
        batch_invariant=arguments.batch_invariant,
    )


def _one(client: Client, arguments: argparse.Namespace) -> int:
    evidence = [arguments.evidence] if arguments.evidence else None
    [result] = client.classify([arguments.text], **_options(arguments, evidence))
    if isinstance(result, RequestRejected):
        raise result
    print(json_line(result.to_json(), sys.stdout) if arguments.json else render(result))
    return 0


def render(result: Classified) -> str:
    """A result for people: labels, how they came about, and what they rest on."""
    lines = [result.text]
    for label in result.labels:
        readings = (("alone", label.alone), ("with neighbours", label.model), ("their vote", label.knn))
        parts = ", ".join(f"{name} {value:.0%}" for name, value in readings if value is not None)
        lines.append(f"  {label.probability:6.1%}  {label.label}" + (f"   ({parts})" if parts else ""))
    lines += [f"  neighbour {one.hit.score:.2f}  {one.label}: {_shown(one.hit)}" for one in result.neighbours]
    lines += [f"  evidence {hit.score:.2f}  {_shown(hit)}" for hit in result.evidence]
    lines.append(f"  {spent(dict(result.timings_ms))}")
    return "\n".join(lines)


def _shown(hit: Hit) -> str:
    text = " ".join(hit.text.split())
    return f"{text[:120]}{'…' if len(text) > 120 else ''}   [{hit.passage_id}]"
