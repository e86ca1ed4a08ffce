"""Tuning: what it tries, what it chooses, and that the server takes the profile it writes."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openbook import cli
from openbook_server import command_serve
from openbook_server.bundle import load_bundle
from openbook_server.config import ServerConfig
from openbook_server.errors import InvalidRequest
from openbook_server.profiles import read_profile, write_profile
from openbook_server.runtime import cores
from openbook_server.tuning import BUDGETS, ENOUGH, Trial, choose, seconds_needed, thread_arrangements, tune


def trial(threads: int, rate: float, p95_ms: float, requests: int = ENOUGH) -> Trial:
    return Trial(threads=threads, sessions=1, max_batch_tokens=2_048, requests_per_second=rate, p95_ms=p95_ms, requests=requests)


def test_the_highest_rate_that_keeps_the_objective_is_chosen() -> None:
    trials = [trial(1, 50, 20), trial(2, 90, 80), trial(3, 70, 40)]
    assert choose(trials, 50).threads == 3
    assert choose(trials, None).threads == 2
    assert choose(trials, 10).threads == 1  # none keeps it: the quickest


def test_of_about_equal_rates_the_quicker_is_chosen() -> None:
    assert choose([trial(1, 100, 30), trial(2, 99, 20), trial(3, 90, 5)], None).threads == 2


def test_all_cores_are_shared_by_ever_fewer_batches_and_then_half_of_them_are_left_alone() -> None:
    assert thread_arrangements("cpu", 1) == [(1, 1)]
    assert thread_arrangements("openvino", 2) == [(2, 2), (2, 1), (1, 1)]
    assert thread_arrangements("cpu", 24) == [(24, 8), (24, 4), (24, 2), (24, 1), (12, 8)]
    assert thread_arrangements("cuda", 24) == [(0, 1), (0, 2)]


def test_every_arrangement_of_threads_and_then_every_budget_is_tried(tiny_bundle: Path) -> None:
    seen: list[tuple[Trial, int]] = []

    def report(*told: Any) -> None:
        seen.append(told)

    trials, best = tune(load_bundle(tiny_bundle), device="cpu", precision="fp32", objective_ms=None, seconds=0.5, report=report)
    assert seen == [(trial, len(trials)) for trial in trials]
    tried = thread_arrangements("cpu", cores())
    assert [(trial.threads, trial.sessions) for trial in trials[: len(tried)]] == tried
    assert {trial.max_batch_tokens for trial in trials[: len(tried)]} == {ServerConfig().max_batch_tokens}
    assert len({(trial.threads, trial.sessions) for trial in trials[len(tried) :]}) == 1
    assert {trial.max_batch_tokens for trial in trials} == set(BUDGETS)
    assert best in trials
    assert all(trial.requests_per_second > 0 and trial.p95_ms > 0 for trial in trials)


def test_the_command_writes_a_profile_that_serve_reads(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "profile.json"
    arguments = ["tune", str(tiny_bundle), "--device", "cpu", "--seconds", "0.3", "--out", str(file)]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.strip()[:1].isdigit()]) == len(thread_arrangements("cpu", cores())) + len(BUDGETS)
    profile = read_profile(file)
    settings = profile.settings
    assert (settings["device"], settings["precision"]) == ("cpu", "fp32")
    assert (profile.cores, profile.bundle_id) == (cores(), load_bundle(tiny_bundle).id)
    served = configure("--profile", str(file), bundle=tiny_bundle)
    assert capsys.readouterr().err == ""  # nothing is another one
    assert (served.threads, served.sessions) == (settings["threads"], settings["sessions"])
    assert cli.main([*arguments, "--objective-ms", "0.000001"]) == 3
    assert "nothing kept" in capsys.readouterr().err


def test_how_long_it_takes_is_told_after_the_first_trial_and_that_trials_had_too_few_requests(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = [trial(2, 0.5, 2_000, requests=1), trial(1, 1.0, 1_000, requests=ENOUGH)]
    assert seconds_needed(slow) == pytest.approx(2 * 2 * ENOUGH / (0.8 * 0.5))
    assert seconds_needed([trial(2, 0.5, 2_000)]) == 0.0

    def tune_(bundle: object, *, report: Callable[[Trial, int], None], **_: object) -> tuple[list[Trial], Trial]:
        for seen in slow:
            report(seen, len(slow))
        return slow, slow[1]

    monkeypatch.setattr("openbook_server.tuning.tune", tune_)
    assert cli.main(["tune", str(tiny_bundle), "--device", "cpu", "--out", str(tmp_path / "profile.json")]) == 0
    total, few = capsys.readouterr().err.splitlines()
    assert total.startswith("openbook tune: 2 trials, about ")
    assert few.startswith("openbook tune: a trial had 1 requests, and a p95 of fewer than 20 tells little: ")
    assert few.endswith("give --seconds 200 or more")


@pytest.mark.parametrize(
    ("flag", "value", "limits"),
    [("--seconds", value, "0.1 to 86,400") for value in ("nan", "inf", "1e-9", "0", "-1")]
    + [("--objective-ms", value, "1e-06 to 3,600,000") for value in ("nan", "inf", "0")],
)
def test_a_time_that_cannot_be_measured_is_refused(flag: str, value: str, limits: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "bundle", f"{flag}={value}"]) == 2
    assert f"openbook tune: {flag} {value if value != '1e-9' else '1e-09'} is not from {limits}" in capsys.readouterr().err


@pytest.mark.parametrize("target", [".", "absent/profile.json"])
def test_a_profile_that_cannot_be_written_is_refused_before_anything_is_measured(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr("openbook_server.tuning.tune", lambda *_, **__: pytest.fail("it was measured"))
    assert cli.main(["tune", str(tiny_bundle), "--device", "cpu", "--out", str(tmp_path / target)]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_profile_that_the_disk_does_not_take_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "profile.json"
    write_profile(file, {"threads": 3}, {})

    def full(aside: Path, text: str) -> int:
        aside.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_profile(file, {"threads": 4}, {})
    assert list(tmp_path.iterdir()) == [file]
    assert read_profile(file).settings == {"threads": 3}


def configure(*arguments: str, bundle: Path = Path("bundle")) -> ServerConfig:
    parser = argparse.ArgumentParser()
    command_serve.add_arguments(parser)
    return command_serve._config(parser.parse_args([str(bundle), *arguments]))


def test_a_flag_wins_over_the_environment_over_the_profile_over_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "profile.json"
    write_profile(file, {"threads": 3, "max_batch_tokens": 1_024, "device": "cpu"}, {})
    profile = ["--profile", str(file)]
    assert configure().threads == 0
    assert configure(*profile).threads == 3
    monkeypatch.setenv("OPENBOOK_THREADS", "4")
    assert configure(*profile).threads == 4
    assert configure(*profile, "--threads", "5").threads == 5
    assert (configure(*profile).max_batch_tokens, configure(*profile).device) == (1_024, "cpu")


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("OPENBOOK_READ_ONLY", "maybe", r"'maybe' is neither on \(1, true, yes\) nor off \(0, false, no, or nothing\)"),
        ("OPENBOOK_THREADS", "two", "'two' is no whole number"),
        ("OPENBOOK_DRAIN_SECONDS", "long", "'long' is no number"),
    ],
)
def test_a_variable_of_another_kind_is_refused_with_what_is_wanted(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, problem: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidRequest, match=f"{variable}: {problem}"):
        configure()


def test_a_value_outside_its_range_is_refused_by_the_place_that_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "profile.json"
    write_profile(file, {"threads": -5}, {})
    with pytest.raises(InvalidRequest, match="profile.json, threads: -5 is outside 0 to 1024"):
        configure("--profile", str(file))
    monkeypatch.setenv("OPENBOOK_PORT", "70000")
    with pytest.raises(InvalidRequest, match="OPENBOOK_PORT: 70000 is outside 0 to 65535"):
        configure()
    monkeypatch.setenv("OPENBOOK_THREADS", "-6")
    with pytest.raises(InvalidRequest, match="OPENBOOK_THREADS: -6 is"):
        configure("--profile", str(file), "--port", "1")
    with pytest.raises(InvalidRequest, match="--threads: -7 is"):
        configure("--profile", str(file), "--port", "1", "--threads", "-7")


def test_a_switch_is_set_by_any_of_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, on in (("1", True), ("True", True), ("YES", True), ("0", False), ("false", False), ("No", False), ("", False)):
        monkeypatch.setenv("OPENBOOK_READ_ONLY", word)
        assert configure().read_only is on


@pytest.mark.parametrize("by_flag", [True, False])
def test_nothing_of_a_profile_applies_on_a_device_that_it_was_not_measured_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by_flag: bool
) -> None:
    file = tmp_path / "profile.json"
    settings: dict[str, str | int] = {"device": "openvino", "precision": "bf16", "threads": 3, "sessions": 2, "max_batch_tokens": 4_096}
    write_profile(file, settings, {"cores": 1_000, "bundle_id": "another"})
    if not by_flag:
        monkeypatch.setenv("OPENBOOK_DEVICE", "cpu")
    config = configure("--profile", str(file), "--threads", "5", *(["--device", "cpu"] if by_flag else []))
    assert config == ServerConfig(device="cpu", threads=5)
    assert capsys.readouterr().err == f"openbook serve: {file} was measured on openvino, not on cpu; none of its settings apply\n"


def test_a_profile_of_other_cores_or_another_bundle_applies_and_is_told_in_a_line(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "profile.json", cores() + 1
    for measured, told in (
        ({"cores": other}, f"{other} cores, of which there are {cores()} here;"),
        ({"bundle_id": "another"}, "another bundle;"),
        ({"cores": other, "bundle_id": "another"}, f"{other} cores, of which there are {cores()} here, and with another bundle;"),
    ):
        write_profile(file, {"device": "cpu", "threads": 3}, measured)
        assert configure("--profile", str(file), "--device", "cpu", bundle=tiny_bundle).threads == 3
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"openbook serve: {file} was measured with {told}")
    for measured in ({}, {"cores": "many", "bundle_id": 7}, {"cores": cores(), "bundle_id": load_bundle(tiny_bundle).id}):
        write_profile(file, {"device": "cpu", "threads": 3}, measured)
        assert configure("--profile", str(file), bundle=tiny_bundle).threads == 3
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read"),
        ("{", "no JSON"),
        ("[1]", "no profile"),
        ('{"format": 2, "settings": {}}', "no profile of format 1"),
        ('{"format": 1, "settings": {"host": "0.0.0.0"}}', "sets 'host'"),
        ('{"format": 1, "settings": {"threads": true}}', "True, which is no int"),
        ('{"format": 1, "settings": {"threads": 9999}}', "9999 is outside"),
    ],
)
def test_a_bad_profile_is_refused_with_its_fault(tmp_path: Path, text: str | None, problem: str) -> None:
    file = tmp_path / "profile.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InvalidRequest, match=problem):
        configure("--profile", str(file))
