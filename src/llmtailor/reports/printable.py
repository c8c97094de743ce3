"""Text that nobody vouches for, made fit for a terminal.

Names in a manifest may hold escape sequences that move the cursor or rewrite what stands above; a file name may hold
bytes that are not text. Both are shown, never obeyed.
"""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: object, *, keep_lines: bool = False) -> str:
    r"""The text with everything unprintable written out (``\x1b``).

    Args:
        text: Anything; ``str`` of it is shown.
        keep_lines: Leave line ends as they are.
    """
    return "".join(
        each if each.isprintable() or (keep_lines and each == "\n") else each.encode("unicode_escape").decode("ascii")
        for each in str(text)
    )
