"""The mean of adapters, against merged weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from openbook_training.average import average
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.errors import InvalidConfig, InvalidData, NotWritten
from openbook_training.reader import trained_reader
from openbook_training.span_task import SpanConfig, SpanTask
from torch import Tensor


def adapter(checkpoint: Path, folder: Path, seed: int, rank: int) -> Path:
    """An adapter of random weights."""
    task = SpanTask(SpanConfig(checkpoint=str(checkpoint), max_tokens=128, stride=32, lora_rank=rank, lora_alpha=2 * rank))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    folder.mkdir()
    task.save(task.model, folder)
    return folder


def merged(checkpoint: Path, folder: Path) -> dict[str, Tensor]:
    model = trained_reader(resolve_checkpoint(str(checkpoint)), str(folder)).merge_and_unload()
    return {name: weight.float() for name, weight in model.named_parameters()}


def test_the_mean_adds_to_each_weight_the_mean_of_what_the_adapters_add(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folders = [adapter(tiny_checkpoint, tmp_path / str(seed), seed, rank) for seed, rank in ((1, 2), (2, 3))]
    lost = average(folders, tmp_path / "mean", rank=5)
    assert lost < 1e-6
    one, other, mean = (merged(tiny_checkpoint, folder) for folder in (*folders, tmp_path / "mean"))
    for name, weight in mean.items():
        assert torch.allclose(weight, (one[name] + other[name]) / 2, atol=2e-3), name
    assert any(not torch.allclose(one[name], other[name], atol=2e-2) for name in mean)
    assert json.loads((tmp_path / "mean" / "reader.json").read_text())["one_segment"] is True


def test_cutting_the_rank_says_what_it_lost(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folders = [adapter(tiny_checkpoint, tmp_path / str(seed), seed, 4) for seed in (1, 2)]
    assert 0.05 < average(folders, tmp_path / "mean", rank=2) < 1


def test_a_rank_above_the_width_of_a_layer_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = adapter(tiny_checkpoint, tmp_path / "1", 1, 2)
    with pytest.raises(InvalidConfig, match="rank 33 is above 32, the width of a layer; lower --rank"):
        average([folder, folder], tmp_path / "mean", rank=33)
    assert not (tmp_path / "mean").exists()
    average([folder, folder], tmp_path / "mean", rank=32)
    assert trained_reader(resolve_checkpoint(str(tiny_checkpoint)), str(tmp_path / "mean"))


def test_only_adapters_of_one_kind_are_averaged_and_nothing_is_overwritten(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one = adapter(tiny_checkpoint, tmp_path / "1", 1, 2)
    with pytest.raises(InvalidData, match="holds no adapter"):
        average([one, tmp_path], tmp_path / "mean", rank=2)
    other = adapter(tiny_checkpoint, tmp_path / "2", 2, 2)
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "another"}))
    with pytest.raises(InvalidData, match="different kinds, checkpoints or layers"):
        average([one, other], tmp_path / "mean", rank=2)
    with pytest.raises(InvalidData, match="exists"):
        average([one, one], one, rank=2)
    assert not (tmp_path / "mean").exists()


def test_what_is_neither_all_readers_nor_all_retrievers_of_a_checkpoint_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one = adapter(tiny_checkpoint, tmp_path / "1", 1, 2)
    settings = json.loads((one / "reader.json").read_text())
    for name, file, stated, message in (
        ("classifier", "head.json", settings, "classifier holds no reader or retriever"),
        ("retriever", "retriever.json", settings, "retriever and .* are adapters of different kinds"),
        ("another", "reader.json", settings | {"base_digest": "0"}, "another and .* are adapters of different kinds, checkpoints"),
    ):
        other = shutil.copytree(one, tmp_path / name)
        (other / "reader.json").unlink()
        (other / file).write_text(json.dumps(stated))
        with pytest.raises(InvalidData, match=message):
            average([one, other], tmp_path / "mean", rank=2)


@pytest.mark.parametrize(
    ("file", "content"), [("adapter_config.json", "{"), ("adapter_config.json", "[]"), ("adapter_model.safetensors", "x")]
)
def test_a_damaged_file_of_an_adapter_is_named(tiny_checkpoint: Path, tmp_path: Path, file: str, content: str) -> None:
    folder = adapter(tiny_checkpoint, tmp_path / "1", 1, 2)
    (folder / file).write_text(content)
    with pytest.raises(InvalidData, match=f"1/{file} cannot be read .*; copy the whole folder again"):
        average([folder], tmp_path / "mean", rank=2)


def test_a_target_that_cannot_be_written_is_refused_before_the_work_and_a_stop_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter(tiny_checkpoint, tmp_path / "1", 1, 2)
    monkeypatch.setattr("openbook_training.average._mean", lambda *_: pytest.fail("it was computed"))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWritten, match="file/mean cannot be written"):
        average([folder], tmp_path / "file" / "mean", rank=2)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("openbook_training.average._mean", stopped)
    with pytest.raises(KeyboardInterrupt):
        average([folder], tmp_path / "mean", rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "file"]


def test_what_a_killed_run_has_left_beside_the_target_goes_with_the_next(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = adapter(tiny_checkpoint, tmp_path / "1", 1, 2)
    (tmp_path / "mean.new").mkdir()
    (tmp_path / "mean.new" / "half").touch()
    average([folder], tmp_path / "mean", rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "mean"]
    assert not (tmp_path / "mean" / "half").exists()
