"""A merge of any size in the same little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
PROGRAM = """
import sys
from pathlib import Path
from llmtailor.assembly import execute
from llmtailor.file_plan import CheckpointPlan, CrcPatch, FilePlan, FileRange
from llmtailor.tensor_refs import CastTensor, Extent, FileTensor, whole
from llmtailor.tensors import ByteRange, TensorMeta

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024

source, target = map(Path, sys.argv[1:])
half = 2**29
single = FileTensor(
    meta=TensorMeta(dtype="F32", shape=(half // 4,)),
    extents=(Extent(path=source, offset=half, start=0, numel=half // 4),),
)
plan = CheckpointPlan(files=(
    FilePlan(
        name="archive",
        parts=(bytes(8), FileRange(path=source, byte_range=ByteRange(start=0, end=half))),
        crc_patches=(CrcPatch(byte_range=ByteRange(start=8, end=half + 8), offsets=(0,)),),
    ),
    FilePlan(name="cast", parts=(whole(CastTensor(meta=TensorMeta(dtype="BF16", shape=(half // 4,)), source=single)),)),
))
before = peak()
execute(plan, target)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_sources(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(1024 * MIB)
    command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "target")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (tmp_path / "target" / "archive").stat().st_size == 512 * MIB + 8
    assert (tmp_path / "target" / "cast").stat().st_size == 256 * MIB
    assert int(done.stdout) < 150, done.stdout
