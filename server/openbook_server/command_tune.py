"""`openbook tune`: find the settings that serve a bundle best on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from openbook.commands import folder

if TYPE_CHECKING:
    from openbook_server.tuning import Trial

_OBJECTIVE_MISSED = 3
_SECONDS = (0.1, 86_400.0)
_OBJECTIVE_MS = (1e-6, 3_600_000.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure how many requests a second a bundle does on this machine, and how long they take at four fifths of that, with several "
        "numbers of threads, of batches at once and of tokens a batch; write the best settings into a profile for `openbook serve "
        "--profile`. A request embeds a question and, where the bundle has a reader, reads five passages. Run it on an idle machine, and "
        "again when the machine, the device or the bundle changes."
    )
    parser.epilog = (
        "example: openbook tune bundle/ --objective-ms 200 --out profile.json; openbook serve bundle/ kb/ --profile profile.json\n"
        "exit status: 0; 1 when the bundle or the device does not open, or the file cannot be written; 2 for wrong usage;\n"
        "3 when no settings meet the objective (the quickest are written)"
    )
    parser.add_argument("bundle", type=folder, metavar="BUNDLE", help="folder written by `openbook export`")
    parser.add_argument("--objective-ms", type=float, metavar="P95", help="latency that 95 of 100 requests must keep (default: none)")
    parser.add_argument("--device", default="auto", help="auto, cpu, openvino or cuda (default: %(default)s)")
    parser.add_argument("--precision", default="", help="fp32, bf16, fp16 or int8; by default the device's lossless one")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="of measuring (default: %(default)s); loading the models comes on top, and in each of some ten trials finishing what was "
        "begun, which may be minutes in all: the total is told after the first trial",
    )
    parser.add_argument("--out", type=Path, default=Path("profile.json"), metavar="FILE", help="profile to write (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    from openbook_server.bundle import load_bundle
    from openbook_server.errors import OpenBookError
    from openbook_server.profiles import check_target, write_profile
    from openbook_server.runtime import choose_device, cores
    from openbook_server.tuning import ENOUGH, SHARE, seconds_needed, tune

    given = {"--seconds": (arguments.seconds, _SECONDS), "--objective-ms": (arguments.objective_ms, _OBJECTIVE_MS)}
    for flag, (value, (least, most)) in given.items():
        if value is not None and not least <= value <= most:  # NaN is between no two numbers
            print(f"openbook tune: {flag} {value:g} is not from {least:g} to {most:,.0f}", file=sys.stderr)
            return 2
    began, told = time.monotonic(), False

    def report(trial: Trial, of: int) -> None:
        nonlocal told
        print(_line(trial), flush=True)
        if not told:
            print(f"openbook tune: {of} trials, about {of * (time.monotonic() - began):.0f} s in all", file=sys.stderr)
        told = True

    try:
        bundle = load_bundle(arguments.bundle)
        check_target(arguments.out)
        device = choose_device(arguments.device, arguments.precision or None)
        print(f"{bundle.name} on {device.name} in {device.precision}")
        print(f"threads  batches at once  tokens a batch  requests/s  p95 ms at {SHARE:.0%} of that")
        trials, best = tune(
            bundle,
            device=device.name,
            precision=device.precision,
            objective_ms=arguments.objective_ms,
            seconds=arguments.seconds,
            report=report,
        )
        write_profile(
            arguments.out,
            {
                "device": device.name,
                "precision": device.precision,
                "threads": best.threads,
                "sessions": best.sessions,
                "max_batch_tokens": best.max_batch_tokens,
            },
            {
                "bundle_id": bundle.id,
                "cores": cores(),
                "objective_ms": arguments.objective_ms,
                "trials": [dataclasses.asdict(trial) for trial in trials],
            },
        )
    except OpenBookError as error:
        print(f"openbook tune: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"openbook tune: {arguments.out} cannot be written ({error.strerror}); choose another --out", file=sys.stderr)
        return 1
    print(f"\nbest:\n{_line(best)}\nwritten to {arguments.out}; openbook serve {arguments.bundle} KB --profile {arguments.out}")
    if needed := seconds_needed(trials):
        few = f"a trial had {min(trial.requests for trial in trials)} requests, and a p95 of fewer than {ENOUGH} tells little"
        print(f"openbook tune: {few}: on an idle machine give --seconds {math.ceil(needed)} or more", file=sys.stderr)
    if arguments.objective_ms is not None and best.p95_ms > arguments.objective_ms:
        print(f"openbook tune: nothing kept {arguments.objective_ms:g} ms; the quickest settings were written", file=sys.stderr)
        return _OBJECTIVE_MISSED
    return 0


def _line(trial: Trial) -> str:
    threads = trial.threads or "own"
    return f"{threads:>7}  {trial.sessions:>15}  {trial.max_batch_tokens:>14}  {trial.requests_per_second:>10.1f}  {trial.p95_ms:>21.1f}"
