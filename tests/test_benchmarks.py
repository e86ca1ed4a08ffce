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
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return report


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": "the red city " * (1 + number % 8)}) for number in range(64)))
    return file


def test_overload_reports_goodput_refusals_and_memory(tiny_bundle: Path, texts: Path, tmp_path: Path) -> None:
    plot = tmp_path / "overload.png"
    options = ["--seconds", 1, "--factors", 3, 0.5, "--deadline-ms", 200, "--plot", plot]
    report = benchmark("overload.py", tiny_bundle, texts, *options)
    calm, flooded = report["phases"]
    assert (calm["factor"], flooded["factor"]) == (0.5, 3.0)
    assert calm["offered_texts_per_second"] < flooded["offered_texts_per_second"]
    assert calm["goodput_to_capacity"] > 0
    assert calm["calls"]["OK"] > 0
    assert report["memory"]["peak_mb"] >= report["memory"]["before_mb"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_growth_reports_each_size_with_its_recall() -> None:
    options = ["--passages", 500, 10_500, "--dim", 8, "--queries", 30]
    small, large = benchmark("growth.py", *options)["sizes"]
    assert (small["passages"], large["passages"]) == (500, 10_500)
    assert (small["graph_passages"], small["recall_at_10"]) == (0, 1.0)  # compared exactly
    assert large["graph_passages"] > 0
    assert large["recall_at_10"] > 0.9
    assert large["open_seconds"] > 0
    assert 0 < large["hybrid_p50_ms"] <= large["hybrid_p99_ms"]
