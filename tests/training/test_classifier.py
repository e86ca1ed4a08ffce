"""Classifiers on a tiny checkpoint: neighbours, readings, a whole run that is stopped and resumed, and what is left of it."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import shutil
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.config import LoopConfig
from openbook_training.errors import CheckpointNotFound, InvalidConfig, InvalidData
from openbook_training.heads import RowEncoder, load_head_model
from openbook_training.labelled import Labelled
from openbook_training.negatives import embed
from openbook_training.objectives import NEGATIVE
from openbook_training.run import train
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.classifier import ClassifierConfig, ClassifierTask
from rich.console import Console

COLOURS = {"warm": ["red", "king", "city"], "cold": ["blue", "river", "two"], "leafy": ["green", "book", "three"]}


def quiet() -> Console:
    return Console(file=io.StringIO())


def write(file: Path, rows: int, seed: int) -> Path:
    """Texts of three labels that share some words and are told apart by others."""
    rng = random.Random(seed)
    lines = ["text,label"]
    for number in range(rows):
        label = list(COLOURS)[number % 3]
        words = [rng.choice(COLOURS[label]), *rng.sample(["the", "was", "of", "in", "case", "one"], 2), rng.choice(COLOURS[label])]
        lines.append(f"{' '.join(words)} {number},{label}")
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> ClassifierConfig:
    return config_in(tmp_path, tiny_checkpoint)


def config_in(folder: Path, checkpoint: Path) -> ClassifierConfig:
    return ClassifierConfig(
        output=str(folder / "run"),
        checkpoint=str(checkpoint),
        train=str(write(folder / "train.csv", 60, 1)),
        dev=str(write(folder / "dev.csv", 30, 2)),
        held_out=15,
        max_tokens=24,
        neighbours=5,
        lora_rank=2,
        lora_alpha=2,
        loop=LoopConfig(epochs=8, batch_examples=8, precision="fp32", learning_rate=3e-2, average_decay=0.9, evaluate_every_epochs=4),
    )


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ClassifierConfig, dict[str, float]]:
    """A finished run, and the metrics of its best epoch."""
    config = config_in(tmp_path_factory.mktemp("trained"), tiny_checkpoint)
    return config, train(OBJECTIVES["classifier"], config, resume=False, console=quiet())


def changed(config: ClassifierConfig, output: Path, **loop: object) -> ClassifierConfig:
    return dataclasses.replace(config, output=str(output), loop=dataclasses.replace(config.loop, **loop))  # type: ignore[arg-type]


def test_a_renamed_label_is_refused_on_resume_and_the_best_result_stays(config: ClassifierConfig, tmp_path: Path) -> None:
    config = changed(config, tmp_path / "run", epochs=1, evaluate_every_epochs=1)
    train(OBJECTIVES["classifier"], config, resume=False, console=quiet())
    best = {file.name: file.read_bytes() for file in (tmp_path / "run" / "best").iterdir()}
    data = Path(config.train)
    data.write_text(data.read_text().replace(",cold", ",zzz"))  # it sorts last, so every label's number is another one's
    longer = changed(config, tmp_path / "run", epochs=2, evaluate_every_epochs=1)
    with pytest.raises(InvalidData, match="labels, training texts, held-out texts changed since it began"):
        train(OBJECTIVES["classifier"], longer, resume=True, console=quiet())
    assert {file.name: file.read_bytes() for file in (tmp_path / "run" / "best").iterdir()} == best


def test_one_long_text_makes_the_others_no_longer() -> None:
    rows = [Labelled(place="", text=text, label="") for text in ["y" * 1_000_000, *(f"text {number}" for number in range(99))]]
    task: Any = SimpleNamespace(rows=rows, train=range(100), held_out=range(100, 100), dev=range(100, 100), gold=np.zeros(100, np.int64))
    tracemalloc.start()
    ClassifierTask._find(task, np.eye(100, dtype=np.float32), 5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000  # an array of texts of one width would take 400 MB


def test_a_training_text_sees_neither_itself_nor_its_words_elsewhere(config: ClassifierConfig, tmp_path: Path) -> None:
    file = Path(config.train)
    file.write_text(file.read_text() + "red king in case one,cold\nred king in case one,warm\n")
    task = ClassifierTask(dataclasses.replace(config, neighbours=99), quiet())
    vectors = embed(resolve_checkpoint(config.checkpoint), [row.text for row in task.rows])
    k = len(task.train) - 1
    for number in task.train:
        others = [z for z in task.train if task.rows[z].text != task.rows[number].text]
        expected = sorted((float(vectors[number] @ vectors[z]) for z in others), reverse=True)
        scores = task._neighbours.scores[number]
        assert scores[: len(expected)] == pytest.approx(expected, abs=1e-5)
        assert (scores[len(expected) :] == NEGATIVE).all()
    for number in task.dev:  # dev texts see training and held-out texts alike
        expected = sorted((float(vectors[number] @ vectors[z]) for z in range(task.dev.start)), reverse=True)[:k]
        assert task._neighbours.scores[number] == pytest.approx(expected, abs=1e-5)


def test_separable_texts_are_learned_and_every_reading_is_reported(trained: tuple[ClassifierConfig, dict[str, float]]) -> None:
    _, metrics = trained
    for name in ("held_out", "dev"):
        for reading in ("alone", "model", "knn", "combined"):
            for what in ("accuracy", "macro_f1", "calibration_error"):
                assert 0 <= metrics[f"{name}_{reading}_{what}"] <= 100
    assert metrics["dev_alone_accuracy"] >= 90
    assert metrics["dev_model_accuracy"] >= 90
    assert metrics["dev_combined_accuracy"] >= 90
    assert metrics["score"] == metrics["held_out_combined_accuracy"]
    assert 0 <= metrics["model_weight"] <= 1


def test_the_folder_that_is_left_gives_the_probabilities_that_were_reported(
    trained: tuple[ClassifierConfig, dict[str, float]],
) -> None:
    config, metrics = trained
    best = Path(config.output) / "best"
    assert {file.name for file in best.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", "task.json"}
    checkpoint = resolve_checkpoint(config.checkpoint)
    model, settings = load_head_model(checkpoint, best)
    task = ClassifierTask(config, quiet())
    with torch.inference_mode():
        alone = task.probabilities(model, task.dev, alone=True)
        latent = task.probabilities(model, task.dev, alone=False)
    assert 100 * (alone.argmax(1) == task.gold[task.dev]).mean() == pytest.approx(metrics["dev_alone_accuracy"])
    assert 100 * (latent.argmax(1) == task.gold[task.dev]).mean() == pytest.approx(metrics["dev_model_accuracy"])
    assert np.abs(alone - latent).max() > 1e-3  # neighbours do matter
    assert settings["labels"] == sorted(COLOURS)
    assert settings["mixture"] == {"weight": metrics["model_weight"], "temperature": metrics["knn_temperature"]}
    assert (settings["neighbours"], settings["label_column"]) == (5, "label")
    assert settings["base_digest"] == checkpoint.digest()


def losses(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_stopped_run_resumes_to_the_same_losses_and_metrics(
    config: ClassifierConfig, tmp_path: Path, killed_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    whole = changed(config, tmp_path / "whole", epochs=2)
    expected = train(OBJECTIVES["classifier"], whole, resume=False, console=quiet())
    halves = changed(config, tmp_path / "halves", epochs=2, checkpoint_minutes=0.0)

    with killed_after(8):
        train(OBJECTIVES["classifier"], halves, resume=False, console=quiet())
    assert train(OBJECTIVES["classifier"], halves, resume=True, console=quiet()) == pytest.approx(expected, rel=1e-4)
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert len(losses(tmp_path / "whole")) == 12


def test_bad_rows_are_named_and_the_run_goes_on_with_the_others(config: ClassifierConfig) -> None:
    for file, rows in ((config.train, "nothing,\n"), (config.dev, ",warm\nred,tepid\n")):
        Path(file).write_text(Path(file).read_text() + rows)
    console = quiet()
    task = ClassifierTask(config, console)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert f"{config.train}: 1 of 61 rows left out:\n  {config.train}: line 62: 'label' is empty" in said
    assert f"{config.dev}: line 32: 'text' is empty" in said
    assert f"{config.dev}: line 33: label 'tepid' is none of the 3 that the training data have" in said
    assert (len(task.train) + len(task.held_out), len(task.dev)) == (60, 30)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"held_out": 0}, InvalidConfig, "held_out: 0"),
        ({"alone_share": 1.5}, InvalidConfig, "alone_share: 1.5"),
        ({"neighbours": 0}, InvalidConfig, "neighbours: 0"),
        ({"temperature": 0.0}, InvalidConfig, "temperature: 0.0"),
        ({"max_tokens": 2}, InvalidConfig, "max_tokens: 2 is below 3"),
        ({"lora_rank": 0}, InvalidConfig, "lora_rank: 0 is below 1"),
        ({"shots": 1}, InvalidConfig, "shots: 1 row of each label"),
        ({"label_column": "text"}, InvalidData, "at least two labels of two rows"),
        ({"label_column": "category"}, InvalidData, "no column 'category', only label, text"),
    ],
)
def test_a_setting_that_leaves_nothing_to_train_is_refused(
    config: ClassifierConfig, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(OBJECTIVES["classifier"], dataclasses.replace(config, **changes), resume=False, console=quiet())  # type: ignore[arg-type]


def test_few_shot_counts_the_held_out_texts_in(config: ClassifierConfig) -> None:
    file = Path(config.train)
    file.write_text(file.read_text() + "a king,rare\nthe king,rare\n")
    console = quiet()
    task = ClassifierTask(dataclasses.replace(config, shots=5, held_out=6), console)
    assert (len(task.train), len(task.held_out)) == (11, 6)
    assert np.bincount(task.gold[: task.dev.start]).tolist() == [5, 5, 2, 5]
    assert isinstance(console.file, io.StringIO)
    assert "1 labels have fewer than 5 rows, and give all: ['rare']" in console.file.getvalue().replace("\n", " ")


def test_texts_and_pairs_are_cut_to_the_limit_and_padded_on_the_right(tiny_checkpoint: Path) -> None:
    encoder = RowEncoder(resolve_checkpoint(str(tiny_checkpoint)), max_tokens=9)
    [text, pair] = encoder.rows([("red " * 20, ""), ("one two", "red " * 20)])
    assert (len(text[0]), len(pair[0])) == (9, 9)
    assert pair[1] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    batch = encoder.batch([([2, 7, 3], [0, 0, 0]), pair], torch.device("cpu"))
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 6, [1] * 9]
    assert batch["input_ids"][0].tolist() == [2, 7, 3, *[encoder.pad] * 6]


def test_a_damaged_folder_is_refused_with_a_reason(trained: tuple[ClassifierConfig, dict[str, float]], tmp_path: Path) -> None:
    checkpoint = resolve_checkpoint(trained[0].checkpoint)
    best = Path(shutil.copytree(Path(trained[0].output) / "best", tmp_path / "copy"))
    settings = json.loads((best / "task.json").read_text())
    for change, message in (
        ({"labels": ["a", "b"]}, r"does not load \(Error"),
        ({"temperature": 0.0}, "holds log_temperature, null_score"),
        ({"base_digest": "0"}, "with digest 0, but the checkpoint"),
    ):
        (best / "task.json").write_text(json.dumps(settings | change))
        with pytest.raises(CheckpointNotFound, match=message):
            load_head_model(checkpoint, best)
    (best / "task.json").write_text("{")
    with pytest.raises(CheckpointNotFound, match=r"task.json cannot be read"):
        load_head_model(checkpoint, best)
