"""Which of the processes of a run this is, and the device it computes on: accelerate decides both, once for everybody."""

from __future__ import annotations

import os
import sys

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process() -> PartialState:
    """This process, among those that `accelerate launch` started; the only one of a run begun without it."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # PartialState alone does not read what `--cpu` sets


def leave(status: int) -> int:
    """End this process with `status` where it is one of several, which must have nothing left to do; otherwise return it.

    One of several must not take its interpreter down: now and then a thread that torch keeps for the others is still there when its memory
    goes, and the process aborts ("terminate called without an active exception"), though all is saved, and the launcher tells of a failure.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
