"""The recipes in training/configs: all can be read, and the tiny ones are run as their users run them."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from openbook_training.command import add_arguments
from openbook_training.config import load_config
from openbook_training.tasks import OBJECTIVES

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "training" / "configs").glob("*.toml"))
TINY = [recipe for recipe in RECIPES if recipe.stem.endswith("_tiny")]
HANGS_SECONDS = 600  # a recipe takes less than one; only a run that hangs is to be given up


def objective(recipe: Path) -> str:
    """The one that a recipe is named after."""
    return next(name for name in OBJECTIVES if recipe.stem == name or recipe.stem.startswith(name + "_"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_valid_for_the_objective_it_is_named_after(recipe: Path) -> None:
    assert load_config(recipe, OBJECTIVES[objective(recipe)].config()).output == f"runs/{recipe.stem}"


def test_every_objective_has_a_recipe_and_a_tiny_one() -> None:
    names = {recipe.stem for recipe in RECIPES}
    assert {objective(recipe) for recipe in RECIPES if not recipe.stem.endswith(("_tiny", "_gpu"))} == set(OBJECTIVES)
    assert {f"{name}_tiny" for name in OBJECTIVES} <= names


def test_the_example_of_the_help_is_a_tiny_recipe_that_begins_a_run() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = str(parser.epilog).split("\n", 1)[0].removeprefix("example: openbook train ").split()
    arguments = parser.parse_args(words)
    assert ROOT / arguments.config in TINY
    assert arguments.objective == objective(Path(arguments.config))
    assert not arguments.resume


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TINY, ids=lambda recipe: recipe.stem)
def test_a_tiny_recipe_runs_to_its_end(recipe: Path, tmp_path: Path) -> None:
    settings = tomllib.loads(recipe.read_text(encoding="utf-8"))
    if absent := [path for key in ("train", "dev") if not (ROOT / (path := settings.get(key, "."))).exists()]:
        pytest.skip(f"recipes read public data that is not there: {', '.join(absent)} (docs/benchmarks.md#data)")
    command = [sys.executable, "-m", "openbook.cli", "train", objective(recipe), str(recipe), "--output", str(tmp_path / "run")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS_SECONDS)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    scores = [row["score"] for row in rows if "score" in row]
    assert losses
    assert scores
    assert all(map(math.isfinite, [*losses, *scores]))
    assert any((tmp_path / "run" / "best").iterdir())
