"""Retention, done: removes from a tier what ``retention`` says may go.

Both tiers of a run go through here, each with its own number to keep. It runs after the publish, on whatever thread
published, so it reports by its result and never by a warning or an exception.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from .errors import FormatError, TailorError
from .formats.tailored import read_manifest
from .retention import Kept, choose_removals
from .storage import RunDirectory, list_checkpoints

__all__ = ["apply_retention"]


def apply_retention(
    run: RunDirectory, *, keep: int | None, pinned: Collection[int] = (), keep_consistent: bool = True
) -> TailorError | OSError | None:
    """Remove the checkpoints of a tier that may go, oldest first.

    Called by the one thread that publishes into ``run``. Directories without a manifest are not ours: they neither
    count nor go.

    Args:
        run: The tier, held for writing.
        keep: How many checkpoints to keep; None or <= 0 keeps all.
        pinned: Steps that must stay.
        keep_consistent: Never remove the newest checkpoint whose layers are all of one step.

    Returns:
        What stopped it, or None. It costs disk and never a checkpoint, so the caller warns; the next one tries again.
    """
    if keep is None or keep <= 0:
        return None
    try:
        entries = [entry for entry in list_checkpoints(run.path) if entry.has_manifest]
        if len(entries) <= keep:
            return None
        kept = [Kept(step=entry.step, is_consistent=_is_consistent(entry.path)) for entry in entries]
        doomed = choose_removals(kept, limit=keep, pinned=pinned, keep_consistent=keep_consistent)
        for entry in entries:
            if entry.step in doomed:
                run.remove(entry.path)
    except (TailorError, OSError) as err:
        return err
    return None


def _is_consistent(path: Path) -> bool:
    try:
        manifest, _ = read_manifest(path)
    except FormatError:
        return False
    return manifest.is_consistent
