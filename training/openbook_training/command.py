"""`openbook train`: the command line of this package. Heavy imports wait until a run starts."""

from __future__ import annotations

import argparse
import sys

from openbook_training.tasks import OBJECTIVES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train a model of the system. OBJECTIVE names what is trained; CONFIG.toml says on what and for how long."
    parser.epilog = (
        "example: openbook train retriever training/configs/retriever_tiny.toml\n"
        "The run folder (key `output`) gets config.json, metrics.jsonl, tensorboard/, plots.png, checkpoint.pt and best/, the\n"
        "weights that `openbook export` takes (--reader, --embedder, --task, --generator, --language-model). Ctrl-C saves a checkpoint;\n"
        "the same command with --resume goes on.\n"
        "Several GPUs: accelerate launch -m openbook.cli train reader CONFIG.toml"
    )
    parser.add_argument(
        "objective", choices=list(OBJECTIVES), metavar="OBJECTIVE", help="; ".join(f"{name}: {o.summary}" for name, o in OBJECTIVES.items())
    )
    parser.add_argument(
        "config",
        metavar="CONFIG.toml",
        help="settings: recipes are in training/configs/, and training/README.md says where keys are explained",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    parser.add_argument("--output", help="run folder, instead of the configuration's")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from openbook_training.config import load_config
    from openbook_training.errors import TrainingError

    console = Console(stderr=True)
    try:
        overrides = {"output": arguments.output} if arguments.output else {}
        objective = OBJECTIVES[arguments.objective]
        config = load_config(arguments.config, objective.config(), overrides)
        from openbook_training.loop import Stopped
        from openbook_training.processes import leave
        from openbook_training.run import train

        try:
            metrics = train(objective, config, resume=arguments.resume, console=console)
        except Stopped as stop:
            console.print(str(stop))
            return leave(130)
    except (TrainingError, OSError) as error:
        print(f"openbook train: {error}", file=sys.stderr)
        return 1
    from openbook_training.record import metric_lines

    if not console.quiet:  # of several processes the first
        print(f"best: {config.output}/best  {metric_lines(metrics)[0]}")
    return leave(0)
