"""The README's figures are those of the results that are kept beside the benchmarks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_readme_table_is_made_from_the_results() -> None:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks/readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.make_table() in text, "run benchmarks/readme_table.py"
    assert module.make_save_table() in text, "run benchmarks/readme_table.py"
    assert module.make_merge_table() in text, "run benchmarks/readme_table.py"
    assert module.make_codes_table() in text, "run benchmarks/readme_table.py"
    page = (ROOT / "docs/codes.md").read_text(encoding="utf-8")
    assert module.make_bytes_table() in page, "run benchmarks/readme_table.py"
    page = (ROOT / "docs/frameworks/index.md").read_text(encoding="utf-8")
    assert module.make_ranks_table() in page, "run benchmarks/readme_table.py"
    page = (ROOT / "docs/monitor.md").read_text(encoding="utf-8")
    assert module.make_monitor_table() in page, "run benchmarks/readme_table.py"
