"""Every snippet of the framework pages runs, in order, on as many ranks as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ranks.launch import run_ranks

GUIDES = Path(__file__).parents[2] / "docs" / "frameworks"
_START = "import os\n\nos.chdir(os.path.dirname(os.path.abspath(__file__)))\n"
# It would be compiled for a minute, see merge/deepspeed_training.py.
_WITHOUT_SHARED_MEMORY = """
import sys
import deepspeed.comm.torch
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
"""
PAGES = sorted(path.stem for path in GUIDES.glob("*.md") if path.stem != "index")


def test_every_framework_has_a_page() -> None:
    assert set(PAGES) == {"accelerate", "dcp", "ddp", "deepspeed", "fsdp2", "lightning", "trainer"}
    linked = set(re.findall(r"\]\((\w+)\.md\)", (GUIDES / "index.md").read_text()))
    assert linked == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page: str, tmp_path: Path) -> None:
    text = (GUIDES / f"{page}.md").read_text()
    ranks = re.search(r"<!-- run on (\d+) ranks -->", text)
    assert ranks is not None
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program = tmp_path / "train.py"
    start = _START + _WITHOUT_SHARED_MEMORY * (page == "deepspeed")
    program.write_text(start + "\n".join(snippets))
    run_ranks(program, int(ranks[1]))
    checkpoints = sorted(tmp_path.glob("runs/*/checkpoint-*/tailor.json"))
    assert checkpoints, "the page's program saved nothing"
