"""Which directories of a run may go, which keep weights alone, and what that frees. Decides and shows; does nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import IncompleteError, InvalidInputError
from ..inventory import Inventory, RunEntry, State, freed_nbytes
from ..manifest import MANIFEST_NAME, encode_manifest
from ..pruning import describe_kept, droppable_files, read_metrics
from ..retention import METRICS_NAME, Keep, Kept, choose_removals, thin_manifest
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
    """Neither counted nor removed: damaged checkpoints, those without a manifest, what stays set aside."""
    thinned: tuple[RunEntry, ...] = ()
    """Of those that stay: they lose their optimizer state."""
    bound: tuple[RunEntry, ...] = ()
    """Of those that stay: they would lose it, if their weights could be read without it."""
    reasons: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Step -> why it stays."""
    is_done: bool = False
    """They were removed."""

    @property
    def has_work(self) -> bool:
        return bool(self.doomed or self.thinned)

    @property
    def successors(self) -> tuple[RunEntry, ...]:
        """Checkpoints that must verify before anything goes: the newest that stays, and the newest to resume from.

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
        full = [entry for entry in self.kept if _is_full(entry)]
        return (*(entry for entry in full[-1:] if entry is not self.kept[-1]), self.kept[-1])

    @property
    def freed_nbytes(self) -> int:
        """Bytes of files that no other directory holds."""
        return freed_nbytes((*self.doomed, *map(_droppable, self.thinned))) + sum(map(_saving, self.thinned))

    def summary(self) -> str:
        """``3 directories and optimizer state of 2 more, 1.2 MB``."""
        parts = [format_number_of(len(self.doomed), "directory")] if self.doomed else []
        if self.thinned:
            parts.append(f"optimizer state of {format_number_of(len(self.thinned), 'checkpoint')}")
        return f"{' and '.join(parts)}, {format_bytes(self.freed_nbytes)}"

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
            "thinned": [
                {"path": str(entry.path), "step": entry.step, "bytes": _droppable(entry).nbytes}
                for entry in self.thinned
            ],
            "kept": [str(entry.path) for entry in self.kept],
            "reasons": {str(entry.path): list(self._why(entry)) for entry in self.kept},
            "optimizer": {str(entry.path): self._optimizer(entry) for entry in self.kept},
            "ignored": [str(entry.path) for entry in self.ignored],
        }

    def _why(self, entry: RunEntry) -> tuple[str, ...]:
        return () if entry.step is None else self.reasons.get(entry.step, ())

    def _optimizer(self, entry: RunEntry) -> str:
        """What becomes of a checkpoint's optimizer state."""
        if entry in self.thinned:
            return "goes"
        if entry in self.bound:
            return "stays: the weights are in codes"
        return "stays" if _is_full(entry) else "none"

    def tables(self) -> Iterator[RenderableType]:
        from .tables import line

        if self.doomed:
            yield _removal_table("remove", "size", [(entry, entry.nbytes) for entry in self.doomed])
            yield line("")
        if self.thinned:
            dropped = [(entry, _droppable(entry).nbytes) for entry in self.thinned]
            yield _removal_table("keep weights alone", "optimizer state", dropped)
            yield line("")
        if self.has_work:
            yield line(f"frees {format_bytes(self.freed_nbytes)}; the rest is shared with what stays")
        else:
            yield line("nothing to remove")
        if not self.kept:
            yield line("there is no whole checkpoint of LLMTailor")
        else:
            yield line("")
            yield self._kept_table()
        for entry in self.ignored:
            yield line(f"left alone: {entry.path.name}, {_why_ignored(entry)}")

    def _kept_table(self) -> Table:
        from .tables import cell, plain_table

        table = plain_table("stays", "optimizer state", "because")
        for entry in self.kept:
            table.add_row(cell(entry.path.name), cell(self._optimizer(entry)), cell("; ".join(self._why(entry))))
        return table


def _why_ignored(entry: RunEntry) -> str:
    match entry.state:
        case State.FOREIGN:
            return f"no {MANIFEST_NAME}: another tool's, or half a checkpoint"
        case State.BAD:
            return "failed verification and was set aside; --bad removes it"
        case State.SUPERSEDED:
            return "of an abandoned branch; --superseded removes it"
        case _:
            return f"{entry.detail}; resume sets it aside"


def _is_full(entry: RunEntry) -> bool:
    return entry.manifest is not None and entry.manifest.contents == "full"


def _droppable(entry: RunEntry) -> RunEntry:
    """The same directory, as if it held only what goes when it is thinned."""
    assert entry.manifest is not None
    names = {record.path for record in droppable_files(entry.manifest)}
    return replace(entry, files={name: file for name, file in entry.files.items() if name in names})


def _saving(entry: RunEntry) -> int:
    """Bytes that the manifest of a checkpoint is shorter by when it is thinned."""
    assert entry.manifest is not None
    thinned = thin_manifest(entry.manifest)
    assert thinned is not None
    return entry.files[MANIFEST_NAME].nbytes - len(encode_manifest(thinned)[0])


def _removal_table(what: str, size: str, rows: Sequence[tuple[RunEntry, int]]) -> Table:
    from .tables import cell, plain_table

    table = plain_table(what, "state", f">{size}")
    for entry, nbytes in rows:
        table.add_row(cell(entry.path.name), cell(entry.state), cell(format_bytes(nbytes)))
    return table


def plan_removal(inventory: Inventory, keep: Keep, *, pinned: Collection[int], states: Collection[State]) -> Removal:
    """Choose what goes.

    A damaged checkpoint is not counted, so that it cannot push out a good one, and is not removed; nor is one without
    a manifest, which may be another tool's.

    Args:
        inventory: The run.
        keep: The rules.
        pinned: Steps to keep, beside those of the rules; they need not be there.
        states: What else goes, entirely: ``State.BAD``, ``State.SUPERSEDED``.

    Raises:
        InvalidInputError: A step that the rules pin is not there, or no checkpoint has a value of their metric.
    """
    _check_steps(inventory, keep.pinned)
    whole = [entry for entry in inventory.checkpoints if entry.state is State.WHOLE]
    candidates = _describe(whole, None if keep.best is None else keep.metric)
    if keep.best is not None and whole and all(each.metric is None for each in candidates):
        raise _no_metric(inventory, keep.metric, whole)
    choice = choose_removals(candidates, keep, pinned=pinned)
    aside = [entry for entry in inventory.others if entry.state in states]
    damaged = [entry for entry in inventory.checkpoints if entry.state is State.DAMAGED]
    others = [entry for entry in inventory.others if entry.state not in states and entry.state is not State.IN_FLIGHT]
    return Removal(
        doomed=(*(entry for entry in whole if entry.step in choice.removed), *aside),
        kept=tuple(entry for entry in whole if entry.step in choice.reasons),
        ignored=(*damaged, *others),
        thinned=tuple(entry for entry in whole if entry.step in choice.thinned),
        bound=tuple(entry for entry in whole if entry.step in choice.bound),
        reasons=choice.reasons,
    )


def _describe(entries: Sequence[RunEntry], metric: str | None) -> list[Kept]:
    return [describe_kept(entry.path, entry.manifest, metric) for entry in entries if entry.manifest is not None]


def _check_steps(inventory: Inventory, pinned: Collection[int]) -> None:
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


def _no_metric(inventory: Inventory, metric: str, entries: Sequence[RunEntry]) -> InvalidInputError:
    known = {name for entry in entries if entry.step is not None for name in read_metrics(entry.path, entry.step)}
    return InvalidInputError(
        f"no checkpoint has a value of {metric!r}, so none is the best; nothing was removed",
        kind="no-metric",
        path=inventory.path,
        expected=f"{metric} in {METRICS_NAME} of a checkpoint, or logged at its step in trainer_state.json",
        found=", ".join(sorted(known)[:20]) or "no metrics",
        hint="name another with --metric",
    )
