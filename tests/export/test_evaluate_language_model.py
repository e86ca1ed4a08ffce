"""`openbook evaluate language-model` as its user runs it."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openbook_export.command_evaluate import add_arguments, run
from openbook_export.language_model_scores import _compared, perplexity_table
from openbook_training.language_model import Prompts, ReadingConfig, new_model, new_tokenizer, save_language_model

WORDS = "red blue green one two three city river king book".split()


def evaluate(*arguments: object) -> int:
    parser = argparse.ArgumentParser(prog="openbook evaluate")
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def text(file: Path, start: int, rows: int) -> Path:
    file.write_text("\n".join(" ".join(WORDS[(start + row + n * n) % 10] for n in range(12)) for row in range(rows)))
    return file


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A random one whose text has rules: neighbours know more than the model."""
    memory = text(tmp_path / "memory.txt", 0, 30)
    torch.manual_seed(0)
    prompts = Prompts(new_tokenizer(memory.read_text().splitlines(), 280))
    network = new_model(prompts.tokenizer, layers=1, dim=16, heads=2, positions=64, dropout=0.0)
    settings = ReadingConfig(stride_tokens=8, context_tokens=8, passage_tokens=16, query_tokens=8, embedder=str(tiny_checkpoint))
    save_language_model(network, prompts, settings, tmp_path / "model")
    return tmp_path / "model"


def test_every_reading_is_measured_on_the_same_stretches(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text(tmp_path / "test.txt", 3, 5)
    arguments = ["language-model", model, tmp_path / "test.txt", "--memory", tmp_path / "memory.txt", "--neighbours", 16, "--stretches", 8]
    assert evaluate(*arguments) == 0
    output = capsys.readouterr().out.splitlines()
    report: dict[str, Any] = json.loads(output[-1])
    assert list(report["readings"]) == ["alone", "alone+knn", "retrieval", "retrieval+knn"]
    assert [line.split()[0] for line in output[1:-1]] == list(report["readings"])
    assert (report["stretches"], report["tokens"]) == (8, 64)
    alone, knn = report["readings"]["alone"], report["readings"]["alone+knn"]
    assert knn["share"] > 0
    assert knn["perplexity"]["mean"] < alone["perplexity"]["mean"]
    for name, row in report["readings"].items():
        own = row["perplexity"]
        assert own["low"] <= own["mean"] <= own["high"]
        if name != "alone":
            assert row["ratio"]["mean"] == pytest.approx(own["mean"] / alone["perplexity"]["mean"])
    assert knn["better"] > 0.9


def test_alone_is_the_perplexity_of_the_model_in_transformers(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = text(tmp_path / "test.txt", 3, 5).read_text().splitlines()
    assert evaluate("language-model", model, tmp_path / "test.txt", "--memory", tmp_path / "memory.txt") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["readings"]["alone"]
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    ids = tokenizer("\n".join(lines))["input_ids"]
    surprises = []
    for start in range(0, len(ids) - 7, 8):
        row = [tokenizer.bos_token_id, *ids[max(0, start - 8) : start + 8]]
        with torch.no_grad():
            logits = network(torch.tensor([row])).logits[0].double().numpy()
        for t in range(len(row) - 8, len(row)):
            surprises.append(np.log(np.exp(logits[t - 1]).sum()) - logits[t - 1][row[t]])
    assert found["perplexity"]["mean"] == pytest.approx(math.exp(np.mean(surprises)), rel=1e-4)
    words = len(" ".join(lines).split()) * len(surprises) / len(ids)
    assert found["word_perplexity"] == pytest.approx(math.exp(sum(surprises) / words), rel=0.15)  # a word may end in the part left out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/absent", "TEST", "--memory", "MEMORY"], "no such folder"),
        (["MODEL", "/absent.txt", "--memory", "MEMORY"], "absent.txt' does not exist"),
        (["MODEL", "MEMORY", "--memory", "MEMORY"], "the memory is the text that is measured"),
        (["EMBEDDER", "TEST", "--memory", "MEMORY"], "neither a bos nor an eos token"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    model: Path, tiny_checkpoint: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known: dict[str, Path] = {"MODEL": model, "MEMORY": tmp_path / "memory.txt", "EMBEDDER": tiny_checkpoint}
    known["TEST"] = text(tmp_path / "test.txt", 3, 5)
    assert evaluate("language-model", *(known.get(argument, argument) for argument in arguments)) == 1
    output, errors = capsys.readouterr()
    assert not output
    assert errors.startswith("openbook evaluate: ")
    assert message in errors


def test_a_perplexity_beyond_all_numbers_is_null_and_blank() -> None:
    losses = {"alone": np.array([1.0, 2.0]), "retrieval": np.array([800.0, 900.0])}
    readings = _compared(losses, {}, 1.5)
    assert json.loads(json.dumps(readings, allow_nan=False))["retrieval"]["perplexity"]["mean"] is None
    assert readings["alone"]["perplexity"]["mean"] == pytest.approx(math.exp(1.5))
    assert "– to –" in perplexity_table({"readings": readings}).splitlines()[-1]
