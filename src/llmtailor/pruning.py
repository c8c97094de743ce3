"""Retention, done: removes from a tier what ``retention`` says may go, and optimizer state that may go.

Both tiers of a run go through here, each with its own rules. It runs after the publish, on whatever thread published,
so it reports by its result and never by a warning or an exception.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from .errors import FormatError, IntegrityError, NotFoundError, TailorError
from .formats.manifest_file import read_manifest
from .formats.source_files import open_source
from .manifest import MANIFEST_NAME, FileRecord, Manifest, encode_manifest
from .retention import METRICS_NAME, Keep, Kept, choose_removals, parse_keep, thin_manifest
from .storage import CheckpointEntry, RunDirectory, list_checkpoints, read_pins

__all__ = ["apply_retention", "describe_kept", "droppable_files", "read_metrics", "thin_checkpoint"]

_TRAINER_STATE_NAME = "trainer_state.json"
_MAX_METRICS_NBYTES = 64 * 2**20
_NUM_RUNS = 64
_Asked: TypeAlias = tuple[Path, int, str | None, tuple[int, int, int]]
"""A checkpoint, its step, the metric that was looked up, and the identity of the manifest."""


def apply_retention(
    run: RunDirectory,
    *,
    keep: Keep | int | str | None,
    pinned: Collection[int] = (),
    keep_consistent: bool = True,
) -> TailorError | OSError | None:
    """Remove the checkpoints of a tier that may go, oldest first, then the optimizer state that may go.

    Called by the one thread that publishes into ``run``. Directories without a manifest are not ours: they neither
    count nor go.

    Args:
        run: The tier, held for writing.
        keep: The rules, or how many checkpoints to keep; see ``parse_keep``.
        pinned: Steps that must stay, beside those that are pinned in the tier.
        keep_consistent: False takes that rule away.

    Returns:
        What stopped it, or kept it from one of them, the first if several did; None if all went well. It costs disk
        and never a checkpoint, so the caller warns; the next one tries again.
    """
    try:
        rules = parse_keep(keep, consistent=keep_consistent)
        if rules.is_idle:
            return None
        entries = {entry.step: entry for entry in list_checkpoints(run.path) if entry.has_manifest}
        if rules.limit is not None and rules.optimizer is None and len(entries) <= rules.limit:
            return None
        metric = None if rules.best is None else rules.metric
        kept = _examine_all(run.path, entries.values(), metric)
        choice = choose_removals(kept, rules, pinned={*pinned, *read_pins(run.path)})
        fault = _remove_all(run, (entries[step].path for step in choice.removed))
        fault_of_thinning = _thin_all(run, (entries[step].path for step in choice.thinned))
        return fault or fault_of_thinning
    except (TailorError, OSError) as err:
        return err


def _remove_all(run: RunDirectory, paths: Iterable[Path]) -> TailorError | None:
    """Remove what can be, for one that cannot must not keep all others for ever; returns the first fault."""
    fault: TailorError | None = None
    for path in paths:
        try:
            run.remove(path)
        except TailorError as err:
            fault = fault or err
    return fault


def _thin_all(run: RunDirectory, paths: Iterable[Path]) -> TailorError | None:
    """Thin what can be; returns the first fault of a checkpoint, which stays as it is."""
    fault: TailorError | None = None
    for path in paths:
        try:
            thin_checkpoint(run, path)
        except (IntegrityError, NotFoundError) as err:
            fault = fault or err
    return fault


def thin_checkpoint(run: RunDirectory, path: Path) -> None:
    """Take the optimizer state out of a published checkpoint; whoever opens it finds it whole, before or after.

    Args:
        run: Its run, held for writing.
        path: Its directory.

    Raises:
        NotFoundError, FormatError: It is not as it was published; it was left as it is.
        WriteError: The disk failed; it is there, with its optimizer state or without.
    """
    thinned = thin_manifest(read_manifest(path)[0])
    if thinned is not None:
        run.thin(path, thinned.all_files, encode_manifest(thinned)[0])


def droppable_files(manifest: Manifest) -> frozenset[FileRecord]:
    """Files that go when a checkpoint is thinned; none if it cannot be."""
    thinned = thin_manifest(manifest)
    return frozenset() if thinned is None else frozenset(manifest.all_files).difference(thinned.all_files)


def describe_kept(path: Path, manifest: Manifest, metric: str | None) -> Kept:
    """A checkpoint as retention sees it.

    Args:
        path: Its directory.
        manifest: Of it.
        metric: Name of the metric to look up; None for none.

    Raises:
        OSError: The device failed.
    """
    return Kept(
        step=manifest.step,
        is_consistent=manifest.is_consistent,
        has_optimizer=manifest.contents == "full",
        can_thin=thin_manifest(manifest) is not None,
        metric=None if metric is None else read_metrics(path, manifest.step).get(metric),
    )


def _examine_all(run: Path, entries: Iterable[CheckpointEntry], metric: str | None) -> list[Kept]:
    """Checkpoints do not change, and a run may have thousands of them that stay: each is looked at once."""
    remembered = _remembered_of(run)
    before = dict(remembered)
    # Those that are gone are forgotten.
    remembered.clear()
    for entry in entries:
        status = os.stat(entry.path / MANIFEST_NAME)
        asked = entry.path, entry.step, metric, (status.st_dev, status.st_ino, status.st_mtime_ns)
        remembered[asked] = before[asked] if asked in before else _examine(entry.path, entry.step, metric)
    return list(remembered.values())


@functools.lru_cache(maxsize=_NUM_RUNS)
def _remembered_of(run: Path) -> dict[_Asked, Kept]:
    """What was seen of a run's checkpoints; as many as it has, for one more than there is room for would cost all."""
    return {}


def _examine(path: Path, step: int, metric: str | None) -> Kept:
    try:
        manifest, _ = read_manifest(path)
    except FormatError:
        manifest = None
    if manifest is None or manifest.step != step:
        # It counts as one more checkpoint, and nothing in it is worth protecting.
        return Kept(step=step, is_consistent=False, has_optimizer=False, can_thin=False)
    return describe_kept(path, manifest, metric)


def read_metrics(checkpoint: Path, step: int) -> dict[str, float]:
    """What was measured at a checkpoint's step: ``metrics.json``, and what the Trainer logged at that step.

    Both are JSON; what cannot be read as such, and numbers that are not finite, count as nothing.

    Args:
        checkpoint: Its directory.
        step: Its step.

    Raises:
        OSError: The device failed.
    """
    history = _read_object(checkpoint / _TRAINER_STATE_NAME).get("log_history")
    found: dict[str, Any] = {}
    for entry in history if isinstance(history, list) else ():
        if isinstance(entry, dict) and entry.get("step") == step:
            found |= entry
    found |= _read_object(checkpoint / METRICS_NAME)
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _read_object(path: Path) -> dict[str, Any]:
    try:
        with os.fdopen(open_source(path), "rb") as file:
            text = file.read(_MAX_METRICS_NBYTES)
    except (NotFoundError, FormatError):
        return {}
    try:
        # Not strict_json: the Trainer logs NaN, which is no reason to lose the rest.
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
