"""`openbook ask`: one question on the command line, or a file of them."""

from __future__ import annotations

import argparse
import sys

from openbook.client import Client
from openbook.commands import (
    FAILED,
    InputRow,
    add_search_arguments,
    add_server_arguments,
    json_line,
    marked,
    named,
    search_options,
    spent,
    work_through,
)
from openbook.errors import ClientError, RequestRejected
from openbook.messages import MODES
from openbook.results import AnswerResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Ask a running server. Answers come with their probability, the passage they stand in, and its source."
    parser.epilog = (
        'example: openbook ask "Who signed the lease?" --top-k 10\n'
        "         openbook ask --file questions.jsonl --out answers.jsonl\n"
        "A file has a JSON object a line, with `_id` or `id`, a string or a number (without, the line's number), and `text` or\n"
        "`question`; the output has a line a question, in order:\n"
        '{"id", "question", "answers": [{"text", "probability", "passage_id", "document_id", "start", "end", "document_start",\n'
        ' "document_end"}], "hits": [{"passage_id", "document_id", "score", "title", "source", "document_start"}],\n'
        ' "no_answer_probability", "passages_read", "timings_ms"}; offsets count characters, and the end is behind the last;\n'
        'for a bad row {"id", "error"}.\n'
        "exit status: 0 all answered; 1 nothing could be done; 2 wrong usage; 3 some rows of the file failed; 130 stopped"
    )
    parser.add_argument("question", nargs="?", help="the question")
    parser.add_argument("--file", type=named, metavar="QUESTIONS.jsonl", help="a file of questions; - is standard input")
    parser.add_argument(
        "--out", type=named, metavar="ANSWERS.jsonl", default="-", help="where answers to a file go (default: standard output)"
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    add_search_arguments(parser, "found for each question, and read until its answer is settled", MODES)
    parser.add_argument("--max-answers", type=int, metavar="N", help="answers for each question, 1 to 20 (default: 3)")
    parser.add_argument(
        "--read-all", action="store_true", help="read every passage found, though the best answer be settled by the first ones"
    )
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if (arguments.question is None) == (arguments.file is None):
        print("openbook ask: give a question, or --file QUESTIONS.jsonl (one of the two)", file=sys.stderr)
        return 2
    if arguments.out != "-" and not arguments.file:
        print("openbook ask: --out belongs to --file; a single result is printed (--json)", file=sys.stderr)
        return 2
    try:
        with Client(arguments.server, timeout_seconds=arguments.timeout) as client:
            if not arguments.file:
                return _ask_one(client, arguments)

            def ask(rows: list[InputRow]) -> list[AnswerResult | RequestRejected]:
                return _ask(client, [row.text for row in rows], arguments)

            client.describe()  # a server that is not there is told before a file is opened for writing
            return work_through("ask", arguments.file, arguments.out, ask, counted="questions answered", fields=("questions[",))
    except ClientError as error:
        print(f"openbook ask: {error}", file=sys.stderr)
        return FAILED


def _ask(client: Client, questions: list[str], arguments: argparse.Namespace) -> list[AnswerResult | RequestRejected]:
    return client.answer(questions, max_answers=arguments.max_answers, read_all=arguments.read_all, **search_options(arguments))


def _ask_one(client: Client, arguments: argparse.Namespace) -> int:
    [result] = _ask(client, [arguments.question], arguments)
    if isinstance(result, RequestRejected):
        raise result
    print(json_line(result.to_json(), sys.stdout) if arguments.json else render(result))
    return 0


def render(result: AnswerResult) -> str:
    """A result for people: each answer, its passage with the span marked, its source, and where the time went."""
    hits = {hit.passage_id: hit for hit in result.hits}
    lines = [result.question]
    if not result.answers:
        lines.append("  no answer: no passage was found to read")
    for number, answer in enumerate(result.answers, 1):
        hit = hits[answer.passage_id]
        place = f"characters {answer.document_start} to {answer.document_end} of {hit.source or answer.document_id}"
        title = f" ({hit.title})" if hit.title else ""
        lines += [
            f"  {number}. {' '.join(answer.text.split())}   [{answer.probability:.0%}]",
            f"     {marked(hit, answer)}",
            f"     passage {answer.passage_id}{title}, {place}",
        ]
    read = f"{result.passages_read} of {len(result.hits)}"
    lines += [f"  no answer in the passages read ({read}): {result.no_answer_probability:.0%}", f"  {spent(dict(result.timings_ms))}"]
    return "\n".join(lines)
