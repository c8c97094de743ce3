"""The picture of the demo: both runs' losses, the kill and the resume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .report import DemoReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_losses", "loss_differences"]

_REFERENCE_COLOR = "#2f4858"
_RECOVERED_COLOR = "#e07a1f"
_KILL_COLOR = "#b3261e"


def draw_losses(report: DemoReport, path: Path) -> None:
    """Draw the report into a PNG file. No display and no global state of matplotlib is touched."""
    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    _draw_runs(above, report)
    _draw_crash(above, report)
    _draw_difference(below, report)
    figure.savefig(path, format="png")


def loss_differences(report: DemoReport) -> list[tuple[int, float]]:
    """Training loss of the resumed process minus that of the uninterrupted run, by step."""
    reference = {point.step: point.loss for part in report.reference.losses for point in part}
    return [
        (point.step, point.loss - reference[point.step])
        for point in report.recovered.losses[-1]
        if point.step in reference
    ]


def _draw_runs(axes: Axes, report: DemoReport) -> None:
    other = report.recovered.strategy
    whole = report.reference.losses[0]
    axes.plot(
        [point.step for point in whole],
        [point.loss for point in whole],
        color=_REFERENCE_COLOR,
        linewidth=4,
        alpha=0.35,
        label="full, uninterrupted",
    )
    *killed, resumed = report.recovered.losses
    for number, part in enumerate(killed):
        axes.plot(
            [point.step for point in part],
            [point.loss for point in part],
            color=_RECOVERED_COLOR,
            linewidth=1.4,
            linestyle=(0, (2, 1.5)),
            label=f"{other}, until the kill" if number == 0 else None,
        )
    axes.plot(
        [point.step for point in resumed],
        [point.loss for point in resumed],
        color=_RECOVERED_COLOR,
        linewidth=1.6,
        label=f"{other}, resumed",
    )
    for run, color, marker, size in (
        (report.reference, _REFERENCE_COLOR, "D", 10),
        (report.recovered, _RECOVERED_COLOR, "o", 6),
    ):
        axes.plot(
            [report.steps],
            [run.validation_loss],
            color=color,
            marker=marker,
            markersize=size,
            markeredgecolor="white",
            linestyle="none",
            clip_on=False,
            zorder=5,
            label=f"validation, {run.strategy} {'resumed' if run is report.recovered else 'uninterrupted'}: "
            f"{run.validation_loss:.4f}",
        )
    axes.set_ylabel("training loss (nats per byte)")
    axes.set_title(
        f"Killed in the middle of a save, then resumed: {report.validation_difference:+.4f} validation loss\n"
        f"{other} writes {report.share * 100:.0f} % of the bytes of a full save; same seed, same data",
        loc="left",
        fontsize=11,
    )
    axes.legend(frameon=False, loc="upper right")
    _tidy(axes)


def _draw_crash(axes: Axes, report: DemoReport) -> None:
    crash = report.crash
    axes.axvspan(crash.resumed_step, crash.killed_at_step, color=_KILL_COLOR, alpha=0.08, linewidth=0)
    for step, text, side in (
        (crash.resumed_step, f"resumed from \ncheckpoint-{crash.resumed_step} ", "right"),
        (crash.killed_at_step, f" killed while\n saving step {crash.save_step}", "left"),
    ):
        axes.axvline(step, color=_KILL_COLOR, linewidth=1, linestyle="-" if side == "left" else "--")
        axes.annotate(
            text, (step, 0.55), xycoords=("data", "axes fraction"), ha=side, va="center", color=_KILL_COLOR, fontsize=9
        )


def _draw_difference(axes: Axes, report: DemoReport) -> None:
    differences = loss_differences(report)
    axes.axhline(0, color=_REFERENCE_COLOR, linewidth=4, alpha=0.35)
    axes.plot(
        [step for step, _ in differences],
        [difference for _, difference in differences],
        color=_RECOVERED_COLOR,
        linewidth=1.6,
    )
    axes.axvspan(report.crash.resumed_step, report.crash.killed_at_step, color=_KILL_COLOR, alpha=0.08, linewidth=0)
    axes.set_xlim(0, report.steps)
    axes.set_xlabel("step (one seed, one tiny model)")
    axes.set_ylabel("resumed minus\nuninterrupted")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
