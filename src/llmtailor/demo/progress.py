"""Progress bars on stderr while the demo runs."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Bars"]

# Room for all but the bar: phase, counts, time and a note.
_OTHER_COLUMNS = 66


class Bars:
    """One bar for each phase; a phase that is over stays on the screen with what came of it.

    Where stderr is no terminal, a line for each phase that is over.
    """

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._console = console = Console(stderr=True, quiet=is_quiet)
        self._is_live = console.is_terminal
        self._phase = ""
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=max(8, min(32, console.width - _OTHER_COLUMNS))),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self._is_live,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, phase: str, total: int) -> None:
        """Start a phase."""
        self._phase = phase
        self._task = self._progress.add_task(f"{phase:<21}", total=total, note="[dim]starting")

    def advance(self, done: int, note: str) -> None:
        """So much of the phase is done."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, note=note)

    def end(self, note: str, *, is_crash: bool = False) -> None:
        """The phase is over."""
        if self._task is None:
            return
        style = "red" if is_crash else "green"
        self._progress.update(self._task, note=f"[{style}]{note}")
        self._progress.stop_task(self._task)
        if not self._is_live:
            self._console.print(f"{self._phase}: {note}", highlight=False)
