"""Numbers and names as the command line prints them."""

from __future__ import annotations

import pytest

from llmtailor.reports.printable import printable
from llmtailor.reports.units import format_bytes, format_number_of


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (112_345_678_901, "112.3 GB"),
        (10**22, "10000.0 EB"),
    ],
)
def test_format_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "layer", "1 layer"),
        (0, "layer", "0 layers"),
        (1024, "file", "1,024 files"),
        (2, "directory", "2 directories"),
    ],
)
def test_format_number_of(number: int, noun: str, text: str) -> None:
    assert format_number_of(number, noun) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Schicht \u00fc", "Schicht \u00fc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb", "a\\nb"),
        ("\u202egnp", "\\u202egnp"),
        ("\udce9", "\\udce9"),
    ],
)
def test_printable_writes_out_what_a_terminal_would_obey(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_printable_keeps_lines_if_told() -> None:
    assert printable("a\nb\r", keep_lines=True) == "a\nb\\r"
