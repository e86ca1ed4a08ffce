"""Language models with retrieved passages: what is read beside a stretch, what is predicted, what is learned and left."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from openbook_training.config import LoopConfig
from openbook_training.errors import CheckpointNotFound, InvalidConfig, InvalidData
from openbook_training.language_model import ReadingConfig, load_language_model, new_tokenizer, read, retrieve
from openbook_training.loop import Loop, Stopped
from openbook_training.run import train
from openbook_training.streams import RUN, holds, passages, split_tail, stream, stretches
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.causal_lm import CausalLmConfig, CausalLmTask
from rich.console import Console

WORDS = "red blue green one two three city river king book".split()


def quiet() -> Console:
    return Console(file=io.StringIO())


def write(file: Path, rows: int, seed: int) -> Path:
    """Sentences in which every second word follows from the one before."""
    rng = random.Random(seed)
    lines = []
    for _ in range(rows):
        drawn = [rng.randrange(10) for _ in range(8)]
        lines.append(" ".join(f"{WORDS[n]} {WORDS[(n + 3) % 10]}" for n in drawn) + " .")
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> CausalLmConfig:
    return CausalLmConfig(
        output=str(tmp_path / "run"),
        train=str(write(tmp_path / "train.txt", 40, 1)),
        dev=str(write(tmp_path / "dev.txt", 8, 2)),
        layers=1,
        dim=16,
        heads=2,
        vocabulary=300,
        dropout=0.1,
        held_out_share=0.15,
        stride_tokens=16,
        context_tokens=16,
        passage_tokens=16,
        query_tokens=8,
        embedder=str(tiny_checkpoint),
        loop=LoopConfig(epochs=2, batch_examples=16, micro_batch_examples=8, precision="fp32", learning_rate=1e-2, average_decay=0.5),
    )


def test_a_text_that_changed_would_have_another_tokenizer_and_is_refused_on_resume(config: CausalLmConfig) -> None:
    train(OBJECTIVES["causal_lm"], config, resume=False, console=quiet())
    longer = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=3))
    train(OBJECTIVES["causal_lm"], longer, resume=True, console=quiet())  # the tokenizer trained anew is the same
    data = Path(config.train)
    data.write_text("zebra zigzags " * 40 + data.read_text())
    with pytest.raises(InvalidData, match="on other data: tokenizer, training text, held-out text changed since it began"):
        train(OBJECTIVES["causal_lm"], longer, resume=True, console=quiet())


def test_a_stream_is_cut_into_stretches_that_cover_every_token_once() -> None:
    tokenizer = new_tokenizer(["the king of the city", "a river"], 300)
    of = stream(["the king of the  city", "a – river"], tokenizer)
    assert tokenizer.decode(of.ids) == "the king of the  city\na – river"
    assert of.words.sum() == 8
    assert len(of.words) == len(of.ids)
    made = stretches(of, stride_tokens=4, context_tokens=6, name="text")
    assert [token for stretch in made for token in stretch.tokens] == of.ids[: 4 * len(made)].tolist()
    for number, stretch in enumerate(made):
        assert stretch.before == of.ids[max(0, 4 * number - 6) : 4 * number].tolist()
        assert stretch.around[stretch.lead : stretch.lead + 4] == stretch.tokens
    with pytest.raises(InvalidData, match="less than one stretch of 999"):
        stretches(of, stride_tokens=999, context_tokens=6, name="text")


def test_a_passage_holds_a_stretch_exactly_when_it_has_one_of_its_tokens_in_place() -> None:
    rng = np.random.default_rng(0)
    of = stream([""], new_tokenizer(["x"], 300))
    of = dataclasses.replace(of, ids=rng.integers(1000, size=400), words=np.zeros(400, dtype=np.int64))
    for stretch, start in zip(stretches(of, stride_tokens=30, context_tokens=0, name=""), range(0, 400, 30), strict=False):
        for at in range(0, 400 - 20):
            passage = of.ids[at : at + 20].tolist()
            assert holds(passage, stretch) == (at < start + 30 and at + 20 > start), (at, start)
    assert all(len(passage) >= RUN for passage in passages(of, 30))


def test_passages_stand_best_last_before_the_text_and_never_hold_it(config: CausalLmConfig) -> None:
    task = CausalLmTask(dataclasses.replace(config, passages=2), quiet())
    read_beside = [example for example in task.train if example.passages]
    assert len(read_beside) == len(task.train) - 1  # there is nothing to look up before the first stretch
    for example in read_beside:
        assert len(example.passages) == 2
        assert not any(holds(passage, example.stretch) for passage in example.passages)
    example = read_beside[3]
    best, second = example.passages
    row = task.prompts.row(example.stretch, example.passages)
    newline = task.prompts.newline
    assert row[1:] == [*second, *newline, *best, *newline, *example.stretch.before, *example.stretch.tokens]
    assert len(row) == task._config.longest(len(newline))


def test_the_own_passage_would_be_the_nearest_if_it_were_not_left_out(config: CausalLmConfig) -> None:
    task = CausalLmTask(config, quiet())
    made = [example.stretch for example in task.train]
    own = [(stretch.before[-4:] + stretch.tokens)[:16] for stretch in made]
    vectors = np.concatenate([np.eye(len(made))] * 2)  # passage i is the nearest of stretch i
    found = retrieve(task.prompts, made, own, task._config, lambda texts: vectors)
    assert all(passage != mine for stretch, mine in zip(found, own, strict=True) for passage in stretch)


def test_the_loss_is_of_the_stretch_alone_and_as_the_model_of_transformers_has_it(config: CausalLmConfig) -> None:
    task = CausalLmTask(config, quiet())
    model = task.model.eval()
    batch = [next(example for example in task.train if example.passages), task.train[0]]
    expected = []
    for example in batch:
        row = torch.tensor([task.prompts.row(example.stretch, example.passages)])
        with torch.no_grad():
            logits = model.network(row).logits[0].double().numpy()
        for t in range(row.shape[1] - 16, row.shape[1]):
            p = np.exp(logits[t - 1]) / np.exp(logits[t - 1]).sum()
            expected.append(-np.log(p[row[0, t]]))
    assert task.loss(model, batch, random.Random(0)).item() == pytest.approx(float(np.mean(expected)), rel=1e-5)


def test_training_learns_the_text_and_the_folder_reads_it_the_same(config: CausalLmConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=8))
    metrics = train(OBJECTIVES["causal_lm"], config, resume=False, console=quiet())
    task = CausalLmTask(config, quiet())
    assert metrics["dev_perplexity"] < 0.3 * len(task.prompts.tokenizer)
    model, prompts, settings = load_language_model(str(tmp_path / "run" / "best"))
    assert settings == ReadingConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(ReadingConfig)})
    rows = [prompts.row(example.stretch, example.passages) for example in task.dev]
    total = sum(float(surprise.sum()) for _, _, surprise, _ in read(model, rows, 16, torch.device("cpu"), "fp32"))
    assert math.exp(-total / (16 * len(rows))) == pytest.approx(metrics["dev_perplexity"], rel=1e-4)


def test_a_stopped_run_resumes_to_the_same_losses(config: CausalLmConfig, tmp_path: Path) -> None:
    expected = train(OBJECTIVES["causal_lm"], dataclasses.replace(config, output=str(tmp_path / "whole")), resume=False, console=quiet())
    halves = dataclasses.replace(config, output=str(tmp_path / "halves"))
    original = Loop._take_step

    def stops_at_three(self: Loop[object], batch: list[object], total: int) -> float:
        loss = original(self, batch, total)
        if self._step == 3:
            self._stopping.set()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_take_step", stops_at_three)
        with pytest.raises(Stopped, match="step 3 of"):
            train(OBJECTIVES["causal_lm"], halves, resume=False, console=quiet())
    assert train(OBJECTIVES["causal_lm"], halves, resume=True, console=quiet()) == pytest.approx(expected, rel=1e-4)
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "halves")]
    losses = [[row["loss"] for row in run if "loss" in row] for run in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_trained_folder_is_a_checkpoint_to_go_on_from(config: CausalLmConfig, tmp_path: Path) -> None:
    short = dataclasses.replace(config, passages=0, loop=dataclasses.replace(config.loop, max_steps=1))
    train(OBJECTIVES["causal_lm"], short, resume=False, console=quiet())
    task = CausalLmTask(dataclasses.replace(short, checkpoint=str(tmp_path / "run" / "best")), quiet())
    assert task.model.network.config.n_embd == 16  # type: ignore[union-attr]
    assert task.memory == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"held_out_share": 0.0, "dim": 15, "vocabulary": 9}, InvalidConfig, r"held_out_share: 0.0(.|\n)*dim 15(.|\n)*vocabulary: 9"),
        (
            {"stride_tokens": 0, "passage_tokens": 5, "query_tokens": 17},
            InvalidConfig,
            "stride_tokens 0.*passage_tokens 5.*query_tokens 17",
        ),
        ({"dropout": 1.5}, InvalidConfig, r"dropout: 1.5 is not in \[0, 1\)"),
        ({"held_out_share": 0.999}, InvalidData, "40 texts cannot be split"),
        ({"stride_tokens": 4000}, InvalidData, "less than one stretch of 4000"),
        ({"checkpoint": "EMBEDDER", "stride_tokens": 128}, InvalidConfig, "the model has 128 positions"),
        ({"checkpoint": "/absent"}, CheckpointNotFound, "no such folder"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(
    config: CausalLmConfig, tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    if changes.get("checkpoint") == "EMBEDDER":
        train(OBJECTIVES["causal_lm"], dataclasses.replace(config, passages=0, passage_tokens=16), resume=False, console=quiet())
        changes = changes | {"checkpoint": str(tmp_path / "run" / "best"), "output": str(tmp_path / "next")}
        message = "the model has 33 positions"
    with pytest.raises(error, match=message):
        train(OBJECTIVES["causal_lm"], dataclasses.replace(config, **changes), resume=False, console=quiet())  # type: ignore[arg-type]


def test_the_end_of_a_text_is_what_is_held_out() -> None:
    assert split_tail(["a" * 10] * 10, 0.2) == (["a" * 10] * 8, ["a" * 10] * 2)
