"""The `openbook` command: finds the subcommand's module, and turns what can go wrong around it into one line.

A module is imported only when its subcommand is asked for. Each has `add_arguments(parser)` and `run(arguments) -> int`
and imports nothing heavy before `run`, so that every `--help` works on the base install.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO, cast

from openbook import __version__


@dataclass(frozen=True, slots=True)
class Subcommand:
    module: str
    meaning: str
    extra: str  # that brings what the module imports; empty for the base install


SUBCOMMANDS = {
    "train": Subcommand("openbook_training.command", "train or fine-tune a model of the system", "training"),
    "export": Subcommand("openbook_export.command", "turn a checkpoint into a bundle of verified ONNX graphs", "server,export"),
    "index": Subcommand("openbook_server.command_index", "put documents into a knowledge base", "server"),
    "generations": Subcommand("openbook_server.command_generations", "replace a knowledge base's embedder, and take it back", "server"),
    "upsert": Subcommand("openbook_server.command_upsert", "put documents into the knowledge base of a running server", "server"),
    "delete": Subcommand("openbook.command_delete", "take documents out of the knowledge base of a running server", ""),
    "serve": Subcommand("openbook_server.command_serve", "answer over gRPC from a bundle and a knowledge base", "server"),
    "tune": Subcommand("openbook_server.command_tune", "find the settings that serve a bundle best on this machine", "server"),
    "ask": Subcommand("openbook.command_ask", "ask a server a question, or a file of questions", ""),
    "search": Subcommand("openbook.command_search", "find the passages for a question", ""),
    "classify": Subcommand("openbook.command_classify", "label texts, or check claims", ""),
    "generate": Subcommand("openbook.command_generate", "let a model write after a prompt, or of a question", ""),
    "embed": Subcommand("openbook.command_embed", "turn texts into vectors", ""),
    "evaluate": Subcommand("openbook_export.command_evaluate", "measure a server or a checkpoint on known answers", "server,export"),
    "info": Subcommand("openbook_server.command_info", "say what a bundle, a knowledge base or a server is", "server"),
}
_EXTRAS = {"datasets": "datasets", "pyarrow": "datasets"}  # modules that another extra than the subcommand's own brings
# Installed, they take the place of what `server` brings: a second onnxruntime would overwrite the first.
SERVER_EXTRAS = {"onnxruntime-gpu": "server-gpu", "onnxruntime-openvino": "server-openvino"}
_INTERRUPTED, _DEFECT = 130, 70


class _Parser(argparse.ArgumentParser):
    """Takes a subcommand's options before, between and after its positional arguments, and tells what it does not know under the usage of
    that subcommand. (argparse by itself takes optional positional arguments only beside the first ones.)"""

    _begun = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._begun or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._begun = True  # mixing calls this method for either kind
        # What follows a `--` is positional, which mixing forgets.
        parsed, unknown = (super().parse_known_args if "--" in args else self.parse_known_intermixed_args)(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


class _Unwritable(OSError):
    """Standard output takes no more."""


class _Output:
    """Standard output, whose errors say that they are its own: a subcommand writes files as well. Characters that its encoding lacks are
    written as escapes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _told():
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:  # before any of it was written
                encoding = self._stream.encoding
                return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        with _told():
            self._stream.flush()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _Unwritable(f"standard output cannot be written: {error.strerror or error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    name, output, parsed = "", sys.stdout, argparse.Namespace()
    try:
        for stream in ("stdout", "stderr"):
            if getattr(sys, stream) is None:  # closed by whoever started us, who wants none of it
                setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
        sys.stdout = cast(TextIO, _Output(sys.stdout))
        # gRPC's core would log, in its own words, failures that are reported below.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        # numpy's threads spin for 20 ms after each product, on the cores that hnswlib and onnxruntime share the work of; our products
        # are small. To be set before numpy is imported.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        arguments = list(sys.argv[1:] if argv is None else argv)
        name = next((word for word in arguments if not word.startswith("-")), "")
        parsed = _parsed(name, arguments)
        status: int = parsed.run(parsed)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        return _missing(name, error, parsed)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away; so do we, quietly
        _drop_output()
        return 0
    except _Unwritable as error:
        print(f"openbook {name}: {error}", file=sys.stderr)
        _drop_output()
        return 1
    except Exception as error:
        if os.environ.get("OPENBOOK_TRACEBACK"):
            raise
        print(f"openbook {name}: {type(error).__name__}: {error} (OPENBOOK_TRACEBACK=1 shows where)", file=sys.stderr)
        return _DEFECT
    finally:
        sys.stdout = output
    return status


def _parsed(name: str, arguments: list[str]) -> argparse.Namespace:
    """The arguments of the subcommand of that name, and as `run` what does it; raises what its module does when it is imported."""
    parser = _Parser(
        prog="openbook",
        description="Answers from your documents: train, export, index, serve, ask.",
        epilog="`openbook SUBCOMMAND --help` is the manual of each.  First steps: export, index, serve, ask.",
    )
    parser.add_argument("--version", action="version", version=f"openbook {__version__}")
    subparsers = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    for known, subcommand in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(known, help=subcommand.meaning, formatter_class=argparse.RawDescriptionHelpFormatter)
        if known == name:
            module = importlib.import_module(subcommand.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run, extra=subcommand.extra)  # which a target of it may set otherwise
    return parser.parse_args(arguments)


def _drop_output() -> None:
    """Have what could not be written go nowhere, or the interpreter would try again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _missing(name: str, error: ModuleNotFoundError, parsed: argparse.Namespace) -> int:
    module = (error.name or "").partition(".")[0]
    needed = getattr(parsed, "extra", SUBCOMMANDS[name].extra if name in SUBCOMMANDS else "")
    extra = _EXTRAS.get(module, needed)
    if not extra:
        raise error
    from importlib.metadata import distributions  # here: it takes as long to import as all the rest of this module

    for distribution, server in SERVER_EXTRAS.items():
        if list(distributions(name=distribution)):
            extra = extra.replace("server", server)
    print(f"openbook {name} needs {module}, which is not installed; in a clone of openbook: pip install '.[{extra}]'", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
