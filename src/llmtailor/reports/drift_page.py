"""How the layers of a run move: at a checkpoint, and over the measurements before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint, expected_loss_steps
from .units import format_number_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["DriftPage"]

_BARS = "▁▂▃▄▅▆▇█"
_NUM_BARS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftPage:
    """What ``llmtailor show --drift`` shows."""

    checkpoint: Checkpoint
    measurements: Mapping[int, Mapping[str, Any]]
    """By step, of the run; see ``drift_log``."""

    def names(self) -> list[str]:
        """Path of the checkpoint."""
        return [str(self.checkpoint.path)]

    def record(self) -> dict[str, Any]:
        manifest = self.checkpoint.manifest
        return {
            "path": str(self.checkpoint.path),
            "step": manifest.step,
            "strategy": manifest.strategy,
            "expected_loss_steps": expected_loss_steps(manifest),
            "layers": [
                {
                    "name": layer.name,
                    "step": layer.state_step,
                    "staleness": manifest.step - layer.state_step,
                    "reason": layer.reason,
                    "drift": layer.drift,
                    "share": layer.share,
                }
                for layer in manifest.layers
            ],
            "measurements": list(self._until_now()),
        }

    def tables(self) -> Iterator[RenderableType]:
        from .tables import facts_table, heading, line

        manifest = self.checkpoint.manifest
        measured = list(self._until_now())
        yield line(str(self.checkpoint.path), "bold")
        yield facts_table(
            (
                ("step", manifest.step),
                ("strategy", manifest.strategy),
                ("lost at a resume", f"about {expected_loss_steps(manifest):.3g} steps of progress"),
                ("measured", f"{format_number_of(len(measured), 'time')}, in drift.jsonl" if measured else None),
            )
        )
        if all(layer.drift is None for layer in manifest.layers) and not measured:
            yield line("nothing was measured; train with monitor=True, or a strategy that asks for it", "yellow")
            return
        yield heading(format_number_of(len(manifest.layers), "layer"))
        yield self._layer_table(measured)

    def _until_now(self) -> Iterator[Mapping[str, Any]]:
        return (each for step, each in self.measurements.items() if step <= self.checkpoint.manifest.step)

    def _layer_table(self, measured: Sequence[Mapping[str, Any]]) -> Table:
        from .tables import cell, plain_table

        manifest = self.checkpoint.manifest
        newest = measured[-1]["layers"] if measured else {}
        table = plain_table("  layer", ">stale", ">drift", ">update", ">matters", "reason", "drift until now")
        for layer in manifest.layers:
            values = newest.get(layer.name, {})
            history = [_number(each["layers"].get(layer.name), "drift") for each in measured[-_NUM_BARS:]]
            row = (
                f"  {layer.name}",
                manifest.step - layer.state_step,
                None if layer.drift is None else f"{layer.drift:.3g}",
                None if (update := _number(values, "update")) is None else f"{update:.3g}",
                None if layer.share is None else f"{100 * layer.share:.3g} %",
                layer.reason,
                _draw(history),
            )
            table.add_row(*map(cell, row))
        return table


def _number(values: object, key: str) -> float | None:
    found = values.get(key) if isinstance(values, dict) else None
    return float(found) if isinstance(found, int | float) else None


def _draw(values: Sequence[float | None]) -> str:
    """A bar for each value, the largest the highest."""
    top = max((value for value in values if value is not None), default=0.0)
    if not top:
        return ""
    return "".join(" " if value is None else _BARS[min(7, int(8 * value / top))] for value in values)
