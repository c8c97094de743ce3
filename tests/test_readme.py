"""The figures of the README and of pages are those of the results that are kept beside the benchmarks."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [path.relative_to(ROOT).as_posix() for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])]


@pytest.fixture(scope="module")
def readme_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks/readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_made_from_the_results(readme_table: ModuleType) -> None:
    for page, beginning, make in readme_table.TABLES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert readme_table.replace_table(text, beginning, make()) == text, f"{page}: run benchmarks/readme_table.py"


def test_a_table_takes_no_other_ones_place(readme_table: ModuleType) -> None:
    other = "| what | bytes |\n| --- | --- |\n| all | 1 |\n\n"
    mine = "| bytes | of |\n| --- | --- |\n| 2 | it |"
    page = f"{other}{mine}\n\nmore\n"
    assert readme_table.replace_table(page, "bytes", "| new |") == f"{other}| new |\n\nmore\n"
    with pytest.raises(AssertionError, match="2 tables begin"):
        readme_table.replace_table(page + page, "bytes", "| new |")


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: str) -> None:
    head: int | None = None
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("|"):
            head = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        head = head or cells
        assert cells == head, f"{page}:{number}: {cells - 1} cells, not {head - 1}"
