"""What the checkpoints of a run will take: bytes, time, money."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..estimate import Estimate, StrategyEstimate
from .units import format_bytes, format_number_of

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["EstimatePage", "draw_bars"]

_GB = 1000**3


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatePage:
    """What ``llmtailor estimate`` shows."""

    estimate: Estimate
    bandwidth: int
    """Bytes a second that are written."""
    price: float
    """USD for a GB and month."""

    def names(self) -> list[str]:
        """Bytes that each run writes."""
        return [str(run.run_nbytes) for run in self.estimate.runs]

    def record(self) -> dict[str, Any]:
        estimate, schedule = self.estimate, self.estimate.schedule
        training = estimate.training
        return {
            "model": estimate.model.name,
            "origin": estimate.model.origin,
            "num_parameters": estimate.model.num_parameters,
            "num_layers": len(estimate.layers),
            "optimizer": None if training is None else training.optimizer,
            "precision": None if training is None else training.precision,
            "trainable": [] if training is None else list(training.trainable),
            "ranks": estimate.ranks,
            "checkpoint_bytes": estimate.checkpoint_nbytes,
            "rank_bytes": estimate.rank_nbytes,
            "bytes_per_parameter": estimate.bytes_per_parameter,
            "steps": schedule.steps,
            "every": schedule.every,
            "is_resumed": schedule.is_resumed,
            "keep": schedule.keep.text or None,
            "rest": estimate.rest,
            "assumed_drift_per_step": estimate.drift_per_step,
            "bandwidth": self.bandwidth,
            "price": self.price,
            "full_run_bytes": estimate.full.run_nbytes,
            "strategies": [self._run_record(run) for run in estimate.runs],
            "refused": [{"strategy": refusal.label, "reason": refusal.what} for refusal in estimate.refusals],
            "layers": [self._layer_record(number) for number in range(len(estimate.layers))],
        }

    def _run_record(self, run: StrategyEstimate) -> dict[str, Any]:
        return {
            "strategy": run.strategy,
            "num_saves": len(run.saves),
            "save_bytes": {"mean": run.mean_nbytes, "min": run.min_nbytes, "max": run.max_nbytes},
            "run_bytes": run.run_nbytes,
            "ratio": self.estimate.ratio(run),
            "disk_bytes": run.disk_nbytes,
            "peak_disk_bytes": run.peak_disk_nbytes,
            "save_seconds": {"mean": run.mean_nbytes / self.bandwidth, "max": run.max_nbytes / self.bandwidth},
            "run_seconds": run.run_nbytes / self.bandwidth,
            "usd_per_month": self._usd_per_month(run),
            "max_staleness": run.max_staleness,
            "max_exact_age": run.max_exact_age,
            "is_drift_assumed": run.is_drift_assumed,
            "saves": [_rename_bytes(asdict(save)) for save in run.saves],
        }

    def _layer_record(self, number: int) -> dict[str, Any]:
        layer = self.estimate.layers[number]
        return {
            "name": layer.name,
            "kind": layer.kind.value,
            "num_trained": layer.numel,
            "weights_bytes": layer.weights_nbytes,
            "optimizer_bytes": layer.optimizer_nbytes,
            "coded_bytes": None if layer.coded is None else layer.coded.nbytes,
        }

    def _usd_per_month(self, run: StrategyEstimate) -> float:
        return run.disk_nbytes / _GB * self.price

    def tables(self) -> Iterator[RenderableType]:
        from .tables import facts_table, line

        yield line(self.estimate.model.name, "bold")
        yield facts_table(self._facts())
        yield line("")
        yield self._run_table()
        yield from (line(f"  {refusal.label} is left out: {refusal.what}") for refusal in self.estimate.refusals)
        yield from (line(f"  {note}") for note in self._notes())

    def _facts(self) -> Iterator[tuple[str, object]]:
        estimate, schedule = self.estimate, self.estimate.schedule
        model = estimate.model
        yield "from", model.origin
        parameters = format_number_of(model.num_parameters, "parameter")
        yield "model", f"{format_number_of(len(estimate.layers), 'layer')}, {parameters}"
        training = estimate.training
        yield "state", "as in the checkpoint" if training is None else training.text
        yield "trained", ", ".join(training.trainable) if training is not None and training.trainable else None
        size = format_bytes(estimate.checkpoint_nbytes)
        yield "a full checkpoint", f"{size}, {estimate.bytes_per_parameter:.2f} bytes a parameter"
        yield f"of {estimate.ranks} ranks", f"{format_bytes(estimate.rank_nbytes)} each" if estimate.ranks > 1 else None
        resumed = ", after a full checkpoint at step 0" if schedule.is_resumed else ""
        yield "saves", f"every {schedule.every:,} of {schedule.steps:,} steps{resumed}"
        yield "keep", schedule.keep.text or "all"
        yield "rest", None if estimate.rest == "skip" else estimate.rest

    def _run_table(self) -> Table:
        from .tables import cell, plain_table

        table = plain_table(
            *("  strategy", ">saves", ">a save", ">least", ">most", ">run", ">of full", ">on disk", ">s a save"),
            *(">USD a month", ">stale"),
            *((">exact age",) if self.estimate.rest != "skip" else ()),
        )
        for run in self.estimate.runs:
            row = (
                f"  {run.label}",
                len(run.saves),
                format_bytes(round(run.mean_nbytes)),
                format_bytes(run.min_nbytes),
                format_bytes(run.max_nbytes),
                format_bytes(run.run_nbytes),
                f"{100 * self.estimate.ratio(run):.1f} %",
                format_bytes(run.disk_nbytes),
                f"{run.mean_nbytes / self.bandwidth:.3g}",
                f"{self._usd_per_month(run):.2f}",
                f"{run.max_staleness:,}",
                *((f"{run.max_exact_age:,}",) if self.estimate.rest != "skip" else ()),
            )
            table.add_row(*map(cell, row))
        return table

    def _notes(self) -> Iterator[str]:
        rate = format_bytes(self.bandwidth)
        yield f"at {rate} a second and USD {self.price:g} for a GB and month; small files are not counted"
        assumed = [run.label for run in self.estimate.runs if run.is_drift_assumed]
        if assumed:
            per_step = f"{100 * self.estimate.drift_per_step:g} %"
            yield (
                f"assumed, for {', '.join(assumed)}: all layers move alike, {per_step} a step; what is written "
                "depends on it"
            )
        own = [run.label for run in self.estimate.runs if run.has_own_steps]
        if own:
            yield f"saves at steps of its own: {', '.join(own)}"
        if self.estimate.rest != "skip":
            yield "codes are assumed to be within their limits of error; 16-bit weights without masters count in full"


def _rename_bytes(record: dict[str, Any]) -> dict[str, Any]:
    """Names of a JSON report instead of ours."""
    return {name.replace("nbytes", "bytes"): value for name, value in record.items()}


def draw_bars(estimate: Estimate, path: Path) -> None:
    """Draw the bytes that each run writes into a PNG or SVG file. No display and no global state is touched.

    Args:
        estimate: What to draw.
        path: The file, as ``heat_map.check_picture`` lets it pass; what was there is replaced.

    Raises:
        WriteError: The disk, a permission or a limit.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..errors import WriteError

    figure = Figure(figsize=(8, 1.4 + 0.42 * max(len(estimate.runs), 2)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    _draw(figure.subplots(), estimate)
    is_vector = path.suffix.lower() == ".svg"
    try:
        figure.savefig(path, format=path.suffix.lower()[1:], metadata={"Date": None} if is_vector else None)
    except OSError as err:
        raise WriteError(
            f"cannot write the picture: {err.strerror or err}", kind="picture", path=path, hint="choose another place"
        ) from err


def _draw(axes: Axes, estimate: Estimate) -> None:
    runs = estimate.runs
    places = range(len(runs))
    axes.barh(places, [run.run_nbytes / _GB for run in runs], color="#2a9d8f", height=0.7)
    for place, run in zip(places, runs, strict=True):
        text = f"  {format_bytes(run.run_nbytes)}, {100 * estimate.ratio(run):.0f} %"
        axes.text(run.run_nbytes / _GB, place, text, va="center", fontsize=8)
    axes.set_yticks(places, [run.label for run in runs], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel(f"GB written in {estimate.schedule.steps:,} steps, a save every {estimate.schedule.every:,}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(estimate.model.name, loc="left", fontsize=9, parse_math=False)
