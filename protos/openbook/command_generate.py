"""`openbook generate`: what a model of the server's bundle writes after a prompt, or of a question and the passages found for it."""

from __future__ import annotations

import argparse
import sys

from openbook.client import Client
from openbook.commands import FAILED, add_filter_argument, add_server_arguments, json_line, spent
from openbook.errors import ClientError
from openbook.messages import MODES, GenerateOptions
from openbook.results import Ending


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Let a model of the server's bundle write: a language model goes on with a prompt, a generator answers a question. Both read the\n"
        "passages that are found in the knowledge base. On a terminal, what is written appears as it comes."
    )
    parser.epilog = (
        'example: openbook generate "The river rises in" --max-tokens 40 --temperature 0.8 --seed 1\n'
        '         openbook generate "Who signed the lease?" --writer generator --json\n'
        "exit status: 0 written; 1 nothing or only a part was; 2 wrong usage; 130 stopped"
    )
    parser.add_argument("text", help="the prompt, or the question")
    parser.add_argument("--writer", choices=["language_model", "generator"], help="which model (default: the only one of the bundle)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="to write at most (default: 64; of a generator as in training)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 to 10; 0 = the most probable token at each step (default: 0)")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the fewest tokens whose probabilities sum to it (default: 1)")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="the text ends before it; up to 8 times, of 1,024 bytes each")
    parser.add_argument("--top-k", type=int, metavar="N", help="passages that are read, 0 to as many as in training (the default)")
    parser.add_argument("--mode", choices=sorted(MODES), help="how passages are found (default: hybrid); none reads none")
    add_filter_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the whole as JSON when it is written")
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    options = GenerateOptions(
        writer=arguments.writer,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=arguments.stop,
        top_k=arguments.top_k,
        mode=arguments.mode,
        filter=arguments.filter or None,
    )
    try:
        with Client(arguments.server, timeout_seconds=arguments.timeout) as client:
            shown = ""
            for piece in client.generate(arguments.text, **options):
                shown += piece.text
                if sys.stdout.isatty() and not arguments.json:
                    print(piece.text, end="", flush=True)
                if piece.ending is not None:
                    _print_ending(piece.ending, shown, as_json=arguments.json)
    except ClientError as error:
        print(f"openbook generate: {error}", file=sys.stderr)
        return FAILED
    return 0


def _print_ending(ending: Ending, shown: str, *, as_json: bool) -> None:
    """What is left to say of a text of which a terminal has `shown` by now."""
    if as_json:
        print(json_line(ending.to_json(), sys.stdout))
        return
    print("" if sys.stdout.isatty() else ending.text)
    if sys.stdout.isatty() and ending.text != shown:  # a generator's tokens have no capitals
        print(f"as it stands in the passage: {ending.text}")
    print(f"\n{ending.tokens} tokens, {ending.finish}, seed {ending.seed}; {spent(dict(ending.timings_ms))}", file=sys.stderr)
    for hit in ending.hits:
        print(f"read: {hit.passage_id}  {' '.join(hit.text.split())[:120]}", file=sys.stderr)
