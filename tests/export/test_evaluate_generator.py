"""`openbook evaluate generator` as its user runs it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from openbook_export.command_evaluate import add_arguments, run
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.generator import AnswerEncoder, GeneratorSettings, answer_all, build_generator, save_generator
from openbook_training.squad import answer_scores

WORDS = "red blue green one two three city river king book".split()


def evaluate(*arguments: object) -> int:
    parser = argparse.ArgumentParser(prog="openbook evaluate")
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def test_answers_beside_passages_are_compared_with_the_closed_book_ones(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    settings = GeneratorSettings(passages=2, max_tokens=32, max_answer_tokens=4, embedder=str(tiny_checkpoint))
    encoder = AnswerEncoder(checkpoint, max_tokens=32, max_answer_tokens=4)
    torch.manual_seed(0)
    model = build_generator(checkpoint, encoder, dropout=0.0).eval()
    save_generator(model, encoder, settings, tmp_path / "model")
    asked = [(f"what was {WORDS[n % 10]} {n} ?", f"the {WORDS[n]} of {WORDS[n - 3]}") for n in range(8)]
    closed = answer_all(model, encoder, [(text, []) for text, _ in asked], settings, torch.device("cpu"))
    rows = [
        {"id": f"q{n}", "question": text, "context": context, "answers": [closed[n] if n % 2 and closed[n] else "nothing"]}
        for n, (text, context) in enumerate(asked)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert evaluate("generator", tmp_path / "model", tmp_path / "questions.jsonl") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["questions"], report["passages"], report["retrieved"]) == (8, 8, 2)
    expected = answer_scores(closed, [row["answers"] for row in rows])  # type: ignore[misc]
    assert report["baseline"]["em"]["mean"] == pytest.approx(100 * float(np.mean(expected["em"])))
    assert set(report["metrics"]) == set(report["difference"]) == {"em", "f1"}


def test_a_folder_without_a_generator_is_one_line_on_stderr(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("generator", tiny_checkpoint, "data") == 1
    assert "generator.json cannot be read" in capsys.readouterr().err
