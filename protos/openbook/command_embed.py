"""`openbook embed`: texts into vectors."""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np

from openbook.client import Client
from openbook.commands import (
    FAILED,
    InputRow,
    InvalidFile,
    add_invariance_argument,
    add_server_arguments,
    named,
    read_rows,
    status,
    sum_up,
    tell_failed,
    written_aside,
)
from openbook.errors import ClientError, RequestRejected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Turn texts into unit vectors; the similarity of two texts is the inner product of theirs."
    parser.epilog = (
        'example: openbook embed "a lease" "a rental contract"\n'
        "         openbook embed --file texts.jsonl --out vectors.npy\n"
        'Vectors are printed as JSON lines {"id", "vector"}; an --out that ends in .npy gets one float32 array, a row a text.\n'
        "exit status: 0 all embedded; 1 nothing could be done; 2 wrong usage; 3 some texts failed (their rows are zeros in .npy);\n"
        "130 stopped"
    )
    parser.add_argument("texts", nargs="*", help="the texts")
    parser.add_argument(
        "--file", type=named, metavar="TEXTS.jsonl", help="a file with a JSON object a line: `_id` or `id`, and `text`; - is standard input"
    )
    parser.add_argument("--out", type=named, metavar="FILE", default="-", help="where the vectors go (default: standard output)")
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long for the model instead of refusing them")
    add_invariance_argument(parser)
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if bool(arguments.texts) == bool(arguments.file):
        print("openbook embed: give texts, or --file TEXTS.jsonl (one of the two)", file=sys.stderr)
        return 2
    try:
        with Client(arguments.server, timeout_seconds=arguments.timeout) as client:
            return _embed(client, arguments)
    except ClientError as error:
        print(f"openbook embed: {error}", file=sys.stderr)
        return FAILED


def _embed(client: Client, arguments: argparse.Namespace) -> int:
    dim, began = client.describe().bundle.dim, time.monotonic()
    if arguments.file:
        rows = list(read_rows(arguments.file))
        if not rows:
            raise InvalidFile(f"{arguments.file}: no text in it")
    else:
        rows = [InputRow(number, str(number), text) for number, text in enumerate(arguments.texts, 1)]
    as_array = arguments.out.endswith(".npy")
    with written_aside(arguments.out, "wb" if as_array else "w") as stream:
        vectors, failed = _vectors(client, rows, dim, arguments)
        if as_array:
            np.save(stream, vectors)
        else:
            for at, row in enumerate(rows):
                if at not in failed:
                    stream.write(json.dumps({"id": row.id, "vector": [float(x) for x in vectors[at]]}) + "\n")
    return sum_up(len(failed), len(rows), "texts embedded", began) if arguments.file else status(len(failed), len(rows))


def _vectors(client: Client, rows: list[InputRow], dim: int, arguments: argparse.Namespace) -> tuple[np.ndarray, set[int]]:
    """The vectors of rows, zeros for those that failed, and which these are; each of them is told.

    Raises:
        RequestRejected: all of them did.
    """
    vectors = np.zeros((len(rows), dim), np.float32)
    failed = {at: row.problem for at, row in enumerate(rows) if row.problem}
    good = [at for at in range(len(rows)) if at not in failed]
    texts = [rows[at].text for at in good]
    found = client.embed_each(texts, truncate=arguments.truncate, batch_invariant=arguments.batch_invariant)
    for at, vector in zip(good, found, strict=True):
        if isinstance(vector, RequestRejected):
            failed[at] = str(vector)
        else:
            vectors[at] = vector
    for at, problem in sorted(failed.items()):
        if arguments.file:
            tell_failed("embed", arguments.file, rows[at], problem)
        else:
            print(f"openbook embed: text {rows[at].id}: {problem}", file=sys.stderr)
    if len(failed) == len(rows):
        raise RequestRejected(f"none of {len(rows)} texts could be embedded")
    return vectors, set(failed)
