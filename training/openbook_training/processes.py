"""Which of the processes of a run this is, and the device it computes on: accelerate decides both, once for everybody."""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process() -> PartialState:
    """This process, among those that `accelerate launch` started; the only one of a run begun without it."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # PartialState alone does not read what `--cpu` sets
