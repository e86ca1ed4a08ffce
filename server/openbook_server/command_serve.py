"""`openbook serve`: run the server until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openbook.commands import folder, named

if TYPE_CHECKING:
    from openbook_server.config import ServerConfig
    from openbook_server.errors import OpenBookError

_FLAGS = {
    "host": "address to listen on; 0.0.0.0 opens the server to the network",
    "port": "port to listen on; 0 = any free one, named in the log",
    "device": "auto, cpu, openvino or cuda",
    "precision": "fp32, bf16, fp16 or int8; by default the device's lossless one",
    "frontends": "processes that speak gRPC for the one that computes, which then does nothing else; 0 = one process does it all. For "
    "machines with many cores and a fast device",
    "threads": "processor threads for inference; 0 = all cores",
    "sessions": "batches at once, which share the threads; 0 = as many as threads, up to 8; on a GPU 2",
    "max_batch_tokens": "tokens of one batch, padding included; raise it on a GPU until the device is busy",
    "cache_mb": "megabytes for the vectors of texts and questions asked before; 0 = compute every one, as a benchmark must",
    "max_queued": "texts and passages that may wait; beyond it callers get RESOURCE_EXHAUSTED and a time to come back",
    "max_texts": "texts or questions a request",
    "max_text_bytes": "bytes of one text",
    "max_message_bytes": "bytes of one request",
    "max_top_k": "largest top_k",
    "default_deadline_seconds": "for callers that set no deadline; a longer one than 600 counts as 600",
    "drain_seconds": "after SIGTERM, time for requests in flight",
    "writable": "take writes (KnowledgeBase service) although --host lets other machines in; there is no authentication",
    "read_only": "take no writes even from this machine, from which a proxy's come too",
    "recall_share": "of the dense searches, made again exactly in the background to know their recall; 0 = none",
    "recall_target": "recall@10 that the index's candidates (ef) are adapted to hold",
    "shadow_share": "of the questions, answered in the background by a generation that is being built as well, to compare; 0 = none",
    "metrics_port": "Prometheus metrics over HTTP on the same host; 0 = off",
}

_SWITCH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
_WANTED = {  # of a variable of the environment, by its setting's type
    bool: "neither on (1, true, yes) nor off (0, false, no, or nothing)",
    int: "no whole number",
    float: "no number",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from openbook_server.config import ServerConfig

    parser.description = (
        "Serve a bundle, and a knowledge base where one is given, over gRPC (openbook.v1, health v1, reflection). "
        "Health says SERVING once every digest and golden vector matched. SIGTERM drains; a second signal, or one while it loads, stops "
        "at once."
    )
    parser.epilog = (
        "example: openbook serve bundle/ kb/ --port 50051 --metrics-port 9090\n"
        "Every flag but --profile can also be set in the environment: OPENBOOK_PORT, OPENBOOK_DEVICE, ...\n"
        "A flag wins over it, and it over the profile, of which nothing applies on another device than it was measured on.\n"
        "exit status: 0 after a drain or a stop while it loads, 130 (SIGINT) or 143 (SIGTERM) after a second signal, 1 when the server "
        "cannot start, 2 for wrong usage"
    )
    parser.add_argument("bundle", type=folder, metavar="BUNDLE", help="folder written by `openbook export`")
    parser.add_argument(
        "knowledge_base", nargs="?", type=named, metavar="KB", help="folder written by `openbook index`, or elasticsearch://HOST:PORT/ALIAS"
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="settings that `openbook tune` found good on this machine")
    defaults = {field.name: field.default for field in dataclasses.fields(ServerConfig)}
    for name, meaning in _FLAGS.items():
        kind = type(defaults[name])
        if kind is bool:
            parser.add_argument(_flag(name), action="store_true", default=None, help=meaning)
            continue
        shown = f" (default: {defaults[name]})" if defaults[name] != "" else ""
        parser.add_argument(_flag(name), type=kind, metavar=kind.__name__.upper(), help=meaning + shown)


def run(arguments: argparse.Namespace) -> int:
    from openbook_server.errors import InvalidRequest, OpenBookError
    from openbook_server.hosting import set_up_process

    set_up_process()
    try:
        config = _config(arguments)
    except OpenBookError as error:
        return _failed(error, 2 if isinstance(error, InvalidRequest) else 1)
    try:
        if config.frontends:
            from openbook_server.frontends.supervisor import supervise

            return asyncio.run(supervise(arguments.bundle, arguments.knowledge_base, config))
        from openbook_server.serving import serve_until_stopped

        asyncio.run(serve_until_stopped(arguments.bundle, arguments.knowledge_base, config))
    except OpenBookError as error:
        return _failed(error, 1)
    return 0


def _failed(error: OpenBookError, status: int) -> int:
    print(f"openbook serve: {error}", file=sys.stderr)
    return status


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _config(arguments: argparse.Namespace) -> ServerConfig:
    """Flag before environment before profile before default.

    Raises:
        InvalidRequest: a value is outside its range, an environment variable is not of its type, or the profile is none; it names
            where the value came from.
        BundleInvalid: what the profile was measured with cannot be compared with the bundle, which is none.
    """
    from openbook_server.config import ServerConfig
    from openbook_server.errors import InvalidRequest

    values: dict[str, Any] = {}
    sources: dict[str, str] = {}  # of values that no flag gave, by the flags that errors name
    for name in _FLAGS:
        variable = "OPENBOOK_" + name.upper()
        given = getattr(arguments, name)
        if given is None and variable in os.environ:
            kind = type(getattr(ServerConfig(), name))
            try:
                given = _SWITCH[os.environ[variable].lower()] if kind is bool else kind(os.environ[variable])
            except (ValueError, KeyError) as error:
                raise InvalidRequest(variable, f"{os.environ[variable]!r} is {_WANTED[kind]}") from error
            sources[_flag(name)] = variable
        if given is not None:
            values[name] = given
    if arguments.profile:
        profile = _of_profile(arguments.profile, arguments.bundle, values.get("device"))
        sources |= {_flag(name): f"{arguments.profile}, {name}" for name in profile.keys() - values.keys()}
        values = profile | values
    try:
        return ServerConfig(**values)
    except InvalidRequest as error:
        raise InvalidRequest(sources.get(error.field, error.field), error.description) from error


def _of_profile(file: Path, bundle: Path, device: str | None) -> dict[str, Any]:
    """The settings of a profile; none where a `device` is given that they were not measured on, which would be slow or refused there.

    Says on standard error when that is so, and when the number of cores or the bundle is another one.
    """
    from openbook_server.bundle import read_manifest
    from openbook_server.profiles import read_profile
    from openbook_server.runtime import cores

    profile = read_profile(file)
    measured_on = profile.settings.get("device", device)
    if device not in (None, measured_on):
        print(f"openbook serve: {file} was measured on {measured_on}, not on {device}; none of its settings apply", file=sys.stderr)
        return {}
    others = []
    if profile.cores not in (None, cores()):
        others.append(f"{profile.cores} cores, of which there are {cores()} here")
    if profile.bundle_id is not None and profile.bundle_id != read_manifest(bundle)["id"]:
        others.append("another bundle")
    if others:
        again = f"`openbook tune {bundle} --out {file}` measures again"
        print(f"openbook serve: {file} was measured with {', and with '.join(others)}; {again}", file=sys.stderr)
    return dict(profile.settings)
