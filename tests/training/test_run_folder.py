"""What a run leaves behind: metrics, TensorBoard scalars, plots; and that bad rows and small memory do not stop it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, ClassVar

import matplotlib.image
import pytest
import torch
from openbook_training.config import LoopConfig
from openbook_training.errors import InvalidConfig
from openbook_training.loop import Loop
from openbook_training.plots import plot
from openbook_training.record import Record, memory_mb, metric_lines, read_metrics
from openbook_training.run import train
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.reader import ReaderConfig
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_run_leaves_metrics_scalars_and_a_picture_and_its_log_says_speed_and_memory(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"id": f"q{n}", "question": "who ?", "context": f"the red king {n}", "answers": ["red king"]} for n in range(8)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "train.jsonl").write_text("\n".join([*lines[:3], "{broken", '{"id": "q9"}', *lines[3:]]))
    config = ReaderConfig(
        output=str(tmp_path / "run"),
        checkpoint=str(tiny_checkpoint),
        train=str(tmp_path / "train.jsonl"),
        held_out=2,
        max_tokens=32,
        stride=4,
        max_question_tokens=8,
        max_answer_tokens=5,
        negatives=(0,),
        lora_rank=2,
        lora_alpha=2,
        loop=LoopConfig(epochs=2, batch_examples=3, precision="fp32"),
    )
    console = quiet()
    train(OBJECTIVES["reader"], config, resume=False, console=console)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert "2 of 10 rows left out" in said
    assert "train.jsonl: line 4: is not JSON" in said
    assert "train.jsonl: line 5: lacks" in said
    assert "training: 4 of 4, about 0.0 min left, loss" in said
    assert "examples/s" in said
    assert " MB" in said
    written = read_metrics(tmp_path / "run")
    steps = [row for row in written if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(row["examples_per_second"] > 0 and row["memory_mb"] > 10 for row in steps)
    assert [row["step"] for row in written if "held_out_f1" in row] == [2, 4]
    seen = scalars(tmp_path / "run")
    assert seen["train/loss"] == [(row["step"], pytest.approx(row["loss"])) for row in steps]
    assert [step for step, _ in seen["evaluation/held_out_f1"]] == [2, 4]
    assert (tmp_path / "run" / "plots.png").is_file()


def test_steps_taken_again_count_once_in_metrics_and_in_tensorboard(tmp_path: Path) -> None:
    first = Record(tmp_path, first_step=1)
    for step in (1, 2, 3):
        first.step({"step": step, "epoch": 0, "loss": 5.0, "learning_rate": 0.1})
    first.evaluation({"step": 3, "epoch": 0, "f1": 50.0, "dim8/f1": 40.0})
    first.close()
    again = Record(tmp_path, first_step=3)  # the last checkpoint was that of step 2
    again.step({"step": 3, "epoch": 0, "loss": 4.0, "learning_rate": 0.1})
    again.evaluation({"step": 3, "epoch": 0, "f1": 60.0, "dim8/f1": 45.0})
    again.close()
    assert [(row["step"], row.get("loss"), row.get("f1")) for row in read_metrics(tmp_path)] == [
        (1, 5.0, None),
        (2, 5.0, None),
        (3, 4.0, None),
        (3, None, 60.0),
    ]
    seen = scalars(tmp_path)
    assert seen["train/loss"] == [(1, 5.0), (2, 5.0), (3, 4.0)]
    assert seen["dim8/f1"] == [(3, 45.0)]


def test_a_process_that_is_not_the_first_records_nothing(tmp_path: Path) -> None:
    record = Record(tmp_path, first_step=1, silent=True)
    record.step({"step": 1, "epoch": 0, "loss": 5.0})
    record.evaluation({"step": 1, "epoch": 0, "f1": 5.0})
    record.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [1, 50])
def test_a_plot_has_a_panel_for_each_group_of_metrics(tmp_path: Path, steps: int) -> None:
    rows: list[dict[str, Any]] = [{"step": n, "epoch": 0, "loss": 1 / n, "learning_rate": 0.1} for n in range(1, steps + 1)]
    heights = []
    for groups in ([], ["dim8/"], ["dim8/", "dim4/", "dim2/"]):
        evaluation = {"step": steps, "epoch": 0, "f1": 50.0, "score": 50.0} | {f"{group}f1": 40.0 for group in groups}
        plot([*rows, evaluation], tmp_path / "plots.png")
        heights.append(matplotlib.image.imread(tmp_path / "plots.png").shape[0])
    assert heights[0] == heights[1] < heights[2]  # two panels a line: three, four, six


def test_what_a_task_observes_in_its_steps_gets_a_panel_beside_the_evaluations(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": n, "epoch": 0, "loss": 1 / n, "learning_rate": 0.1} for n in range(1, 5)]
    heights = []
    for observed in ({}, {"drift/cosine": 99.0, "retrieval_utility/mean": 0.5}):
        plot([*(row | observed for row in rows), {"step": 4, "epoch": 0, "perplexity/held_out": 500.0}], tmp_path / "plots.png")
        heights.append(matplotlib.image.imread(tmp_path / "plots.png").shape[0])
    assert heights[0] < heights[1]  # two panels a line: three, then five


def test_metrics_are_said_a_group_a_line() -> None:
    assert metric_lines({"f1": 50.0, "dim8/f1": 1.25, "em": 2.0, "dim8/em": 3.0}) == ["f1 50.00  em 2.00", "dim8:  f1 1.25  em 3.00"]


@pytest.mark.skipif(not Path("/proc/self/status").is_file() or torch.cuda.is_available(), reason="asks Linux for the same number")
def test_memory_is_the_most_that_the_process_has_held_in_megabytes() -> None:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    assert memory_mb() == pytest.approx(int(line.split()[1]) * 1024 / 1e6, rel=0.02)


class Backbone:
    """A task around a tiny transformer, as far as the loop's settings need one."""

    compares_examples: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model


def test_recomputed_activations_give_the_same_gradients_and_hold_less(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from openbook_training.checkpoint import resolve_checkpoint
    from openbook_training.retriever import build_retriever

    ids = torch.randint(5, 60, (6, 32), generator=torch.Generator().manual_seed(0))
    measured: list[tuple[int, list[torch.Tensor]]] = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_retriever(resolve_checkpoint(str(tiny_checkpoint)), lora_rank=2, lora_alpha=2)
        task: Any = Backbone(model)
        Loop(task, LoopConfig(gradient_checkpointing=checkpointing, precision="fp32"), tmp_path, quiet())
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        held = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            states = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        states.square().mean().backward()
        measured.append((held, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]))
    assert measured[1][0] < measured[0][0] / 3
    for plain, recomputed in zip(measured[0][1], measured[1][1], strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-5, atol=1e-8)


def test_a_model_that_cannot_recompute_says_so(tmp_path: Path) -> None:
    task: Any = Backbone(nn.Linear(2, 2))
    with pytest.raises(InvalidConfig, match="gradient_checkpointing"):
        Loop(task, LoopConfig(gradient_checkpointing=True, precision="fp32"), tmp_path, quiet())
