"""The dullest way to execute a plan: every part in memory, one after the other. The real writer must agree with it."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import torch

from llmtailor.file_plan import CheckpointPlan, FilePlan, FileRange, Part, WrittenFile, Zeros
from llmtailor.manifest import digest_of
from llmtailor.tensor_bytes import torch_dtype
from llmtailor.tensor_refs import AveragedTensor, CastTensor, FileTensor, InlineTensor, ScaledTensor, TensorRef
from llmtailor.tensors import DTYPE_BITS
from tensor_content import host_bytes, tensor_from_bytes


def write_checkpoint(plan: CheckpointPlan, directory: Path) -> Path:
    """All files of a plan, in a new directory."""
    directory.mkdir(parents=True)
    written = {}
    for file in plan.files:
        path = write_plan(file, directory)
        digest = None if file.crc_patches else digest_of(path.read_bytes())
        written[file.name] = WrittenFile(name=file.name, nbytes=path.stat().st_size, digest=digest)
    for link in plan.links:
        path = directory / link.name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(link.source, path)
        assert path.stat().st_size == link.nbytes
        assert digest_of(path.read_bytes()) == link.digest
        written[link.name] = WrittenFile(name=link.name, nbytes=link.nbytes, digest=link.digest)
    if plan.seal is not None:
        write_plan(plan.seal(written), directory)
    return directory


def write_plan(plan: FilePlan, directory: Path) -> Path:
    """One file of a plan; there must be none of its name."""
    path = directory / plan.name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = assemble(plan)
    with path.open("xb") as file:
        file.write(content)
    return path


def assemble(plan: FilePlan) -> bytes:
    """The bytes of a planned file."""
    content = bytearray().join(part_bytes(part) for part in plan.parts)
    assert len(content) == plan.nbytes
    position = 0
    for patch in plan.crc_patches:
        place = patch.byte_range
        assert place.start >= position, "ranges are in order and do not overlap"
        position = place.end
        crc = zlib.crc32(content[place.start : place.end])
        for offset in patch.offsets:
            assert not place.start - 4 < offset < place.end, "a CRC is not among what it is of"
            assert content[offset : offset + 4] == bytes(4), "the plan leaves zeros for it"
            content[offset : offset + 4] = crc.to_bytes(4, "little")
    return bytes(content)


def part_bytes(part: Part) -> bytes:
    match part:
        case bytes():
            return part
        case Zeros():
            return bytes(part.nbytes)
        case FileRange():
            return read_range(part.path, part.byte_range.start, part.byte_range.nbytes)
    itemsize = DTYPE_BITS[part.tensor.meta.dtype] // 8
    return tensor_bytes(part.tensor)[part.start * itemsize : part.stop * itemsize]


def read_range(path: Path, start: int, nbytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(nbytes)
    assert len(data) == nbytes
    return data


def tensor_bytes(ref: TensorRef) -> bytes:
    """All elements of a tensor, little-endian, row-major."""
    match ref:
        case InlineTensor():
            return ref.data
        case FileTensor():
            itemsize = DTYPE_BITS[ref.meta.dtype] // 8
            data = b"".join(read_range(e.path, e.offset, e.numel * itemsize) for e in ref.extents)
            assert len(data) == ref.meta.nbytes
            return data
    return bytes(host_bytes(load_ref(ref)))


def load_ref(ref: TensorRef) -> torch.Tensor:
    """The value of a reference, as torch computes it."""
    match ref:
        case InlineTensor() | FileTensor():
            return tensor_from_bytes(bytearray(tensor_bytes(ref)), ref.meta)
        case CastTensor():
            return load_ref(ref.source).to(torch_dtype(ref.meta.dtype))
        case ScaledTensor():
            return (load_ref(ref.source).double() * ref.factor).to(torch_dtype(ref.meta.dtype))
        case AveragedTensor():
            values = [load_ref(s).double() * w for s, w in zip(ref.sources, ref.weights, strict=True)]
            return torch.stack(values).sum(0).to(torch_dtype(ref.meta.dtype))
