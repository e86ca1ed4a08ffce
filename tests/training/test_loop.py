"""The loop on a model of two weights: when it saves, and that what cannot be learned from harms nothing."""

from __future__ import annotations

import errno
import io
import itertools
import os
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from openbook_training.config import LoopConfig
from openbook_training.errors import NotWritten, TrainingDiverged
from openbook_training.loop import Loop, Staged, Stopped
from openbook_training.record import read_metrics
from rich.console import Console
from torch import Tensor, nn


class Slope(Staged):
    """A single step an epoch; the examples of batch `bad` have a gradient that is no number, though their loss is one."""

    compares_examples: ClassVar[bool] = False

    def __init__(self, bad: int = -1) -> None:
        self.model: nn.Module = nn.Linear(1, 1)
        self._bad = bad

    def summary(self) -> str:
        return "a slope"

    def batches(self, epoch: int) -> list[list[int]]:
        return [[epoch, 100 + epoch]]

    def loss(self, model: nn.Module, batch: list[int], rng: random.Random) -> Tensor:
        out = model(torch.ones(1, 1)).square().sum()
        # The square root's slope at 0 is infinite: 0 × infinity in the backward pass.
        return out + (torch.sqrt(out * 0.0) if self._bad in batch else torch.zeros(()))

    def describe(self, batch: list[int]) -> str:
        return ", ".join(f"row {one}" for one in batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"score": 0.0}

    def save(self, model: nn.Module, folder: Path) -> None:
        folder.mkdir()


def loop_in(folder: Path, task: Slope, **settings: object) -> tuple[Loop[int], Console]:
    console = Console(file=io.StringIO(), width=300)
    folder.mkdir(exist_ok=True)
    config = LoopConfig(batch_examples=2, micro_batch_examples=1, precision="fp32", threads=1, **settings)  # type: ignore[arg-type]
    return Loop(task, config, folder, console), console


def test_no_epoch_is_prepared_that_no_step_is_left_for_and_the_first_is_counted_for_all(tmp_path: Path) -> None:
    asked: list[int] = []

    class Asked(Slope):
        def batches(self, epoch: int) -> list[list[int]]:
            asked.append(epoch)
            return super().batches(epoch)

    loop_in(tmp_path, Asked(), epochs=10**12, max_steps=3)[0].run(resume=False)
    assert asked == [0, 0, 1, 2]
    asked.clear()
    loop_in(tmp_path, Asked(), epochs=10**12, max_steps=4)[0].run(resume=True)
    assert asked == [0, 3]
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == [1, 2, 3, 4]


def test_a_run_of_more_epochs_than_any_machine_takes_begins_at_once(tmp_path: Path) -> None:
    class Stops(Slope):
        def loss(self, model: nn.Module, batch: list[int], rng: random.Random) -> Tensor:
            loop._stopping.set()
            return super().loss(model, batch, rng)

    loop, _ = loop_in(tmp_path, Stops(), epochs=10**12)
    with pytest.raises(Stopped, match="stopped at step 1 of 1000000000000; go on"):
        loop.run(resume=False)


def test_a_resumed_run_decays_weights_as_it_says_now(tmp_path: Path) -> None:
    weights = {}
    for decay in (0.0, 50.0):
        torch.manual_seed(0)
        loop_in(tmp_path / str(decay), Slope(), epochs=1, weight_decay=0.0)[0].run(resume=False)
        task = Slope()
        loop_in(tmp_path / str(decay), task, epochs=3, weight_decay=decay)[0].run(resume=True)
        weights[decay] = float(next(iter(task.model.parameters())).detach())
    assert abs(weights[50.0]) < 0.99 * abs(weights[0.0])


def test_checkpoints_come_in_time_however_short_an_epoch_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("openbook_training.loop.time.monotonic", lambda: float(next(clock)))
    loop, _ = loop_in(tmp_path / "run", Slope(), epochs=30, evaluate_every_epochs=30, checkpoint_minutes=0.2)
    saved: list[int] = []
    original = Loop._checkpoint

    def noted(self: Loop[int]) -> None:
        saved.append(self._step)
        original(self)

    monkeypatch.setattr(Loop, "_checkpoint", noted)
    loop.run(resume=False)
    assert len(saved) >= 5
    assert max(after - before for before, after in itertools.pairwise(saved)) <= 12


def test_a_gradient_that_is_no_number_stops_the_run_before_it_is_in_the_weights(tmp_path: Path) -> None:
    task = Slope(bad=103)
    loop, _ = loop_in(tmp_path / "run", task, epochs=6, checkpoint_minutes=0.0)
    with pytest.raises(TrainingDiverged, match=r"gradient is nan at step 4; lower the learning rate. Batch: row 3, row 103"):
        loop.run(resume=False)
    assert all(bool(torch.isfinite(weight).all()) for weight in task.model.parameters())
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3]
    again, console = loop_in(tmp_path / "run", Slope(), epochs=6)
    again.run(resume=True)
    assert isinstance(console.file, io.StringIO)
    assert "at step 3" in console.file.getvalue()
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_begins_where_one_left_no_checkpoint_forgets_its_steps_and_says_so(tmp_path: Path) -> None:
    loop, _ = loop_in(tmp_path / "run", Slope(), epochs=5)
    loop.run(resume=False)
    (tmp_path / "run" / "checkpoint.pt").unlink()
    again, console = loop_in(tmp_path / "run", Slope(), epochs=2)
    again.run(resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [1, 2]
    assert isinstance(console.file, io.StringIO)
    assert "holds no checkpoint to resume; beginning" in console.file.getvalue()


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """Have the files of that name under the run's folder take no more bytes from the `after`th time on that one is opened."""
    granted, times = Path.open, itertools.count(1)

    def refuse(file: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if file.name == name and mode != "rb" and next(times) >= after:
            granted(file, mode).close()
            return granted(Path("/dev/full"), mode)  # which takes none
        return granted(file, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="the system has no full device")
@pytest.mark.parametrize(
    ("name", "after", "way_on"),
    [
        ("checkpoint.new", 3, "go on with --resume: the last checkpoint is of step 2"),
        ("checkpoint.new", 1, "begin again: there is no checkpoint yet"),
        ("metrics.jsonl", 7, "go on with --resume: the last checkpoint is of step 3"),  # a step and its evaluation each
    ],
)
def test_a_full_disk_ends_a_run_with_the_file_and_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int, way_on: str
) -> None:
    with monkeypatch.context() as patch:
        fill_the_disk(patch, name, after)
        loop, _ = loop_in(tmp_path / "run", Slope(), epochs=4)
        with pytest.raises(NotWritten, match=rf"/run/{name} cannot be written: No space left on device; make room and {way_on}$"):
            loop.run(resume=False)
    assert not (tmp_path / "run" / "checkpoint.new").exists()
    again, _ = loop_in(tmp_path / "run", Slope(), epochs=4)
    again.run(resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]


def test_a_best_result_that_finds_no_room_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(_: Slope, model: nn.Module, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    loop, _ = loop_in(tmp_path / "run", Slope(), epochs=1)
    loop.run(resume=False)
    monkeypatch.setattr(Slope, "save", save)
    again, _ = loop_in(tmp_path / "run", Slope(), epochs=2)
    with pytest.raises(NotWritten, match=r"/run/best.new cannot be written: No space .* the last checkpoint is of step 1$"):
        again.run(resume=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"best", "checkpoint.pt"}
    assert not (tmp_path / "run" / "best.new").exists()
