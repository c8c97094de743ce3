"""Where the elements of a DCP tensor are: worked out once for all blocks of it, and forgotten when others come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from formats.simple_writer import load_ref
from llmtailor.assembly import execute
from llmtailor.boxes import Box
from llmtailor.file_plan import CheckpointPlan, FilePlan
from llmtailor.formats.dcp import stored
from llmtailor.formats.dcp.metadata import Blob, Chunk, TensorItem
from llmtailor.formats.dcp.stored import StoredTensor
from llmtailor.tensor_refs import AveragedTensor, whole
from llmtailor.tensors import ByteRange, TensorMeta


def sharded_by_columns(path: Path, tensor: torch.Tensor, *, num_ranks: int) -> StoredTensor:
    """As torch saves it, each rank's piece in a file of its own."""
    chunks, start = [], 0
    for rank, piece in enumerate(tensor.tensor_split(num_ranks, dim=1)):
        place = path.with_name(f"{path.name}-{rank}.distcp")
        torch.save(piece.contiguous(), place)
        blob = Blob(path=place, byte_range=ByteRange(start=0, end=place.stat().st_size))
        chunks.append(Chunk(box=Box(offsets=(0, start), sizes=tuple(piece.shape)), blob=blob))
        start += piece.shape[1]
    meta = TensorMeta(dtype="F32", shape=tuple(tensor.shape))
    return StoredTensor(TensorItem(key=path.name, path=(path.name,), directory="", meta=meta, chunks=tuple(chunks)))


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of tensors whose extents are worked out, each time."""
    keys: list[str] = []
    work_out = StoredTensor._place

    def count(self: StoredTensor) -> tuple[stored.Extent, ...]:
        keys.append(self.item.key)
        return work_out(self)

    monkeypatch.setattr(StoredTensor, "_place", count)
    return keys


def test_blocks_of_an_average_ask_once_for_each_of_its_tensors(tmp_path: Path, placed: list[str]) -> None:
    torch.manual_seed(1)
    # Larger than a block of the assembly.
    values = [torch.randn(2048, 1024) for _ in range(2)]
    refs = [sharded_by_columns(tmp_path / name, value, num_ranks=2) for name, value in zip("ab", values, strict=True)]
    mean = AveragedTensor(meta=refs[0].meta, sources=tuple(refs), weights=(0.5, 0.5))
    execute(CheckpointPlan(files=(FilePlan(name="x", parts=(whole(mean),)),)), tmp_path / "out")
    made = torch.frombuffer(bytearray((tmp_path / "out" / "x").read_bytes()), dtype=torch.float32)
    assert made.equal(((values[0].double() + values[1].double()) / 2).float().flatten())
    assert sorted(placed) == ["a", "b"]


def test_the_first_tensor_forgets_when_there_are_too_many(
    tmp_path: Path, placed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "_KEPT", stored._Kept())
    monkeypatch.setattr(stored, "_MAX_KEPT_EXTENTS", 20)
    values = {name: torch.arange(8.0).view(4, 2) + number for number, name in enumerate("abc")}
    refs = {name: sharded_by_columns(tmp_path / name, value, num_ranks=2) for name, value in values.items()}
    for name in "aabba":
        assert len(refs[name].extents) == 8
    assert "".join(placed) == "ab"
    assert load_ref(refs["c"]).equal(values["c"])
    assert load_ref(refs["b"]).equal(values["b"])
    assert "".join(placed) == "abc"
    assert load_ref(refs["a"]).equal(values["a"])
    assert "".join(placed) == "abca"
    # Of those that are gone nothing is counted for ever.
    del refs
    for name, value in values.items():
        assert load_ref(sharded_by_columns(tmp_path / name, value, num_ranks=2)).equal(value)
