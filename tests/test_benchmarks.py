"""The benchmarks in their short form: that they run, are bounded, and end in a line of JSON that says what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str, *arguments: object) -> dict[str, Any]:
    """Run one and read its last line."""
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return report


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": "the red city " * (1 + number % 8)}) for number in range(64)))
    return file


def test_a_mistake_ends_a_benchmark_in_a_line(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "load.py"), str(tmp_path / "nowhere"), "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("load.py: ")
    assert "nowhere" in line


def test_overload_reports_goodput_refusals_and_memory(tiny_bundle: Path, texts: Path, tmp_path: Path) -> None:
    plot = tmp_path / "overload.png"
    options = ["--seconds", 1, "--factors", 3, 0.5, "--deadline-ms", 200, "--plot", plot]
    report = benchmark("overload.py", tiny_bundle, texts, *options)
    calm, flooded = report["phases"]
    assert (calm["factor"], flooded["factor"]) == (0.5, 3.0)
    assert calm["offered_texts_per_second"] < flooded["offered_texts_per_second"]
    assert calm["goodput_to_capacity"] > 0
    assert calm["calls"]["OK"] > 0
    assert sum(calm["probe_calls"].values()) > 0
    assert 0 <= calm["probe_waited_in_vain"] <= 1
    assert report["capacity_texts_per_second"] == max(report["capacity_at_start"], report["capacity_at_end"])
    assert report["memory"]["peak_mb"] >= report["memory"]["before_mb"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_a_call_costs_is_reported_of_every_process() -> None:
    report = benchmark("rpc.py", "--rounds", 1, "--seconds", 0.3)
    for calls in (1, 32, 64):
        assert report[f"openbook, {calls} at a time"].keys() == {"client_us", "server_us"}
        behind = report[f"openbook behind a front end, {calls} at a time"]
        assert behind.keys() == {"client_us", "server_us", "front_end_us"}
        assert behind["client_us"] > 0  # the others' clock ticks too rarely for so short a run


def test_served_is_compared_with_raw_and_refusals_count_as_no_answer(tiny_bundle: Path, texts: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    report = benchmark("load.py", tiny_bundle, texts, "--device", "cpu", "--rounds", 1, "--seconds", 0.3, "--results", results)
    assert report["raw_texts_per_second"] > 0
    for name in ("32 texts a message", "unary, concurrency 64"):
        row = report[name]
        assert row["served_to_raw"] > 0
        assert row["statuses"] == {"OK": row["statuses"]["OK"]}
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["server_cpu_ms_a_text"] > 0
    assert {f"open loop, {share} of capacity" for share in (0.5, 0.8, 2.0)} <= set(report)
    assert json.loads(results.read_text())["load"] == report


def test_raw_limits_are_told_of_every_part(tiny_bundle: Path, texts: Path) -> None:
    report = benchmark("limits.py", tiny_bundle, texts, "--device", "cpu", "--seconds", 0.2, "--rows", 500)
    assert report["texts"] == 64
    assert min(value for value in report.values() if isinstance(value, float)) > 0


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    file.write_text("\n".join(json.dumps({"question": "who was king " + "of the river " * (number % 3)}) for number in range(8)))
    return file


@pytest.fixture(scope="module")
def knowledge_base(tiny_bundle: Path, texts: Path) -> Path:
    folder = texts.parent / "kb"
    index = [sys.executable, "-m", "openbook.cli", "index", str(tiny_bundle), str(folder), str(texts), "--passage-tokens", "30"]
    done = subprocess.run(index, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return folder


def test_curves_are_drawn_of_every_kind_of_load(
    tiny_bundle: Path, knowledge_base: Path, questions: Path, texts: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "curve.png"
    options = ["--seconds", 0.5, "--shares", 0.5, "--clients", 2, "--plot", plot]
    report = benchmark("curve.py", tiny_bundle, knowledge_base, questions, texts, *options)
    assert len(report["curves"]) == 4
    for curve in report["curves"].values():
        assert curve["capacity_per_second"] > 0
        assert [point["share"] for point in curve["points"]] == [0.5]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_answers_are_divided_by_the_raw_loop_over_what_was_read(tiny_bundle: Path, knowledge_base: Path, questions: Path) -> None:
    report = benchmark("answers.py", tiny_bundle, knowledge_base, questions, "--rounds", 1, "--seconds", 0.2)
    assert report["passages_a_question"] == 5.0
    assert report["raw_answers_per_second"] > 0
    for row in report["served"].values():
        assert row["served_to_raw"] == pytest.approx(row["answers_per_second"] / report["raw_answers_per_second"])


def test_overload_asks_for_answers_where_it_is_given_a_knowledge_base(tiny_bundle: Path, knowledge_base: Path, questions: Path) -> None:
    options = ["--answer", knowledge_base, "--texts-a-message", 1, "--seconds", 0.5, "--factors", 0.5]
    report = benchmark("overload.py", tiny_bundle, questions, *options)
    [phase] = report["phases"]
    assert report["method"] == "Answer"
    assert phase["calls"]["OK"] > 0


def test_streams_are_measured_beside_single_calls(writing_bundle: Path, texts: Path, questions: Path) -> None:
    options = ["--limit", 40, "--rounds", 1, "--seconds", 0.5, "--callers", 3, "--shares", 0.5, "--max-tokens", 5]
    report = benchmark("streams.py", writing_bundle, texts, questions, *options)
    assert report["documents"] == 40
    for method in ("Upsert", "Delete"):
        for count in (1, 32):
            single, stream = (report["writing"][f"{method}{suffix}, {count} a message"] for suffix in ("", "Stream"))
            assert stream["to_single_calls"] == pytest.approx(stream["documents_per_second"] / single["documents_per_second"])
            assert single["documents_per_second"] > 0
    assert report["generating"].keys() == {"generator", "language_model"}
    for phases in report["generating"].values():
        assert phases.keys() == {"callers: 3", "0.5 of capacity"}
        closed = phases["callers: 3"]
        assert closed["calls"].keys() == {"OK"}
        assert closed["pieces_per_second"] > 1.5 * closed["texts_per_second"] > 0  # a text comes in several
        assert 0 < closed["first_piece_p50_ms"] <= closed["first_piece_p95_ms"]
        assert min(closed["between_pieces_p50_ms"], closed["server_cpu_ms_a_piece"]) > 0


def test_generating_is_left_out_where_no_model_writes(tiny_bundle: Path, texts: Path, questions: Path) -> None:
    report = benchmark("streams.py", tiny_bundle, texts, questions, "--limit", 2, "--rounds", 1)
    assert report["generating"] == {}
    assert len(report["writing"]) == 8


def test_a_start_is_timed_with_and_without_a_knowledge_base(tiny_bundle: Path, knowledge_base: Path) -> None:
    report = benchmark("startup.py", tiny_bundle, knowledge_base, "--rounds", 1)
    assert list(report["starts"]) == ["bundle alone", "with knowledge base"]
    assert all(row["median_seconds"] > 0 for row in report["starts"].values())


def test_searches_are_divided_by_hnswlib_at_the_same_recall() -> None:
    report = benchmark("nearest.py", "--passages", 10_500, "--dim", 8, "--batches", 1, 64, "--rounds", 1, "--seconds", 0.1)
    assert report["graph_dims"] > 0
    assert report["hnswlib_recall_at_10"] >= report["recall_at_10"] or report["hnswlib_ef"] == 512
    assert all(row["ratio"] > 0 for row in report["batches"].values())


def test_growth_reports_each_size_with_its_recall() -> None:
    options = ["--passages", 500, 10_500, "--dim", 8, "--queries", 30]
    small, large = benchmark("growth.py", *options)["sizes"]
    assert (small["passages"], large["passages"]) == (500, 10_500)
    assert (small["graph_passages"], small["recall_at_10"]) == (0, 1.0)  # compared exactly
    assert large["graph_passages"] > 0
    assert large["recall_at_10"] > 0.9
    assert min(large["open_seconds"], large["write_seconds"], large["save_seconds"]) > 0
    assert 0 < large["hybrid_p50_ms"] <= large["hybrid_p99_ms"]
