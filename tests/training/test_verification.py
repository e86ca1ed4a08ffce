"""Verification on a tiny checkpoint: the evidence decides, and the claim alone is reported beside it."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.config import LoopConfig
from openbook_training.heads import load_head_model
from openbook_training.run import train
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.verification import VerificationConfig, VerificationTask
from rich.console import Console


def quiet() -> Console:
    return Console(file=io.StringIO())


def write(file: Path, rows: int, seed: int) -> Path:
    """Claims that say nothing about their label; the evidence has one of two words."""
    rng = random.Random(seed)
    lines = []
    for number in range(rows):
        supported = number % 2 == 0
        claim = f"the {rng.choice(['king', 'river'])} was {rng.choice(['one', 'two'])}"
        evidence = [f"it is {'red red red' if supported else 'blue blue blue'} .", f"a {rng.choice(['city', 'book'])} ."]
        lines.append(json.dumps({"claim": claim, "label": "SUPPORTS" if supported else "REFUTES", "evidence": evidence}))
    file.write_text("\n".join(lines))
    return file


def config_in(folder: Path, checkpoint: Path) -> VerificationConfig:
    return VerificationConfig(
        output=str(folder / "run"),
        checkpoint=str(checkpoint),
        train=str(write(folder / "train.jsonl", 64, 1)),
        dev=str(write(folder / "dev.jsonl", 40, 2)),
        held_out=16,
        max_tokens=32,
        lora_rank=2,
        lora_alpha=2,
        loop=LoopConfig(epochs=12, batch_examples=8, precision="fp32", learning_rate=1e-2, average_decay=0.9, evaluate_every_epochs=4),
    )


def test_evidence_decides_and_the_claim_alone_is_no_better_than_chance(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, tiny_checkpoint)
    metrics = train(OBJECTIVES["verification"], config, resume=False, console=quiet())
    assert metrics["dev_model_accuracy"] >= 95
    assert metrics["dev_model_macro_f1"] >= 95
    assert 25 <= metrics["dev_claim_only_accuracy"] <= 75
    assert metrics["score"] == metrics["held_out_model_accuracy"]
    model, settings = load_head_model(resolve_checkpoint(config.checkpoint), tmp_path / "run" / "best")
    assert (settings["objective"], settings["pair"], settings["labels"]) == ("verification", True, ["REFUTES", "SUPPORTS"])
    task = VerificationTask(config, quiet())
    with torch.inference_mode():
        again = task.probabilities(model, task.dev, alone=False)
    assert 100 * (again.argmax(1) == task.gold[task.dev]).mean() == pytest.approx(metrics["dev_model_accuracy"])


def test_a_baseline_that_never_reads_evidence_is_chosen_by_what_it_is_trained_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, tiny_checkpoint)
    config = dataclasses.replace(config, alone_share=1.0, loop=dataclasses.replace(config.loop, epochs=1, evaluate_every_epochs=1))
    metrics = train(OBJECTIVES["verification"], config, resume=False, console=quiet())
    assert metrics["score"] == metrics["held_out_claim_only_accuracy"]
    task = VerificationTask(config, quiet())
    chances = {True: np.eye(2)[task.gold[task.held_out]], False: np.eye(2)[1 - task.gold[task.held_out]]}  # alone always right, else never
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VerificationTask, "probabilities", lambda self, model, numbers, *, alone: chances[alone])
        patch.setattr(task, "dev", range(0))
        assert task.evaluate(task.model)["score"] == 100


def test_a_claim_is_read_beside_its_evidence_or_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    task = VerificationTask(config_in(tmp_path, tiny_checkpoint), quiet())
    beside, alone = task.encoder.rows(task.found([0, 0], [False, True]).texts)
    decoded = task.encoder.tokenizer.decode(beside[0], skip_special_tokens=False)
    row = task.rows[0]
    assert decoded.startswith(f"[CLS] {row.text} [SEP] it is ")
    assert beside[1] == [0] * len(alone[0]) + [1] * (len(beside[0]) - len(alone[0]))
    assert beside[0][: len(alone[0])] == alone[0]
    assert set(alone[1]) == {0}


def test_evidence_is_read_in_the_claims_segment_unless_a_folder_of_old_says_nothing_of_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    task = VerificationTask(config_in(tmp_path, tiny_checkpoint), quiet())
    task.save(task.model, tmp_path)
    inputs = task.encoder.batch(task.encoder.rows(task.found([0], [False]).texts), torch.device("cpu"))
    assert 1 in inputs["token_type_ids"]
    told_apart = []
    for stated in (True, False):
        settings = json.loads((tmp_path / "task.json").read_text())
        if not stated:
            del settings["one_segment"]
            (tmp_path / "task.json").write_text(json.dumps(settings))
        model, _ = load_head_model(task.checkpoint, tmp_path)
        with torch.inference_mode():
            one, two = (model(inputs | {"token_type_ids": types * inputs["token_type_ids"]}) for types in (0, 1))
        told_apart.append(not torch.equal(one, two))
    assert told_apart == [False, True]
