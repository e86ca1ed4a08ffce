"""What a run leaves behind: metrics, TensorBoard scalars, plots; and that bad rows and small memory do not stop it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import matplotlib.image
import pytest
import torch
from openbook_training.config import LoopConfig
from openbook_training.errors import InvalidConfig, InvalidData, TrainingError
from openbook_training.loop import Loop
from openbook_training.plots import plot
from openbook_training.pretrained import best_device
from openbook_training.processes import process
from openbook_training.record import Record, memory_mb, metric_lines, read_metrics
from openbook_training.run import train
from openbook_training.run_folder import digests, held, load_state, save_folder, save_state
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


def config_in(folder: Path, checkpoint: Path, **loop: Any) -> ReaderConfig:
    rows = [{"id": f"q{n}", "question": "who ?", "context": f"the red king {n}", "answers": ["red king"]} for n in range(8)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ReaderConfig(
        output=str(folder / "run"),
        checkpoint=str(checkpoint),
        train=str(folder / "train.jsonl"),
        held_out=2,
        max_tokens=32,
        stride=4,
        max_question_tokens=8,
        max_answer_tokens=5,
        negatives=(0,),
        lora_rank=2,
        lora_alpha=2,
        loop=dataclasses.replace(LoopConfig(epochs=2, batch_examples=3, precision="fp32"), **loop),
    )


def test_a_run_leaves_metrics_scalars_and_a_picture_and_its_log_says_speed_and_memory(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, tiny_checkpoint)
    lines = Path(config.train).read_text().splitlines()
    Path(config.train).write_text("\n".join([*lines[:3], "{broken", '{"id": "q9"}', *lines[3:]]))
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
    first = Record(tmp_path, quiet(), first_step=1)
    for step in (1, 2, 3):
        first.step({"step": step, "epoch": 0, "loss": 5.0, "learning_rate": 0.1})
    first.evaluation({"step": 3, "epoch": 0, "f1": 50.0, "dim8/f1": 40.0})
    first.close()
    again = Record(tmp_path, quiet(), first_step=3)  # the last checkpoint was that of step 2
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


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_perplexity_beyond_all_numbers_is_null_in_metrics_and_in_no_picture(tmp_path: Path) -> None:
    record = Record(tmp_path, quiet(), first_step=1)
    record.step({"step": 1, "epoch": 0, "loss": 800.0, "learning_rate": 1.0})
    record.evaluation({"step": 1, "epoch": 0, "perplexity/held_out": math.inf, "score": -math.inf})
    record.close()
    evaluation = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)
    assert (evaluation["perplexity/held_out"], evaluation["score"]) == (None, None)
    assert (tmp_path / "plots.png").is_file()


def test_a_refused_run_leaves_everything_as_it_was_and_says_which_settings_differ(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, tiny_checkpoint)
    train(OBJECTIVES["reader"], config, resume=False, console=quiet())
    before = everything(tmp_path)
    other = dataclasses.replace(config, held_out=3, loop=dataclasses.replace(config.loop, seed=7, batch_examples=1, learning_rate=0.1))
    with pytest.raises(InvalidConfig, match="already holds a run; go on with --resume"):
        train(OBJECTIVES["reader"], other, resume=False, console=quiet())
    with pytest.raises(InvalidConfig, match="loop.seed was 42 and is 7; loop.batch_examples was 3 and is 1; held_out was 2 and is 3. Set"):
        train(OBJECTIVES["reader"], other, resume=True, console=quiet())
    assert everything(tmp_path) == before


def test_a_folder_that_another_process_trains_in_is_refused_with_its_number_until_that_ends(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, tiny_checkpoint)
    held_by = "import sys; from pathlib import Path; from openbook_training.run_folder import held\n"
    held_by += "with held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", held_by, config.output]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        before = everything(tmp_path)
        for resume in (False, True):
            with pytest.raises(InvalidConfig, match=rf"another process \(pid {other.pid}\) trains in .*run; stop it first, or choose"):
                train(OBJECTIVES["reader"], config, resume=resume, console=quiet())
        with pytest.raises(InvalidConfig, match=f"pid {other.pid}"), held(tmp_path / "run"):  # it began while this one read its data
            pass
        assert everything(tmp_path) == before
        other.kill()
    train(OBJECTIVES["reader"], config, resume=False, console=quiet())
    with held(tmp_path / "run"):  # the run that has ended holds it no more
        assert (tmp_path / "run" / "lock").read_text() == f"{os.getpid()}\n"


REFUSED = {
    "missing data": {"train": "nowhere.jsonl"},
    "a missing teacher": {"teacher": "nowhere"},
    "a missing adapter": {"initial_adapter": "nowhere"},
    "no question left to train on": {"held_out": 8},
}


@pytest.mark.parametrize("changed", REFUSED.values(), ids=REFUSED)
def test_a_run_refused_while_it_reads_what_it_needs_has_written_nothing(
    tiny_checkpoint: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    config = dataclasses.replace(config_in(tmp_path, tiny_checkpoint), **changed)
    with pytest.raises(TrainingError):
        train(OBJECTIVES["reader"], config, resume=False, console=quiet())
    assert not Path(config.output).exists()


def test_a_refused_resumption_leaves_the_settings_of_the_run_as_they_were(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, tiny_checkpoint)
    train(OBJECTIVES["reader"], config, resume=False, console=quiet())
    file = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"config": {}, "trained": state["trained"][1:]}, file)
    before = everything(tmp_path / "run")
    with pytest.raises(InvalidConfig, match="made with another model configuration"):
        train(OBJECTIVES["reader"], dataclasses.replace(config, lora_alpha=3), resume=True, console=quiet())
    Path(config.train).unlink()
    with pytest.raises(InvalidData, match="does not exist"):
        train(OBJECTIVES["reader"], dataclasses.replace(config, lora_alpha=3), resume=True, console=quiet())
    assert everything(tmp_path / "run") == before


def test_an_output_that_cannot_be_written_is_refused(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openbook_training.run_folder.os.access", lambda path, mode: False)
    with pytest.raises(InvalidConfig, match="output: .* cannot be written to; name another folder"):
        train(OBJECTIVES["reader"], config_in(tmp_path, tiny_checkpoint), resume=False, console=quiet())


def test_a_run_goes_on_with_other_speeds_and_from_a_checkpoint_that_states_no_settings(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, tiny_checkpoint)
    train(OBJECTIVES["reader"], config, resume=False, console=quiet())
    faster = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=3, learning_rate=1e-3))
    train(OBJECTIVES["reader"], faster, resume=True, console=quiet())
    file = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    assert (state["step"], state.pop("config")["train"]) == (6, config.train)
    torch.save(state | {"torch_rng": torch.get_rng_state()}, file)  # as older versions wrote them
    other = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=4, batch_examples=2))
    train(OBJECTIVES["reader"], other, resume=True, console=quiet())
    stated = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (stated["loop"]["epochs"], stated["loop"]["batch_examples"]) == (4, 2)
    assert not list((tmp_path / "run").glob("config.json.*"))


def test_a_run_whose_data_changed_is_refused_with_what_did_and_one_whose_dev_questions_did_goes_on(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_checkpoint)
    data, dev = Path(config.train), tmp_path / "dev.jsonl"
    dev.write_text(data.read_text())
    config = dataclasses.replace(config, dev=str(dev))
    train(OBJECTIVES["reader"], config, resume=False, console=quiet())
    began, kept = data.read_text(), everything(tmp_path / "run")
    data.write_text(began.replace("who ?", "who then ?"))
    with pytest.raises(
        InvalidData, match="run holds a run on other data: training questions, held-out questions changed since it began. Put"
    ):
        train(OBJECTIVES["reader"], config, resume=True, console=quiet())
    assert everything(tmp_path / "run") == kept
    data.write_text("\n" + began)  # the same rows at other places
    dev.write_text(began.replace("who ?", "who then ?"))
    train(OBJECTIVES["reader"], config, resume=True, console=quiet())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_says_what_it_trains_on(objective: str) -> None:
    assert callable(getattr(OBJECTIVES[objective].task(), "trains_on", None))


def test_a_digest_tells_parts_items_and_their_order_apart() -> None:
    first = digests({"labels": ["a", "b"], "texts": iter([("x", [1, 2])])})
    assert first == digests({"labels": ("a", "b"), "texts": [("x", [1, 2])]})
    others = [["b", "a"], ["ab"], ["a", "b", "c"], ["a"], ["a", b"b"]]
    assert len({digests({"labels": other})["labels"] for other in others} | {first["labels"]}) == 6
    assert digests({"labels": ["\ud800"]})  # half a character, which UTF-8 does not hold


def saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


DAMAGED = {
    "torn": (b"torn", "File is not a zip file"),
    "empty": (b"", "it is empty"),
    "a list": (saved([1]), "it holds a list, and not average, best, evaluated, optimizer, step, trained"),
    "of something else": (saved({"step": 1}), "it holds a dict, and not average"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_checkpoint_is_named(tiny_checkpoint: Path, tmp_path: Path, content: bytes, reason: str) -> None:
    config = config_in(tmp_path, tiny_checkpoint)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
    with pytest.raises(InvalidConfig, match=rf"checkpoint.pt cannot be read \({reason}.*\); remove it to begin again"):
        train(OBJECTIVES["reader"], config, resume=True, console=quiet())


def test_a_checkpoint_with_other_bytes_in_its_middle_is_not_resumed(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    state = dict.fromkeys(("step", "evaluated", "best", "average", "optimizer"), 0) | {"trained": [torch.zeros(10_000)]}
    save_state(file, state)
    assert load_state(file).keys() == state.keys()
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = random.Random(0).randbytes(400)
    file.write_bytes(content)
    with pytest.raises(InvalidConfig, match="checkpoint.pt cannot be read .* in it is not what was written"):
        load_state(file)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_finds_the_best_result_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    """Killed before the first, the second or no rename, one of the folders holds a whole result."""
    folder, synced, original = tmp_path / "best", [], os.fsync

    def save(words: str) -> Callable[[Path], None]:
        def write(aside: Path) -> None:
            (aside / "deeper").mkdir(parents=True)
            (aside / "deeper" / "weights").write_text(words)

        return write

    save_folder(folder, save("old"))
    left, rename = iter(range(renames)), Path.rename

    def killed(file: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return rename(file, target)

    monkeypatch.setattr(os, "fsync", lambda number: synced.append(number) or original(number))
    monkeypatch.setattr(Path, "rename", killed)
    with contextlib.suppress(KeyboardInterrupt):
        save_folder(folder, save("new"))
    assert synced
    found = {path.parts[-3]: path.read_text() for path in tmp_path.rglob("weights")}
    expected: list[dict[str, str]] = [{"best": "old", "best.new": "new"}, {"best.old": "old", "best.new": "new"}, {"best": "new"}]
    assert found == expected[renames]
    monkeypatch.setattr(Path, "rename", rename)
    save_folder(folder, save("newer"))
    assert [(path.name, (path / "deeper" / "weights").read_text()) for path in tmp_path.iterdir()] == [("best", "newer")]


@pytest.mark.parametrize("name", ["run", "run/deeper"])
def test_an_output_that_is_a_file_or_below_one_is_refused(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "run").write_text("mine")
    config = dataclasses.replace(config_in(tmp_path, tiny_checkpoint), output=str(tmp_path / name))
    with pytest.raises(InvalidConfig, match="output: '.*run' is a file"):
        train(OBJECTIVES["reader"], config, resume=False, console=quiet())


def test_half_a_line_that_a_kill_left_ends_no_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, tiny_checkpoint)
    train(OBJECTIVES["reader"], config, resume=False, console=quiet())
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "ep')
    for epochs in (3, 4):
        longer = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=epochs))
        train(OBJECTIVES["reader"], longer, resume=True, console=quiet())
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = quiet()
    record = Record(tmp_path, console, first_step=1)
    monkeypatch.setattr("openbook_training.record.plot", lambda rows, file: 1 / 0)
    record.evaluation({"step": 1, "epoch": 0, "f1": 50.0})
    record.close()
    assert isinstance(console.file, io.StringIO)
    assert "plots.png was not drawn (ZeroDivisionError" in console.file.getvalue()


class Drawn:
    """A task whose steps draw random numbers, as dropout does, and whose evaluations may draw some too."""

    compares_examples: ClassVar[bool] = False

    def __init__(self, batches: int, in_evaluation: int = 0) -> None:
        self.model: nn.Module = nn.Linear(2, 1)
        self.drawn: list[float] = []
        self._batches, self._in_evaluation = batches, in_evaluation

    def batches(self, epoch: int) -> list[list[int]]:
        return [[0]] * self._batches

    def loss(self, model: nn.Module, batch: list[int], rng: random.Random) -> torch.Tensor:
        self.drawn.append(float(torch.rand(())))
        return model(torch.ones(1, 2)).square().sum()  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        torch.rand(self._in_evaluation)
        return {"score": 0.0}

    def save(self, model: nn.Module, folder: Path) -> None:
        folder.mkdir()


def test_the_random_numbers_of_a_step_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    drawn = []
    for name, in_evaluation, seed in (("a", 0, 1), ("b", 5, 1), ("c", 0, 2)):
        task: Any = Drawn(2, in_evaluation)
        (tmp_path / name).mkdir()
        Loop(task, LoopConfig(epochs=2, precision="fp32", seed=seed), tmp_path / name, quiet()).run(resume=False)
        drawn.append(task.drawn)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 4


def test_a_run_without_a_batch_is_refused(tmp_path: Path) -> None:
    task: Any = Drawn(0)
    with pytest.raises(InvalidData, match="no batch to train on in an epoch"):
        Loop(task, LoopConfig(precision="fp32"), tmp_path, quiet()).run(resume=False)
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_not_the_first_says_nothing_and_states_no_settings(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = quiet()
    monkeypatch.setattr("openbook_training.run.process", lambda: SimpleNamespace(is_main_process=False))
    train(OBJECTIVES["reader"], config_in(tmp_path, tiny_checkpoint, max_steps=1), resume=False, console=console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""
    assert not (tmp_path / "run" / "config.json").exists()


def test_models_go_to_the_device_that_accelerate_has_chosen_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openbook_training.pretrained.process", lambda: SimpleNamespace(device=torch.device("meta")))
    assert best_device() == torch.device("meta")
    monkeypatch.setattr("openbook_training.processes.PartialState", lambda cpu: SimpleNamespace(cpu=cpu))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert process().cpu is True


def test_a_process_that_is_not_the_first_records_nothing(tmp_path: Path) -> None:
    record = Record(tmp_path, quiet(), first_step=1, silent=True)
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
