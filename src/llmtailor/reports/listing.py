"""A run, one line a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..inventory import Inode, Inventory, RunEntry, State
from .units import format_bytes, format_number_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["Listing", "max_staleness", "num_layers_coded", "num_layers_written"]


def num_layers_written(entry: RunEntry) -> int | None:
    """Layers whose exact files the checkpoint's own save wrote."""
    manifest = entry.manifest
    if manifest is None:
        return None
    return sum(layer.step == manifest.step and layer.encoding is None for layer in manifest.layers)


def num_layers_coded(entry: RunEntry) -> int | None:
    """Layers whose state is in codes."""
    manifest = entry.manifest
    return None if manifest is None else sum(layer.encoding is not None for layer in manifest.layers)


def max_staleness(entry: RunEntry) -> int | None:
    """Age in steps of the oldest layer's state."""
    manifest = entry.manifest
    return None if manifest is None else max((manifest.step - layer.state_step for layer in manifest.layers), default=0)


@dataclass(frozen=True, slots=True)
class Listing:
    """What ``llmtailor ls`` shows."""

    inventory: Inventory

    def names(self) -> list[str]:
        """Paths of the whole checkpoints, oldest first."""
        return [str(entry.path) for entry in self.inventory.checkpoints if entry.state is State.WHOLE]

    def record(self) -> list[dict[str, Any]]:
        """One record a directory; their ``new_bytes`` add up to what the run takes on disk."""
        seen: set[Inode] = set()
        return [_record(entry, seen) for entry in self.inventory.entries]

    def tables(self) -> Iterator[RenderableType]:
        from .tables import heading, line

        if self.inventory.checkpoints:
            yield _checkpoint_table(self.inventory.checkpoints)
        else:
            yield line("no checkpoint")
        odd = [entry for entry in self.inventory.entries if entry.state is not State.WHOLE]
        if odd:
            yield heading("damaged or set aside; resume passes them over")
            yield _odd_table(odd)
        yield heading("on disk")
        yield line(self._describe_disk())

    def _describe_disk(self) -> str:
        unique = {file.inode: file.nbytes for entry in self.inventory.entries for file in entry.files.values()}
        held, apparent = sum(unique.values()), sum(entry.nbytes for entry in self.inventory.entries)
        number = format_number_of(len(self.inventory.entries), "directory")
        text = f"  {format_bytes(held)} in {number}"
        if held == apparent:
            return text
        share = round(100 * (1 - held / apparent))
        return f"{text}; without shared files it would be {format_bytes(apparent)} ({share}% saved)"


def _record(entry: RunEntry, seen: set[Inode]) -> dict[str, Any]:
    manifest = entry.manifest
    new = {file.inode: file.nbytes for file in entry.files.values() if file.inode not in seen}
    seen.update(new)
    return {
        "path": str(entry.path),
        "step": entry.step,
        "state": str(entry.state),
        "detail": entry.detail,
        "created": manifest and manifest.created,
        "run_id": manifest and manifest.run_id,
        "contents": manifest and manifest.contents,
        "strategy": manifest and manifest.strategy,
        "num_layers_written": num_layers_written(entry),
        "num_layers_coded": num_layers_coded(entry),
        "num_layers": manifest and len(manifest.layers),
        "max_staleness": max_staleness(entry),
        "is_consistent": manifest and manifest.is_consistent,
        "is_current": manifest and manifest.is_current,
        "bytes": entry.nbytes,
        "written_bytes": manifest and manifest.written_nbytes,
        "new_bytes": sum(new.values()),
    }


def _checkpoint_table(entries: tuple[RunEntry, ...]) -> Table:
    from .tables import cell, plain_table

    has_codes = any(num_layers_coded(entry) for entry in entries)
    table = plain_table(
        *(">step", "created (UTC)", ">layers"),
        *([">coded"] if has_codes else []),
        *(">stale", "consistent", ">size", ">written", "strategy"),
    )
    for entry in entries:
        size = cell(format_bytes(entry.nbytes))
        coded = [cell(num_layers_coded(entry))] if has_codes else []
        if entry.manifest is None:
            table.add_row(cell(entry.step), cell("damaged", "red"), cell(None), *coded, cell(None), cell(None), size)
            continue
        manifest = entry.manifest
        table.add_row(
            cell(entry.step),
            cell(manifest.created[:16].replace("T", " ")) if entry.state is State.WHOLE else cell("damaged", "red"),
            cell(f"{num_layers_written(entry)}/{len(manifest.layers)}"),
            *coded,
            cell(max_staleness(entry)),
            cell("yes", "green") if manifest.is_consistent else cell("no"),
            size,
            cell(format_bytes(manifest.written_nbytes)),
            cell(manifest.strategy),
        )
    return table


def _odd_table(entries: list[RunEntry]) -> Table:
    from .tables import cell, plain_table

    table = plain_table("directory", "state", ">size", "reason")
    for entry in entries:
        style = "red" if entry.state is State.DAMAGED else ""
        reason = None if entry.detail is None else entry.detail.splitlines()[0]
        table.add_row(cell(entry.path.name), cell(entry.state, style), cell(format_bytes(entry.nbytes)), cell(reason))
    return table
