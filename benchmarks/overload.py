"""What happens when too much is asked? Embed, or Answer, at one, two and ten times what the server can do.

    python benchmarks/overload.py BUNDLE TEXTS.jsonl [--device cpu] [--factors 0.5 1 2 10] [--seconds 8] [--minutes 10] [--plot FILE.png]
    python benchmarks/overload.py BUNDLE TEXTS.jsonl --answer KB --texts-a-message 1 ...

Capacity is measured first, in closed loop; then messages arrive at random (Poisson) at multiples of it, whether or not those before
were answered, from processes of their own, and each call has a deadline. At the end capacity is measured again: shares are of the larger
of the two, and when they differ by more than a tenth, that is said, for then the machine was not the same throughout.

Reported per factor: goodput (texts answered within their deadline, as a share of capacity), what became of the other calls, how soon
refusals came, the server's CPU time a call, and its memory. How soon refusals came is seen by a client of its own that sends a few calls
a second, for those who flood a server wait for themselves; beside it stands which share of its calls waited in vain until their
deadline, which no latency of refusals counts. With `--minutes` the largest factor then goes on for so long, minute by minute: memory must
not grow from the first minute to the last.

Clients on the same cores take part of them, so goodput falls somewhat with the factor whatever the server does; `offered` is what they
really sent, `client_cpu` what the busiest of them used (near 1: it may be the limit; raise `--clients`). The CPU time of a refusal is what
is left of the largest factor's after its answers are paid for at the smallest factor's price. Bounded in time and number of requests;
warm-up is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from driver import Clients, Driven, Load, add_arguments, memory_mb, percentile, started_server, warn_if_saturated
from openbook_server.bundle import load_bundle
from openbook_server.runtime import choose_device
from raw import load_texts, machine
from report import add_results_arguments, publish, run_benchmark

REFUSED = ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
SETTLE_SECONDS = 2.0  # before memory is looked at again
MINUTE = 60.0
PROBE_RATE = 20.0  # calls a second of the client that is not busy itself, at most, and a tenth of what the others send
STEADY = 0.9  # the smaller capacity as a share of the larger, at least, on a machine that stayed the same


def summary(driven: Driven, load: Load, probe: Driven) -> dict[str, object]:
    """One phase in numbers."""
    refusals, answers = probe.milliseconds.get(REFUSED[0], []), driven.milliseconds.get("OK", [])
    return {
        "offered_texts_per_second": load.texts_a_message * driven.sent / driven.seconds,
        "goodput_texts_per_second": load.texts_a_message * len(answers) / driven.seconds,
        "calls": {status: len(part) for status, part in driven.milliseconds.items()},
        "probe_calls": {status: len(part) for status, part in probe.milliseconds.items()},
        "probe_waited_in_vain": probe.count(REFUSED[1]) / max(1, probe.calls),  # a share
        "server_cpu_ms_a_call": 1000 * driven.server_cpu_seconds / max(1, driven.calls),
        "client_cpu": driven.client_cpu,
        "memory_peak_mb": max((mb for _, mb in driven.memory_mb), default=float("nan")),
        **{
            f"{name}_p{at}_ms": percentile(took, at)
            for name, took in (("answer", answers), ("refusal", refusals))
            if took
            for at in (50, 95, 99)
        },
    }


def described(phase: dict[str, object]) -> str:
    took = ", ".join(f"{name.removesuffix('_ms')} {value:.1f} ms" for name, value in phase.items() if "_p" in name and name.endswith("_ms"))
    return (
        f"goodput {phase['goodput_texts_per_second']:.0f} texts/s; {took}; {phase['server_cpu_ms_a_call']:.2f} ms CPU a call; "
        f"{phase['memory_peak_mb']:.0f} MB; {phase['calls']}; probe {phase['probe_calls']}, "
        f"{phase['probe_waited_in_vain']:.1%} waited in vain"
    )


def against(phases: Sequence[dict[str, object]], *, start: float, end: float) -> dict[str, object]:
    """Adds to each phase its goodput as a share of the larger capacity, in texts a second; returns what is to be reported of the two."""
    capacity = max(start, end)
    for phase in phases:
        phase["goodput_to_capacity"] = phase["goodput_texts_per_second"] / capacity  # type: ignore[operator]
    return {
        "capacity_texts_per_second": capacity,
        "capacity_at_start": start,
        "capacity_at_end": end,
        "capacity_steady": min(start, end) >= STEADY * capacity,
    }


def refusal_cost(phases: Sequence[dict[str, object]]) -> float | None:
    """Milliseconds of CPU time of one refused call; None where nothing was refused."""

    def counts(phase: dict[str, object]) -> tuple[int, int]:
        calls: dict[str, int] = phase["calls"]  # type: ignore[assignment]
        return calls.get("OK", 0), sum(calls.get(status, 0) for status in REFUSED)

    calm, flooded = phases[0], phases[-1]
    answered, refused = counts(flooded)
    if not refused:
        return None
    total: float = flooded["server_cpu_ms_a_call"] * (answered + refused)  # type: ignore[operator]
    return max(0.0, total - answered * calm["server_cpu_ms_a_call"]) / refused  # type: ignore[operator]


def plot(file: Path, phases: Sequence[dict[str, object]], capacity: float) -> None:
    """Goodput against offered load, both as multiples of capacity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    offered = [phase["offered_texts_per_second"] / capacity for phase in phases]  # type: ignore[operator]
    axes.plot([0, 1, max(offered)], [0, 1, 1], "--", color="grey", label="what could be answered")
    axes.plot(offered, [phase["goodput_to_capacity"] for phase in phases], "o-", label="answered in time")
    axes.set_xlabel("offered load / capacity")
    axes.set_ylabel("goodput / capacity")
    axes.set_ylim(0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--answer", type=Path, metavar="KB", help="ask for answers from this knowledge base (default: for embeddings)")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 2.0, 10.0], help="of capacity (default: 0.5 1 2 10)")
    parser.add_argument("--texts-a-message", type=int, default=4, help="so that few clients can send enough (default: %(default)s)")
    parser.add_argument("--deadline-ms", type=float, default=1_000.0, help="of each call (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="a phase (default: %(default)s)")
    parser.add_argument("--minutes", type=int, default=0, help="that the largest factor goes on for in the end (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=2, help="processes that send (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw goodput against offered load")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    bundle, texts = load_bundle(arguments.bundle), load_texts(arguments.texts, arguments.limit)
    device = choose_device(arguments.device, None, arguments.threads, arguments.sessions)
    size, deadline = arguments.texts_a_message, arguments.deadline_ms / 1000
    base = Load(seconds=arguments.seconds, texts_a_message=size, method="Answer" if arguments.answer else "Embed")
    limited = replace(base, deadline_seconds=deadline)
    factors = sorted(arguments.factors)
    phases: list[dict[str, object]] = []
    with (
        started_server(arguments.bundle, arguments.device, arguments.threads, arguments.answer, sessions=arguments.sessions) as server,
        Clients(arguments.clients) as clients,
    ):

        def measured_capacity() -> float:
            load = replace(base, concurrency=max(4, 64 // size))
            return size * clients.drive(server, texts, load).count("OK") / load.seconds

        start = measured_capacity()
        before = memory_mb(server.pid)
        print(f"capacity: {start:.0f} texts/s, {size} a message")

        def flood(factor: float, seconds: float) -> Driven:
            load = replace(limited, rate=factor * start / size, seconds=seconds)
            probe = replace(limited, rate=min(PROBE_RATE, load.rate / 10), seconds=seconds)
            driven = clients.drive(server, texts, load, probe=probe)
            assert driven.probe is not None
            phases.append({"factor": factor, "seconds": seconds, **summary(driven, load, driven.probe)})
            print(f"{factor:g} x capacity, {seconds:g} s: {described(phases[-1])}")
            warn_if_saturated(driven)
            return driven

        for factor in factors:
            flood(factor, arguments.seconds)
        refusal = refusal_cost(phases)
        measured = len(phases)
        minutes = [flood(factors[-1], MINUTE) for _ in range(arguments.minutes)]
        time.sleep(SETTLE_SECONDS)
        memory: dict[str, object] = {"before_mb": before, "after_mb": memory_mb(server.pid), "peak_mb": memory_mb(server.pid, "VmHWM")}
        end = measured_capacity()
    capacity = against(phases, start=start, end=end)
    print(f"capacity at the end: {end:.0f} texts/s, at the start {start:.0f}")
    if not capacity["capacity_steady"]:
        print("  they differ by more than a tenth: the machine was not the same throughout, and no share is better known than that")
    shares = ", ".join(f"{phase['goodput_to_capacity']:.2f}" for phase in phases[:measured])
    print(f"goodput at {', '.join(f'{factor:g}' for factor in factors)} x capacity: {shares} of the larger capacity")
    cost = "none was refused" if refusal is None else f"a refusal costs {refusal:.2f} ms of CPU time"
    print(f"{cost}; memory {before:.0f} -> {memory['after_mb']:.0f} MB, peak {memory['peak_mb']:.0f}")
    if minutes:
        memory["each_minute_mb"] = [max(mb for _, mb in minute.memory_mb) for minute in minutes]
        print(f"the most in each minute at {factors[-1]:g} x capacity: {', '.join(f'{mb:.0f}' for mb in memory['each_minute_mb'])} MB")  # type: ignore[attr-defined]
    if arguments.plot:
        plot(arguments.plot, phases[:measured], max(start, end))
    report = {
        **capacity,
        "method": base.method,
        "texts_a_message": size,
        "deadline_ms": arguments.deadline_ms,
        "phases": phases[:measured],
        "minutes": phases[measured:],
        "refusal_cpu_ms": refusal,
        "memory": memory,
        "machine": machine(bundle, f"{device.name} {device.precision}"),
    }
    publish(report, arguments, "overload")


if __name__ == "__main__":
    run_benchmark(main)
