"""Tables of the documents that tell of the command line are tables, for whoever renders them."""

from __future__ import annotations

from pathlib import Path

import pytest

DOCUMENTS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["troubleshooting.md", "cli.md", "retention.md", "estimate.md", "merging.md"])
def test_every_row_is_in_a_table_with_a_head(name: str) -> None:
    lines = (DOCUMENTS / name).read_text().splitlines()
    heads = [
        following
        for before, line, following in zip(["", *lines], lines, [*lines[1:], ""], strict=False)
        if line.startswith("|") and not before.startswith("|")
    ]
    assert [line for line in heads if not line.startswith("|--")] == []
