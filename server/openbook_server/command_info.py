"""`openbook info`: what a bundle, a knowledge base or a running server is."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from openbook.commands import named

from openbook_server.targets import is_address


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say what a bundle, a knowledge base or a server is; a bundle's digests are checked."
    parser.epilog = (
        "example: openbook info bundle/; openbook info kb/; openbook info elasticsearch://es1:9200/manuals; openbook info localhost:50051\n"
        "exit status: 0; 1 when it is none or damaged"
    )
    parser.add_argument(
        "target", type=named, metavar="BUNDLE|KB|HOST:PORT", help="a folder, elasticsearch://HOST:PORT/ALIAS, or the address of a server"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from openbook.errors import ClientError

    from openbook_server.errors import OpenBookError

    try:
        facts = _facts(arguments.target)
    except (OpenBookError, ClientError) as error:
        print(f"openbook info: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        way_out = "; give this user the right to read it" if isinstance(error, PermissionError) else ""
        what = error.filename or arguments.target
        print(f"openbook info: {what} cannot be read: {error.strerror or error}{way_out}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(facts))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
    return 0


def _facts(target: str) -> dict[str, Any]:
    folder = Path(target)
    if is_address(target):
        from openbook_server.knowledge.opening import describe_address

        return describe_address(target)
    if not folder.exists() and ":" in target:
        return _server(target)  # needs no more than the client's own install
    from openbook_server.errors import BundleInvalid
    from openbook_server.knowledge.store import FILE
    from openbook_server.manifest import MANIFEST

    if (folder / MANIFEST).is_file():
        return _bundle(folder)
    if (folder / FILE).is_file():
        return _knowledge_base(folder)
    what = "is neither a bundle nor a knowledge base" if folder.exists() else "does not exist"
    raise BundleInvalid(f"{target} {what}; give a folder written by `openbook export` or `openbook index`, or HOST:PORT of a server")


def _bundle(folder: Path) -> dict[str, Any]:
    from openbook_server.bundle import load_bundle

    bundle = load_bundle(folder)
    facts: dict[str, Any] = {
        "kind": "bundle (every digest matches)",
        "name": bundle.name,
        "id": bundle.id,
        "licence": bundle.license,
        "tasks": ", ".join(bundle.tasks),
        "source": bundle.manifest.get("source"),
        "embedder": f"{bundle.embedder.dim} dimensions, {bundle.embedder.max_tokens} tokens, graphs {', '.join(bundle.embedder.graphs)}",
        "fingerprint": bundle.embedder.fingerprint,
    }
    if bundle.reader is not None:
        facts["reader"] = f"{bundle.reader.max_tokens} tokens a pair, graphs {', '.join(bundle.reader.graphs)}"
    for name, head in bundle.heads.items():
        classes = f"{len(head.labels)} labels" if head.labels else "the vocabulary"
        unit = "a pair" if head.pair else "a text"
        beside = f", {head.neighbours.count} neighbours labelled by {head.neighbours.label_key!r}" if head.neighbours else ""
        facts[name] = f"{head.objective}, {classes}, {head.max_tokens} tokens {unit}{beside}, graphs {', '.join(head.graphs)}"
    for name, writer in bundle.writers.items():
        unit = "a question and passage" if name == "generator" else "read and written"
        precisions = ", ".join(next(iter(writer.graphs.values())))
        facts[name] = f"{writer.architecture}, {writer.max_tokens} tokens {unit}, {len(writer.graphs)} graphs in {precisions}"
    return facts


def _knowledge_base(folder: Path) -> dict[str, Any]:
    from openbook_server.knowledge.inventory import describe_generations
    from openbook_server.knowledge.store import FILE, Store

    store = Store(folder, read_only=True)
    try:
        counts, live = store.counts(), store.generations.live()
        facts = {
            "kind": "knowledge base",
            "documents": counts.documents,
            "passages": counts.passages,
            "generation": live.name if live else None,
            "fingerprint": live.fingerprint if live else None,
            "dimensions": live.dim if live else None,
            "writes": store.sequence(),
            "bytes": (folder / FILE).stat().st_size,
            "snapshots": ", ".join(sorted(file.name for file in folder.glob("index-*.hnsw"))) or "none (all rows are scanned exactly)",
        }
        states = describe_generations(folder, store)
        return facts | {f"generation {state.name}": str(state) for state in states}
    finally:
        store.close()


def _server(address: str) -> dict[str, Any]:
    from openbook.client import Client

    from openbook_server.command_generations import comparison_lines

    with Client(address, timeout_seconds=10) as client:
        reply = client.describe()
        knowledge = client.describe_knowledge_base() if reply.HasField("knowledge_base") else None
    limits = reply.limits
    facts = {
        "kind": f"server, openbook {reply.version}",
        "bundle": f"{reply.bundle.name} {reply.bundle.id}",
        "licence": reply.bundle.license,
        "tasks": ", ".join(reply.bundle.tasks),
        "fingerprint": reply.bundle.embedder_fingerprint,
        "device": f"{reply.device}, {reply.precision}",
        "same bytes whatever shares a batch": ", ".join(reply.batch_invariant) or "none, unless a request asks for it (batch_invariant)",
        "knowledge base": f"{reply.knowledge_base.documents} documents, {reply.knowledge_base.passages} passages, "
        f"generation {reply.knowledge_base.generation}"
        if reply.HasField("knowledge_base")
        else "none",
        "limits": f"{limits.max_texts} texts a request, {limits.max_text_tokens} tokens a text, {limits.max_question_tokens} a question, "
        f"top_k {limits.max_top_k}, {limits.max_message_bytes} bytes a message",
    }
    for one in reply.bundle.classifiers:
        classes = f"{len(one.labels)} labels" if one.labels else "the vocabulary"
        beside = f", {one.neighbours} neighbours labelled by {one.label_key!r}" if one.neighbours else ""
        facts[f"classifier {one.name}"] = f"{one.objective}, {classes}, {one.max_text_tokens} tokens a text{beside}"
    for writer in reply.bundle.writers:
        unit = "a question" if writer.name == "generator" else "a prompt and its text"
        facts[writer.name] = f"{writer.architecture}, {writer.max_text_tokens} tokens {unit}, beside {writer.passages} passages"
    if knowledge is not None and knowledge.HasField("comparison"):
        compared = "; ".join(comparison_lines(knowledge.comparison)) or "no question yet"
        facts["the generation that follows"] = f"lacks nothing; {compared}"
    return facts
