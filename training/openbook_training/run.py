"""A training run from its configuration: seed, task, loop, and a record of what it was made with."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from rich.console import Console

from openbook_training.loop import Loop
from openbook_training.tasks import Objective

_RECORDED = ("torch", "transformers", "peft", "accelerate", "tokenizers")


def train(objective: Objective, config: Any, *, resume: bool, console: Console) -> dict[str, float]:
    """Run the whole training; what a user deploys is left in `<output>/best`. Returns the metrics of the best epoch.

    Args:
        config: an `objective.config()`.

    Raises:
        TrainingError: bad data or settings, or a diverged loss (errors.py).
        Stopped: after SIGINT or SIGTERM, once a checkpoint is on the disk.
    """
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in _RECORDED}
    (folder / "config.json").write_text(json.dumps({"config": dataclasses.asdict(config), "versions": versions}, indent=2) + "\n")
    set_seed(config.loop.seed)  # before the model is built: its new weights are random
    task = objective.task()(config, console)
    trained = sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad)
    console.print(f"{task.summary()}; {trained:,} trained weights")
    return Loop(task, config.loop, folder, console).run(resume=resume)
