"""The vocabulary head on a tiny checkpoint: what is masked, what is learned, what is left."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.config import LoopConfig
from openbook_training.errors import InvalidConfig, InvalidData
from openbook_training.heads import load_head_model
from openbook_training.loop import Loop, Stopped
from openbook_training.run import train
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.vocab_head import VocabHeadConfig, VocabHeadTask
from rich.console import Console

TOPICS = (["red", "king", "city"], ["blue", "river", "two"])


def quiet() -> Console:
    return Console(file=io.StringIO())


def write(file: Path, rows: int, seed: int) -> Path:
    """Texts of two topics: every content word tells which others to expect."""
    rng = random.Random(seed)
    texts = [["the", *rng.sample(TOPICS[number % 2], 3), "was", "."] for number in range(rows)]
    file.write_text("\n".join(" ".join(text) for text in texts) + "\n")
    return file


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> VocabHeadConfig:
    return VocabHeadConfig(
        output=str(tmp_path / "run"),
        checkpoint=str(tiny_checkpoint),
        train=str(write(tmp_path / "train.txt", 60, 1)),
        dev=str(write(tmp_path / "dev.txt", 20, 2)),
        held_out=12,
        max_tokens=16,
        common_share=0.6,
        lora_rank=2,
        lora_alpha=2,
        loop=LoopConfig(epochs=8, batch_examples=8, precision="fp32", learning_rate=1e-2, average_decay=0.9, evaluate_every_epochs=4),
    )


def test_only_content_words_are_masked_whole_and_become_the_target(config: VocabHeadConfig) -> None:
    file = Path(config.train)
    file.write_text(file.read_text() + "the redcity was .\nthe was .\n\n")  # a word of several pieces; no content word
    console = quiet()
    task = VocabHeadTask(config, console)
    assert isinstance(console.file, io.StringIO)
    assert f"{file}: 1 of 62 rows left out:\n  {file}: line 62: no content word" in console.file.getvalue()
    [text] = [text for text in [*task.train, *task.held_out] if text.place.endswith("line 61")]
    (ids, _), bag = task.masked(text, random.Random(0))
    assert len(bag) > 1
    assert task.encoder.tokenizer.decode(bag) == "redcity"
    pieces = [task.encoder.tokenizer.id_to_token(piece) for piece in ids]
    assert pieces == ["[CLS]", "the", *["[MASK]"] * len(bag), "was", ".", "[SEP]"]
    for text in task.train[:20]:
        (ids, _), bag = task.masked(text, random.Random(1))
        hidden = [at for at, piece in enumerate(ids) if piece == task.encoder.mask]
        assert [text.ids[at] for at in hidden] == bag
        assert len(bag) >= 1


@pytest.mark.parametrize("tied", [True, False])
def test_training_says_more_than_word_frequencies_and_the_folder_says_the_same(config: VocabHeadConfig, tmp_path: Path, tied: bool) -> None:
    config = dataclasses.replace(config, tied=tied)
    task = VocabHeadTask(config, quiet())
    model = task.model.eval()
    with torch.inference_mode():
        before = task.evaluate(model)
    assert before["dev_perplexity"] == pytest.approx(before["dev_unigram_perplexity"], rel=1e-4)  # nothing was learned yet
    metrics = train(OBJECTIVES["vocab_head"], config, resume=False, console=quiet())
    assert metrics["dev_perplexity"] < 0.6 * metrics["dev_unigram_perplexity"]  # two words are left to choose from, of six
    assert metrics["dev_top10"] == 100
    loaded, settings = load_head_model(resolve_checkpoint(config.checkpoint), tmp_path / "run" / "best")
    assert (settings["objective"], settings["tied"]) == ("vocab_head", tied)
    with torch.inference_mode():
        again = task.evaluate(loaded)
    assert again == pytest.approx(metrics, rel=1e-2)  # the adapter is kept in half precision
    assert ((tmp_path / "run" / "best" / "head.safetensors").stat().st_size < 10_000) == tied  # no copy of the embeddings


def test_the_unigram_baseline_is_the_smoothed_frequency_of_the_pieces_of_content_words(config: VocabHeadConfig) -> None:
    task = VocabHeadTask(config, quiet())
    counts = Counter(text.ids[at] for text in task.train for word in text.words for at in word)
    size = len(task.unigram)
    for piece in (*counts, 0):
        expected = (counts[piece] + 1) / (sum(counts.values()) + size)
        assert task.unigram[piece].item() == pytest.approx(math.log(expected), abs=1e-5)
    common = {task.encoder.tokenizer.decode(list(pieces)) for pieces in task._common}
    assert common == {"the", "was"}


def test_a_stopped_run_resumes_to_the_same_losses(config: VocabHeadConfig, tmp_path: Path) -> None:
    def at(name: str) -> VocabHeadConfig:
        return dataclasses.replace(config, output=str(tmp_path / name), loop=dataclasses.replace(config.loop, epochs=2))

    expected = train(OBJECTIVES["vocab_head"], at("whole"), resume=False, console=quiet())
    original = Loop._take_step

    def stops_at_eight(self: Loop[object], batch: list[object], total: int) -> float:
        loss = original(self, batch, total)
        if self._step == 8:
            self._stopping.set()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_take_step", stops_at_eight)
        with pytest.raises(Stopped, match="step 8 of 12"):
            train(OBJECTIVES["vocab_head"], at("halves"), resume=False, console=quiet())
    assert train(OBJECTIVES["vocab_head"], at("halves"), resume=True, console=quiet()) == pytest.approx(expected, rel=1e-4)
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "halves")]
    losses = [[row["loss"] for row in run if "loss" in row] for run in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 12


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"masked_share": 0.0}, InvalidConfig, "masked_share: 0.0"),
        ({"held_out": 0}, InvalidConfig, "held_out: 0 is below 1"),
        ({"held_out": 60}, InvalidData, "60 usable texts, and held_out takes 60"),
        ({"text_column": "words"}, InvalidData, "no text in column 'words'"),
    ],
)
def test_a_setting_that_leaves_nothing_to_train_is_refused(
    config: VocabHeadConfig, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(OBJECTIVES["vocab_head"], dataclasses.replace(config, **changes), resume=False, console=quiet())  # type: ignore[arg-type]
