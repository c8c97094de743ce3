"""The README's figures are those of the results that are kept beside the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def rows(question: str) -> dict[str, Any]:
    text = (ROOT / "benchmarks/results" / f"{question}.json").read_text(encoding="utf-8")
    rows: dict[str, Any] = json.loads(text)["rows"]
    return rows


def test_readme_figures_come_from_results() -> None:
    saved, demo, cli = rows("selective_save"), rows("demo"), rows("cli")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.split("|")[2:4]] for line in readme.splitlines() if line.startswith("| ")]
    assert table[1:] == [
        [f"{saved['two_full_saves_bytes'] / 2e6:.1f} MB", f"{saved['two_parity_saves_bytes'] / 2e6:.1f} MB"],
        ["", f"{saved['publish_nothing_written_ms_beyond_fsync_median']:.0f} ms"],
        ["not killed", str(demo["crash"]["lost_steps"])],
        [f"{demo[run]['validation_loss']:.3f}" for run in ("reference", "recovered")],
        ["", f"{cli['ls_secs_median']:.2f} s"],
    ]
