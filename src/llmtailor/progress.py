"""A bar for reading or writing many bytes, on stderr, where somebody is looking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .manifest import FileRecord

__all__ = ["show_bytes", "show_reading"]


@contextmanager
def show_reading(what: str, find_total_nbytes: Callable[[], int]) -> Iterator[Callable[[FileRecord], None]]:
    """Show how far the reading of files is; nothing if stderr is no terminal.

    Args:
        what: A word before the bar ("verify").
        find_total_nbytes: Called only where there is a bar.

    Yields:
        To be called before each file is read.
    """
    with show_bytes(what, find_total_nbytes) as on_bytes:
        begun: list[FileRecord] = []

        def advance(record: FileRecord) -> None:
            # The file before this one is done.
            on_bytes(sum(each.bytes for each in begun))
            begun[:] = [record]

        yield advance


@contextmanager
def show_bytes(what: str, find_total_nbytes: Callable[[], int]) -> Iterator[Callable[[int], None]]:
    """Show how many bytes are done, and how fast; nothing if stderr is no terminal.

    Args:
        what: A word before the bar ("merge").
        find_total_nbytes: Called only where there is a bar.

    Yields:
        To be called with each number of bytes that are done; from any thread.
    """
    if not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=find_total_nbytes())
        yield lambda nbytes: progress.advance(task, nbytes)
