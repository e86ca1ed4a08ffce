"""`openbook upsert`: documents into a running server's knowledge base, while it answers."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from openbook.commands import FAILED, add_server_arguments, named, status

if TYPE_CHECKING:
    from openbook.client import Document

    from openbook_server.ingest.sources import Source

_SECONDS_BETWEEN_LINES = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Send documents to a running server, which stores them while it answers; each is durable and searchable when it is counted. "
        "Without a server, `openbook index` does the same, faster."
    )
    parser.epilog = (
        "sources: as of `openbook index`: files and folders of txt, md, rst, html, pdf, csv, jsonl, parquet; hf:NAME[:SPLIT]\n"
        "example: openbook upsert news/today.jsonl --server localhost:50051\n"
        "exit status: 0 all stored; 1 nothing could be done; 2 wrong usage; 3 some documents failed or were unreadable (they are\n"
        "named); 130 stopped by Ctrl-C, what was counted is stored and the same command goes on"
    )
    parser.add_argument("sources", nargs="+", type=named, metavar="SOURCE", help="what to send")
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from openbook.client import Client
    from openbook.errors import ClientError

    from openbook_server.errors import OpenBookError
    from openbook_server.ingest.sources import displaced, find_sources

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)  # what is left out of a source
    outcomes: Counter[str] = Counter()
    began = shown = time.monotonic()
    try:
        sources = find_sources(arguments.sources)
        with Client(arguments.server, timeout_seconds=arguments.timeout) as client:
            for result in client.upsert(_documents(sources, outcomes)):
                outcomes[result.outcome] += 1
                if result.problem:
                    print(f"openbook upsert: {result.id!r}: {result.problem}", file=sys.stderr)
                if result.replaced_source and (told := displaced(result.id, result.replaced_source)):
                    print(f"openbook upsert: {told}", file=sys.stderr)
                if time.monotonic() - shown > _SECONDS_BETWEEN_LINES:
                    shown = time.monotonic()
                    stored = outcomes.total()
                    print(f"{stored} documents, {stored / (shown - began):.1f} a second", file=sys.stderr)
    except (ClientError, OpenBookError) as error:
        print(f"openbook upsert: {error}", file=sys.stderr)
        return FAILED
    finally:
        if outcomes:
            print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())), flush=True)
    if not outcomes:
        print("no document was found", flush=True)
        return FAILED
    return status(outcomes["failed"] + outcomes["unreadable"], outcomes.total())


def _documents(sources: list[Source], outcomes: Counter[str]) -> Iterator[Document]:
    from openbook.client import Document

    from openbook_server.ingest.items import Unreadable
    from openbook_server.ingest.sources import read_source

    for source in sources:
        for item in read_source(source):
            if isinstance(item, Unreadable):
                outcomes["unreadable"] += 1
                where = f", {item.where}" if item.where else ""
                print(f"openbook upsert: skipped {source.path or source.name}{where}: {item.reason}", file=sys.stderr)
            else:
                yield Document(id=item.id, text=item.text, title=item.title, source=item.source, metadata=item.metadata)
