"""Verification on a tiny checkpoint: the evidence decides, given or found, and the claim alone is reported beside it."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import random
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.chunks import length_grouped
from openbook_training.config import LoopConfig, check
from openbook_training.errors import InvalidConfig
from openbook_training.heads import load_head_model
from openbook_training.negatives import embed
from openbook_training.record import read_metrics
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


def write_findable(file: Path, subjects: list[str], seed: int) -> Path:
    """As `write`, but claim and evidence are of a subject of their own, so that the evidence can be found."""
    rng = random.Random(seed)
    lines = []
    for number, subject in enumerate(subjects):
        supported, topic = number % 2 == 0, " ".join([subject] * 6)
        evidence = f"{topic} is {'red red' if supported else 'blue blue'}"
        claim = f"{topic} was {rng.choice(['one', 'two'])}"
        lines.append(json.dumps({"claim": claim, "label": "SUPPORTS" if supported else "REFUTES", "evidence": [evidence]}))
    file.write_text("\n".join(lines))
    return file


def config_in(folder: Path, checkpoint: Path) -> VerificationConfig:
    """Of a run that looks for no evidence."""
    return VerificationConfig(
        output=str(folder / "run"),
        checkpoint=str(checkpoint),
        train=str(write(folder / "train.jsonl", 64, 1)),
        dev=str(write(folder / "dev.jsonl", 40, 2)),
        held_out=16,
        max_tokens=32,
        retrieved_share=0.0,
        lora_rank=2,
        lora_alpha=2,
        loop=LoopConfig(epochs=12, batch_examples=8, precision="fp32", learning_rate=1e-2, average_decay=0.9, evaluate_every_epochs=4),
    )


def finding_in(folder: Path, checkpoint: Path) -> VerificationConfig:
    """Of a run in which half of the claims are read beside the one passage that is nearest to them."""
    words = "king river city book case three green what who read two by in".split()
    subjects = [f"{one} {other}" for one, other in itertools.combinations(words, 2)]
    random.Random(0).shuffle(subjects)
    config = config_in(folder, checkpoint)
    return dataclasses.replace(
        config,
        train=str(write_findable(folder / "train.jsonl", subjects[:54], 1)),
        dev=str(write_findable(folder / "dev.jsonl", subjects[54:], 2)),
        held_out=8,
        retrieved_share=0.5,
        passages=1,
        loop=dataclasses.replace(config.loop, epochs=18, evaluate_every_epochs=6),
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


def test_evidence_found_decides_where_it_is_found(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = finding_in(tmp_path, tiny_checkpoint)
    metrics = train(OBJECTIVES["verification"], config, resume=False, console=quiet())
    assert metrics["evidence/dev_all@1"] == metrics["evidence/dev_any@1"] >= 75  # each claim has but one passage
    assert metrics["dev_model_accuracy"] >= 90
    assert metrics["dev_claim_only_accuracy"] < 75 <= metrics["dev_retrieved_accuracy"]
    assert {f"{part}_retrieved_{what}" for part in ("held_out", "dev") for what in ("macro_f1", "calibration_error")} < set(metrics)
    assert metrics["score"] == metrics["held_out_retrieved_accuracy"]
    assert json.loads((tmp_path / "run" / "best" / "task.json").read_text())["passages"] == 1


def test_claims_find_the_evidence_of_their_own_file_or_that_of_a_corpus(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(finding_in(tmp_path, tiny_checkpoint), passages=3)
    texts = tmp_path / "corpus.txt"
    texts.write_text("".join(f"the {word} was red\n" for word in ("king", "river", "city", "book", "case")))
    for corpus in ("", str(texts)):
        task = VerificationTask(dataclasses.replace(config, corpus=corpus, output=str(tmp_path / f"run{len(corpus)}")), quiet())
        given, found = task.rows[: task.dev.stop], task.rows[task.dev.stop :]
        assert [(row.place, row.text, row.label) for row in found] == [(row.place, row.text, row.label) for row in given]
        assert task.gold[: len(given)].tolist() == task.gold[len(given) :].tolist()
        for part in (range(task.dev.start), task.dev):
            pool = texts.read_text().splitlines() if corpus else [given[number].evidence for number in part]
            everything = [*pool, *(given[number].text for number in part)]
            vectors = dict(zip(everything, embed(task.checkpoint, everything), strict=True))
            for number in (part[0], part[-1]):
                best = sorted(pool, key=lambda text: -float(vectors[text] @ vectors[given[number].text]))[:3]
                assert found[number].passages == tuple(best)
                assert task.found([number + len(given)], [False]).texts == [(given[number].text, " ".join(best))]
        with torch.inference_mode():
            metrics = task.evaluate(task.model.eval())
        assert (metrics["evidence/dev_any@3"] > 0) == (not corpus)  # the corpus holds none of it
        assert ("any@3 0 %" in task.summary()) == bool(corpus)


def test_a_share_of_the_claims_is_read_beside_what_was_found_drawn_anew_in_each_epoch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    task = VerificationTask(finding_in(tmp_path, tiny_checkpoint), quiet())
    drawn = []
    for epoch in (0, 1):
        assert task.batches(epoch) == task.batches(epoch)
        examples = [number for batch in task.batches(epoch) for number in batch]
        assert sorted(number % task.dev.stop for number in examples) == list(task.train)
        drawn.append({number for number in examples if number >= task.dev.stop})
        assert 0.2 < len(drawn[-1]) / len(task.train) < 0.8
    assert drawn[0] != drawn[1]


def test_a_run_that_looks_for_no_evidence_reads_what_the_data_give_and_embeds_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    task = VerificationTask(config_in(tmp_path, tiny_checkpoint), quiet())
    lengths = [len(row.text) + len(row.evidence) for row in task.rows]
    for epoch in (0, 1):
        assert task.batches(epoch) == length_grouped(task.train, lengths.__getitem__, 8, random.Random(f"42/{epoch}"))
    with torch.inference_mode():
        metrics = task.evaluate(task.model.eval())
    assert not [name for name in metrics if "retrieved" in name or "/" in name]
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_resumes_to_the_same_losses_and_metrics(
    tiny_checkpoint: Path, tmp_path: Path, killed_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    config = finding_in(tmp_path, tiny_checkpoint)
    loop = dataclasses.replace(config.loop, epochs=2, evaluate_every_epochs=1, checkpoint_minutes=0.0)
    whole, halves = (dataclasses.replace(config, output=str(tmp_path / name), loop=loop) for name in ("whole", "halves"))
    expected = train(OBJECTIVES["verification"], whole, resume=False, console=quiet())

    with killed_after(7):
        train(OBJECTIVES["verification"], halves, resume=False, console=quiet())
    assert train(OBJECTIVES["verification"], halves, resume=True, console=quiet()) == pytest.approx(expected, rel=1e-4)
    losses = [{row["step"]: row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row} for name in ("whole", "halves")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(losses[0]) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrieved_share": 1.5}, "retrieved_share: 1.5 is not in [0, 1]"),
        ({"passages": 0}, "passages: 0 is below 1"),
        (
            {"retrieved_share": 0.0, "corpus": "texts.txt"},
            "corpus: nothing is looked for in 'texts.txt' while retrieved_share is 0; give it a share",
        ),
        ({"max_tokens": 4}, "max_tokens: 4 is below 5"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(message)):
        check(VerificationConfig(train="claims.jsonl", **changes))  # type: ignore[arg-type]
