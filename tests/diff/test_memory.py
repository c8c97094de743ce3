"""A comparison of any size in the same little memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtailor.formats.safetensors import plan_layout
from llmtailor.tensors import TensorMeta

PROGRAM = """
import sys
from pathlib import Path
import numpy
from llmtailor.diff import compare, plan_diff

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024

plan = plan_diff(*sys.argv[1:])
before = peak()
difference = compare(plan)
assert difference.totals["weights"].is_equal
print(peak() - before)
"""


def write_zeros(directory: Path, numel: int, dtype: str) -> Path:
    """A model of zeros that takes no room on the disk."""
    directory.mkdir()
    layout = plan_layout([(f"layers.{n}.up.weight", TensorMeta(dtype=dtype, shape=(numel,))) for n in range(4)], {})
    (directory / "model.safetensors").write_bytes(layout.prefix)
    os.truncate(directory / "model.safetensors", layout.nbytes)
    return directory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoints(tmp_path: Path) -> None:
    a, b = write_zeros(tmp_path / "a", 2**26, "F32"), write_zeros(tmp_path / "b", 2**26, "BF16")
    command = [sys.executable, "-c", PROGRAM, str(a), str(b)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (a / "model.safetensors").stat().st_size > 2**30
    assert int(done.stdout) < 100, done.stdout
