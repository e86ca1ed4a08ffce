"""The masked language model on tiny checkpoints: what is hidden, what rests, what is learned, what is left, and from nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.config import LoopConfig
from openbook_training.errors import CheckpointNotFound, InvalidConfig, InvalidData
from openbook_training.loop import Loop, Stopped
from openbook_training.masked_language_model import build_masked_lm
from openbook_training.processes import process
from openbook_training.run import train
from openbook_training.scratch import ScratchConfig, make_checkpoint
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.masked_lm import MaskedLmConfig, MaskedLmTask
from rich.console import Console

SCRATCH = ScratchConfig(layers=2, hidden=32, heads=2, vocabulary=120)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> MaskedLmConfig:
    """Texts in which a word's neighbours tell what it is: "the red king", "the blue river"."""
    rng, pairs = random.Random(1), [("red", "king"), ("blue", "river"), ("two", "city")]
    texts = [" ".join(f"the {a} {b}" for a, b in rng.choices(pairs, k=3)) + f" {number}" for number in range(60)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    return MaskedLmConfig(
        output=str(tmp_path / "run"),
        checkpoint=str(tiny_checkpoint),
        train=str(tmp_path / "texts.txt"),
        held_out=12,
        max_tokens=24,
        masked_share=0.2,
        frozen_layers=1,
        frozen_share=0.5,
        lora_rank=4,
        lora_alpha=4,
        loop=LoopConfig(epochs=2, batch_examples=8, precision="fp32", learning_rate=1e-2, average_decay=0.9, threads=1),
    )


def test_training_says_more_than_word_frequencies_and_the_folder_says_the_same(config: MaskedLmConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=8, evaluate_every_epochs=4))
    task = MaskedLmTask(config, quiet())
    with torch.inference_mode():
        before = task.evaluate(task.model.eval())
    assert before["perplexity/held_out"] == pytest.approx(before["perplexity/word_frequencies"], rel=1e-4)  # nothing was learned yet
    metrics = train(OBJECTIVES["masked_lm"], config, resume=False, console=quiet())
    assert metrics["perplexity/held_out"] < 0.6 * metrics["perplexity/word_frequencies"]
    assert metrics["score"] == -metrics["perplexity/held_out"]
    best = tmp_path / "run" / "best"
    loaded = build_masked_lm(resolve_checkpoint(config.checkpoint), lora_rank=4, lora_alpha=4, folder=str(best))
    with torch.inference_mode():
        assert task.evaluate(loaded.eval()) == pytest.approx(metrics, rel=2e-2)  # the adapter is kept in half precision
    assert any("lora" in name for name, weight in loaded.named_parameters() if weight.requires_grad)
    assert (best / "head.safetensors").stat().st_size < 10_000  # no copy of the embeddings


def test_the_lower_layers_rest_for_their_share_of_the_steps_and_then_learn(config: MaskedLmConfig) -> None:
    task = MaskedLmTask(config, quiet())
    lower = {name: value for name, value in task.model.named_parameters() if ".layer.0." in name and "lora_B" in name}
    upper = {name: value for name, value in task.model.named_parameters() if ".layer.1." in name and "lora_B" in name}
    assert lower
    assert upper
    torch.nn.init.normal_(task.model.head.transform.weight)  # type: ignore[union-attr,arg-type]  # a fresh head, all zero, passes no gradient on
    for step, rests in ((0, True), (4, True), (5, False), (9, False)):
        task.before_step(task.model, step, 10)
        task.model.zero_grad()
        task.loss(task.model, task.train[:4], random.Random(0)).backward()
        assert all((value.grad is None) == rests for value in lower.values())
        assert all(value.grad is not None and bool(value.grad.any()) for value in upper.values())


def test_a_run_stopped_while_layers_rest_resumes_to_the_same_losses(config: MaskedLmConfig, tmp_path: Path) -> None:
    def at(name: str) -> MaskedLmConfig:
        return dataclasses.replace(config, output=str(tmp_path / name))

    expected = train(OBJECTIVES["masked_lm"], at("whole"), resume=False, console=quiet())
    original = Loop._take_step

    def stops_at_four(self: Loop[object], batch: list[object], total: int) -> float:
        loss = original(self, batch, total)
        if self._step == 4:  # of 12; the lower layer wakes after 6
            self._stopping.set()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_take_step", stops_at_four)
        with pytest.raises(Stopped, match="step 4 of 12"):
            train(OBJECTIVES["masked_lm"], at("halves"), resume=False, console=quiet())
    assert train(OBJECTIVES["masked_lm"], at("halves"), resume=True, console=quiet()) == pytest.approx(expected, rel=1e-4)
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "halves")]
    losses = [[row["loss"] for row in run if "loss" in row] for run in rows]
    assert len(losses[0]) == 12
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_from_nothing_it_leaves_a_checkpoint_that_every_objective_can_begin_with(config: MaskedLmConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, scratch=SCRATCH, frozen_layers=0, loop=dataclasses.replace(config.loop, epochs=8))
    metrics = train(OBJECTIVES["masked_lm"], config, resume=False, console=quiet())
    assert metrics["perplexity/held_out"] < 0.6 * metrics["perplexity/word_frequencies"]
    best = tmp_path / "run" / "best"
    made = resolve_checkpoint(str(best / "checkpoint"))
    model = build_masked_lm(made, lora_rank=2, lora_alpha=2, folder=str(best)).eval()
    assert {name.split(".")[-2] for name, value in model.named_parameters() if value.requires_grad and "lora" in name}
    with torch.inference_mode():
        assert MaskedLmTask(config, quiet()).evaluate(model) == pytest.approx(metrics, rel=1e-3)
    again = dataclasses.replace(config, output=str(tmp_path / "next"), checkpoint=str(best / "checkpoint"), scratch=ScratchConfig())
    assert train(OBJECTIVES["masked_lm"], again, resume=False, console=quiet())["score"] > -metrics["perplexity/word_frequencies"]


def test_a_backbone_trained_whole_embeds_as_the_checkpoint_did_that_it_began_with(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "cls"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    checkpoint = resolve_checkpoint(str(folder))
    (tmp_path / "best").mkdir()
    build_masked_lm(checkpoint, lora_rank=0, lora_alpha=1).save(tmp_path / "best", checkpoint)
    kept = resolve_checkpoint(str(tmp_path / "best" / "checkpoint"))
    assert (kept.pooling, kept.max_tokens) == (checkpoint.pooling, checkpoint.max_tokens) == ("cls", 64)


def test_a_checkpoint_from_nothing_is_made_once_for_the_same_texts_and_settings(tmp_path: Path) -> None:
    texts = ["the red king reads a book", "a river of blue cities"] * 3
    first = make_checkpoint(tmp_path / "made", texts, SCRATCH, seed=1)
    digest, written = first.digest(), (first.folder / "config.json").stat().st_mtime_ns
    assert make_checkpoint(tmp_path / "made", texts, SCRATCH, seed=1).digest() == digest
    assert (first.folder / "config.json").stat().st_mtime_ns == written
    assert make_checkpoint(tmp_path / "made", texts, SCRATCH, seed=2).digest() != digest
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_the_other_processes_take_the_checkpoint_that_the_first_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    @contextmanager
    def main_process_first() -> Iterator[None]:  # as a process sees it that is not the first: within, the first is done
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("openbook_training.scratch.process", process)
            make_checkpoint(tmp_path / "made", ["the red king"], SCRATCH, seed=1)
        monkeypatch.setattr("openbook_training.scratch._make", lambda *_: made.append("again"))
        yield

    monkeypatch.setattr("openbook_training.scratch.process", lambda: SimpleNamespace(main_process_first=main_process_first))
    assert make_checkpoint(tmp_path / "made", ["the red king"], SCRATCH, seed=1).folder == tmp_path / "made"
    assert not made


def test_a_run_that_goes_on_keeps_the_tokenizer_that_its_weights_were_trained_with(config: MaskedLmConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, scratch=SCRATCH, frozen_layers=0, loop=dataclasses.replace(config.loop, epochs=1))
    train(OBJECTIVES["masked_lm"], config, resume=False, console=quiet())

    def standing() -> dict[str, bytes]:
        files = [tmp_path / "run" / "config.json", *(tmp_path / "run" / "scratch").iterdir()]
        return {file.name: file.read_bytes() for file in files}

    before = standing()
    other = dataclasses.replace(config, loop=dataclasses.replace(config.loop, seed=7))
    for resume, message in ((False, "go on with --resume"), (True, "loop.seed was 42 and is 7")):
        with pytest.raises(InvalidConfig, match=message):
            train(OBJECTIVES["masked_lm"], other, resume=resume, console=quiet())
        assert standing() == before
    Path(config.train).write_text("\n".join([*Path(config.train).read_text().splitlines()[:-1], "a river of green books is in a city"]))
    longer = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=2))
    with pytest.raises(InvalidData, match="on other data: .*passages changed since"):
        train(OBJECTIVES["masked_lm"], longer, resume=True, console=quiet())
    assert {name: text for name, text in standing().items() if name != "config.json"} == {
        name: text for name, text in before.items() if name != "config.json"
    }


def test_a_run_that_has_lost_the_tokenizer_of_its_weights_is_refused(config: MaskedLmConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, scratch=SCRATCH, frozen_layers=0, loop=dataclasses.replace(config.loop, epochs=1))
    train(OBJECTIVES["masked_lm"], config, resume=False, console=quiet())
    (tmp_path / "run" / "scratch").rename(tmp_path / "elsewhere")
    longer = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=2))
    with pytest.raises(InvalidConfig, match="run/scratch holds no scratch.json, .* copy the whole run folder, or begin again with another"):
        train(OBJECTIVES["masked_lm"], longer, resume=True, console=quiet())
    assert not (tmp_path / "run" / "scratch").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "run" / "scratch")
    train(OBJECTIVES["masked_lm"], longer, resume=True, console=quiet())


def test_a_head_of_another_checkpoint_is_refused(config: MaskedLmConfig, tmp_path: Path) -> None:
    train(OBJECTIVES["masked_lm"], config, resume=False, console=quiet())
    other = make_checkpoint(tmp_path / "other", ["the red king"], SCRATCH, seed=1)
    best = tmp_path / "run" / "best"
    with pytest.raises(CheckpointNotFound, match="use the checkpoint it was trained on"):
        build_masked_lm(other, lora_rank=2, lora_alpha=2, folder=str(best))
    (best / "head.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointNotFound, match=r"head\.safetensors does not load"):
        build_masked_lm(resolve_checkpoint(config.checkpoint), lora_rank=2, lora_alpha=2, folder=str(best))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"masked_share": 0.0}, InvalidConfig, "masked_share: 0.0"),
        ({"held_out": 0}, InvalidConfig, "held_out: 0"),
        ({"frozen_share": 1.5}, InvalidConfig, "frozen_share: 1.5"),
        ({"frozen_layers": 3}, InvalidConfig, "frozen_layers: 3, and the backbone has 2"),
        ({"scratch": SCRATCH}, InvalidConfig, "set 0 beside"),
        (
            {"scratch": dataclasses.replace(SCRATCH, heads=3), "frozen_layers": 0},
            InvalidConfig,
            "scratch.hidden: 32 should be a multiple of heads, 3",
        ),
        ({"held_out": 60}, InvalidData, "60 passages, and held_out takes 60"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(
    config: MaskedLmConfig, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(OBJECTIVES["masked_lm"], dataclasses.replace(config, **changes), resume=False, console=quiet())  # type: ignore[arg-type]
