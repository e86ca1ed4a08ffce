"""A reader that teaches another one: of a checkpoint of its own, asked once a window, and refused where it sees other tokens."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from openbook_training.checkpoint import Checkpoint, resolve_checkpoint
from openbook_training.config import LoopConfig
from openbook_training.errors import InvalidConfig
from openbook_training.objectives import span_distillation_loss
from openbook_training.reader import PairEncoder, forward
from openbook_training.run import train
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.reader import ReaderConfig, ReaderTask
from openbook_training.teacher import Teacher
from rich.console import Console

CPU = torch.device("cpu")
READ = [("what was red ?", ["red blue green one two", "three city"]), ("what was one ?", ["river king book"])]


@pytest.fixture(scope="module")
def tiny_mpnet(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another kind and width, that knows no segments, with the tokenizer of `tiny_checkpoint`."""
    from transformers import MPNetConfig, MPNetModel

    folder = tmp_path_factory.mktemp("mpnet") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    vocabulary = json.loads((tiny_checkpoint / "config.json").read_text())["vocab_size"]
    torch.manual_seed(3)
    config = MPNetConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=130,
        pad_token_id=0,
        initializer_range=0.2,
    )
    MPNetModel(config).save_pretrained(folder)
    return folder


def config_for(checkpoint: Path, output: Path, train_file: Path, **settings: object) -> ReaderConfig:
    return ReaderConfig(
        output=str(output),
        checkpoint=str(checkpoint),
        train=str(train_file),
        held_out=4,
        max_tokens=32,
        stride=4,
        max_question_tokens=8,
        max_answer_tokens=5,
        negatives=(1,),
        mined=5,
        lora_rank=2,
        lora_alpha=2,
        loop=LoopConfig(epochs=6, batch_examples=4, precision="fp32", learning_rate=1e-2),
        **settings,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def mpnet_reader(tiny_mpnet: Path, questions_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "teacher"
    train(OBJECTIVES["reader"], config_for(tiny_mpnet, output, questions_file), resume=False, console=Console(file=io.StringIO()))
    return output / "best"


def windows(checkpoint: Checkpoint) -> PairEncoder:
    return PairEncoder(checkpoint, max_tokens=32, stride=4, max_question_tokens=8)


def test_a_reader_of_another_checkpoint_teaches(
    tiny_checkpoint: Path, tiny_mpnet: Path, mpnet_reader: Path, questions_file: Path, tmp_path: Path
) -> None:
    settings = {"teacher": str(mpnet_reader), "teacher_checkpoint": str(tiny_mpnet), "teacher_weight": 1.0, "no_answer_share": 0.0}
    config = config_for(tiny_checkpoint, tmp_path / "run", questions_file, **settings)
    train(OBJECTIVES["reader"], config, resume=False, console=Console(file=io.StringIO()))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    history = [row["loss"] for row in rows if "loss" in row]
    assert sum(history[-5:]) < 0.8 * sum(history[:5])


def test_the_distance_is_that_of_the_teachers_own_logits(
    tiny_checkpoint: Path, tiny_mpnet: Path, mpnet_reader: Path, questions_file: Path, tmp_path: Path
) -> None:
    settings = {"teacher": str(mpnet_reader), "teacher_checkpoint": str(tiny_mpnet), "teacher_weight": 1.0, "no_answer_share": 0.0}
    task = ReaderTask(config_for(tiny_checkpoint, tmp_path / "run", questions_file, **settings), Console(file=io.StringIO()))
    model = task.model.eval()
    batch = task.batches(0)[0]
    pairs = task.windows(batch)
    teacher = Teacher(resolve_checkpoint(str(tiny_mpnet)), str(mpnet_reader), windows(resolve_checkpoint(str(tiny_mpnet))), CPU)
    encoder = windows(resolve_checkpoint(str(tiny_mpnet)))
    own = list(encoder.pairs(batch[0].question.text, batch[0].passages, 0))
    with torch.no_grad():
        alone = forward(teacher._model, own, encoder, CPU)
    taught = teacher.logits([(one.question.text, one.passages) for one in batch], pairs)
    for mine, theirs in zip(taught, alone, strict=True):
        for row, pair in enumerate(own):
            assert torch.allclose(mine[row, : len(pair.ids)], theirs[row, : len(pair.ids)], atol=1e-5)
    reading, told = task.read(model, pairs), task.scored(pairs, *taught)
    distance = span_distillation_loss(reading.spans, reading.null, told.spans, told.null, reading.owner, len(batch), 2.0)
    assert float(task.loss(model, batch, None).detach()) == pytest.approx(float(distance.detach()), rel=1e-5)  # type: ignore[arg-type]


def test_a_window_is_read_once_by_the_teacher(tiny_mpnet: Path, mpnet_reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = windows(resolve_checkpoint(str(tiny_mpnet)))
    teacher = Teacher(resolve_checkpoint(str(tiny_mpnet)), str(mpnet_reader), encoder, CPU)
    read: list[int] = []

    def counted(model: object, pairs: list[object], *others: object) -> tuple[torch.Tensor, torch.Tensor]:
        read.append(len(pairs))
        return forward(model, pairs, *others)  # type: ignore[arg-type]

    monkeypatch.setattr("openbook_training.teacher.forward", counted)
    pairs = [pair for row, (question, passages) in enumerate(READ) for pair in encoder.pairs(question, passages, row)]
    first = teacher.logits(READ, pairs)
    again = teacher.logits(READ[1:], [pair for pair in pairs if pair.question == 1])
    assert read == [3]
    width = len(pairs[2].ids)
    for before, after in zip(first, again, strict=True):
        assert torch.equal(before[2, :width], after[0])


def test_what_is_not_remembered_is_read_again(tiny_mpnet: Path, mpnet_reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openbook_training.teacher.KEPT_BYTES", 0)
    encoder = windows(resolve_checkpoint(str(tiny_mpnet)))
    teacher = Teacher(resolve_checkpoint(str(tiny_mpnet)), str(mpnet_reader), encoder, CPU)
    pairs = [pair for row, (question, passages) in enumerate(READ) for pair in encoder.pairs(question, passages, row)]
    first, again = teacher.logits(READ, pairs), teacher.logits(READ, pairs)
    assert not teacher._known
    assert all(torch.equal(before, after) for before, after in zip(first, again, strict=True))


def test_a_teacher_that_cuts_texts_elsewhere_is_refused(
    tiny_checkpoint: Path, tiny_mpnet: Path, mpnet_reader: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_mpnet, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    tokenizer["model"]["vocab"] = {piece.replace("king", "queen"): at for piece, at in tokenizer["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    adapter = tmp_path / "adapter"
    shutil.copytree(mpnet_reader, adapter)
    stated = json.loads((adapter / "reader.json").read_text()) | {"base_digest": resolve_checkpoint(str(other)).digest()}
    (adapter / "reader.json").write_text(json.dumps(stated))
    teacher = Teacher(resolve_checkpoint(str(other)), str(adapter), windows(resolve_checkpoint(str(other))), CPU)
    encoder = windows(resolve_checkpoint(str(tiny_checkpoint)))
    with pytest.raises(InvalidConfig, match=r"teacher_checkpoint: the tokenizer of .* cuts texts elsewhere than the reader's"):
        teacher.logits(READ, [pair for row, (question, passages) in enumerate(READ) for pair in encoder.pairs(question, passages, row)])


def test_hard_negatives_are_mined_by_the_embedder_that_is_named(
    tiny_checkpoint: Path, tiny_mpnet: Path, questions_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openbook_training.tasks.reader as module

    asked: list[str] = []
    original = module.embed_once

    def noted(checkpoint: Checkpoint, *others: object, **settings: object) -> object:
        asked.append(checkpoint.name)
        return original(checkpoint, *others, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "embed_once", noted)
    ReaderTask(config_for(tiny_mpnet, tmp_path / "a", questions_file, embedder=str(tiny_checkpoint)), Console(file=io.StringIO()))
    ReaderTask(config_for(tiny_mpnet, tmp_path / "b", questions_file), Console(file=io.StringIO()))
    assert asked == [str(tiny_checkpoint), str(tiny_mpnet)]
