"""The one training loop: steps, progress, checkpoints, resuming, evaluation, the best result kept.

Promises: a stop (Ctrl-C, SIGTERM) saves a checkpoint first; a kill loses at most the steps since the last one; a
resumed run sees the same batches and the same random numbers as an uninterrupted one, for both depend on seed, step and
process alone. Knows nothing of any objective.
"""

from __future__ import annotations

import copy
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.console import Console
from torch import Tensor, nn

from openbook_training.config import LoopConfig
from openbook_training.errors import InvalidConfig, InvalidData, TrainingDiverged
from openbook_training.progress import Update, progress
from openbook_training.recomputation import recompute_activations
from openbook_training.record import Record, memory_mb, metric_lines
from openbook_training.run_folder import CHECKPOINT, load_state, save_folder, save_state

Example = TypeVar("Example")


class Task(Protocol[Example]):
    """What an objective gives the loop."""

    model: nn.Module
    compares_examples: ClassVar[bool]  # the loss is no mean over examples: the loop never splits a batch, and `loss` itself
    # holds the activations of `micro_batch_examples` at once

    def __init__(self, config: Any, console: Console) -> None: ...

    def summary(self) -> str:
        """What it trains on, for the first line of the run."""

    def batches(self, epoch: int) -> list[list[Example]]:
        """All batches of an epoch, as many in each: the same for the same seed and epoch, however often it is asked."""

    def trains_on(self) -> Mapping[str, Iterable[object]]:
        """What decides its batches, and which is the best epoch, each part under the name that a user knows it by: a run goes on only with
        the same. Nothing in it is a set, whose order is another in the next process."""

    def loss(self, model: nn.Module, batch: list[Example], rng: random.Random) -> Tensor:
        """Scalar mean loss."""

    def describe(self, batch: list[Example]) -> str:
        """Names of the examples, for the message about a diverged step."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics after an epoch; "score" decides which epoch is the best."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what a user deploys."""


class Staged:
    """A base for tasks that change between the steps of a run: layers thaw, an index is made anew. Others need none of this."""

    def before_step(self, model: nn.Module, step: int, total: int) -> None:
        """Called before each step; `model` is the one in training, `step` of `total` have been taken."""

    def observed(self) -> dict[str, float]:
        """Called after each step: what the task measured in it, for metrics.jsonl; names hold a "/", and each group is a plot."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to remember for `restore`: plain values and tensors."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Called once, before the first step of a resumed run."""


class Stopped(Exception):
    """The user asked the run to stop; a checkpoint was saved."""


class Loop(Generic[Example]):
    def __init__(
        self, task: Task[Example], config: LoopConfig, folder: Path, console: Console, *, stated: Mapping[str, Any] | None = None
    ) -> None:
        """`stated`: what the checkpoints say the whole run was made with, see `run_folder`."""
        self._task, self._config, self._folder, self._console = task, config, folder, console
        self._stated = dict(stated or {})
        self._staged = task if isinstance(task, Staged) else Staged()
        self._file = folder / CHECKPOINT
        # bf16 autocast works on a CPU too; accelerate picks the device and shards over processes.
        self.accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
        if config.gradient_checkpointing:
            recompute_activations(task.model)
        self._trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        # Not wrapped for several processes: a wrapper counts backward passes, and ours are as many as a process's share needs.
        self._model = self.accelerator.prepare_model(task.model, evaluation_mode=True)
        self._optimizer = self.accelerator.prepare_optimizer(self._optimizer)
        if self.accelerator.num_processes > 1:
            _copy(self._trained, broadcast([parameter.detach() for parameter in self._trained]))
        self._average = [parameter.detach().clone() for parameter in self._trained] if config.average_decay else None
        self._step = self._evaluated = 0
        self._best: dict[str, float] = {}  # metrics of the best epoch so far
        self._saved = 0.0  # when the last checkpoint was
        self._stopping, self._agreed = threading.Event(), False  # this process was told to stop; all stop after this step

    def run(self, *, resume: bool, begin: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Train to the end; returns the metrics of the best epoch. `begin` is called when nothing refuses the run any more.

        Raises:
            Stopped: after SIGINT or SIGTERM, once a checkpoint is on the disk.
            TrainingDiverged: the loss, or its gradient, is NaN or infinite.
            NotWritten: the disk is full.
            InvalidData: there is no batch to train on.
        """
        config = self._config
        size = len(self._task.batches(0))  # steps of an epoch
        if not size:
            raise InvalidData("no batch to train on in an epoch; give more training data")
        total = min(size * config.epochs, config.max_steps or size * config.epochs)
        if resume and self._file.is_file():
            self._restore(self._file)
            self._console.print(f"resuming {self._folder} at step {self._step}")
        elif resume:
            self._console.print(f"{self._folder} holds no checkpoint to resume; beginning")
        begin()
        self._saved = time.monotonic()
        silent = not self.accelerator.is_main_process
        with (
            self._signals(),
            closing(Record(self._folder, self._console, first_step=self._step + 1, silent=silent)) as self._record,
            progress(self._console, "training", total, completed=self._step) as update,
        ):
            for epoch in range(max(0, self._step - 1) // size, -(-total // size)):  # the last one begun may lack its evaluation
                end = min((epoch + 1) * size, total)
                if self._step < end:
                    self._train_epoch(epoch, epoch * size, total, update)
                due = (epoch + 1) % config.evaluate_every_epochs == 0 or end == total
                if due and self._evaluated < end:  # a stop may have fallen between the last step and this
                    self._evaluate(epoch)
                    self._evaluated = end
                    self._checkpoint()
        return self._best

    def _train_epoch(self, epoch: int, first: int, total: int, update: Update) -> None:
        """The epoch's batches that are not behind us yet; `first` is the step that the epoch begins with."""
        began = ended = time.monotonic()
        examples = 0
        for batch in self._task.batches(epoch)[self._step - first : total - first]:
            row = {"epoch": epoch, "learning_rate": self._rate(total)}
            self._staged.before_step(self.accelerator.unwrap_model(self._model), self._step, total)
            loss = self._take_step(batch, total)
            before, ended = ended, time.monotonic()
            examples += len(batch)
            row |= {"step": self._step, "loss": loss, "examples_per_second": len(batch) / (ended - before), "memory_mb": memory_mb()}
            self._record.step(row | self._staged.observed())
            update(self._step, f"loss {loss:.3f}, {examples / (ended - began):.1f} examples/s, {row['memory_mb']:,.0f} MB")
            if self._agreed if self.accelerator.num_processes > 1 else self._stopping.is_set():
                self._checkpoint()
                raise Stopped(f"stopped at step {self._step} of {total}; go on with --resume")
            if time.monotonic() - self._saved > self._config.checkpoint_minutes * 60:
                self._checkpoint()

    def _take_step(self, batch: list[Example], total: int) -> float:
        config = self._config
        for group in self._optimizer.param_groups:  # a checkpoint brings the values that it was saved with
            group |= {"lr": self._rate(total), "weight_decay": config.weight_decay}
        self._model.train()
        share = batch[self.accelerator.process_index :: self.accelerator.num_processes]
        rng = random.Random(f"{config.seed}/{self._step}/{self.accelerator.process_index}")
        torch.manual_seed(rng.getrandbits(63))  # of dropout, on every device: nothing of it has to be kept for a resumed run
        value = 0.0
        size = max(1, len(share)) if self._task.compares_examples else config.micro_batch_examples
        for at in range(0, len(share), size):
            part = share[at : at + size]
            with self.accelerator.autocast():
                loss = self._task.loss(self._model, part, rng) * (len(part) / len(batch))
            value += float(loss.detach())
            if not math.isfinite(value):
                raise self._diverged("loss", value, part)
            self.accelerator.backward(loss)
        value = self._summed(value)
        norm = float(self.accelerator.clip_grad_norm_(self._trained, config.max_gradient_norm))
        if not math.isfinite(norm):  # before it is in the weights, and they in a checkpoint
            raise self._diverged("gradient", norm, batch)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        if self._average is not None:
            decay = min(config.average_decay, (1 + self._step) / (10 + self._step))
            with torch.no_grad():
                torch._foreach_lerp_(self._average, [parameter.detach() for parameter in self._trained], 1 - decay)
        return value

    def _diverged(self, what: str, value: float, examples: list[Example]) -> TrainingDiverged:
        batch = self._task.describe(examples)
        return TrainingDiverged(f"{what} is {value} at step {self._step + 1}; lower the learning rate. Batch: {batch}")

    def _summed(self, loss: float) -> float:
        """The loss over all processes; gradients become their sums over all, and all agree on whether one was told to stop. Each process
        has divided by the whole batch, so the sum is what one process alone would have had, however the shares differ."""
        if self.accelerator.num_processes == 1:
            return loss
        gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in self._trained]
        taught = [float(parameter.grad is not None) for parameter in self._trained]
        said = torch.tensor([loss, float(self._stopping.is_set()), *taught], device=self.accelerator.device)
        summed = self.accelerator.reduce(torch.cat([*(gradient.flatten() for gradient in gradients), said]), reduction="sum")
        sizes = [gradient.numel() for gradient in gradients]
        *parts, said = summed.split([*sizes, len(said)])
        value, stopped, *taught = said.tolist()
        for parameter, part, by in zip(self._trained, parts, taught, strict=True):
            parameter.grad = part.view_as(parameter) if by else None  # of a layer that rests: a zero would let its weights decay
        self._agreed = bool(stopped)
        return float(value)

    def _rate(self, total: int) -> float:
        warmup = max(1, int(self._config.warmup_share * total))
        if self._step < warmup:
            return self._config.learning_rate * (self._step + 1) / warmup
        return self._config.learning_rate * max(0.0, (total - self._step) / max(1, total - warmup))

    def _evaluate(self, epoch: int) -> None:
        with self._averaged():
            model = self.accelerator.unwrap_model(self._model).eval()
            with torch.inference_mode():
                metrics = self._task.evaluate(model)
            self._record.evaluation({"step": self._step, "epoch": epoch, **metrics})
            self._console.print(f"epoch {epoch + 1}: " + "\n  ".join(metric_lines(metrics)), soft_wrap=True, highlight=False)
            if metrics["score"] >= self._best.get("score", -math.inf) and self.accelerator.is_main_process:
                self._best = metrics
                save_folder(self._folder / "best", partial(self._task.save, model))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within, the model carries the averaged weights."""
        if self._average is None:
            yield
            return
        own = [parameter.detach().clone() for parameter in self._trained]
        _copy(self._trained, self._average)
        try:
            yield
        finally:
            _copy(self._trained, own)

    def _checkpoint(self) -> None:
        self._saved = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self._step,
            "evaluated": self._evaluated,
            "best": self._best,
            "trained": [parameter.detach() for parameter in self._trained],
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
            "task": self._staged.state(),
        }
        save_state(self._file, state | self._stated)

    def _restore(self, file: Path) -> None:
        state = load_state(file)
        shapes = [tuple(tensor.shape) for tensor in state["trained"]]
        if shapes != [tuple(parameter.shape) for parameter in self._trained]:
            raise InvalidConfig(f"{file} was made with another model configuration; choose another output folder")
        _copy(self._trained, state["trained"])
        if self._average is not None and state["average"] is not None:
            _copy(self._average, state["average"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._step, self._evaluated, self._best = state["step"], state["evaluated"], state["best"]
        self._staged.restore(state.get("task", {}))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, _frame: object) -> None:
            self._console.print(f"{signal.Signals(number).name}: saving a checkpoint, then stopping")
            self._stopping.set()

        previous: dict[int, Callable[..., Any] | int | None] = {}
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(into, values, strict=True):
            target.copy_(value)
