"""A merge, planned or done: where each layer comes from, and what is done to it on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..merging import MergePlan
from .units import format_bytes, format_number_of

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Merging"]


@dataclass(frozen=True, slots=True)
class Merging:
    """What ``llmtailor merge``, ``export`` and ``plan RECIPE`` show."""

    plan: MergePlan
    output: Path | None = None
    """The new checkpoint; None if it was only planned."""
    secs: float | None = None
    """Time it took, planning included."""
    warned: tuple[str, ...] = ()
    """What turned out when it was written."""

    @property
    def _notes(self) -> tuple[str, ...]:
        return (*self.plan.notes, *self.warned)

    def names(self) -> list[str]:
        """The new checkpoint; of a plan, its sources."""
        if self.output is not None:
            return [str(self.output)]
        return list(dict.fromkeys(row.source for row in self.plan.rows))

    def record(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "output": None if self.output is None else str(self.output),
            "format": plan.to,
            "step": plan.catalog.step,
            "method": plan.method,
            "state_from": plan.state_from,
            "has_optimizer": plan.catalog.has_optimizer,
            "layers": [
                {
                    "layer": row.layer,
                    "source": row.source,
                    "source_layer": row.source_layer,
                    "step": row.step,
                    "staleness": row.staleness,
                    "bytes": row.nbytes,
                }
                for row in plan.rows
            ],
            "bytes": plan.nbytes,
            "linked_bytes": plan.linked_nbytes,
            "num_files": len(plan.files.files) + len(plan.files.links) + (plan.files.seal is not None),
            "secs": self.secs,
            "notes": list(self._notes),
        }

    def tables(self) -> Iterator[RenderableType]:
        from .tables import cell, facts_table, heading, line, plain_table

        is_renamed = any(row.layer != row.source_layer for row in self.plan.rows)
        table = plain_table("layer", *(["is"] if is_renamed else []), "source", ">step", ">stale", ">size")
        for row in self.plan.rows:
            style = "yellow" if row.staleness else ""
            table.add_row(
                cell(row.layer),
                *([cell(row.source_layer)] if is_renamed else []),
                cell(row.source),
                cell(row.step),
                cell(row.staleness, style),
                cell(format_bytes(row.nbytes)),
            )
        yield table
        yield heading("result" if self.output is not None else "would be")
        yield facts_table(self._facts())
        if self._notes:
            yield heading("to know")
            yield from (line(f"  {note}") for note in self._notes)

    def _facts(self) -> Iterator[tuple[str, object]]:
        plan = self.plan
        yield "path", self.output
        contents = "weights and optimizer" if plan.catalog.has_optimizer else "weights alone"
        yield "format", f"{plan.to}, {contents}"
        yield "step", plan.catalog.step
        yield "state from", plan.state_from if plan.catalog.has_optimizer else None
        size = format_bytes(plan.nbytes)
        linked = f", of which {format_bytes(plan.linked_nbytes)} are links" if plan.linked_nbytes else ""
        number = format_number_of(len(plan.files.files) + len(plan.files.links) + (plan.files.seal is not None), "file")
        yield "size", f"{size} in {number}{linked}"
        yield "time", None if self.secs is None else f"{self.secs:.1f} s"
