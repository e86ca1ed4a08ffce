"""Where a benchmark's numbers go: its last line, and a file of results that several runs share."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openbook.commands import written_aside
from openbook_server.errors import OpenBookError
from openbook_training.errors import TrainingError


def run_benchmark(main: Callable[[], None]) -> None:
    """Run a benchmark's `main`: what its user can mend ends it in one line and exit status 1, as `openbook` does."""
    try:
        main()
    except (OpenBookError, TrainingError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from error


def add_results_arguments(parser: argparse.ArgumentParser) -> None:
    """For `publish`."""
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="also write the last line into this file, beside what is there")
    parser.add_argument("--key", help="under this name in it (default: the benchmark's)")


def publish(report: dict[str, Any], arguments: argparse.Namespace, name: str) -> None:
    """Print a report as one line of JSON, and put it into the file of results where one was asked for.

    Numbers that are not finite become null: JSON has no others.
    """
    clean = finite(report)
    print(json.dumps(clean, allow_nan=False), flush=True)
    if arguments.results is not None:
        file: Path = arguments.results
        known = json.loads(file.read_text()) if file.exists() else {}
        known |= {"date": time.strftime("%Y-%m-%d"), arguments.key or name: clean}
        with written_aside(str(file)) as stream:
            stream.write(json.dumps(known, indent=1) + "\n")


def finite(value: Any) -> Any:
    """The same with None in place of NaN and infinities, at any depth."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
