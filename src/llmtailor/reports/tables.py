"""Plain tables: no frames, so that they can be read, searched and cut. Imports rich; import it late."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from .printable import printable

__all__ = ["cell", "facts_table", "heading", "line", "plain_table"]


def plain_table(*columns: str) -> Table:
    """An empty table; a column whose name starts with ``>`` is set flush right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for name in columns:
        is_number = name.startswith(">")
        table.add_column(cell(name.removeprefix(">")), justify="right" if is_number else "left", no_wrap=is_number)
    return table


def facts_table(facts: Iterable[tuple[str, object]]) -> Table:
    """Names and values, indented; facts that are None are left out."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts:
        if value is not None:
            table.add_row(cell(f"  {name}"), cell(value))
    return table


def cell(value: object, style: str = "") -> Text:
    """Text that is shown as it is: no markup, no escape sequences; ``-`` for None."""
    return Text("-" if value is None else printable(value), style=style)


def heading(text: str) -> Text:
    """A title, with an empty line above."""
    return Text(f"\n{printable(text)}", style="bold")


def line(text: str, style: str = "") -> Text:
    """A line of text."""
    return cell(text, style)
