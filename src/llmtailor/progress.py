"""A bar for reading many bytes, on stderr, where somebody is looking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .manifest import FileRecord

__all__ = ["show_reading"]


@contextmanager
def show_reading(what: str, find_total_nbytes: Callable[[], int]) -> Iterator[Callable[[FileRecord], None]]:
    """Show how far the reading of files is; nothing if stderr is no terminal.

    Args:
        what: A word before the bar ("verify").
        find_total_nbytes: Called only where there is a bar.

    Yields:
        To be called before each file is read.
    """
    if not sys.stderr.isatty():
        yield lambda record: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=find_total_nbytes())
        begun: list[FileRecord] = []

        def advance(record: FileRecord) -> None:
            # The file before this one is done.
            progress.advance(task, sum(each.bytes for each in begun))
            begun[:] = [record]

        yield advance
