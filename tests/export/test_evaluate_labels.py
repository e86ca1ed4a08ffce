"""`openbook evaluate classifier` and `verification`: what training reported comes again, differences are paired, mistakes are explained."""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openbook_export.command_evaluate import add_arguments, run
from openbook_export.label_scores import compared_readings
from openbook_training.bootstrap import RESAMPLES, SEED
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.config import LoopConfig
from openbook_training.heads import RowEncoder, load_head_model
from openbook_training.metrics import label_metrics
from openbook_training.negatives import embed
from openbook_training.tasks.classifier import ClassifierConfig, ClassifierTask
from openbook_training.tasks.labels import LabelTask
from openbook_training.tasks.verification import VerificationConfig, VerificationTask
from rich.console import Console

WORDS = "red blue green one two three city river king book".split()
WHATS = ("accuracy", "macro_f1", "calibration_error")


def evaluate(*arguments: object) -> int:
    parser = argparse.ArgumentParser(prog="openbook evaluate")
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def reported(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The last line of the output."""
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


def labelled(file: Path, count: int, seed: int, labels: list[str], *, text: str, label: str) -> Path:
    """Random words, whose first one is a weak hint at the label, with other words for evidence."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        words = rng.choices(WORDS, k=6)
        place = rng.choice([WORDS.index(words[0]) % len(labels), number % len(labels)])
        rows.append({text: " ".join([*words, str(number + 100 * seed)]), label: labels[place], "evidence": rng.choices(WORDS, k=3)})
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


@pytest.fixture
def shelves(tmp_path: Path) -> tuple[Path, Path]:
    """Texts to measure and a memory, in the columns that the tiny classifier's folder states."""
    made = {
        name: labelled(tmp_path / f"{name}.jsonl", count, seed, ["cold", "leafy", "warm"], text="text", label="shelf")
        for name, count, seed in (("texts", 30, 1), ("memory", 40, 2))
    }
    return made["texts"], made["memory"]


@pytest.mark.parametrize("objective", ["classifier", "verification"])
def test_what_a_run_leaves_is_measured_as_its_training_reports_it(
    tiny_checkpoint: Path, tmp_path: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten shots of two columns with names of their own: the folder says how the memory was drawn and where texts and labels stand."""
    train, dev = (labelled(tmp_path / f"{n}.jsonl", n, n, ["x", "y", "z"], text="words", label="kind") for n in (60, 33))
    shared: Any = {"checkpoint": str(tiny_checkpoint), "train": str(train), "dev": str(dev), "output": str(tmp_path / "run")}
    shared |= {"text_column": "words", "label_column": "kind", "shots": 10, "held_out": 9, "lora_rank": 2, "lora_alpha": 2}
    shared["loop"] = LoopConfig(precision="fp32", seed=7)
    task: LabelTask
    if objective == "classifier":
        task = ClassifierTask(ClassifierConfig(max_tokens=24, neighbours=4, **shared), Console(file=io.StringIO()))
    else:
        task = VerificationTask(VerificationConfig(max_tokens=32, **shared), Console(file=io.StringIO()))
    torch.manual_seed(1)
    for parameter in task.model.parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
            parameter.data = parameter.data.half().float()  # as the adapter is kept
    with torch.inference_mode():
        expected = task.evaluate(task.model.eval())
    task.save(task.model, tmp_path / "best")
    memory = ["--memory", train] if objective == "classifier" else []
    assert evaluate(objective, tiny_checkpoint, dev, "--task", tmp_path / "best", *memory) == 0
    metrics = reported(capsys)["metrics"]
    readings = {"classifier": ("alone", "model", "knn", "combined"), "verification": ("claim_only", "model", "retrieved")}[objective]
    reported_by_training = {f"{reading}/{what}": f"dev_{reading}_{what}" for reading in readings for what in WHATS}
    if objective == "verification":
        reported_by_training |= {f"evidence/{which}@5": f"evidence/dev_{which}@5" for which in ("all", "any")}
    assert set(metrics) == set(reported_by_training)
    for name, found in metrics.items():
        assert found["mean"] == pytest.approx(expected[reported_by_training[name]], abs=1e-3)


def test_four_readings_are_those_of_the_formula(
    tiny_checkpoint: Path, tiny_heads: dict[str, Path], shelves: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, memory = shelves
    out = tmp_path / "report.json"
    arguments = ["classifier", tiny_checkpoint, texts, "--task", tiny_heads["topics"], "--memory", memory, "--texts", 15, "--json", out]
    assert evaluate(*arguments) == 0
    report = reported(capsys)
    assert report == json.loads(out.read_text())
    assert (report["texts"], report["memory_texts"], report["neighbours"], report["main"]) == (15, 40, 5, "combined")
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    model, settings = load_head_model(checkpoint, tiny_heads["topics"])
    rows, known = ([json.loads(line) for line in file.read_text().splitlines()] for file in (texts, memory))
    rows = rows[::2]
    vectors, remembered = (embed(checkpoint, [row["text"] for row in part]).astype(float) for part in (rows, known))
    encoder = RowEncoder(checkpoint, max_tokens=24)
    labels, head = settings["labels"], model.head
    readings: dict[str, list[list[float]]] = {name: [] for name in ("alone", "model", "knn", "combined")}
    with torch.inference_mode():
        for row, vector in zip(rows, vectors, strict=True):
            alone = model(encoder.batch(encoder.rows([(row["text"], "")]), torch.device("cpu"))).exp()[0].tolist()
            near = sorted(((float(vector @ other), labels.index(of["shelf"])) for other, of in zip(remembered, known, strict=True)))[-5:]
            weights = [math.exp(score / float(head.log_temperature.exp())) for score in [float(head.null_score), *(s for s, _ in near)]]
            model_says = [weights[0] / sum(weights) * p for p in alone]
            votes, knn = [math.exp(score / 0.1) for score, _ in near], [0.0] * 3
            for (_, label), weight, vote in zip(near, weights[1:], votes, strict=True):
                shifted = [p * math.exp(float(shift)) for p, shift in zip(alone, head.shift[label], strict=True)]
                model_says = [p + weight / sum(weights) * q / sum(shifted) for p, q in zip(model_says, shifted, strict=True)]
                knn[label] += vote / sum(votes)
            combined = [0.6 * p + 0.4 * q for p, q in zip(model_says, knn, strict=True)]
            for name, values in (("alone", alone), ("model", model_says), ("knn", knn), ("combined", combined)):
                readings[name].append(values)
    gold = np.array([labels.index(row["shelf"]) for row in rows])
    for name, probabilities in readings.items():
        expected = label_metrics(np.array(probabilities), gold)
        assert {what: report["metrics"][f"{name}/{what}"]["mean"] for what in WHATS} == pytest.approx(expected, abs=1e-3)
    assert len({report["metrics"][f"{name}/calibration_error"]["mean"] for name in readings}) == 4  # they do differ


def test_differences_to_the_main_reading_are_paired_and_a_lower_calibration_error_is_better() -> None:
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 3, 60)
    sure = 0.8 * np.eye(3)[np.where(rng.random(60) < 0.8, gold, (gold + 1) % 3)] + 0.2 / 3
    readings = {"other": rng.dirichlet([1.0] * 3, 60), "main": sure}
    report = compared_readings(readings, gold, "main")
    assert [name for name in report["metrics"] if name.endswith("macro_f1")] == ["main/macro_f1", "other/macro_f1"]
    assert set(report["difference"]) == set(report["baseline"]) == {f"other/{what}" for what in WHATS}
    drawn_by, resamples = np.random.default_rng(SEED), []
    for _ in range(RESAMPLES):
        drawn = drawn_by.integers(60, size=60)
        of = {name: label_metrics(probabilities[drawn], gold[drawn]) for name, probabilities in readings.items()}
        resamples.append([of["other"][what] - of["main"][what] for what in WHATS])
    for what, changes in zip(WHATS, zip(*resamples, strict=True), strict=True):
        difference, ordered = report["difference"][f"other/{what}"], sorted(changes)
        own, main = (report["metrics"][f"{name}/{what}"]["mean"] for name in ("other", "main"))
        assert difference["mean"] == pytest.approx(own - main)
        assert ordered[24] <= difference["low"] <= ordered[25]
        assert ordered[974] <= difference["high"] <= ordered[975]
        beaten = [change < 0 if what == "calibration_error" else change > 0 for change in changes]
        assert difference["better"] == pytest.approx(np.mean(beaten), abs=0.01)
        assert report["baseline"][f"other/{what}"] == report["metrics"][f"main/{what}"]


def test_rows_that_cannot_be_used_are_named_counted_and_left_out(
    tiny_checkpoint: Path, tiny_heads: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "claims.csv"
    file.write_text("claim,evidence,label\nred king,a river,yes\nblue,it is,perhaps\none,,no\ntwo,a book,no\n")
    assert evaluate("verification", tiny_checkpoint, file, "--task", tiny_heads["claims"]) == 0
    output, said = capsys.readouterr()
    report = json.loads(output.splitlines()[-1])
    assert (report["texts"], report["left_out"], report["main"]) == (2, 2, "claim_only")
    assert "line 3: label 'perhaps' is none of the 2 that the training data have: no, yes" in said
    assert "line 4: 'evidence' is empty" in said
    lines = output.splitlines()
    readings = [f"{name}/{what}" for what in WHATS for name in ("claim_only", "model", "retrieved")]
    assert [line.split()[0] for line in lines[1:-1]] == [*readings, "evidence/all@5", "evidence/any@5"]


def test_claims_are_read_beside_what_is_found_in_all_evidence_of_the_file_or_in_a_corpus(
    tiny_checkpoint: Path, tiny_heads: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two passages a claim, as the folder states; of the claims every third is measured."""
    folder = Path(shutil.copytree(tiny_heads["claims"], tmp_path / "claims"))
    stated = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(stated | {"passages": 2}))
    file = labelled(tmp_path / "claims.jsonl", 30, 3, stated["labels"], text="claim", label="label")
    texts = tmp_path / "texts.txt"
    texts.write_text("the red king\nby the river\nit is a book\n")
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    model, _ = load_head_model(checkpoint, folder)
    encoder = RowEncoder(checkpoint, max_tokens=stated["max_tokens"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for corpus in ([], ["--corpus", texts]):
        assert evaluate("verification", tiny_checkpoint, file, "--task", folder, "--texts", 10, *corpus) == 0
        report = reported(capsys)
        pool = texts.read_text().splitlines() if corpus else sorted({word for row in rows for word in row["evidence"]})
        assert (report["texts"], report["passages"], report["corpus_passages"]) == (10, 2, len(pool))
        vectors, probabilities, shares = dict(zip(pool, embed(checkpoint, pool), strict=True)), [], []
        for row in rows[::3]:
            [vector] = embed(checkpoint, [row["claim"]])
            best = sorted(pool, key=lambda text: -float(vectors[text] @ vector))[:2]
            with torch.inference_mode():
                read = model(encoder.batch(encoder.rows([(row["claim"], " ".join(best))]), torch.device("cpu")))
            probabilities.append(read.exp()[0].tolist())
            shares.append(np.mean([any(wanted in text for text in best) for wanted in row["evidence"]]))
        expected = label_metrics(np.array(probabilities), np.array([stated["labels"].index(row["label"]) for row in rows[::3]]))
        metrics = {name: value["mean"] for name, value in report["metrics"].items()}
        assert {what: metrics[f"retrieved/{what}"] for what in WHATS} == pytest.approx(expected, abs=1e-3)
        assert metrics["evidence/all@2"] == pytest.approx(100 * np.mean([share == 1 for share in shares]))
        assert metrics["evidence/any@2"] == pytest.approx(100 * np.mean([share > 0 for share in shares]))
        gained = report["difference"]["retrieved/accuracy"]["mean"]
        assert gained == pytest.approx(metrics["retrieved/accuracy"] - metrics["claim_only/accuracy"])
    (folder / "task.json").write_text(json.dumps(stated | {"passages": 0}))
    assert evaluate("verification", tiny_checkpoint, file, "--task", folder) == 1
    assert "'passages' is 0; wanted is a whole number, 1 or above" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("objective", "file", "task", "more", "message"),
    [
        ("classifier", "TEXTS", "topics", [], "reads each text beside 5 labelled neighbours, and no memory is given .* with --memory FILE"),
        ("classifier", "TEXTS", "topics", ["--memory", "TEXTS"], "each of its 30 texts is in the memory .* too"),
        ("classifier", "TEXTS", "topics", ["--memory", "absent.csv"], "absent.csv' does not exist"),
        (
            "classifier",
            "TEXTS",
            "claims",
            [],
            "objective 'verification', wanted .*openbook train classifier.*`openbook evaluate verification`",
        ),
        ("classifier", "TEXTS", "words", [], "objective 'vocab_head', wanted .* name another folder"),
        ("verification", "TEXTS", "topics", [], "objective 'classifier', wanted .*openbook train verification"),
        ("classifier", "TEXTS", "absent", [], "holds no task.json"),
        ("verification", "TEXTS", "claims", [], "no usable row in it.*no column 'claim', only evidence, shelf, text"),
        (
            "classifier",
            "WRONG",
            "topics",
            ["--memory", "TEXTS"],
            "no usable row in it.*label 'tepid' is none of the 3 .*: cold, leafy, warm",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    tiny_checkpoint: Path,
    tiny_heads: dict[str, Path],
    shelves: tuple[Path, Path],
    tmp_path: Path,
    objective: str,
    file: str,
    task: str,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("text,shelf\nred king,tepid\n")
    known = {"TEXTS": shelves[0], "WRONG": wrong}
    task_folder = tiny_heads.get(task, tmp_path / task)
    assert evaluate(objective, tiny_checkpoint, known[file], "--task", task_folder, *(known.get(part, part) for part in more)) == 1
    output, errors = capsys.readouterr()
    assert not output
    last = errors.splitlines()[-1]
    assert last.startswith("openbook evaluate: ")
    assert re.search(message, last), last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_column": 3}, "'text_column' is 3, no name"),
        ({"shots": -1}, "'shots' is -1; wanted is a whole number, 0 or above"),
        ({"mixture": None}, "task.json states mixture None"),
        ({"max_tokens": None}, "'max_tokens' is None"),
    ],
)
def test_a_folder_that_states_nonsense_is_refused(
    tiny_checkpoint: Path,
    tiny_heads: dict[str, Path],
    shelves: tuple[Path, Path],
    tmp_path: Path,
    change: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(tiny_heads["topics"], tmp_path / "topics"))
    stated = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(stated | change))
    assert evaluate("classifier", tiny_checkpoint, shelves[0], "--task", folder, "--memory", shelves[1]) == 1
    assert message in capsys.readouterr().err


def test_the_memory_holds_as_many_texts_of_each_label_as_are_asked_for(
    tiny_checkpoint: Path, tiny_heads: dict[str, Path], shelves: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    texts, memory = shelves
    assert evaluate("classifier", tiny_checkpoint, texts, "--task", tiny_heads["topics"], "--memory", memory, "--shots", 4) == 0
    output, said = capsys.readouterr()
    report = json.loads(output.splitlines()[-1])
    assert (report["memory_texts"], report["shots"]) == (12, 4)
    assert "12 of 40 texts are the memory, 4 of each label" in said
