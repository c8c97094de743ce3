"""Where commands print: data on stdout; talk, progress and questions on stderr.

What stdout gets is one report, as tables, as JSON (``--json``) or as paths, one a line (``--quiet``).
"""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

if TYPE_CHECKING:
    from ..manifest import FileRecord
    from ..reports.report import Report

__all__ = ["AsJson", "IsQuiet", "Output", "collect_warnings"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
IsQuiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print paths alone, one a line.")]

# Wide enough that nothing is folded or cut.
_UNBOUNDED_WIDTH = 10_000
_LINE_END = re.compile(r"(?: |\x1b\[[\d;]*m)+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The one sink of a command."""

    as_json: bool = False
    is_quiet: bool = False

    def show(self, report: Report) -> None:
        """Print a report on stdout."""
        # A path that is not text goes out as the bytes it is; in a table it is for the eyes only.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape" if self.is_quiet else "backslashreplace")
        if self.as_json:
            sys.stdout.write(json.dumps(report.record(), indent=2, allow_nan=False) + "\n")
        elif self.is_quiet:
            sys.stdout.writelines(f"{name}\n" for name in report.names())
        else:
            _print_tables(report)

    def note(self, text: str) -> None:
        """Say something on stderr."""
        if not self.is_quiet:
            sys.stderr.write(f"{text}\n")

    def confirm(self, question: str) -> bool:
        """Ask on the terminal; anything but yes is no."""
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in {"y", "yes"}

    def file_progress(self, find_total: Callable[[], int]) -> AbstractContextManager[Callable[[FileRecord], None]]:
        """A bar on stderr, if that is a terminal; see ``progress.show_reading``."""
        from ..progress import show_reading

        return nullcontext(lambda record: None) if self.is_quiet else show_reading("verify", find_total)

    def byte_progress(self, what: str, total_nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """A bar on stderr, if that is a terminal; see ``progress.show_bytes``."""
        from ..progress import show_bytes

        return nullcontext(lambda nbytes: None) if self.is_quiet else show_bytes(what, lambda: total_nbytes)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Warnings of ours, as text for a report; all others are shown as ever."""
    from ..errors import TailorWarning

    texts: list[str] = []
    show = warnings.showwarning

    def collect(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, TailorWarning):
            texts.append(str(message))
        else:
            show(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", TailorWarning)
        warnings.showwarning = collect
        yield texts


def _print_tables(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    # A table that is wider than the terminal is left to the terminal to wrap: to make it fit, whole columns are cut.
    # Whoever reads a pipe wants whole lines of text, too.
    wide = Console(file=sys.stdout, width=_UNBOUNDED_WIDTH, highlight=False, emoji=False)
    texts = Console(file=sys.stdout, highlight=False, emoji=False) if sys.stdout.isatty() else wide
    for each in report.tables():
        console = wide if isinstance(each, Table) else texts
        with console.capture() as captured:
            console.print(each)
        # Cells are filled up with spaces, which nobody wants at the end of a line, where they may be in bold type.
        sys.stdout.writelines(
            _LINE_END.sub(lambda end: end[0].replace(" ", ""), line) + "\n" for line in captured.get().splitlines()
        )
