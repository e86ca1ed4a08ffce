"""Several processes train as one would: the same steps, and all stop after the same one."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from openbook_training.config import LoopConfig
from openbook_training.loop import Loop, Staged, Stopped
from openbook_training.processes import leave
from rich.console import Console
from torch import Tensor, nn

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--log-dir")


class Line(Staged):
    """Least squares on batches of seven, which two processes cannot share evenly: four rows make two micro-batches, three as well, and
    the last batch of an epoch has a single row, which leaves one process without any. The bias rests at first: nothing may decay it."""

    compares_examples: ClassVar[bool] = False

    def __init__(self, stop_at: int = 0) -> None:
        """`stop_at`: the step in which the process that is not the first gets SIGTERM."""
        generator = torch.Generator().manual_seed(0)
        self._inputs = torch.randn(15, 3, generator=generator)
        self._wanted = self._inputs @ torch.tensor([1.0, -2.0, 3.0]) + 0.1 * torch.randn(15, generator=generator)
        # New weights must be those of the first process everywhere, whatever others drew.
        torch.manual_seed(int(os.environ.get("RANK", "0")))
        self.model: nn.Module = nn.Linear(3, 1)
        self._stop_at, self._batches = stop_at, 0

    def before_step(self, model: nn.Module, step: int, total: int) -> None:
        model.get_parameter("bias").requires_grad_(step >= total / 2)

    def summary(self) -> str:
        return "a line"

    def batches(self, epoch: int) -> list[list[int]]:
        rows = list(range(15))
        random.Random(epoch).shuffle(rows)
        return [rows[:7], rows[7:14], rows[14:]]

    def loss(self, model: nn.Module, batch: list[int], rng: random.Random) -> Tensor:
        self._batches += 1
        if self._batches == self._stop_at and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return (model(self._inputs[batch]).squeeze(1) - self._wanted[batch]).square().mean()

    def describe(self, batch: list[int]) -> str:
        return str(batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"score": 0.0}

    def save(self, model: nn.Module, folder: Path) -> None:
        folder.mkdir()
        torch.save(model.state_dict(), folder / "line.pt")


def run(folder: Path, *, resume: bool = False, stop_at: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    config = LoopConfig(epochs=4, batch_examples=7, micro_batch_examples=2, learning_rate=0.1, precision="fp32", threads=1)
    Loop(Line(stop_at), config, folder, Console(file=io.StringIO())).run(resume=resume)


def trained(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "best" / "line.pt", weights_only=True)
    return state


@pytest.mark.skipif(torch.cuda.is_available(), reason="the launcher's processes would take a GPU each")
def test_two_processes_train_as_one_does_and_a_stop_told_to_one_stops_both_after_the_same_step(tmp_path: Path) -> None:
    run(tmp_path / "one")
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*LAUNCHER, str(tmp_path / "logs"), __file__, str(tmp_path / "two")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]
    assert done.stdout.count("stopped at step 4 of 12") == 2
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    for name, values in one.items():
        assert torch.allclose(values, two[name], rtol=1e-5, atol=1e-6)


def test_a_process_that_is_the_only_one_ends_as_any_does() -> None:
    assert leave(130) == 130


if __name__ == "__main__":  # what the launcher starts: the sixth loss of the second process is one of step 4
    try:
        run(Path(sys.argv[1]), stop_at=6)
    except Stopped as stopped:
        print(stopped)
    run(Path(sys.argv[1]), resume=True)
    leave(0)
    sys.exit("one of several processes should have ended")
