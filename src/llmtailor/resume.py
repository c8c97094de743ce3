"""Which checkpoint to resume from: the newest that verifies; what does not is set aside, never deleted.

    find_resumable                  reads every byte of a candidate, then says which it is
    load_resumable, load_named      load it while it is read, so that nothing is read twice

On several ranks all come to one answer: the coordinator looks for candidates, every rank loads what it needs of one,
and what is bad on one is bad for all (see ``resume_together``).

A candidate that cannot be loaded is read again, whole, and only what does not verify is set aside: whatever is wrong
with one that does is the user's to know. That it was saved on another number of ranks is said at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack, cast

from .checkpoint import Checkpoint, open_checkpoint
from .errors import (
    FormatError,
    IncompatibleError,
    IncompleteError,
    IntegrityError,
    NotFoundError,
    QuarantineWarning,
    StaleWarning,
    SupersededWarning,
    TailorError,
)
from .load import say_partly_loaded
from .manifest import MANIFEST_NAME, FileRecord, Manifest
from .meeting import Meeting, Outcome
from .progress import show_reading
from .resume_together import follow_search, lead_search
from .storage import (
    CheckpointEntry,
    RunDirectory,
    checkpoint_name,
    list_checkpoints,
    list_set_aside,
    newest_step_seen,
)
from .verify import FileState, VerifyReport, verify_checkpoint

__all__ = [
    "Fill",
    "ResumeLimits",
    "check_staleness",
    "find_resumable",
    "load_named",
    "load_resumable",
    "open_resumable",
    "resume_limits",
]

_MAX_USUAL_STALENESS = 1000
"""What adaptive strategies never let a layer exceed, unless they are told to."""

Fill: TypeAlias = Callable[[Callable[[FileRecord], None]], None]
"""Puts a checkpoint into live objects; is given what to call before each file. What it raises leaves them spoiled."""


class ResumeLimits(TypedDict, total=False):
    """What a checkpoint of a run must be, to be resumed from; the same for every integration."""

    consistent: bool
    """Take only a checkpoint whose layers are all of one step, exactly; False by default."""
    max_rollback_steps: int | None
    """Refuse to fall further back than this behind the newest checkpoint ever published; None by default."""
    max_staleness: int | None
    """Take only a checkpoint none of whose layers is more steps old than this; None by default."""


def resume_limits(options: Mapping[str, Any]) -> ResumeLimits:
    """Those of an integration's options that are about resuming."""
    return cast(ResumeLimits, {key: options[key] for key in ResumeLimits.__annotations__ if key in options})


def find_resumable(
    runs: RunDirectory | Sequence[RunDirectory],
    *,
    meeting: Meeting = Meeting(None),  # noqa: B008
    **limits: Unpack[ResumeLimits],
) -> Checkpoint | None:
    """The newest checkpoint of a run that verifies, every byte of it.

    One that does not is renamed ``*.bad`` and the next older one is tried. Directories without a manifest are not
    ours and are left alone.

    Args:
        runs: The run, held for writing; or several directories that hold the same run, the preferred one first.
            Of those after the first only checkpoints of the first one's run are taken.
        meeting: The ranks that are to agree; the coordinator reads for all.
        **limits: See ``ResumeLimits``.

    Returns:
        None if there is no checkpoint of ours at all.

    Raises:
        IntegrityError: There were checkpoints and none verifies.
        IncompleteError: None is within the limits, or all that verify are too far back.
        FormatError: A newer program wrote the newest (kind ``format-version``); it was left alone.
        OSError: The device failed (``EIO``) or this process may not read; nothing was renamed for that.
    """
    if not meeting.is_coordinator:
        return follow_search(meeting, lambda found: None)
    search = _Search(runs, limits)

    def examine(found: Checkpoint) -> str | None:
        reason = search.find_damage(found)
        if reason is None:
            search.check_rollback(found)
        return reason

    return lead_search(meeting, search.take, examine)


def load_resumable(
    runs: RunDirectory | Sequence[RunDirectory],
    plan: Callable[[Checkpoint], Fill],
    *,
    meeting: Meeting = Meeting(None),  # noqa: B008
    **limits: Unpack[ResumeLimits],
) -> Checkpoint | None:
    """Load the newest checkpoint of a run that verifies; one that does not is set aside, and the next loaded over it.

    The same checkpoint is taken as by ``find_resumable``, with the same warnings, but its layer files are read once.

    Args:
        runs: As for ``find_resumable``.
        plan: Checks a candidate and changes nothing; what it returns then loads it. Its small files were verified.
        meeting: The ranks that are to agree; each loads what it needs.
        **limits: See ``ResumeLimits``.

    Returns:
        The one that was loaded; None if there is no checkpoint of ours at all.

    Raises:
        TailorError: What ``find_resumable`` raises, and what ``plan`` raises of a checkpoint that verifies. If a
            candidate was loaded in part before that, the hint says that the live values are not to be used.
        OSError: As ``find_resumable``; the same is said in a note.
    """
    search = None
    if meeting.is_coordinator:
        search = _Search(runs, limits)
    is_spoiled = False

    def examine(found: Checkpoint) -> str | None:
        nonlocal is_spoiled
        try:
            if search is not None:
                search.check_rollback(found)
            fill = _plan(found, plan)
            is_spoiled = True
            _fill(found, fill)
        except TailorError as err:
            if _is_of_manifest(err):
                raise
            reason = search.find_damage(found) if search is not None else _find_damage(found)
            if reason is None and not isinstance(err, IntegrityError):
                raise
            return reason or f"{Path(err.path or found.path).name}: {err.what}"
        return None

    try:
        return follow_search(meeting, examine) if search is None else lead_search(meeting, search.take, examine)
    except Exception as err:
        if is_spoiled:
            say_partly_loaded(err)
        raise


def load_named(
    path: Path,
    plan: Callable[[Checkpoint], Fill],
    meeting: Meeting = Meeting(None),  # noqa: B008
    *,
    max_staleness: int | None = None,
) -> Checkpoint:
    """Load the checkpoint the user named; if it does not verify it is refused, not replaced by another.

    Args:
        path: Its directory.
        plan: As for ``load_resumable``.
        meeting: The ranks that load it; if one cannot, none has.
        max_staleness: Refuse it if one of its layers is more steps old than this.

    Raises:
        NotFoundError: It is not a checkpoint of ours.
        IncompleteError: It is too stale.
        IntegrityError: It does not verify; the hint says so if live values were overwritten before that was found.
        TailorError: What ``plan`` raises of a checkpoint that verifies.
    """
    try:
        check_staleness(open_checkpoint(path), max_staleness)
        found = _load_named(path, plan)
    except BaseException as err:
        meeting.agree(Outcome(error=err))
        raise
    meeting.agree(Outcome())
    return found


def check_staleness(checkpoint: Checkpoint, max_staleness: int | None) -> None:
    """Refuse a checkpoint whose layers are too old.

    Raises:
        IncompleteError: Kind ``too-stale``.
    """
    staleness = checkpoint.manifest.staleness
    if max_staleness is not None and staleness > max_staleness:
        raise IncompleteError(
            "layers of the checkpoint are too old",
            kind="too-stale",
            path=checkpoint.path,
            expected=f"at most {max_staleness} steps",
            found=f"{staleness} steps",
            hint="take one that is less stale, or raise max_staleness",
        )


def _load_named(path: Path, plan: Callable[[Checkpoint], Fill]) -> Checkpoint:
    found = open_checkpoint(path)
    is_spoiled = False
    try:
        try:
            fill = _plan(found, plan)
            is_spoiled = True
            _fill(found, fill)
        except TailorError as err:
            if not _is_of_manifest(err):
                # All that is wrong with it, if that is why.
                _verify(found).raise_if_bad()
            raise
    except Exception as err:
        if is_spoiled:
            say_partly_loaded(err)
        raise
    return found


def open_resumable(
    path: Path,
    meeting: Meeting = Meeting(None),  # noqa: B008
) -> Checkpoint:
    """Open the checkpoint the user named; if it does not verify it is refused, not replaced by another.

    Args:
        path: Its directory.
        meeting: The ranks that open it; the coordinator reads for all.

    Raises:
        NotFoundError: It is not a checkpoint of ours.
        IntegrityError: It does not verify.
        FormatError: Its manifest is of another version.
    """
    try:
        checkpoint = open_checkpoint(path)
        if meeting.is_coordinator:
            _verify(checkpoint).raise_if_bad()
    except BaseException as err:
        meeting.agree(Outcome(error=err))
        raise
    meeting.agree(Outcome())
    return checkpoint


def _plan(found: Checkpoint, plan: Callable[[Checkpoint], Fill]) -> Fill:
    # The layer files are digested while they are loaded; the others before anybody relies on them.
    verify_checkpoint(found.path, has_layers=False).raise_if_bad()
    return plan(found)


def _is_of_manifest(err: TailorError) -> bool:
    """The manifest alone says it, and that verified: every rank would read all layer files to find the same."""
    return isinstance(err, IncompatibleError) and err.kind == "world-size"


def _fill(found: Checkpoint, fill: Fill) -> None:
    with show_reading(f"load {found.path.name}", lambda: found.manifest.nbytes) as on_file:
        fill(on_file)


def _verify(checkpoint: Checkpoint, digests: dict[FileState, str] | None = None) -> VerifyReport:
    with show_reading(f"verify {checkpoint.path.name}", lambda: checkpoint.manifest.nbytes) as on_file:
        return verify_checkpoint(checkpoint.path, on_file=on_file, digests=digests)


def _find_damage(found: Checkpoint, digests: dict[FileState, str] | None = None) -> str | None:
    problems = _verify(found, digests).problems
    return "; ".join(f"{problem.path}: {problem.detail}" for problem in problems[:10]) or None


class _Search:
    """Candidates of one or several directories, newest first, and what was wrong with those passed over."""

    def __init__(self, runs: RunDirectory | Sequence[RunDirectory], limits: ResumeLimits) -> None:
        self._runs = [runs] if isinstance(runs, RunDirectory) else list(runs)
        self._limits = limits
        self._run_id = _find_run_id(self._runs) if len(self._runs) > 1 else None
        self._newest = max(self._steps_seen(), default=None)
        self._bad: list[str] = []
        self._unfit: list[str] = []
        self._digests: dict[FileState, str] = {}  # a file that several checkpoints share is read once

    def take(self, examine: Callable[[Checkpoint], str | None]) -> Checkpoint | None:
        """The first candidate of which ``examine`` says nothing bad; those before it are set aside."""
        for run, entry in self._list():
            try:
                found = open_checkpoint(entry.path)
            except FormatError as err:
                if err.kind == "format-version":
                    # A newer program wrote it and its digest is right: nothing is wrong with it but our age.
                    raise
                self._set_aside(run, entry.path, f"{MANIFEST_NAME}: {err.what}")
                continue
            if missing := _find_missing(found.manifest, self._limits):
                self._unfit.append(f"{self._name(run, entry.path)}: {missing}")
                continue
            reason = examine(found)
            if reason is None:
                _warn_if_stale(found, self._limits.get("max_staleness"))
                return found
            self._set_aside(run, entry.path, reason)
        if self._bad or self._unfit:
            raise _none_left(self._runs[0].path, self._bad, self._unfit, self._limits)
        for run in self._runs:
            _refuse_quarantined(run.path)
            _name_superseded(run.path)
        return None

    def _list(self) -> Iterator[tuple[RunDirectory, CheckpointEntry]]:
        entries = [(place, entry) for place, run in enumerate(self._runs) for entry in list_checkpoints(run.path)]
        for place, entry in sorted(entries, key=lambda pair: (-pair[1].step, pair[0])):
            if not entry.has_manifest:
                warnings.warn(
                    f"{entry.path} has no manifest, so it is not ours or it is half a checkpoint; it was left alone",
                    QuarantineWarning,
                    stacklevel=4,
                )
            elif place and self._is_foreign(entry.path):
                # Left by a run before this one, which it would be a mistake to fall back into.
                self._unfit.append(f"{entry.path}: of another run than {self._runs[0].path}")
            else:
                yield self._runs[place], entry

    def _steps_seen(self) -> Iterator[int]:
        first, *others = self._runs
        if (newest := newest_step_seen(first.path)) is not None:
            yield newest
        for run in others:
            steps = {entry.path: entry.step for entry in list_checkpoints(run.path)}
            steps |= {entry.path: entry.step for entry in list_set_aside(run.path) if entry.kind == "bad"}
            yield from (step for path, step in steps.items() if not self._is_foreign(path))

    def _is_foreign(self, path: Path) -> bool:
        """True if a checkpoint says that it is of another run."""
        return self._run_id is not None and _find_run_id_of(path) not in (self._run_id, None)

    def _set_aside(self, run: RunDirectory, path: Path, reason: str) -> None:
        target = run.quarantine(path, reason)
        name = self._name(run, path)
        warnings.warn(f"{name} does not verify ({reason}); kept as {target.name}", QuarantineWarning, stacklevel=4)
        self._bad.append(f"{name}: {reason}")

    def _name(self, run: RunDirectory, path: Path) -> str:
        return path.name if run is self._runs[0] else str(path)

    def find_damage(self, found: Checkpoint) -> str | None:
        """Read every byte; None if it is what was published."""
        return _find_damage(found, self._digests)

    def check_rollback(self, found: Checkpoint) -> None:
        """Refuse a candidate that is too far back.

        Raises:
            IncompleteError: It is.
        """
        lost = 0 if self._newest is None else self._newest - found.manifest.step
        limit = self._limits.get("max_rollback_steps")
        if limit is not None and lost > limit:
            raise IncompleteError(
                "the newest checkpoint that can be used is too far back",
                kind="rollback-limit",
                path=found.path,
                expected=f"at most {limit} steps behind step {self._newest}",
                found=f"{lost} steps behind",
                hint="look at the *.bad directories, or raise max_rollback_steps to accept the loss",
            )


def _warn_if_stale(found: Checkpoint, max_staleness: int | None) -> None:
    staleness = found.manifest.staleness
    if max_staleness is None and staleness > _MAX_USUAL_STALENESS:
        warnings.warn(
            f"{found.path.name} has a layer that is {staleness} steps old; max_staleness= says how old is too old",
            StaleWarning,
            stacklevel=4,
        )


def _find_run_id(runs: Sequence[RunDirectory]) -> str | None:
    """The run that a set of directories is of: that of the newest checkpoint of the first that has one."""
    entries = (entry for run in runs for entry in reversed(list_checkpoints(run.path)) if entry.has_manifest)
    return next((found for entry in entries if (found := _find_run_id_of(entry.path)) is not None), None)


def _find_run_id_of(path: Path) -> str | None:
    try:
        return open_checkpoint(path).manifest.run_id
    except (FormatError, NotFoundError):
        return None


def _refuse_quarantined(run: Path) -> None:
    """A job that is started again after all was found bad would train from the start, and nobody would notice."""
    bad = [entry for entry in list_set_aside(run) if entry.kind == "bad"]
    if bad:
        raise IntegrityError(
            "no checkpoint of the run verifies: all were set aside before",
            kind="none-verifies",
            path=run,
            expected="at least one whose files are as they were published",
            found=", ".join(entry.path.name for entry in bad[-10:]),
            hint="restore one from a copy; to start anew, move these away or give another directory",
        )


def _name_superseded(run: Path) -> None:
    """A run that died before its own first checkpoint has set the one before it aside: say so."""
    superseded = [
        entry for entry in list_set_aside(run) if entry.kind == "superseded" and (entry.path / MANIFEST_NAME).is_file()
    ]
    if superseded:
        newest = superseded[-1]
        warnings.warn(
            f"nothing to resume from in {run}, but there is {newest.path.name}; to go on from it, rename it to "
            f"{checkpoint_name(newest.step)}",
            SupersededWarning,
            stacklevel=4,
        )


def _find_missing(manifest: Manifest, limits: ResumeLimits) -> str | None:
    max_staleness = limits.get("max_staleness")
    if manifest.contents != "full":
        return "without optimizer state"
    if limits.get("consistent") and not manifest.is_consistent:
        return "without exact layers of one step"
    if max_staleness is not None and manifest.staleness > max_staleness:
        return f"its oldest layer is {manifest.staleness} steps old"
    return None


def _none_left(run: Path, bad: Sequence[str], unfit: Sequence[str], limits: ResumeLimits) -> TailorError:
    found = "\n            ".join([*bad, *unfit][:10])
    kind, expected = _describe_wish(limits)
    if not bad:
        return IncompleteError(
            "no checkpoint of the run can be resumed from as asked",
            kind=kind,
            path=run,
            expected=expected,
            found=found,
            hint="resume without consistent=True, or with a higher max_staleness; from_pretrained loads checkpoints "
            "that hold weights alone",
        )
    return IntegrityError(
        "no checkpoint of the run verifies",
        kind="none-verifies",
        path=run,
        expected="at least one whose files are as they were published",
        found=found,
        hint="the directories were kept as *.bad; start anew in another directory, or restore them from a copy",
    )


def _describe_wish(limits: ResumeLimits) -> tuple[str, str]:
    """Kind of the error where no checkpoint will do, and what was looked for."""
    if limits.get("consistent"):
        return "no-consistent", "one with exact layers of one step"
    if limits.get("max_staleness") is None:
        return "weights-only", "one with optimizer state"
    return "too-stale", f"one with optimizer state whose layers are at most {limits['max_staleness']} steps old"
