"""`openbook export` as its user runs it: exit status, what goes to stdout, what goes to stderr."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import types
from pathlib import Path

import pytest
from openbook_export.command import add_arguments, run


def export(*arguments: object) -> int:
    parser = argparse.ArgumentParser(prog="openbook export")
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def test_a_finished_export_says_the_bundle_its_place_and_sizes(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tiny_checkpoint, tmp_path / "bundle", "--name", "mine") == 0
    output, progress = capsys.readouterr()
    assert output.count("\n") == 1
    assert output.startswith("bundle ")
    assert "(mine)" in output
    assert str(tmp_path / "bundle") in output
    assert "embedder.fp32.onnx 0." in output
    assert " s] embedder.fp32.onnx: cosine" in progress


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["/absent", "out"], 1, "no such folder"),
        (["package:absent", "out"], 1, "no Python package of that name"),
        (["package:absent", "out", "--quality", "dev.json"], 2, "--quality is about a reader"),
        (["package:absent", "out", "--settling", "dev.json"], 2, "--settling is about a reader"),
        (["package:absent", "out", "--null-bias", "0"], 2, "--null-bias is about a reader"),
        (["package:absent", "out", "--task", "a=x", "--task", "a=y"], 2, "two --task have the same name"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(*arguments) == status
    output, errors = capsys.readouterr()
    assert not output
    assert errors.startswith("openbook export: ")
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize(
    "flags",
    [
        ["--quality-questions", "0"],
        ["--null-bias", "nan"],
        ["--quality-budget", "much"],
        ["--em-budget", "101"],
        ["--em-budget", "nan"],
        ["--task", "runs/best"],
        ["--task", "a="],
        ["--task", "../a=x"],
        ["--task", "reader=x"],
    ],
)
def test_a_value_out_of_range_is_wrong_usage(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        export("package:absent", "out", *flags)
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_a_weight_that_no_manifest_may_hold_is_told_with_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export("package:absent", "out", "--prior-weight", "1e6")
    assert "1e6 is out of range, expected less than 1000000 either way" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert export(tiny_checkpoint, tmp_path / "file" / "bundle") == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_terminated_export_leaves_nothing_behind(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("openbook_export.export.write_golden", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
    assert export(tiny_checkpoint, tmp_path / "bundle") == 130
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err.endswith("openbook export: interrupted; nothing was written\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_export_that_is_interrupted_while_modules_load_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loading(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "openbook_export.export", Loading("openbook_export.export"))
    assert export(tmp_path / "checkpoint", tmp_path / "bundle") == 130
    assert capsys.readouterr().err == "openbook export: interrupted; nothing was written\n"
