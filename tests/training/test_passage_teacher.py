"""A reader that teaches the retriever: its masses, the passages a question is compared on, the loss, and a whole run."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openbook_training import teacher as teacher_module
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.config import LoopConfig, load_config
from openbook_training.errors import CheckpointNotFound, InvalidConfig
from openbook_training.objectives import NEGATIVE, matryoshka_mean, passage_distillation_loss, passage_masses, span_scores
from openbook_training.passage_teacher import PassageTeacher
from openbook_training.reader import PairEncoder, forward
from openbook_training.run import train
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.retriever import Example, RetrieverConfig, RetrieverTask
from rich.console import Console

CPU = torch.device("cpu")
WORDS = "red blue green one two three city river king book".split()


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder: 12 passages, three questions on each, every fourth of which has a second gold passage."""
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    passages = [f"the {WORDS[n % 10]} of {WORDS[(n * 7 + 3) % 10]} was {WORDS[(n + 5) % 10]} in case {n}" for n in range(12)]
    rows = [{"_id": f"p{n}", "title": "the book", "text": text} for n, text in enumerate(passages)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    queries = [{"_id": f"q{n}", "text": f"what was {WORDS[n % 10]} {n} ?", "metadata": {"answers": [f"Case {n % 12}"]}} for n in range(36)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    second = [f"q{n}\tp{(n + 5) % 12}\t1" for n in range(0, 36, 4)]
    (folder / "qrels" / "train.tsv").write_text("\n".join(["a\tb\tscore", *(f"q{n}\tp{n % 12}\t1" for n in range(36)), *second]))
    return folder


def config_for(data: Path, checkpoint: Path, adapter: Path, output: Path, **changes: Any) -> RetrieverConfig:
    settings: dict[str, Any] = {
        "held_out": 0,
        "negatives": (2,),
        "mined": 8,
        "anchor_weight": 0.0,
        "train_max_tokens": 24,
        "matryoshka_dims": (32, 8),
        "matryoshka_weights": (1.0, 0.5),
        "lora_rank": 2,
        "lora_alpha": 2,
        "reader": str(adapter),
        "reader_weight": 0.5,
        "loop": LoopConfig(epochs=4, batch_examples=12, micro_batch_examples=12, precision="fp32", learning_rate=2e-2, average_decay=0.0),
    }
    return RetrieverConfig(output=str(output), checkpoint=str(checkpoint), train=str(data), **(settings | changes))


def slow_mass(teacher: PassageTeacher, encoder: PairEncoder, question: str, passage: str) -> float:
    """log of the sum of e^(start + end) over the spans, of up to five tokens, of every window of the passage, read alone."""
    total = 0.0
    for pair in encoder.pairs(question, [passage], 0):
        with torch.no_grad():
            start, end = (logits[0].double().numpy() for logits in forward(teacher._teacher._model, [pair], encoder, CPU))
        for first in range(pair.first, pair.first + len(pair.offsets)):
            for last in range(first, min(first + 5, pair.first + len(pair.offsets))):
                total += np.exp(start[first] + end[last])
    return float(np.log(total))


def test_a_passages_mass_is_that_of_the_spans_of_its_windows(tiny_checkpoint: Path, tiny_reader: Path) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    teacher = PassageTeacher(checkpoint, str(tiny_reader), CPU)
    encoder = PairEncoder(checkpoint, max_tokens=64, stride=22, max_question_tokens=16)
    long = " ".join(random.Random(0).choices(WORDS, k=100))
    read = [("what was red ?", ["red blue", long]), ("what was one ?", ["river king book", "red blue"])]
    assert len(list(encoder.pairs(read[0][0], [long], 0))) > 2
    expected = [slow_mass(teacher, encoder, question, passage) for question, passages in read for passage in passages]
    assert teacher.masses(read).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_distance_to_a_reader_is_the_divergence_over_a_questions_candidates_at_every_dimension() -> None:
    rng = np.random.default_rng(12)
    questions, passages, told = rng.normal(size=(5, 8)), rng.normal(size=(6, 8)), rng.normal(size=(5, 6)) * 3
    candidates = [
        [0, 4],
        [1],
        [0, 2, 5],
        [],
        [4, 3],
    ]  # 0 and 4 are of two questions; a question with one candidate, or none, does not count
    dims, weights, temperature, reader_temperature = (8, 3), (1.0, 0.5), 0.1, 2.0
    expected = 0.0
    for dim, weight in zip(dims, weights, strict=True):
        for question in (0, 2, 4):
            x, taught, own = questions[question, :dim], [], []
            for column in candidates[question]:
                z = passages[column, :dim]
                own.append(np.exp(x @ z / np.sqrt(x @ x) / np.sqrt(z @ z) / temperature))
                taught.append(np.exp(told[question, column] / reader_temperature))
            for p, q in zip(np.array(taught) / sum(taught), np.array(own) / sum(own), strict=True):
                expected += weight / 1.5 * p * (np.log(p) - np.log(q)) / 3
    mask = torch.tensor([[column in mine for column in range(6)] for mine in candidates])
    students = torch.tensor(questions, requires_grad=True)

    def distance(scores: torch.Tensor) -> torch.Tensor:
        return passage_distillation_loss(scores, torch.tensor(told) / reader_temperature, mask)

    actual = matryoshka_mean(students, torch.tensor(passages), distance, dims=dims, weights=weights, temperature=temperature)
    assert float(actual.detach()) == pytest.approx(expected, rel=1e-9)
    actual.backward()
    assert students.grad is not None
    assert [bool(row.any()) for row in students.grad] == [True, False, True, False, True]


def test_a_reader_that_is_agreed_with_or_has_nothing_to_compare_adds_no_loss() -> None:
    scores = torch.randn((3, 4), generator=torch.Generator().manual_seed(0), requires_grad=True)
    two, one = torch.tensor([[True, True, False, False]] * 3), torch.tensor([[True, False, False, False]] * 3)
    assert float(passage_distillation_loss(scores, scores.detach() + 7, two).detach()) == pytest.approx(0.0, abs=1e-6)
    unread = passage_distillation_loss(scores, torch.full((3, 4), 2 * NEGATIVE), two)  # neither passage has a span
    assert abs(float(unread.detach())) < 10
    nothing = passage_distillation_loss(scores, torch.zeros((3, 4)), one)
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_the_mass_of_a_passage_sums_the_spans_of_all_its_windows() -> None:
    rng = np.random.default_rng(13)
    start, end, owner = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), [0, 1, 1, 2]
    context = np.array([[False, True, True, True, False, False]] * 3 + [[False] * 6])  # of the last passage nothing is left to read
    masses = passage_masses(span_scores(torch.tensor(start), torch.tensor(end), torch.tensor(context), 2), torch.tensor(owner), 3)
    for passage in (0, 1):
        total = 0.0
        for pair in (row for row in range(4) if owner[row] == passage):
            for first in range(1, 4):
                for last in range(first, min(first + 2, 4)):
                    total += np.exp(start[pair, first] + end[pair, last])
        assert float(masses[passage]) == pytest.approx(np.log(total), rel=1e-9)
    assert torch.isfinite(masses).all()
    assert float(masses[2]) < NEGATIVE / 2


def columns_of(batch: list[Example]) -> list[int]:
    return list(dict.fromkeys(row for example in batch for row in (example.gold, *example.negatives)))


def candidates_of(task: RetrieverTask, example: Example, columns: list[int]) -> list[int]:
    return sorted({*task.train[example.question].gold, *example.negatives} & set(columns))


def test_the_loss_is_shared_between_the_contrast_and_the_distance_to_the_reader(
    data: Path, tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path
) -> None:
    corpus = [json.loads(line)["text"] for line in (data / "corpus.jsonl").read_text().splitlines()]
    task = RetrieverTask(config_for(data, tiny_checkpoint, tiny_reader, tmp_path, reader_temperature=3.0, reader_weight=0.25), quiet())
    alone = RetrieverTask(config_for(data, tiny_checkpoint, tiny_reader, tmp_path, reader="", reader_weight=0.0), quiet())
    encoder = PairEncoder(task.checkpoint, max_tokens=64, stride=22, max_question_tokens=16)
    assert task._teacher is not None
    sizes, shared = set(), 0
    for batch in task.batches(0):
        columns, distance = columns_of(batch), 0.0
        with torch.no_grad():
            rows = [*(task._questions[example.question] for example in batch), *(task._passages[row] for row in columns)]
            vectors = task.training_vectors(task.model, rows).double().numpy()
        for dim, weight in ((32, 1.0), (8, 0.5)):
            cut = vectors[:, :dim] / np.linalg.norm(vectors[:, :dim], axis=1, keepdims=True)
            for number, example in enumerate(batch):
                own = candidates_of(task, example, columns)
                question = task.train[example.question].text
                taught = np.exp([slow_mass(task._teacher, encoder, question, corpus[row]) / 3.0 for row in own])
                student = np.exp([cut[number] @ cut[len(batch) + columns.index(row)] / 0.05 for row in own])
                p, q = taught / taught.sum(), student / student.sum()
                distance += weight / 1.5 * float(np.sum(p * np.log(p / q))) / len(batch)
                sizes.add(len(own))
        shared += len(batch) * 3 - len(columns)
        contrast = float(alone.loss(alone.model, batch, random.Random(0)).detach())
        loss = float(task.loss(task.model, batch, random.Random(0)).detach())
        assert loss == pytest.approx(0.75 * contrast + 0.25 * distance, rel=1e-3)
    assert sizes == {3, 4}  # two gold passages beside the hard negatives too
    assert shared > 20  # passages of several questions


def test_a_question_that_has_but_one_passage_in_the_batch_is_not_read(
    data: Path, tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = RetrieverTask(config_for(data, tiny_checkpoint, tiny_reader, tmp_path), quiet())
    alone = RetrieverTask(config_for(data, tiny_checkpoint, tiny_reader, tmp_path, reader="", reader_weight=0.0), quiet())
    monkeypatch.setattr(teacher_module, "forward", lambda *arguments: pytest.fail("read"))
    single = [row for row, question in enumerate(task.train) if len(question.gold) == 1][:4]
    batch = [Example(row, next(iter(task.train[row].gold)), ()) for row in single]
    loss, contrast = (float(one.loss(one.model, batch, random.Random(0)).detach()) for one in (task, alone))
    assert loss == pytest.approx(0.5 * contrast)


def test_a_question_beside_a_passage_is_read_once_in_a_run_and_training_comes_nearer_to_the_reader(
    data: Path, tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, ...]] = []

    def noted(model: Any, pairs: list[Any], *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        read.extend(tuple(pair.ids) for pair in pairs)
        return forward(model, pairs, *others)

    monkeypatch.setattr(teacher_module, "forward", noted)
    config = config_for(data, tiny_checkpoint, tiny_reader, tmp_path, reader_weight=1.0, reader_temperature=4.0)  # the loss is the distance
    train(OBJECTIVES["retriever"], config, resume=False, console=quiet())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    history = [row["loss"] for row in rows if "loss" in row]
    assert len(history) == 12
    assert sum(history[-3:]) < 0.7 * sum(history[:3])
    assert len(read) == len(set(read)) > 36


def test_all_that_cannot_work_of_a_readers_settings_is_told_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('train = "t"\nreader_weight = 1.5\nreader_temperature = 0\nmined = 0\n')
    with pytest.raises(InvalidConfig) as raised:
        load_config(recipe, RetrieverConfig)
    for part in (
        "reader_weight: 1.5 is not in [0, 1]",
        "reader_weight: 1.5 is of no reader",
        "reader_temperature: 0.0 is not in",
        "mined: 0 is below 1",
    ):
        assert part in str(raised.value)
    recipe.write_text('train = "t"\nreader = "runs/reader/best"\nnegatives = [0]\n')
    with pytest.raises(InvalidConfig) as raised:
        load_config(recipe, RetrieverConfig)
    for part in ("reader: it teaches nothing while reader_weight is 0", "reader: it compares passages of a question"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (None, "holds no reader.json"),
        ({"base_digest": "other"}, "was trained on"),
        ({"max_answer_tokens": None}, "should state max_tokens, max_question_tokens and max_answer_tokens"),
        ({"max_question_tokens": 61}, "with room for a passage beside the question"),
    ],
)
def test_a_folder_that_is_no_reader_of_the_checkpoint_is_refused(
    tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path, stated: dict[str, object] | None, message: str
) -> None:
    folder = Path(shutil.copytree(tiny_reader, tmp_path / "reader"))
    settings = json.loads((folder / "reader.json").read_text())
    (folder / "reader.json").unlink()
    if stated is not None:
        (folder / "reader.json").write_text(json.dumps(settings | stated))
    with pytest.raises(CheckpointNotFound, match=message):
        PassageTeacher(resolve_checkpoint(str(tiny_checkpoint)), str(folder), CPU)
