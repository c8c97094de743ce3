"""Small plans of new checkpoints over small sources, and what they have to come out as, byte for byte."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from llmtailor.file_plan import CheckpointPlan, CrcPatch, FilePlan, FileRange, LinkPlan, Part, Zeros
from llmtailor.manifest import digest_of
from llmtailor.tensor_refs import Extent, FileTensor, TensorSlice, whole
from llmtailor.tensors import ByteRange, TensorMeta


def write_source(path: Path, nbytes: int, *, mode: int = 0o644) -> Path:
    """A file whose bytes follow from its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(path.name).randbytes(nbytes))
    path.chmod(mode)
    return path


def file_range(path: Path, start: int, end: int) -> FileRange:
    return FileRange(path=path, byte_range=ByteRange(start=start, end=end))


def file_vector(path: Path, offset: int, numel: int, dtype: str = "F32") -> FileTensor:
    meta = TensorMeta(dtype=dtype, shape=(numel,))
    return FileTensor(meta=meta, extents=(Extent(path=path, offset=offset, start=0, numel=numel),))


def link_plan(name: str, source: Path) -> LinkPlan:
    content = source.read_bytes()
    return LinkPlan(name=name, source=source, nbytes=len(content), digest=digest_of(content))


def plan_of(*parts: Part, name: str = "file.bin") -> CheckpointPlan:
    """One file."""
    return CheckpointPlan(files=(FilePlan(name=name, parts=parts),))


def drop_from_cache(path: Path) -> None:
    """Have the next reader wait for the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def expected_bytes(parts: Iterable[Part], patches: Sequence[CrcPatch] = ()) -> bytes:
    """What a file must hold; copies and bytes only."""
    content = bytearray().join(_bytes_of(part) for part in parts)
    for patch in patches:
        crc = zlib.crc32(content[patch.byte_range.start : patch.byte_range.end])
        for offset in patch.offsets:
            content[offset : offset + 4] = crc.to_bytes(4, "little")
    return bytes(content)


def _bytes_of(part: Part) -> bytes:
    match part:
        case bytes():
            return part
        case Zeros():
            return bytes(part.nbytes)
        case FileRange():
            return part.path.read_bytes()[part.byte_range.start : part.byte_range.end]
        case TensorSlice(tensor=FileTensor() as tensor):
            size = tensor.meta.nbytes // tensor.meta.numel
            pieces = [each.path.read_bytes()[each.offset : each.offset + each.numel * size] for each in tensor.extents]
            return b"".join(pieces)[part.start * size : part.stop * size]
        case _:
            raise AssertionError(part)


def small_merge(sources: Path) -> CheckpointPlan:
    """Every kind of file there is, in a few hundred kilobytes: parts, CRCs, a directory, a link, a seal."""
    a = write_source(sources / "a.bin", 150_000)
    b = write_source(sources / "b.bin", 90_001)
    published = write_source(sources / "published.bin", 5000, mode=0o444)
    patched = FilePlan(
        name="optimizer/patched.bin",
        parts=(bytes(8), file_range(a, 10, 80_000), Zeros(nbytes=100), whole(file_vector(b, 1, 5000)), bytes(8)),
        crc_patches=(CrcPatch(byte_range=ByteRange(start=8, end=79_998), offsets=(0, 100_098)),),
    )
    return CheckpointPlan(
        files=(
            FilePlan(name="model.bin", parts=(b"header", file_range(b, 3, 90_000), file_range(a, 0, 150_000))),
            patched,
            FilePlan(name="empty.txt", parts=()),
        ),
        links=(link_plan("optimizer/linked.bin", published),),
        seal=lambda written: FilePlan(name="seal.txt", parts=("\n".join(sorted(written)).encode(),)),
    )


def check_small_merge(plan: CheckpointPlan, target: Path) -> None:
    """The target holds the plan's files and nothing else."""
    names = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    assert names == {*(file.name for file in plan.files), *(link.name for link in plan.links), "seal.txt"}
    for file in plan.files:
        assert (target / file.name).read_bytes() == expected_bytes(file.parts, file.crc_patches), file.name
    for link in plan.links:
        assert (target / link.name).read_bytes() == link.source.read_bytes()
    listed = sorted(names - {"seal.txt"})
    assert (target / "seal.txt").read_text() == "\n".join(listed)


def digests(directory: Path) -> dict[str, str]:
    """Of every file in a directory."""
    return {path.name: digest_of(path.read_bytes()) for path in sorted(directory.iterdir())}


def left_over(directory: Path) -> list[str]:
    """What attempts have left beside their targets."""
    return [path.name for path in directory.iterdir() if ".llmtailor-" in path.name]
