"""`openbook index`: documents into a knowledge base."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from openbook.commands import folder, named

if TYPE_CHECKING:
    from openbook_server.ingest.indexing import Indexing
    from openbook_server.ingest.indexing import Progress as IndexingProgress
    from openbook_server.ingest.sources import Source

STOPPED, SOME_UNREADABLE = 130, 3
_SECONDS_BETWEEN_LINES = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Split documents into passages, embed them with the bundle's embedder and store them in the knowledge base KB, a folder or an "
        "alias of an Elasticsearch cluster, which is made where there is none. Documents that are stored already and have not changed are "
        "left alone, so the same command again goes on after a stop, or stores what has changed; what is gone from a source stays stored "
        "until `openbook delete`. With --new-generation, a "
        "bundle with another embedder takes the place of the one before: the passages are embedded again as they are stored."
    )
    parser.epilog = (
        "sources: files and folders of txt, md, rst, html, pdf, csv, jsonl, parquet; hf:NAME[:SPLIT], a Hugging Face dataset;\n"
        "python-docs:, the documentation that every Python carries. csv, jsonl, parquet and datasets give a document a row:\n"
        "`_id` or `id`, `title` and `text` mean just that, other values become metadata.\n"
        "example: openbook index bundle/ kb/ manuals/ faq.csv\n"
        "         openbook index bundle/ 'elasticsearch://es1:9200,es2:9200/manuals?shards=3&replicas=1' manuals/\n"
        "         openbook index new-bundle/ kb/ --new-generation\n"
        "exit status: 0 all stored; 1 nothing could be done; 2 wrong usage; 3 some items were unreadable (named in the log), the\n"
        "rest is stored; 130 stopped by Ctrl-C, what was reported is stored"
    )
    parser.add_argument("bundle", type=folder, metavar="BUNDLE", help="folder written by `openbook export`")
    parser.add_argument("knowledge_base", type=named, metavar="KB", help="folder of the knowledge base, or elasticsearch://HOST:PORT/ALIAS")
    parser.add_argument("sources", nargs="*", type=named, metavar="SOURCE", help="file, folder, hf:NAME or python-docs:")
    parser.add_argument("--passage-tokens", type=int, metavar="N", help="longest passage (default: as before, at first 200)")
    parser.add_argument("--overlap", type=int, metavar="N", help="tokens neighbours may share (default: as before, at first 40)")
    parser.add_argument(
        "--new-generation",
        action="store_true",
        help="build the generation of this bundle and these parameters beside the live one, and make it the live one once it lacks "
        "nothing; that needs no sources, and a running server does it itself: openbook generations build",
    )
    parser.add_argument(
        "--graph-dims",
        type=int,
        metavar="N",
        help="dimensions that the graph keeps of a vector; candidates are compared by whole vectors all the same. "
        "0 = as few as the data allow (default: as before, at first 0)",
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="documents a transaction (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "openvino", "cuda"], help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="processor threads for inference; 0 = all cores (default)")


def run(arguments: argparse.Namespace) -> int:
    from openbook_server.errors import OpenBookError

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        return _index(arguments)
    except (OpenBookError, OSError) as error:
        print(f"openbook index: {error}", file=sys.stderr)
        return 1


def _index(arguments: argparse.Namespace) -> int:
    from openbook_server.bundle import load_bundle
    from openbook_server.config import check_range
    from openbook_server.errors import InvalidRequest, SourceInvalid
    from openbook_server.ingest.embed import PassageEmbedder
    from openbook_server.ingest.indexing import Indexing
    from openbook_server.ingest.preparation import FACTS, check_stored_passages, choose_splitting
    from openbook_server.ingest.sources import find_sources
    from openbook_server.knowledge.building import build_generation, publish_generation
    from openbook_server.knowledge.opening import open_knowledge_base, recorded_facts
    from openbook_server.runtime import Graph, choose_device
    from openbook_server.tokenization import TextEncoder, load_tokenizer

    if not arguments.sources and not arguments.new_generation:
        raise InvalidRequest("SOURCE", "none given; only --new-generation needs none")
    check_range("threads", arguments.threads)
    sources = find_sources(arguments.sources)
    bundle = load_bundle(arguments.bundle)
    if not 1 <= arguments.batch <= 4_096:
        raise InvalidRequest("--batch", f"{arguments.batch} is outside 1 to 4096")
    if arguments.graph_dims is not None and not 0 <= arguments.graph_dims <= bundle.embedder.dim:
        raise InvalidRequest("--graph-dims", f"{arguments.graph_dims} is outside 0 to {bundle.embedder.dim}, the embedder's dimensions")
    splitting = choose_splitting(bundle, {}, arguments.passage_tokens, arguments.overlap)  # refused before a folder is made
    device = choose_device(arguments.device, None, arguments.threads, sessions=0)
    graph = Graph(bundle.graph_path("embedder", device.precision), device)
    tokenizer = load_tokenizer(bundle.tokenizer_path)
    encoder = TextEncoder(tokenizer, bundle.tokenizer_digest)
    embedder = PassageEmbedder(tokenizer, graph, bundle.embedder, sessions=device.sessions)
    if arguments.new_generation:  # looked at before a generation is added that nothing could fill
        check_stored_passages(bundle, recorded_facts(arguments.knowledge_base, *FACTS))
    knowledge_base = open_knowledge_base(
        arguments.knowledge_base,
        bundle,
        create=True,
        new_generation=arguments.new_generation,
        graph_dims=arguments.graph_dims,
    )
    try:
        recorded = knowledge_base.facts(*FACTS)
        splitting = choose_splitting(bundle, recorded, arguments.passage_tokens, arguments.overlap)
        indexing = Indexing(knowledge_base, encoder, embedder, splitting, batch=arguments.batch)
        began = time.monotonic()
        with _stop_on_signal() as stopping:
            if arguments.new_generation:
                whole = PassageEmbedder(tokenizer, graph, bundle.embedder, whole=True, sessions=device.sessions)
                if build_generation(knowledge_base, whole, _report_build(), stopping):
                    knowledge_base.optimise()
                    knowledge_base.snapshot()
                    publish_generation(knowledge_base, whole)  # first of all: what is stored must be in the live one
            if not stopping():
                if splitting.facts() != recorded:
                    knowledge_base.record(splitting.facts())
                _run_with_progress(indexing, sources, stopping)
            stopped = stopping()
        knowledge_base.optimise()
        knowledge_base.snapshot()
        counts, progress = knowledge_base.counts(), indexing.progress
    finally:
        knowledge_base.close()
    seconds = time.monotonic() - began
    print(
        f"{knowledge_base.name}, generation {knowledge_base.generation}: {counts.documents} documents, {counts.passages} passages; "
        f"this run read {progress.documents}, "
        f"{progress.unchanged} of them unchanged, and stored {progress.passages} passages in {seconds:.1f} s"
        + (f"; {progress.unreadable} items were unreadable and skipped" if progress.unreadable else "")
        + (f"; {progress.replaced_ids} ids came more than once, the last of each was kept" if progress.replaced_ids else "")
        + (f"; {progress.replaced_files} took the place of other files' documents" if progress.replaced_files else "")
    )
    if stopped:
        print("openbook index: stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    if not counts.documents:
        raise SourceInvalid("no document was found in the sources")
    return SOME_UNREADABLE if progress.unreadable else 0


def _report_build() -> Callable[[int, int], None]:
    """A line now and then: passages, of how many, and the time left."""
    began = last = time.monotonic()
    first = -1

    def report(filled: int, passages: int) -> None:
        nonlocal last, first
        now = time.monotonic()
        first = filled if first < 0 else first
        if now - last > _SECONDS_BETWEEN_LINES and filled > first:
            last = now
            left = (now - began) * (passages - filled) / (filled - first)
            print(f"new generation: {filled} of {passages} passages, about {left:.0f} s left", file=sys.stderr)

    return report


def _run_with_progress(indexing: Indexing, sources: list[Source], stopping: Callable[[], bool]) -> None:
    """Passages a second and, where sizes are known, the time left; a bar on a terminal, else a line every few seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    total = sum(source.bytes for source in sources)
    began = last = time.monotonic()
    bar = Progress(
        TextColumn("indexing"), BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), console=console
    )
    task = bar.add_task("", total=total or None)

    def report(progress: IndexingProgress) -> None:
        nonlocal last
        now = time.monotonic()
        rate = progress.embedded / max(now - began, 1e-9)
        line = f"{progress.documents} documents, {progress.embedded} passages, {rate:.0f} passages/s"
        bar.update(task, completed=min(progress.bytes_read, total), description=line)
        if not console.is_terminal and now - last > 5:
            last = now
            share = progress.bytes_read / total if total else 0.0
            left = f"{share:.0%} done, about {(now - began) * (1 - share) / share:.0f} s left, " if share else ""
            console.print(f"indexing: {left}{line}", soft_wrap=True)

    if console.is_terminal:
        with bar:
            indexing.run(sources, report, stopping)
    else:
        indexing.run(sources, report, stopping)


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Within, SIGINT and SIGTERM only set a flag: the transaction under way is finished first."""
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        if not stopped:
            print("openbook index: stopping, in some seconds", file=sys.stderr)
        stopped = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
