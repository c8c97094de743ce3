"""Which directories of a run may go, and what that frees. Decides and shows; removing is somebody else's."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import IncompleteError, InvalidInputError
from ..inventory import Inventory, RunEntry, State, freed_nbytes
from ..retention import Kept, choose_removals
from .units import format_bytes, format_number_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["Removal", "plan_removal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What ``llmtailor prune`` shows."""

    doomed: tuple[RunEntry, ...]
    kept: tuple[RunEntry, ...]
    """Whole checkpoints that stay, oldest first."""
    ignored: tuple[RunEntry, ...]
    """Damaged checkpoints: neither counted nor removed."""
    is_done: bool = False
    """They were removed."""

    @property
    def successor(self) -> RunEntry:
        """The newest checkpoint that stays; it must verify before anything goes.

        Raises:
            IncompleteError: There is none.
        """
        if not self.kept:
            raise IncompleteError(
                "the run has no whole checkpoint; what was set aside may be all that is left of it",
                kind="no-successor",
                path=self.doomed[0].path.parent,
                expected="a checkpoint that stays",
                found=", ".join(entry.path.name for entry in self.doomed),
                hint="nothing was removed; if you are sure, remove the directories yourself",
            )
        return self.kept[-1]

    @property
    def freed_nbytes(self) -> int:
        """Bytes of files that no other directory holds."""
        return freed_nbytes(self.doomed)

    def summary(self) -> str:
        """``3 directories, 1.2 MB``."""
        return f"{format_number_of(len(self.doomed), 'directory')}, {format_bytes(self.freed_nbytes)}"

    def names(self) -> list[str]:
        """Paths that go."""
        return [str(entry.path) for entry in self.doomed]

    def record(self) -> dict[str, Any]:
        return {
            "removed": self.is_done,
            "freed_bytes": self.freed_nbytes,
            "doomed": [
                {"path": str(entry.path), "step": entry.step, "state": str(entry.state), "bytes": entry.nbytes}
                for entry in self.doomed
            ],
            "kept": [str(entry.path) for entry in self.kept],
            "ignored": [str(entry.path) for entry in self.ignored],
        }

    def tables(self) -> Iterator[RenderableType]:
        from .tables import line

        if self.doomed:
            yield _doomed_table(self.doomed)
            yield line("")
            yield line(f"frees {format_bytes(self.freed_nbytes)}; the rest is shared with what stays")
        else:
            yield line("nothing to remove")
        yield line(f"stays: {', '.join(entry.path.name for entry in self.kept) or 'no checkpoint'}")
        for entry in self.ignored:
            yield line(f"left alone: {entry.path.name}, {entry.detail}; resume sets it aside")


def _doomed_table(entries: tuple[RunEntry, ...]) -> Table:
    from .tables import cell, plain_table

    table = plain_table("remove", "state", ">size")
    for entry in entries:
        table.add_row(cell(entry.path.name), cell(entry.state), cell(format_bytes(entry.nbytes)))
    return table


def plan_removal(
    inventory: Inventory,
    *,
    limit: int | None,
    keep_consistent: bool,
    pinned: Collection[int],
    states: Collection[State],
) -> Removal:
    """Choose what goes.

    A damaged checkpoint is not counted, so that it cannot push out a good one, and is not removed.

    Args:
        inventory: The run.
        limit: How many checkpoints to keep; None keeps all.
        keep_consistent: Whether to keep the newest checkpoint whose layers are all of one step.
        pinned: Steps to keep.
        states: What else goes, entirely: ``State.BAD``, ``State.SUPERSEDED``.

    Raises:
        InvalidInputError: Nothing was asked for, or a pinned step is not there.
    """
    if limit is None and not states:
        raise InvalidInputError(
            "prune was not told what may go",
            kind="nothing-asked",
            path=inventory.path,
            expected="--keep N, --bad or --superseded",
            found="none of them",
            hint=f"llmtailor prune {inventory.path} --keep 3 --dry-run",
        )
    steps = {entry.step for entry in inventory.checkpoints if entry.step is not None}
    if not steps.issuperset(pinned):
        raise InvalidInputError(
            "a step to pin is not there; nothing was removed",
            kind="unknown-step",
            path=inventory.path,
            expected=f"one of {', '.join(map(str, sorted(steps)))}" if steps else "no --pin, as there is no checkpoint",
            found=", ".join(map(str, sorted(set(pinned) - steps))),
            hint=f"llmtailor ls {inventory.path}",
        )
    whole = [entry for entry in inventory.checkpoints if entry.state is State.WHOLE and entry.manifest is not None]
    candidates = [
        Kept(step=entry.manifest.step, is_consistent=entry.manifest.is_consistent)
        for entry in whole
        if entry.manifest is not None
    ]
    going = choose_removals(candidates, limit=limit, pinned=pinned, keep_consistent=keep_consistent)
    aside = [entry for entry in inventory.others if entry.state in states]
    return Removal(
        doomed=(*(entry for entry in whole if entry.step in going), *aside),
        kept=tuple(entry for entry in whole if entry.step not in going),
        ignored=tuple(entry for entry in inventory.checkpoints if entry.state is State.DAMAGED),
    )
