"""Which checkpoint to resume from: the newest that verifies; what does not is set aside, never deleted."""

from __future__ import annotations

import warnings
from pathlib import Path

from .checkpoint import Checkpoint, open_checkpoint
from .errors import IncompleteError, IntegrityError, QuarantineWarning
from .storage import RunDirectory, list_checkpoints, newest_step_seen
from .verify import verify_checkpoint

__all__ = ["find_resumable", "open_resumable"]


def find_resumable(
    run: RunDirectory, *, consistent: bool = False, max_rollback_steps: int | None = None
) -> Checkpoint | None:
    """The newest checkpoint of a run that verifies, every byte of it.

    One that does not is renamed ``*.bad`` and the next older one is tried. Directories without a manifest are not
    ours and are left alone.

    Args:
        run: The run, held for writing.
        consistent: Take only a checkpoint whose layers are all of one step.
        max_rollback_steps: Refuse to fall further back than this behind the newest checkpoint ever published.

    Returns:
        None if there is no checkpoint of ours at all.

    Raises:
        IntegrityError: There were checkpoints and none verifies.
        IncompleteError: None fits ``consistent``, or all that verify are too far back.
        FormatError: A newer program wrote the newest (kind ``format-version``); it was left alone.
        OSError: The device failed (``EIO``) or this process may not read; nothing was renamed for that.
    """
    newest = newest_step_seen(run.path)
    refused: list[str] = []
    num_bad = 0
    for entry in reversed(list_checkpoints(run.path)):
        if not entry.has_manifest:
            warnings.warn(
                f"{entry.path} has no manifest, so it is not ours or it is half a checkpoint; it was left alone",
                QuarantineWarning,
                stacklevel=2,
            )
            continue
        report = verify_checkpoint(entry.path)
        if any(problem.kind == "format-version" for problem in report.problems):
            # A newer program wrote it and its digest is right: nothing is wrong with it but our age.
            open_checkpoint(entry.path)
        if not report.is_good:
            reason = "; ".join(f"{problem.path}: {problem.detail}" for problem in report.problems[:10])
            target = run.quarantine(entry.path, reason)
            warnings.warn(f"{entry.path.name} does not verify ({reason}); kept as {target.name}", QuarantineWarning, 2)
            refused.append(f"{entry.path.name}: {reason}")
            num_bad += 1
            continue
        found = open_checkpoint(entry.path)
        if found.manifest.contents != "full" or (consistent and not found.manifest.is_consistent):
            missing = "optimizer state" if found.manifest.contents != "full" else "layers of one step"
            refused.append(f"{entry.path.name}: without {missing}")
            continue
        _check_rollback(found, newest, max_rollback_steps)
        return found
    if refused:
        _raise_none_left(run.path, refused, is_any_bad=num_bad > 0, consistent=consistent)
    return None


def open_resumable(path: Path) -> Checkpoint:
    """Open the checkpoint the user named; if it does not verify it is refused, not replaced by another.

    Raises:
        NotFoundError: It is not a checkpoint of ours.
        IntegrityError: It does not verify.
        FormatError: Its manifest is of another version.
    """
    checkpoint = open_checkpoint(path)
    verify_checkpoint(path).raise_if_bad()
    return checkpoint


def _check_rollback(found: Checkpoint, newest: int | None, limit: int | None) -> None:
    lost = 0 if newest is None else newest - found.manifest.step
    if limit is not None and lost > limit:
        raise IncompleteError(
            "the newest checkpoint that can be used is too far back",
            kind="rollback-limit",
            path=found.path,
            expected=f"at most {limit} steps behind step {newest}",
            found=f"{lost} steps behind",
            hint="look at the *.bad directories, or raise max_rollback_steps to accept the loss",
        )


def _raise_none_left(run: Path, refused: list[str], *, is_any_bad: bool, consistent: bool) -> None:
    found = "\n            ".join(refused[:10])
    if not is_any_bad:
        raise IncompleteError(
            "no checkpoint of the run can be resumed from as asked",
            kind="no-consistent" if consistent else "weights-only",
            path=run,
            found=found,
            hint="resume without consistent=True; from_pretrained loads checkpoints that hold weights alone",
        )
    raise IntegrityError(
        "no checkpoint of the run verifies",
        kind="none-verifies",
        path=run,
        found=found,
        hint="the directories were kept as *.bad; start anew in another directory, or restore them from a copy",
    )
