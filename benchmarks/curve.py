"""How does latency grow with load? Throughput-latency curves of Embed and Answer, single texts, in one run.

    python benchmarks/curve.py BUNDLE KB QUESTIONS.jsonl PASSAGES.jsonl [--device cpu] [--shares 0.2 0.4 1 1.2] [--plot FILE.png]

Four kinds of load, one text a message: Embed of short texts (questions), of long ones (passages), of both in equal parts, and
Answer. The capacity of each is measured first, in closed loop; then messages arrive at random (Poisson) at shares of it, whether
or not those before were answered, from processes of their own. Reported for each share: answered a second, p50, p95 and p99 of
the answered ones, counted from when a message was due, the server's CPU seconds a request, and what became of the others.
Passages that the embedder would refuse as too long are left out. Neither call streams, so a call's end is its only latency.
Clients share the cores with the server. Bounded in time and number of requests; warm-up is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from driver import Clients, Driven, Load, add_server_arguments, percentile, started_server, warn_if_saturated
from openbook_server.bundle import load_bundle
from openbook_server.runtime import choose_device
from openbook_server.tokenization import TextEncoder, load_tokenizer
from raw import load_texts, machine
from report import add_results_arguments, publish, run_benchmark

SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.2)
CALLERS = 64  # of the closed loop that measures capacity
PERCENTILES = (50, 95, 99)
MARKS = [digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)]  # of the axis of milliseconds


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One curve."""

    name: str
    method: Literal["Embed", "Answer"]
    texts: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One share of a curve."""

    share: float  # of capacity, as planned
    offered_per_second: float
    answered_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    server_cpu_seconds_a_request: float
    client_cpu: float
    calls: Mapping[str, int]


def point(share: float, driven: Driven) -> Point:
    answered = driven.milliseconds.get("OK", ())
    p50, p95, p99 = (percentile(answered, at) for at in PERCENTILES)
    return Point(
        share=share,
        offered_per_second=driven.sent / driven.seconds,
        answered_per_second=len(answered) / driven.seconds,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        server_cpu_seconds_a_request=driven.server_cpu_seconds / max(1, driven.calls),
        client_cpu=driven.client_cpu,
        calls={status: len(took) for status, took in driven.milliseconds.items()},
    )


def kinds(questions: Sequence[str], passages: Sequence[str]) -> list[Kind]:
    """The four; of both lengths there are equally many."""
    half = min(len(questions), len(passages))
    return [
        Kind(name="Embed, short texts", method="Embed", texts=questions),
        Kind(name="Embed, long texts", method="Embed", texts=passages),
        Kind(name="Embed, both in equal parts", method="Embed", texts=[*questions[:half], *passages[:half]]),
        Kind(name="Answer", method="Answer", texts=questions),
    ]


def plot(file: Path, curves: Mapping[str, Mapping[str, object]], subtitle: str) -> None:
    """A panel a kind: percentiles over what was answered, capacity as a line across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, panels = pyplot.subplots(2, 2, figsize=(9, 7))
    for axes, (name, curve) in zip(panels.flat, curves.items(), strict=True):
        points: Sequence[Point] = curve["points"]  # type: ignore[assignment]
        capacity: float = curve["capacity_per_second"]  # type: ignore[assignment]
        for share, marker in zip(PERCENTILES, "o^s", strict=True):
            latencies = [getattr(one, f"p{share}_ms") for one in points]
            axes.plot([one.answered_per_second for one in points], latencies, marker=marker, markersize=4, label=f"p{share}")
        axes.axvline(capacity, linestyle="--", color="grey", label="capacity, closed loop")
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("answered a second")
        axes.set_ylabel("milliseconds")
        axes.set_yscale("log")
        finite = [value for one in points for value in (one.p50_ms, one.p99_ms) if value > 0]
        least, most = min(finite, default=1.0), max(finite, default=1.0)
        axes.set_ylim(max(mark for mark in MARKS if mark <= least), min(mark for mark in MARKS if mark > most))
        axes.yaxis.set_major_locator(FixedLocator(MARKS))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(0)
        axes.grid(alpha=0.3)
    panels.flat[0].legend(fontsize=9)
    figure.suptitle(f"One text a message, Poisson arrivals; {subtitle}", fontsize=12)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("knowledge_base", type=Path)
    parser.add_argument("questions", type=Path, help="JSON lines with `text` or `question`: the short texts")
    parser.add_argument("passages", type=Path, help="JSON lines with `text`: the long texts")
    parser.add_argument("--limit", type=int, default=1024, help="texts used of each file (default: %(default)s)")
    add_server_arguments(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of capacity (default: %(default)s)")
    parser.add_argument("--deadline-ms", type=float, default=2_000.0, help="of each call in open loop (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="a share (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=1, help="processes that send (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    if bundle.reader is None:
        parser.error(f"{arguments.bundle} has no reader, and Answer is measured; export it with --reader")
    device = choose_device(arguments.device, None, arguments.threads, arguments.sessions)
    encoder = TextEncoder(load_tokenizer(bundle.tokenizer_path))
    passages = load_texts(arguments.passages, arguments.limit)
    rows = encoder.texts(passages)
    passages = [text for text, row in zip(passages, rows, strict=True) if len(row.ids) <= bundle.embedder.max_tokens]
    questions = load_texts(arguments.questions, arguments.limit)
    curves: dict[str, dict[str, object]] = {}
    with (
        started_server(
            arguments.bundle, arguments.device, arguments.threads, arguments.knowledge_base, sessions=arguments.sessions
        ) as server,
        Clients(arguments.clients) as clients,
    ):
        for kind in kinds(questions, passages):
            tokens = sum(len(row.ids) for row in encoder.texts(kind.texts)) / len(kind.texts)
            closed = clients.drive(server, kind.texts, Load(concurrency=CALLERS, seconds=arguments.seconds, method=kind.method))
            capacity = closed.count("OK") / closed.seconds
            print(f"{kind.name}, {tokens:.1f} tokens a text: capacity {capacity:.1f}/s")
            print(f"{'share':>7}{'answered/s':>12}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'CPU ms/request':>16}  calls")
            points = []
            for share in sorted(arguments.shares):
                load = Load(
                    rate=share * capacity,
                    seconds=arguments.seconds,
                    deadline_seconds=arguments.deadline_ms / 1000,
                    method=kind.method,
                )
                driven = clients.drive(server, kind.texts, load)
                one = point(share, driven)
                points.append(one)
                latencies = "".join(f"{value:>9.1f}" for value in (one.p50_ms, one.p95_ms, one.p99_ms))
                cpu = 1000 * one.server_cpu_seconds_a_request
                print(f"{share:>7.2f}{one.answered_per_second:>12.1f}{latencies}{cpu:>16.2f}  {one.calls}", flush=True)
                warn_if_saturated(driven)
            curves[kind.name] = {"capacity_per_second": capacity, "tokens_a_text": tokens, "points": points}
    place = machine(bundle, f"{device.name} {device.precision}")
    if arguments.plot:
        plot(arguments.plot, curves, f"{place['device']}, {place['cores']} cores of an {place['cpu']}")
    for curve in curves.values():
        curve["points"] = [asdict(one) for one in curve["points"]]  # type: ignore[attr-defined]
    publish({"deadline_ms": arguments.deadline_ms, "curves": curves, "machine": place}, arguments, "curve")


if __name__ == "__main__":
    run_benchmark(main)
