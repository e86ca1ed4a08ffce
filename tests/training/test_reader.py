"""The reader on a tiny checkpoint: windows, gold spans, batches, and a whole run that is stopped and resumed."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.config import LoopConfig
from openbook_training.errors import CheckpointNotFound, InvalidConfig, InvalidData, TrainingDiverged
from openbook_training.loop import Loop, Stopped
from openbook_training.progress import progress
from openbook_training.reader import PairEncoder, build_reader, forward, predict
from openbook_training.run import train
from openbook_training.span_task import Example
from openbook_training.squad import Question, hold_out, occurrences
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.reader import ReaderConfig, ReaderTask
from rich.console import Console

WORDS = "red blue green one two three city river king book"


@pytest.fixture
def encoder(tiny_checkpoint: Path) -> PairEncoder:
    return PairEncoder(resolve_checkpoint(str(tiny_checkpoint)), max_tokens=24, stride=4, max_question_tokens=6)


@pytest.fixture
def training_file(questions_file: Path, tmp_path: Path) -> Path:
    return shutil.copy(questions_file, tmp_path / "train.jsonl")


def config_for(training_file: Path, tiny_checkpoint: Path, output: Path, **loop: object) -> ReaderConfig:
    return ReaderConfig(
        output=str(output),
        checkpoint=str(tiny_checkpoint),
        train=str(training_file),
        held_out=4,
        max_tokens=32,
        stride=4,
        max_question_tokens=8,
        max_answer_tokens=5,
        negatives=(1,),
        mined=5,
        lora_rank=2,
        lora_alpha=2,
        loop=dataclasses.replace(LoopConfig(epochs=2, batch_examples=4, precision="fp32", learning_rate=1e-2), **loop),  # type: ignore[arg-type]
    )


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.mark.parametrize("words", [1, 5, 14, 15, 16, 30, 97])
def test_windows_cover_every_passage_token_and_keep_to_the_limit(encoder: PairEncoder, words: int) -> None:
    passage = " ".join(WORDS.split()[number % 10] for number in range(words))
    pairs = list(encoder.pairs("what was red ?", [passage], 0))
    covered = {offset for pair in pairs for offset in pair.offsets}
    assert covered == set(encoder.tokens(passage)[1])
    assert all(len(pair.ids) <= 24 for pair in pairs)
    assert all(pair.ids[pair.first + len(pair.offsets) :] == [encoder.sep] for pair in pairs)


def test_gold_spans_point_at_the_answer_in_every_window_that_holds_it_whole(encoder: PairEncoder) -> None:
    passage = "red blue green one two three city river king book " * 3
    start = passage.index("river king", 60)
    found = 0
    for pair in encoder.pairs("what ?", [passage], 0):
        for first, extra in pair.gold([(start, start + len("river king"))], 5):
            offsets = pair.offsets[first - pair.first], pair.offsets[first - pair.first + extra]
            assert passage[offsets[0][0] : offsets[1][1]] == "river king"
            found += 1
    assert found >= 1


def test_logits_do_not_depend_on_the_other_pairs_of_a_batch(encoder: PairEncoder, tiny_checkpoint: Path) -> None:
    model = build_reader(resolve_checkpoint(str(tiny_checkpoint)), lora_rank=2, lora_alpha=2).eval()
    pairs = list(encoder.pairs("what was red ?", ["red blue", "one two three city river king book one two"], 0))
    with torch.inference_mode():
        together = forward(model, pairs, encoder, torch.device("cpu"))[0]
        alone = forward(model, pairs[:1], encoder, torch.device("cpu"))[0]
    width = alone.shape[1]
    assert torch.allclose(together[0, :width], alone[0], atol=1e-5)


def test_a_prediction_is_text_of_the_passage_and_probabilities_do_not_exceed_one(encoder: PairEncoder, tiny_checkpoint: Path) -> None:
    model = build_reader(resolve_checkpoint(str(tiny_checkpoint)), lora_rank=2, lora_alpha=2).eval()
    passages = ["the red king", "one city by the river two three one two three one two three red"]
    [prediction] = predict(
        model, encoder, [("what was red ?", passages)], max_answer_tokens=5, device=torch.device("cpu"), autocast=nullcontext
    )
    assert any(prediction.text in passage for passage in passages)
    assert prediction.score <= 0
    assert prediction.null <= 0


def test_a_passage_of_which_the_tokenizer_makes_nothing_has_an_empty_answer(encoder: PairEncoder, tiny_checkpoint: Path) -> None:
    model = build_reader(resolve_checkpoint(str(tiny_checkpoint)), lora_rank=4, lora_alpha=8).eval()
    questions = [("Where?", ["\ufffd"]), ("Where?", ["\u200b", "In the library."])]
    nothing, found = predict(model, encoder, questions, max_answer_tokens=4, device=torch.device("cpu"), autocast=nullcontext)
    assert (nothing.text, nothing.null) == ("", 0.0)
    assert found.text


def test_held_out_questions_share_no_passage_with_training() -> None:
    questions = [Question(id=str(n), text="?", context=f"passage {n // 3}", answers=("passage",)) for n in range(60)]
    train, held = hold_out(questions, 9)
    assert 9 <= len(held) <= 11
    assert not {q.context for q in train} & {q.context for q in held}
    assert len(train) + len(held) == 60


def losses(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_stopped_run_resumes_to_the_same_losses_as_an_uninterrupted_one(
    training_file: Path, tiny_checkpoint: Path, tmp_path: Path, killed_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    whole = config_for(training_file, tiny_checkpoint, tmp_path / "whole")
    train(OBJECTIVES["reader"], whole, resume=False, console=quiet())
    halves = config_for(training_file, tiny_checkpoint, tmp_path / "halves", checkpoint_minutes=0.0)

    with killed_after(7):
        train(OBJECTIVES["reader"], halves, resume=False, console=quiet())
    train(OBJECTIVES["reader"], halves, resume=True, console=quiet())
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert len(losses(tmp_path / "whole")) == 10
    assert {file.name for file in (tmp_path / "whole" / "best").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "reader.json",
    }


def test_a_stop_after_the_last_step_of_an_epoch_does_not_skip_its_evaluation(
    training_file: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = config_for(training_file, tiny_checkpoint, tmp_path / "run", epochs=1)
    original = Loop._take_step

    def stops_at_five(self: Loop[object], batch: list[object], total: int) -> float:
        loss = original(self, batch, total)
        if self._step == 5:
            self._stopping.set()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_take_step", stops_at_five)
        with pytest.raises(Stopped, match="step 5 of 5"):
            train(OBJECTIVES["reader"], config, resume=False, console=quiet())
    metrics = train(OBJECTIVES["reader"], config, resume=True, console=quiet())
    assert "held_out_f1" in metrics
    assert (tmp_path / "run" / "best" / "reader.json").is_file()
    assert train(OBJECTIVES["reader"], config, resume=True, console=quiet()) == metrics


def test_a_log_tells_how_far_a_long_job_is_and_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 40.0, 41.0, 90.0])
    monkeypatch.setattr("openbook_training.progress.time.monotonic", lambda: next(clock))
    console = quiet()
    with progress(console, "training", 100, completed=20) as update:
        for done in (30, 60, 61, 100):
            update(done, "loss 1.5")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "training: 60 of 100, about 0.7 min left, loss 1.5",
        "training: 100 of 100, about 0.0 min left, loss 1.5",
    ]


def test_the_epoch_is_chosen_on_held_out_questions_in_the_company_of_hard_negatives(
    training_file: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ReaderTask(config_for(training_file, tiny_checkpoint, tmp_path / "run"), quiet())
    asked: list[tuple[str, list[str]]] = []

    def answer_all(model: object, encoder: object, questions: list[tuple[str, list[str]]], *others: object) -> list[str]:
        asked.extend(questions)
        return [""] * len(questions)

    monkeypatch.setattr("openbook_training.span_task.answer_all", answer_all)
    assert task.evaluate(task.model)["held_out_f1"] == 0.0
    assert [question for question, _ in asked] == [question.text for question in task.held_out]
    assert any(len(passages) == 2 for _, passages in asked)
    for question, (_, passages) in zip(task.held_out, asked, strict=True):
        assert passages[0] == question.context
        assert not any(occurrences(passage, question.answers) for passage in passages[1:])


def test_negatives_are_a_questions_own_whatever_ids_the_data_have(training_file: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"id": None} for line in training_file.read_text().splitlines()]
    training_file.write_text("\n".join(map(json.dumps, rows)))
    config = dataclasses.replace(config_for(training_file, tiny_checkpoint, tmp_path / "run"), no_answer_share=0.5, negatives=(2,))
    task = ReaderTask(config, quiet())
    examples = [example for batch in task.batches(0) for example in batch]
    assert len(examples) == 20
    own = [example.passages.count(example.question.context) for example in examples]
    assert set(own) == {0, 1}
    for example in examples:
        assert not any(occurrences(z, example.question.answers) for z in example.passages if z != example.question.context)


def test_a_question_that_no_span_can_answer_is_left_out_named_and_counted(
    training_file: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in training_file.read_text().splitlines()]
    rows[3]["answers"]["text"] = ["the green of"]  # of no passage
    rows[5]["answers"]["text"] = [rows[5]["context"]]  # more than five tokens
    rows[6]["answers"]["text"] = [rows[6]["context"], *rows[6]["answers"]["text"]]
    rows[7]["answers"]["text"] = []
    training_file.write_text("\n".join(map(json.dumps, rows)))
    console = Console(file=io.StringIO(), width=300)
    task = ReaderTask(config_for(training_file, tiny_checkpoint, tmp_path / "run"), console)
    kept = {question.id for question in (*task.train, *task.held_out)}
    assert {f"q{number}" for number in range(24)} - kept == {"q3", "q5"}
    assert isinstance(console.file, io.StringIO)
    assert "1 of 24 questions left out, their answer is not in their passage: ['q3']" in console.file.getvalue()
    assert "1 of 24 questions left out, no window holds an answer of theirs in max_answer_tokens, 5: ['q5']" in console.file.getvalue()


def test_only_questions_that_have_an_answer_are_scored(
    training_file: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ReaderTask(config_for(training_file, tiny_checkpoint, tmp_path / "run"), quiet())
    monkeypatch.setattr("openbook_training.span_task.answer_all", lambda model, encoder, read, *others: ["red"] * len(read))
    questions = [Question(id="a", text="?", context="red", answers=("red",)), Question(id="b", text="?", context="blue", answers=())]
    examples = [Example(question, [question.context]) for question in questions]
    assert task.score(task.model, examples, "dev") == {"dev_em": 100.0, "dev_f1": 100.0}
    assert task.score(task.model, examples[1:], "dev") == {}


def test_more_tokens_than_the_checkpoint_has_positions_are_refused(training_file: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(config_for(training_file, tiny_checkpoint, tmp_path / "run"), max_tokens=129)
    with pytest.raises(InvalidConfig, match="max_tokens: 129 is above 128, the positions of checkpoint"):
        train(OBJECTIVES["reader"], config, resume=False, console=quiet())


def test_a_held_out_share_that_leaves_no_question_is_refused(training_file: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(config_for(training_file, tiny_checkpoint, tmp_path / "run"), held_out=300)
    with pytest.raises(InvalidData, match="held_out takes all 24 usable questions; lower held_out, 300"):
        train(OBJECTIVES["reader"], config, resume=False, console=quiet())
    assert not (tmp_path / "run" / "best").exists()


def test_a_finished_run_is_not_overwritten_by_accident(training_file: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = config_for(training_file, tiny_checkpoint, tmp_path / "run", epochs=1, max_steps=1)
    train(OBJECTIVES["reader"], config, resume=False, console=quiet())
    with pytest.raises(InvalidConfig, match="--resume"):
        train(OBJECTIVES["reader"], config, resume=False, console=quiet())


def test_a_diverged_step_names_itself_and_its_batch(training_file: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReaderTask, "loss", lambda self, model, batch, rng: torch.tensor(float("nan")))
        with pytest.raises(TrainingDiverged, match=r"loss is nan at step 1;.*Batch: q\d+"):
            train(OBJECTIVES["reader"], config_for(training_file, tiny_checkpoint, tmp_path / "run"), resume=False, console=quiet())


def test_training_lowers_the_loss(training_file: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    train(OBJECTIVES["reader"], config_for(training_file, tiny_checkpoint, tmp_path / "run", epochs=12), resume=False, console=quiet())
    history = list(losses(tmp_path / "run").values())
    assert sum(history[-5:]) < 0.8 * sum(history[:5])


def test_a_student_comes_closer_to_its_teacher_which_is_itself_at_no_distance(
    training_file: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = config_for(training_file, tiny_checkpoint, tmp_path / "teacher", epochs=6)
    train(OBJECTIVES["reader"], config, resume=False, console=quiet())
    teacher = str(tmp_path / "teacher" / "best")
    taught = config_for(training_file, tiny_checkpoint, tmp_path / "taught", epochs=12, seed=7)
    taught = dataclasses.replace(taught, teacher=teacher, teacher_weight=1.0, no_answer_share=0.0)  # the loss is the distance
    train(OBJECTIVES["reader"], taught, resume=False, console=quiet())
    history = list(losses(tmp_path / "taught").values())
    assert sum(history[-5:]) < 0.6 * sum(history[:5])
    task = ReaderTask(dataclasses.replace(taught, initial_adapter=teacher), quiet())
    batch = task.batches(0)[0]
    assert float(task.loss(task.model.eval(), batch, random.Random(0)).detach()) == pytest.approx(0.0, abs=1e-6)


def test_a_teacher_is_not_asked_where_the_own_passage_was_taken_away(training_file: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = config_for(training_file, tiny_checkpoint, tmp_path / "teacher", epochs=1)
    train(OBJECTIVES["reader"], config, resume=False, console=quiet())
    taught = dataclasses.replace(config, teacher=str(tmp_path / "teacher" / "best"), teacher_weight=0.75, output=str(tmp_path / "taught"))
    task, untaught = ReaderTask(taught, quiet()), ReaderTask(config, quiet())
    model = task.model.eval()
    here, *others = [one.question for one in task.batches(0)[0]][:3]
    beside, without = Example(here, [here.context]), Example(others[0], [others[1].context])
    assert others[0].context != others[1].context

    def loss(of: ReaderTask, *batch: Example) -> float:
        return float(of.loss(model, list(batch), random.Random(0)).detach())

    assert loss(task, without) == pytest.approx(loss(untaught, without), rel=1e-5)
    assert loss(task, beside) != pytest.approx(loss(untaught, beside), rel=1e-3)
    assert loss(task, beside, without) == pytest.approx((loss(task, beside) + loss(untaught, without)) / 2, rel=1e-5)


def test_a_teacher_that_is_no_reader_and_a_weight_that_is_no_share_are_refused(
    training_file: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = config_for(training_file, tiny_checkpoint, tmp_path / "run")
    nowhere = str(tmp_path / "nowhere")
    for key in ("teacher", "initial_adapter"):
        with pytest.raises(
            CheckpointNotFound, match=f"{key}: '.*nowhere' holds no adapter_config.json; train it first, .* leave the key out"
        ):
            ReaderTask(dataclasses.replace(config, **{key: nowhere}), quiet())
    with pytest.raises(InvalidConfig, match=r"teacher_weight: 1.5 is not in \[0, 1\]\nteacher_temperature: 0 is not in"):
        train(OBJECTIVES["reader"], dataclasses.replace(config, teacher_weight=1.5, teacher_temperature=0), resume=False, console=quiet())
