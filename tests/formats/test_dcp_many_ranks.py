"""``.metadata`` of large models on many ranks: limits of a pickle are in proportion to its size, not in its way."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from llmtailor.errors import FormatError
from llmtailor.formats.dcp.metadata import Item, ShardFile, TensorItem, build_metadata, parse_metadata
from llmtailor.formats.torch_files import encode_pickle, pickle_reader, read_pickle, reading, tree_checks

_BLOB_NBYTES = 2**14
_TENSORS_OF_BLOCK = 9


def write_metadata(path: Path, *, num_tensors: int, num_ranks: int) -> int:
    """What torch writes for a model and its AdamW, each tensor a chunk on each rank; gives the number of chunks."""
    described, places, names = {}, {}, {}
    for number in range(num_tensors):
        block, kind = divmod(number, _TENSORS_OF_BLOCK)
        fqn = f"model.layers.{block}.mlp.proj_{kind}.weight"
        for parts in (("model", fqn), ("optim", "state", fqn, "exp_avg"), ("optim", "state", fqn, "exp_avg_sq")):
            key = ".".join(parts)
            chunks = []
            for rank in range(num_ranks):
                offsets = torch.Size([2 * rank, 0])
                chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([2, 1024])))
                index = MetadataIndex(key, torch.Size(offsets), rank)
                places[index] = _StorageInfo(f"__{rank}_0.distcp", len(described) * _BLOB_NBYTES, _BLOB_NBYTES)
            properties = TensorProperties(dtype=torch.float32)
            shape = torch.Size([2 * num_ranks, 1024])
            described[key] = TensorStorageMetadata(properties=properties, size=shape, chunks=chunks)
            names[key] = parts
    path.write_bytes(pickle.dumps(Metadata(described, names, places)))
    return len(places)


def read_items(path: Path) -> tuple[Item, ...]:
    return parse_metadata(
        read_pickle(path), path=path, directory="", locate=lambda name: ShardFile(path=Path(name), nbytes=2**60)
    )


def count_chunks(items: tuple[Item, ...]) -> int:
    return sum(len(item.chunks) for item in items if isinstance(item, TensorItem))


@pytest.fixture
def without_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not need the constant part of a limit is let through at any size."""
    monkeypatch.setattr(pickle_reader, "_FREE_OBJECT_NBYTES", 0)
    monkeypatch.setattr(tree_checks, "_FREE_NODES", 0)
    monkeypatch.setattr(tree_checks, "_FREE_EXPANDED", 1000)  # the walk counts the keys of a dict before its values


@pytest.mark.parametrize("num_ranks", [8, 512])
@pytest.mark.usefixtures("without_allowance")
def test_metadata_takes_its_share_at_any_number_of_ranks(num_ranks: int, tmp_path: Path) -> None:
    num_chunks = write_metadata(tmp_path / ".metadata", num_tensors=1024 // num_ranks, num_ranks=num_ranks)
    items = read_items(tmp_path / ".metadata")
    assert count_chunks(items) == num_chunks == 1024 * 3
    # And as it is written here.
    (tmp_path / "written").write_bytes(encode_pickle(build_metadata(items)))
    assert read_items(tmp_path / "written") == items


@pytest.mark.slow
def test_metadata_of_70b_on_64_ranks_is_read(tmp_path: Path) -> None:
    # 20 MiB; 512 ranks are 150 MiB, and take a minute and 4 GiB.
    num_chunks = write_metadata(tmp_path / ".metadata", num_tensors=80 * _TENSORS_OF_BLOCK, num_ranks=64)
    items = read_items(tmp_path / ".metadata")
    assert count_chunks(items) == num_chunks > 130_000
    assert len(encode_pickle(build_metadata(items))) > 2**24


def test_metadata_beyond_all_measure_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / ".metadata").open("wb") as file:  # a hole
        file.truncate(reading._MAX_BARE_PICKLE_NBYTES + 1)
    with pytest.raises(FormatError) as caught:
        read_pickle(tmp_path / ".metadata")
    assert "too large" in caught.value.what
