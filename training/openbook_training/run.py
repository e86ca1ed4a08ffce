"""A training run from its configuration: folder, processes, seed, task, loop."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from rich.console import Console

from openbook_training.config import check
from openbook_training.loop import Loop
from openbook_training.processes import process
from openbook_training.run_folder import check_data, check_folder, digests, held, identity, make_folder, write_config
from openbook_training.tasks import Objective


def train(objective: Objective, config: Any, *, resume: bool, console: Console) -> dict[str, float]:
    """Run the whole training; what a user deploys is left in `<output>/best`. Returns the metrics of the best epoch.

    A run that is refused leaves everything as it was: config.json is written when the first step is due. Only what a task computes from its
    data before (vectors of texts, a checkpoint from nothing) is kept in the folder at once, for the next start.

    Args:
        config: an `objective.config()`.
        console: made quiet in all processes but the first.

    Raises:
        TrainingError: bad data or settings, or a diverged loss (errors.py).
        Stopped: after SIGINT or SIGTERM, once a checkpoint is on the disk.
    """
    check(config)
    folder = Path(config.output)
    check_folder(folder, config, resume=resume)
    here = process()  # before anything computes: it chooses the device, and a number of threads that ours comes after
    if config.loop.threads:
        torch.set_num_threads(config.loop.threads)
    console.quiet = console.quiet or not here.is_main_process
    set_seed(config.loop.seed)  # before the model is built: its new weights are random
    task = objective.task()(config, console)
    stated = {"config": identity(config), "data": digests(task.trains_on())}
    check_data(folder, stated["data"])
    trained = sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad)
    console.print(f"{task.summary()}; {trained:,} trained weights")

    with ExitStack() as during:

        def begin() -> None:
            make_folder(folder)
            if here.is_main_process:  # the first of several processes holds the folder for all
                during.enter_context(held(folder))
                write_config(folder, config)

        return Loop(task, config.loop, folder, console, stated=stated).run(resume=resume, begin=begin)
