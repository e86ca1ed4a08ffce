"""A run as a picture: loss and learning rate by step, and what the evaluations measured, a panel for each kind of metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_COLUMNS = 2
_INK, _FAINT = "#333333", "#c8ccd0"
# Okabe & Ito's colours, which people who see few colours tell apart too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
_UNITS = {"perplexity": "perplexity", "retrieval_utility": "nats", "masked_token_loss": "nats a token"}  # of groups that are no percentages
_NO_METRIC = frozenset({"step", "epoch", "score"})  # "score" repeats one of the others


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Write a PNG of a run's metrics.

    Metrics of one panel share the part of their name before "/"; those without one share the panel "evaluation". Of the steps'
    metrics those with a "/" have panels too.

    Args:
        rows: of metrics.jsonl, in the order of their steps, each once.
    """
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "loss" not in row]
    groups: dict[str, list[str]] = {}
    observed = [name for row in steps for name in row if "/" in name]
    for name in dict.fromkeys([*observed, *(name for row in evaluations for name in row if name not in _NO_METRIC)]):
        groups.setdefault(name.rpartition("/")[0] or "evaluation", []).append(name)
    panels = 2 + len(groups)
    lines = math.ceil(panels / _COLUMNS)
    figure = Figure(figsize=(5.6 * _COLUMNS, 3.3 * lines), dpi=110, layout="constrained")  # no pyplot: no window, no global state
    axes = [figure.add_subplot(lines, _COLUMNS, number + 1) for number in range(panels)]
    _loss(axes[0], steps)
    _style(axes[1], "learning rate", "learning rate")
    axes[1].plot([row["step"] for row in steps], [row["learning_rate"] for row in steps], color=_COLOURS[0], linewidth=1.5)
    axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    for panel, (group, names) in zip(axes[2:], groups.items(), strict=True):
        _metrics(panel, group, names, rows)
    last = max((row["step"] for row in rows), default=1)
    for panel in axes:
        panel.set_xlim(0, max(last, 1) * 1.02)
        panel.set_ylim(bottom=0 if panel is axes[1] else None)
    figure.savefig(file)


def _loss(panel: Axes, steps: Sequence[dict[str, Any]]) -> None:
    numbers, losses = [row["step"] for row in steps], [row["loss"] for row in steps]
    _style(panel, "training loss", "loss per example (nats)")
    if len(losses) < 20:
        panel.plot(numbers, losses, color=_COLOURS[0], linewidth=1.5, marker="o", markersize=3)
        return
    panel.plot(numbers, losses, color=_FAINT, linewidth=0.8, label="each step")
    window = max(2, len(losses) // 20)
    smooth = [sum(losses[max(0, at + 1 - window) : at + 1]) / min(window, at + 1) for at in range(len(losses))]
    panel.plot(numbers, smooth, color=_COLOURS[0], linewidth=1.8, label=f"mean of the last {window}")
    panel.legend(frameon=False, fontsize=8)


def _metrics(panel: Axes, group: str, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    percent = all(0 <= row[name] <= 100 for row in rows for name in names if row.get(name) is not None)
    _style(panel, group.replace("_", " "), _UNITS.get(group) or ("percent" if percent else "value"))
    for number, name in enumerate(names):
        found = [row for row in rows if row.get(name) is not None]
        panel.plot(
            [row["step"] for row in found],
            [row[name] for row in found],
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=("-", "--", ":")[number // len(_COLOURS) % 3],
            linewidth=1.5,
            marker="o" if len(found) < 40 else "",
            markersize=4,
            label=name.rpartition("/")[2].replace("_", " "),
        )
    panel.margins(y=0.15)
    panel.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _style(panel: Axes, title: str, unit: str) -> None:
    panel.set_title(title, loc="left", fontsize=10, color=_INK)
    panel.set_xlabel("step", fontsize=9, color=_INK)
    panel.set_ylabel(unit, fontsize=9, color=_INK)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    panel.tick_params(labelsize=8, colors=_INK)
    panel.grid(visible=True, axis="y", color="#eceff1", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
