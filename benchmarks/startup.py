"""How soon does a server answer? Seconds from starting its process until it says SERVING.

    python benchmarks/startup.py BUNDLE [KB] [--device cpu] [--rounds 5]

Everything before that counts: Python's imports, opening the knowledge base and its saved indexes, loading graphs, golden vectors and
warming up. With a KB, starts without it are measured as well, in turn. The first round is left out: files that no process has read
lately come from the disk. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from driver import add_server_arguments, started_server
from openbook_server.bundle import load_bundle
from openbook_server.runtime import choose_device
from raw import machine
from report import add_results_arguments, publish, run_benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("knowledge_base", type=Path, nargs="?")
    add_server_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, help="that count (default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds takes 1 or more")
    folders = {"bundle alone": None} | ({"with knowledge base": arguments.knowledge_base} if arguments.knowledge_base else {})
    seconds: dict[str, list[float]] = {name: [] for name in folders}
    for _ in range(1 + arguments.rounds):
        for name, folder in folders.items():
            with started_server(arguments.bundle, arguments.device, arguments.threads, folder, sessions=arguments.sessions) as server:
                seconds[name].append(server.startup_seconds)
    report: dict[str, object] = {}
    for name, (first, *others) in seconds.items():
        report[name] = {"median_seconds": statistics.median(others), "seconds": others, "first_seconds": first}
        spread = f"median of {len(others)}, {min(others):.2f} to {max(others):.2f}; first {first:.2f}"
        print(f"{name}: {statistics.median(others):.2f} s ({spread})")
    bundle, device = load_bundle(arguments.bundle), choose_device(arguments.device, None, arguments.threads, arguments.sessions)
    publish({"starts": report, "machine": machine(bundle, f"{device.name} {device.precision}")}, arguments, "startup")


if __name__ == "__main__":
    run_benchmark(main)
