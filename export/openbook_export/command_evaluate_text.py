"""The targets of `openbook evaluate` that are measured by the text they write: language models and generators."""

from __future__ import annotations

import argparse
from typing import Any

from openbook_export.command import natural, positive


def add_language_model(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Perplexity of TEXT in PyTorch, on identical stretches: the model alone, with passages retrieved from the memory, with kNN-LM\n"
        "(Khandelwal et al. 2020; its datastore is the memory), and with both. 95 % bootstrap intervals; ratios to alone are paired.\n"
        "Passages that hold the stretch that is predicted are left out."
    )
    parser.epilog = (
        "TEXT and the memories are .txt (a line a row), .csv, .jsonl, or NAME:SPLIT of a Hugging Face dataset.\n"
        "example: openbook evaluate language-model runs/causal_lm/best test.txt --memory valid.txt --stretches 500\n"
        "exit status: 0 measured; 1 failed; 2 wrong usage"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder that `openbook train causal_lm` wrote, or a GPT-2")
    parser.add_argument("data", metavar="TEXT", help="what is predicted")
    parser.add_argument("--memory", metavar="TEXT", required=True, help="passages and the datastore are made of it")
    parser.add_argument("--tune", metavar="TEXT", default="", help="chooses lambda and temperature (default: the memory's last tenth)")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column of the texts (default: %(default)s)")
    parser.add_argument("--neighbours", type=positive, default=256, metavar="K", help="contexts it reads (default: %(default)s)")
    parser.add_argument("--stretches", type=natural, default=0, metavar="N", help="at most N of TEXT, evenly spread (default: all)")


def language_model(arguments: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from rich.console import Console

    from openbook_export.language_model_scores import Texts, measure_language_model, perplexity_table

    texts = Texts(measured=arguments.data, memory=arguments.memory, tuned=arguments.tune, column=arguments.text_column)
    result = measure_language_model(
        arguments.checkpoint, texts, neighbours_read=arguments.neighbours, limit=arguments.stretches, console=Console(stderr=True)
    )
    named = {"benchmark": arguments.benchmark, "checkpoint": arguments.checkpoint, "data": arguments.data, "memory": arguments.memory}
    return perplexity_table(result), named | {"tuned_on": arguments.tune, "neighbours": arguments.neighbours} | result, 0


def add_generator(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Answer questions in PyTorch from the passages that retrieval returns: EM and F1 with 95 % bootstrap intervals, and the paired\n"
        "difference to the baseline, which is the same model without passages (closed-book)."
    )
    parser.epilog = (
        "example: openbook evaluate generator runs/generator/best data/squad_open --questions 500\n"
        "exit status: 0 measured; 1 failed; 2 wrong usage"
    )
    parser.add_argument("checkpoint", metavar="FOLDER", help="what `openbook train generator` wrote")
    parser.add_argument("data", metavar="DATA", help="folder in BEIR's layout with answers, or a SQuAD-shaped .json or .jsonl file")
    parser.add_argument("--questions", type=natural, default=0, metavar="N", help="at most N questions, evenly spread (default: all)")


def generator(arguments: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from rich.console import Console

    from openbook_export.checkpoint_scores import table
    from openbook_export.generator_scores import measure_generator

    result = measure_generator(arguments.checkpoint, arguments.data, limit=arguments.questions, console=Console(stderr=True))
    named = {"benchmark": arguments.benchmark, "checkpoint": arguments.checkpoint, "data": arguments.data}
    return table(result), named | result, 0
