"""`openbook evaluate` of checkpoints, as its user runs it: tables, JSON, comparisons and refusals."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openbook_export.abstention import abstention_scores
from openbook_export.checkpoint_scores import compared, table
from openbook_export.command_evaluate import add_arguments, run
from openbook_export.models import load_reader
from openbook_export.quality import pair_encoder, pytorch_predictions, pytorch_scores
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.negatives import embed
from openbook_training.retrieval_metrics import score_retrieval
from openbook_training.retriever import build_retriever, save_retriever
from openbook_training.squad import f1, load_questions

WORDS = "red blue green one two three city river king book".split()


def evaluate(*arguments: object) -> int:
    parser = argparse.ArgumentParser(prog="openbook evaluate")
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def reported(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The last line of the output."""
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


@pytest.fixture
def questions_file(tmp_path: Path) -> Path:
    rows = [
        {
            "id": f"q{n}",
            "question": f"what was {WORDS[n % 10]} ?",
            "context": f"the {WORDS[n % 10]} of {WORDS[n % 7]}",
            "answers": [WORDS[n % 7]],
        }
        for n in range(12)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "questions.jsonl"


def test_a_retriever_is_measured_against_the_untouched_checkpoint(
    tiny_checkpoint: Path, questions_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    model = build_retriever(checkpoint, lora_rank=2, lora_alpha=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    save_retriever(model, tmp_path / "best", checkpoint, [32, 8])
    out = tmp_path / "report.json"
    arguments = ["retriever", tiny_checkpoint, questions_file, "--embedder", tmp_path / "best", "--json", out, "--baseline"]
    assert evaluate(*arguments) == 0
    report = reported(capsys)
    assert report == json.loads(out.read_text())
    assert (report["questions"], report["passages"], report["baseline_adapter"]) == (12, 12, "")
    names = {"recall@1", "recall@5", "recall@20", "mrr", "ndcg@10"}
    hits = {f"answer-hit@{depth}" for depth in (1, 5, 20)}
    assert set(report["metrics"]) == names | hits | {f"dim8/{name}" for name in names}
    questions = load_questions(str(questions_file))
    passages, asked = embed(checkpoint, [q.context for q in questions]), embed(checkpoint, [q.text for q in questions])
    expected = score_retrieval(asked, passages, [{row: 1.0} for row in range(12)])
    for name in names:
        assert report["baseline"][name]["mean"] == pytest.approx(100 * float(expected[name].mean()))
        change = report["metrics"][name]["mean"] - report["baseline"][name]["mean"]
        assert report["difference"][name]["mean"] == pytest.approx(change)
        assert report["metrics"][name]["low"] <= report["metrics"][name]["mean"] <= report["metrics"][name]["high"]


def test_a_reader_is_measured_on_spread_questions_as_the_export_measures_it(
    tiny_checkpoint: Path, tiny_reader: Path, questions_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("reader", tiny_checkpoint, questions_file, "--reader", tiny_reader, "--questions", 6, "--baseline", tiny_reader) == 0
    report = reported(capsys)
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    reader = load_reader(checkpoint, tiny_reader)
    expected = pytorch_scores(reader, pair_encoder(checkpoint, reader), load_questions(str(questions_file))[::2])
    assert report["questions"] == 6
    assert {name: found["mean"] for name, found in report["metrics"].items()} == pytest.approx(expected)
    assert report["difference"]["f1"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "better": 0.5}


def test_a_reader_is_measured_on_questions_without_an_answer(
    tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "id": str(n),
            "question": "what was red ?",
            "context": f"the {word} of {WORDS[n % 4]}",
            "answers": {"text": [word] if n % 3 else []},
        }
        for n, word in enumerate(WORDS)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert evaluate("reader", tiny_checkpoint, file, "--reader", tiny_reader) == 0
    report = reported(capsys)
    assert (report["questions"], report["answerable"]) == (10, 6)
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    reader, questions = load_reader(checkpoint, tiny_reader), load_questions(str(file))
    predictions = pytorch_predictions(reader, pair_encoder(checkpoint, reader), questions)
    asked = [(one.text, question.answers) for one, question in zip(predictions, questions, strict=True) if question.answers]
    means = {name: found["mean"] for name, found in report["metrics"].items()}
    assert means["f1"] == pytest.approx(100 * sum(f1(*one) for one in asked) / len(asked))
    expected = abstention_scores(predictions, questions, reader.null_bias)
    assert means == pytest.approx(means | {name: 100 * float(values.mean()) for name, values in expected.items()})
    assert set(means) == {"em", "f1", *expected}

    file.write_text(json.dumps(rows[0]))
    assert evaluate("reader", tiny_checkpoint, file, "--reader", tiny_reader) == 1
    assert "none of 1 questions has an accepted answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retriever", "/absent", "data"], "no such folder"),
        (["retriever", "CHECKPOINT", "absent.jsonl"], "absent.jsonl' does not exist"),
        (["retriever", "CHECKPOINT", "QUESTIONS", "--embedder", "/absent"], "--embedder /absent: no such folder"),
        (["reader", "CHECKPOINT", "QUESTIONS", "--reader", "/absent"], "--reader /absent: no such folder"),
        (["retriever", "CHECKPOINT", "QUESTIONS", "--baseline", "/absent"], "--baseline /absent: no such folder"),
        (["reader", "CHECKPOINT", "QUESTIONS", "--reader", "READER", "--baseline", "/absent"], "--baseline /absent: no such folder"),
        (["squad-open", "/absent"], "qrels"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    tiny_checkpoint: Path,
    tiny_reader: Path,
    questions_file: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {"CHECKPOINT": tiny_checkpoint, "QUESTIONS": questions_file, "READER": tiny_reader}
    assert evaluate(*(known.get(argument, argument) for argument in arguments)) == 1
    output, errors = capsys.readouterr()
    assert not output
    assert errors.startswith("openbook evaluate: ")
    assert message in errors


def test_a_table_has_a_line_a_metric_and_leaves_blank_what_cannot_be_compared() -> None:
    rng = np.random.default_rng(0)
    scores = {"mrr": rng.random(50), "dim8/mrr": rng.random(50)}
    alone = table(compared(scores)).splitlines()
    assert [line.split()[0] for line in alone[1:]] == ["mrr", "dim8/mrr"]
    against = table(compared(scores, {"mrr": scores["mrr"] - 0.1})).splitlines()
    assert "+10.0" in against[1]
    assert against[1].endswith("100.0 %")
    assert len(against[2].split()) == 5  # its own interval, nothing beside it
