"""`openbook search`: the passages for a question, without reading them."""

from __future__ import annotations

import argparse
import sys

from openbook.client import Client
from openbook.commands import FAILED, add_search_arguments, add_server_arguments, json_line, search_options
from openbook.errors import ClientError, RequestRejected
from openbook.messages import MODES
from openbook.results import SearchResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Find the passages that fit a question best."
    parser.epilog = (
        'example: openbook search "termination of the lease" --mode lexical --top-k 20 --json\n'
        "exit status: 0 searched, though it be that no passage was found; 1 failed; 2 wrong usage; 130 stopped"
    )
    parser.add_argument("question", help="the question, or just words")
    parser.add_argument("--json", action="store_true", help="print the hits as JSON, whole passages included")
    add_search_arguments(parser, "found", set(MODES) - {"none"})
    parser.add_argument(
        "--rerank",
        type=int,
        metavar="N",
        help="read the best N beside the question, order them by whether the answer is there (default: 0; limit as of --top-k)",
    )
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    try:
        with Client(arguments.server, timeout_seconds=arguments.timeout) as client:
            [result] = client.search([arguments.question], **search_options(arguments), rerank=arguments.rerank)
        if isinstance(result, RequestRejected):
            raise result
    except ClientError as error:
        print(f"openbook search: {error}", file=sys.stderr)
        return FAILED
    print(_json(result) if arguments.json else render(result))
    return 0


def _json(result: SearchResult) -> str:
    texts = [{"text": hit.text, "metadata": dict(hit.metadata)} for hit in result.hits]
    whole = result.to_json()
    whole["hits"] = [hit | text for hit, text in zip(whole["hits"], texts, strict=True)]
    return json_line(whole, sys.stdout)


def render(result: SearchResult) -> str:
    """A line for each hit: score, where it is, and how it begins."""
    if not result.hits:
        return "no passage found"
    lines = []
    for number, hit in enumerate(result.hits, 1):
        parts = [f"cosine {hit.dense_score:.3f}"] if hit.dense_score is not None else []
        parts += [f"nearest window {hit.window_score:.3f}"] if hit.window_score is not None else []
        parts += [f"tokens {hit.token_score:.3f}"] if hit.token_score is not None else []
        parts += [f"BM25 {hit.lexical_score:.2f}"] if hit.lexical_score is not None else []
        parts += [f"overlap {hit.overlap_score:.2f}"] if hit.overlap_score is not None else []
        parts += [f"answer in it {100 * hit.answer_probability:.0f} %"] if hit.answer_probability is not None else []
        lines.append(f"{number:3}. {hit.score:.3f}  {hit.passage_id}" + (f"  ({', '.join(parts)})" if parts else ""))
        lines.append(f"     {' '.join(hit.text.split())[:150]}")
    return "\n".join(lines)
