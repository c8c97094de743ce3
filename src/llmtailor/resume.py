"""Which checkpoint to resume from: the newest that verifies; what does not is set aside, never deleted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import Checkpoint, open_checkpoint
from .errors import FormatError, IncompleteError, IntegrityError, QuarantineWarning, SupersededWarning, TailorError
from .manifest import MANIFEST_NAME, Manifest
from .progress import show_reading
from .storage import RunDirectory, checkpoint_name, list_checkpoints, list_set_aside, newest_step_seen
from .verify import FileState, VerifyReport, verify_checkpoint

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
    bad: list[str] = []
    unfit: list[str] = []
    digests: dict[FileState, str] = {}  # a file that several checkpoints share is read once
    for entry in reversed(list_checkpoints(run.path)):
        name = entry.path.name
        if not entry.has_manifest:
            warnings.warn(
                f"{entry.path} has no manifest, so it is not ours or it is half a checkpoint; it was left alone",
                QuarantineWarning,
                stacklevel=2,
            )
            continue
        try:
            found = open_checkpoint(entry.path)
        except FormatError as err:
            if err.kind == "format-version":
                # A newer program wrote it and its digest is right: nothing is wrong with it but our age.
                raise
            bad.append(_quarantine(run, entry.path, f"{MANIFEST_NAME}: {err.what}"))
            continue
        if missing := _find_missing(found.manifest, consistent=consistent):
            unfit.append(f"{name}: without {missing}")
            continue
        report = _verify(found, digests)
        if not report.is_good:
            reason = "; ".join(f"{problem.path}: {problem.detail}" for problem in report.problems[:10])
            bad.append(_quarantine(run, entry.path, reason))
            continue
        _check_rollback(found, newest, max_rollback_steps)
        return found
    if bad or unfit:
        raise _none_left(run.path, bad, unfit, consistent=consistent)
    _name_superseded(run.path)
    return None


def _name_superseded(run: Path) -> None:
    """A run that died before its own first checkpoint has set the one before it aside: say so."""
    superseded = [entry for entry in list_set_aside(run) if entry.kind == "superseded"]
    if superseded:
        newest = superseded[-1]
        warnings.warn(
            f"nothing to resume from in {run}, but there is {newest.path.name}; to go on from it, rename it to "
            f"{checkpoint_name(newest.step)}",
            SupersededWarning,
            stacklevel=3,
        )


def _find_missing(manifest: Manifest, *, consistent: bool) -> str | None:
    if manifest.contents != "full":
        return "optimizer state"
    return "layers of one step" if consistent and not manifest.is_consistent else None


def _quarantine(run: RunDirectory, path: Path, reason: str) -> str:
    target = run.quarantine(path, reason)
    warnings.warn(f"{path.name} does not verify ({reason}); kept as {target.name}", QuarantineWarning, stacklevel=3)
    return f"{path.name}: {reason}"


def _verify(checkpoint: Checkpoint, digests: dict[FileState, str] | None = None) -> VerifyReport:
    with show_reading(f"verify {checkpoint.path.name}", lambda: checkpoint.manifest.nbytes) as on_file:
        return verify_checkpoint(checkpoint.path, on_file=on_file, digests=digests)


def open_resumable(path: Path) -> Checkpoint:
    """Open the checkpoint the user named; if it does not verify it is refused, not replaced by another.

    Raises:
        NotFoundError: It is not a checkpoint of ours.
        IntegrityError: It does not verify.
        FormatError: Its manifest is of another version.
    """
    checkpoint = open_checkpoint(path)
    _verify(checkpoint).raise_if_bad()
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


def _none_left(run: Path, bad: Sequence[str], unfit: Sequence[str], *, consistent: bool) -> TailorError:
    found = "\n            ".join([*bad, *unfit][:10])
    if not bad:
        return IncompleteError(
            "no checkpoint of the run can be resumed from as asked",
            kind="no-consistent" if consistent else "weights-only",
            path=run,
            expected="one with layers of one step" if consistent else "one with optimizer state",
            found=found,
            hint="resume without consistent=True; from_pretrained loads checkpoints that hold weights alone",
        )
    return IntegrityError(
        "no checkpoint of the run verifies",
        kind="none-verifies",
        path=run,
        expected="at least one whose files are as they were published",
        found=found,
        hint="the directories were kept as *.bad; start anew in another directory, or restore them from a copy",
    )
