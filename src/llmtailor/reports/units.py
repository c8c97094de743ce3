"""Numbers as people read them. Decimal units: a disk of 1 TB holds 1000 checkpoints of 1 GB."""

from __future__ import annotations

__all__ = ["format_bytes", "format_number_of"]

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def format_bytes(nbytes: int) -> str:
    """``999 B``, ``1.0 kB``, ``112.3 GB``."""
    if nbytes < 1000:
        return f"{nbytes} B"
    size, power = float(nbytes), 0
    # 999.96 kB would be shown as 1000.0 kB.
    while round(size, 1) >= 1000 and power < len(_UNITS) - 1:
        size, power = size / 1000, power + 1
    return f"{size:.1f} {_UNITS[power]}"


def format_number_of(number: int, noun: str) -> str:
    """``1 layer``, ``1,024 layers``; a noun in -y gets -ies."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun[:-1]}ies" if noun.endswith("y") else f"{number:,} {noun}s"
