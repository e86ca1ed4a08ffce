"""What a run leaves to be looked at: metrics.jsonl, TensorBoard scalars and, after each evaluation, plots.

metrics.jsonl is the truth, one JSON object a line: of a step {"step", "epoch", "loss", "learning_rate", "examples_per_second",
"memory_mb"} and what the task observed in it, of an evaluation {"step", "epoch"} and its metrics. Steps that a killed run had
taken after its last checkpoint are taken again when it is resumed; the later line counts. A kill may leave half a line, which is none.
What is infinite or no number is null: the perplexity of a diverged model.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from openbook_training.plots import plot
from openbook_training.processes import process
from openbook_training.run_folder import writing

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
_PLACE = ("step", "epoch")


class Record:
    """Writes all three; where the disk is full, every method but `close` raises `NotWritten`."""

    def __init__(self, folder: Path, console: Console, *, first_step: int, silent: bool = False) -> None:
        """Args:
        console: told of a picture that could not be drawn.
        first_step: the one that the run begins or goes on with; TensorBoard forgets what it had seen from there on. A run that begins
            forgets all that one before it, stopped without a checkpoint, had left.
        silent: write nothing (the processes of a distributed run that are not the first).
        """
        self._folder, self._console = folder, console
        self._writer: SummaryWriter | None = None
        if silent:
            return
        with writing(folder / TENSORBOARD):
            self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=first_step)
        file = folder / METRICS
        with writing(file):
            if first_step == 1:
                file.unlink(missing_ok=True)
            elif file.is_file() and not file.read_bytes().endswith(b"\n"):
                with file.open("a") as stream:
                    stream.write("\n")  # the half a line stays by itself

    def step(self, row: Mapping[str, Any]) -> None:
        """One optimiser step."""
        self._append(row, "train/")

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """One evaluation; draws the plots again."""
        self._append(row, "evaluation/")
        if self._writer is not None:
            with writing(self._folder / TENSORBOARD):
                self._writer.flush()
            try:
                plot(read_metrics(self._folder), self._folder / "plots.png")
            except Exception as error:  # a picture is worth no run, whatever is wrong with it
                self._console.print(f"plots.png was not drawn ({type(error).__name__}: {error})", markup=False)

    def close(self) -> None:
        """Flush TensorBoard's file."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:  # metrics.jsonl has all of it; and if the run failed, that is to be told
            self._console.print(f"{self._folder / TENSORBOARD} lacks its end ({error})", markup=False)

    def _append(self, row: Mapping[str, Any], prefix: str) -> None:
        if self._writer is None:
            return
        with writing(self._folder / METRICS), (self._folder / METRICS).open("a") as stream:
            stream.write(json.dumps({name: _written(value) for name, value in row.items()}, allow_nan=False) + "\n")
        with writing(self._folder / TENSORBOARD):
            for name, value in row.items():
                if name not in _PLACE:
                    self._writer.add_scalar(name if "/" in name else prefix + name, value, row["step"])


def _written(value: float) -> float | None:
    """JSON has no word for what is no number, or has none."""
    return value if math.isfinite(value) else None


def metric_lines(metrics: Mapping[str, float]) -> list[str]:
    """Metrics for people: those without "/" in their name on the first line, then a line for each group."""
    groups: dict[str, list[str]] = {"": []}
    for name, value in metrics.items():
        group, _, rest = name.rpartition("/")
        groups.setdefault(group, []).append(f"{rest} {value:.2f}")
    return ["  ".join([f"{group}:", *found] if group else found) for group, found in groups.items()]


def memory_mb() -> float:
    """The most memory this process has held so far, in MB of 10^6 bytes: the GPU's where there is one, else the machine's."""
    if process().device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in the order of their steps, each step and each evaluation once: the last one written.

    A line that is no row is passed over.
    """
    last: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in (folder / METRICS).read_bytes().splitlines():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            last[int(row["step"]), "loss" not in row] = row
    return [last[key] for key in sorted(last)]
