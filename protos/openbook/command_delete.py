"""`openbook delete`: documents out of a running server's knowledge base."""

from __future__ import annotations

import argparse
import sys

from openbook.client import Client
from openbook.commands import FAILED, add_server_arguments, status
from openbook.errors import ClientError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Remove documents, with all their passages, from the knowledge base of a running server, for good."
    parser.epilog = (
        "example: openbook delete old.pdf --server localhost:50051\n"
        "The id of a file is its path within the folder that was indexed, of a file named by itself its name; of a row its `id`, or the\n"
        "file's and its number, rows.csv:7. An id that nothing is stored under is `absent`.\n"
        "exit status: 0 none of them is stored any more; 1 nothing could be done; 2 wrong usage; 3 some ids were refused; 130 stopped"
    )
    parser.add_argument("ids", nargs="+", metavar="ID", help="id of a document, as `openbook search --json` shows it")
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    try:
        with Client(arguments.server, timeout_seconds=arguments.timeout) as client:
            results = client.delete(arguments.ids)
    except ClientError as error:
        print(f"openbook delete: {error}", file=sys.stderr)
        return FAILED
    for result in results:
        if result.problem:
            print(f"openbook delete: {result.problem}", file=sys.stderr)
        else:
            print(f"{result.id}: {result.outcome}" + (f", {result.passages} passages" if result.passages else ""))
    return status(sum(bool(result.problem) for result in results), len(results))
