"""`openbook generations`: which generations a knowledge base has; build one, make it live, take it back, remove it."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from openbook.commands import FAILED, folder, named

from openbook_server.targets import is_address

if TYPE_CHECKING:
    from openbook.client import Client
    from openbook.v1 import knowledge_base_pb2 as kb

_STATES = {1: "live", 2: "kept", 3: "new"}  # of GenerationState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A generation is an embedder with the parameters of its index, and the bundle that goes with it. Of a running server they are "
        "built and changed while it answers; of a folder that no process has open, or of an alias in Elasticsearch, by this command."
    )
    parser.epilog = (
        "example: openbook generations list kb/\n"
        "         openbook generations build new-bundle/ localhost:50051     in the background, from the passages that are stored\n"
        "         openbook generations publish localhost:50051               waits until it lacks nothing, then it answers\n"
        "         openbook generations rollback localhost:50051              the one before answers again\n"
        "         openbook generations remove localhost:50051 1-0a1b2c3d4e5f gives its room back to the disk\n"
        "Without a server they are built by `openbook index BUNDLE KB --new-generation`, which publishes as well.\n"
        "exit status: 0; 1 it could not be done; 2 wrong usage"
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action")
    for name, meaning in (
        ("list", "every generation, how far it is built, and what it takes on the disk"),
        ("build", "begin to build the generation of a bundle, or go on with it"),
        ("publish", "make a generation live once it lacks nothing; by default the one that is being built"),
        ("rollback", "make live again what was live before"),
        ("remove", "remove a generation for good"),
    ):
        action = actions.add_parser(name, help=meaning, description=meaning)
        if name == "build":
            action.add_argument("bundle", type=folder, metavar="BUNDLE", help="its folder, on the server's machine")
            action.add_argument("--graph-dims", type=int, metavar="N", help="as of `openbook index` (default: as the live generation's)")
            action.add_argument(
                "target", type=named, metavar="HOST:PORT", help="a server; without one: openbook index BUNDLE KB --new-generation"
            )
        else:
            action.add_argument(
                "target",
                type=named,
                metavar="KB|HOST:PORT",
                help="a server; or a folder that no process has open, or elasticsearch://HOST:PORT/ALIAS",
            )
        if name == "remove":
            action.add_argument("name", type=named, metavar="NAME", help="as `list` shows it")
        if name == "publish":
            action.add_argument("name", nargs="?", type=named, metavar="NAME", help="as `list` shows it; needed without a server")
        action.add_argument(
            "--timeout", type=float, default=600.0, metavar="SECONDS", help="to wait for a server (default: 600); it goes on without us"
        )


def run(arguments: argparse.Namespace) -> int:
    from openbook.client import Client
    from openbook.errors import ClientError

    from openbook_server.errors import OpenBookError

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        if Path(arguments.target).exists() or ":" not in arguments.target or is_address(arguments.target):
            return _of_knowledge_base(arguments)
        with Client(arguments.target, timeout_seconds=arguments.timeout) as client:
            return _of_server(client, arguments)
    except (OpenBookError, ClientError, OSError) as error:
        print(f"openbook generations: {error}", file=sys.stderr)
        return FAILED


def _of_server(client: Client, arguments: argparse.Namespace) -> int:
    if arguments.action == "list":
        for generation in client.generations():
            print(f"{generation.name}  {_line(generation)}")
    elif arguments.action == "build":
        name = client.build_generation(str(arguments.bundle.resolve()), graph_dims=arguments.graph_dims)
        print(f"{name} is being built; `openbook generations publish {arguments.target}` waits for it and makes it live")
    elif arguments.action == "remove":
        client.remove_generation(arguments.name)
        print(f"{arguments.name} is removed")
    else:
        name = client.publish_generation(arguments.name or "") if arguments.action == "publish" else client.roll_back_generation()
        print(f"{name} is live")
    return 0


def _line(generation: kb.Generation) -> str:
    parts = [_STATES.get(generation.state, "unknown") + (", live before" if generation.previous else "")]
    parts.append(f"{generation.passages} passages" + (f", lacks {generation.lacking}" if generation.lacking else ""))
    parts.append(f"embedder {generation.embedder_fingerprint[:12]}, {generation.dim} dimensions")
    parts.append(f"{(generation.vector_bytes + generation.snapshot_bytes) / 1e6:.1f} MB on the disk")
    parts.append(f"bundle {generation.bundle_id[:12]} in {generation.bundle}" if generation.bundle_id else "bundle unknown")
    parts += comparison_lines(generation.comparison)
    if generation.following:
        parts.append("being built or kept up to date")
    if generation.problem:
        parts.append(f"not built any further: {generation.problem}")
    return "; ".join(parts)


def comparison_lines(comparison: kb.Comparison) -> list[str]:
    """What there is to say of the live pair and another one; nothing before the first question."""
    shares = (("overlap@k", comparison.overlap), ("same answer", comparison.agreement))
    return [
        f"{name} {share.mean:.3f} ({share.low:.3f} to {share.high:.3f}) of {share.samples} questions"
        for name, share in shares
        if share.samples
    ]


def _of_knowledge_base(arguments: argparse.Namespace) -> int:
    from openbook_server.errors import GenerationNotReady, InvalidRequest, KnowledgeBaseDamaged
    from openbook_server.knowledge.opening import look, unsecret

    target = unsecret(arguments.target)
    if arguments.action == "build":
        raise InvalidRequest(
            "HOST:PORT", f"{target} is no server; without one: openbook index {arguments.bundle} {target} --new-generation"
        )
    with look(arguments.target) as found:
        if found is None:
            raise KnowledgeBaseDamaged(f"{target} is no knowledge base; make it: openbook index BUNDLE {target} SOURCES...")
        if arguments.action == "remove":
            found.remove(arguments.name)
            print(f"{arguments.name} is removed")
            return 0
        states = found.states()
    if arguments.action == "list":
        for state in states:
            print(f"{state.name}  {state}")
        return 0
    publishes = arguments.action == "publish"
    wanted = [state.name for state in states if (state.name == arguments.name if publishes else state.previous)]
    if not wanted and not publishes:
        raise GenerationNotReady(f"{target}: no generation was live before, or it was removed; publish one by its name")
    if not wanted:
        known, given = ", ".join(state.name for state in states), f"{arguments.name!r} is none" if arguments.name else "not given; name one"
        raise InvalidRequest("NAME", f"{given} of {known}; see `openbook generations list {target}`")
    return _publish(arguments.target, wanted[0])


def _publish(target: str, name: str) -> int:
    """Bring it up to date with the bundle that goes with it, and make it the live one."""
    from openbook_server.ingest.embed import PassageEmbedder
    from openbook_server.knowledge.building import build_generation, publish_generation
    from openbook_server.knowledge.opening import open_generation
    from openbook_server.runtime import Graph, choose_device
    from openbook_server.tokenization import load_tokenizer

    knowledge_base, bundle = open_generation(target, name)
    try:
        device = choose_device(sessions=0)
        graph = Graph(bundle.graph_path("embedder", device.precision), device)
        tokenizer = load_tokenizer(bundle.tokenizer_path)
        embed = PassageEmbedder(tokenizer, graph, bundle.embedder, whole=True, sessions=device.sessions)
        build_generation(knowledge_base, embed)
        knowledge_base.optimise()
        knowledge_base.snapshot()
        publish_generation(knowledge_base, embed)
    finally:
        knowledge_base.close()
    print(f"{name} is live; serve it with {bundle.folder}")
    return 0
