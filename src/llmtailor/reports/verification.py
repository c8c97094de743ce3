"""What verifying some checkpoints gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, NotFoundError
from ..formats.manifest_file import read_manifest
from ..manifest import FileRecord
from ..verify import FileState, Problem, VerifyReport, verify_checkpoint
from .units import format_bytes, format_number_of

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Verification", "total_nbytes", "verify_all"]


def total_nbytes(checkpoints: Sequence[Path]) -> int:
    """Bytes that the manifests promise; of those that can be read."""
    total = 0
    for path in checkpoints:
        try:
            total += read_manifest(path)[0].nbytes
        except (FormatError, NotFoundError):
            continue  # verifying it will say why
    return total


def verify_all(checkpoints: Sequence[Path], *, on_file: Callable[[FileRecord], None]) -> Verification:
    """Verify checkpoints; a file that several of them share is read once.

    Args:
        checkpoints: Their directories.
        on_file: Called before each file of each checkpoint, for a progress bar.

    Raises:
        NotFoundError: One of them is gone.
        OSError: The device failed (``EIO``), which says nothing about the checkpoint.
    """
    digests: dict[FileState, str] = {}
    return Verification(tuple(verify_checkpoint(path, on_file=on_file, digests=digests) for path in checkpoints))


@dataclass(frozen=True, slots=True)
class Verification:
    """What ``llmtailor verify`` shows."""

    reports: tuple[VerifyReport, ...]

    @property
    def num_bad(self) -> int:
        return sum(not report.is_good for report in self.reports)

    def names(self) -> list[str]:
        """Paths of the bad checkpoints."""
        return [report.path for report in self.reports if not report.is_good]

    def record(self) -> list[dict[str, Any]]:
        return [{**asdict(report), "is_good": report.is_good} for report in self.reports]

    def tables(self) -> Iterator[RenderableType]:
        from .tables import line

        for report in self.reports:
            yield from _report_tables(report)
        if len(self.reports) > 1:
            number = format_number_of(len(self.reports), "checkpoint")
            yield line("")
            yield line(f"{number}: {len(self.reports) - self.num_bad} good, {self.num_bad} bad")


def _report_tables(report: VerifyReport) -> Iterator[RenderableType]:
    from .tables import facts_table, line

    if report.is_good:
        files = format_number_of(report.num_files, "file")
        yield line(f"OK   {report.path}  {files}, {format_bytes(report.nbytes)}")
    else:
        yield line(f"BAD  {report.path}  {format_number_of(len(report.problems), 'problem')}", "red")
    for problem in report.problems:
        yield line(f"  {problem.path}: {problem.detail}")
        yield facts_table(_problem_facts(problem))
    if not report.is_good:
        yield line(f"  next: {_next_step(report.problems)}")
    for name in report.unlisted:
        yield line(f"  note: {name} is not in the manifest, so it is no part of the checkpoint")


def _problem_facts(problem: Problem) -> Iterator[tuple[str, object]]:
    yield "  layer", problem.layer
    yield "  expected", problem.expected
    yield "  found", problem.found


def _next_step(problems: Sequence[Problem]) -> str:
    if any(problem.kind == "format-version" for problem in problems):
        return "upgrade llmtailor; this version cannot tell whether the checkpoint is good"
    return "copy the files again from a good source, or resume: it takes the newest checkpoint that verifies"
