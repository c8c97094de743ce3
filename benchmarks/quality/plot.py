"""The picture: what a failure costs, against the bytes that are written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {
    "full": "#2f4858",
    "parity": "#e07a1f",
    "filter": "#7a5195",
    "top_drift": "#b3261e",
    "top_adam": "#d68fb0",
    "round_robin": "#2a9d8f",
    "round_robin_10": "#8ab17d",
    "top_k": "#3a86ff",
    "budget": "#023e8a",
    "budget_per_step": "#00b4d8",
    "budget_per_step_free": "#90e0ef",
    "drift": "#6d6875",
    "monitored": "#b5838d",
}
_LABELS = {
    "top_drift": "half, by drift",
    "top_adam": "half, by Adam's weight",
    "round_robin": "round robin of 20",
    "round_robin_10": "round robin of 10",
    "budget_per_step_free": "budget_per_step, none always",
    "drift": "drift threshold",
    "monitored": "monitored threshold",
}
_MARKERS = {"skip": "o", "q8": "s", "q4": "D", "compact": "^", "compact4": "v"}


def draw_costs(rows: dict[str, Any], path: Path) -> None:
    """Draw the rows of a summary into a PNG file; a panel for each regime."""
    regimes = rows["settings"]["regimes"]
    figure = Figure(figsize=(10, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(regimes), sharey=True, squeeze=False)[0]
    for axes, regime in zip(panels, regimes, strict=True):
        _draw_regime(axes, rows, regime["name"])
        axes.set_title(f"{regime['name']}: {regime['title']}", loc="left", fontsize=10)
        axes.set_xlabel(f"bytes per step, by those of full every {rows['settings']['interval']}")
    panels[0].set_ylabel("cost of a failure, in steps\n(half an interval to redo, and what the restore lost)")
    _add_legend(figure, rows)
    figure.savefig(path, format="png")


def _draw_regime(axes: Axes, rows: dict[str, Any], name: str) -> None:
    for row in rows["one_failure"]:
        values = row["regimes"][name]
        if values.get("share_of_bytes") is None or values.get("expected_cost") is None:
            continue
        axes.errorbar(
            values["share_of_bytes"],
            values["expected_cost"],
            yerr=values["steps_lost_sd"],
            color=_COLORS[row["strategy"]],
            marker=_MARKERS[row["rest"]],
            markersize=7 if row["interval"] == rows["settings"]["interval"] else 5,
            markerfacecolor=None if row["interval"] == rows["settings"]["interval"] else "white",
            linewidth=1,
        )
    shares = np.geomspace(0.05, 2, 50)
    axes.plot(shares, rows["settings"]["interval"] / 2 / shares, color=_COLORS["full"], alpha=0.35, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlim(0.06, 1.3)
    axes.set_ylim(0, 3 * rows["settings"]["interval"])
    ticks = [0.1, 0.2, 0.5, 1]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _add_legend(figure: Figure, rows: dict[str, Any]) -> None:
    """Of what was measured."""
    from matplotlib.lines import Line2D

    strategies, rests = ({row[key] for row in rows["one_failure"]} for key in ("strategy", "rest"))
    entries = [
        Line2D([], [], color=color, marker="o", linestyle="none", label=_LABELS.get(name, name))
        for name, color in _COLORS.items()
        if name in strategies
    ]
    entries += [
        Line2D([], [], color="grey", marker=marker, linestyle="none", label=f"rest: {name}")
        for name, marker in _MARKERS.items()
        if name in rests
    ]
    entries += [
        Line2D([], [], color="grey", marker="o", markerfacecolor="white", linestyle="none", label="saved more often"),
        Line2D([], [], color=_COLORS["full"], alpha=0.35, linestyle="--", label="full at other intervals"),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
