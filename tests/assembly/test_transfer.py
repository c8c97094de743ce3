from __future__ import annotations

import errno
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assembly.merge_plans import (
    check_small_merge,
    drop_from_cache,
    expected_bytes,
    file_range,
    file_vector,
    left_over,
    plan_of,
    small_merge,
    write_source,
)
from faults import memory_directory
from llmtailor.assembly import execute, sources
from llmtailor.file_plan import CheckpointPlan, CrcPatch, FilePlan, Part, WrittenFile, Zeros
from llmtailor.manifest import digest_of
from llmtailor.storage import LocalFileSystem
from llmtailor.tensor_refs import CastTensor, InlineTensor, ScaledTensor, TensorSlice, whole
from llmtailor.tensors import ByteRange, TensorMeta

CHUNK = 8192


# Bytes


@st.composite
def random_parts(draw: st.DrawFn, sources: list[Path], nbytes: int) -> list[Part]:
    position = st.integers(0, nbytes)
    parts: list[Part] = []
    for kind in draw(st.lists(st.sampled_from(["bytes", "zeros", "range", "tensor"]), max_size=8)):
        low, high = sorted((draw(position), draw(position)))
        source = draw(st.sampled_from(sources))
        if draw(st.booleans()):  # small ones meet in one chunk and one read
            high = min(high, low + 50)
        if kind == "bytes":
            parts.append(draw(st.binary(max_size=20)))
        elif kind == "zeros":
            parts.append(Zeros(nbytes=draw(st.integers(0, 3 * CHUNK))))
        elif kind == "range":
            parts.append(file_range(source, low, high))
        elif high - low >= 8:
            numel = (high - low) // 4
            start, stop = sorted((draw(st.integers(0, numel)), draw(st.integers(0, numel))))
            parts.append(TensorSlice(tensor=file_vector(source, low, numel), start=start, stop=stop))
    return parts


@st.composite
def random_patches(draw: st.DrawFn, nbytes: int) -> tuple[CrcPatch, ...]:
    if nbytes < 40:
        return ()
    cuts = sorted(draw(st.lists(st.integers(4, nbytes - 8), min_size=2, max_size=6, unique=True)))
    ranges = [ByteRange(start=low, end=high) for low, high in zip(cuts[::2], cuts[1::2], strict=False)]
    places = [0, nbytes - 4]
    return tuple(
        CrcPatch(byte_range=each, offsets=tuple(places[index :: len(ranges)])) for index, each in enumerate(ranges)
    )


@pytest.mark.usefixtures("_small_things_too")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "cold"])
def test_files_hold_what_was_planned(threads: int, is_cached: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        nbytes = 5 * CHUNK + 17
        paths = [write_source(root / "sources" / name, nbytes) for name in "ab"]

        @settings(max_examples=25)
        @given(st.data())
        def check(data: st.DataObject) -> None:
            files = []
            for index in range(data.draw(st.integers(1, 3))):
                parts = tuple(data.draw(random_parts(paths, nbytes)))
                patches = data.draw(random_patches(FilePlan(name="", parts=parts).nbytes))
                files.append(FilePlan(name=f"{index}/file", parts=parts, crc_patches=patches))
            if not is_cached:
                for path in paths:
                    drop_from_cache(path)
            done: list[int] = []
            plan = CheckpointPlan(files=tuple(files))
            target = root / "target"
            written = execute(plan, target, threads=threads, chunk_nbytes=CHUNK, on_bytes=done.append)
            for file, record in zip(files, written, strict=True):
                content = expected_bytes(file.parts, file.crc_patches)
                assert (target / file.name).read_bytes() == content
                digest = None if file.crc_patches else digest_of(content)
                assert record == WrittenFile(name=file.name, nbytes=len(content), digest=digest)
            assert sum(done) == plan.nbytes
            assert left_over(root) == []
            shutil.rmtree(target)

        check()


def test_large_reads_and_writes_are_right(tmp_path: Path) -> None:
    a = write_source(tmp_path / "sources" / "a", 5 * 2**20 + 3)
    b = write_source(tmp_path / "sources" / "b", 3 * 2**20 + 1)
    parts: tuple[Part, ...] = (
        bytes(4096), file_range(a, 4096, 5 * 2**20), b"odd", file_range(b, 1, 3 * 2**20), file_range(a, 0, 5 * 2**20),
    )  # fmt: skip
    end = FilePlan(name="", parts=parts).nbytes
    patches = (
        CrcPatch(byte_range=ByteRange(start=8, end=7_000_001), offsets=(0, end - 4)),
        CrcPatch(byte_range=ByteRange(start=7_000_001, end=end - 8), offsets=(4,)),
    )
    for path in (a, b):
        drop_from_cache(path)
    plan = CheckpointPlan(
        files=(FilePlan(name="plain", parts=parts), FilePlan(name="patched", parts=parts, crc_patches=patches))
    )
    execute(plan, tmp_path / "target", chunk_nbytes=2**20)
    assert (tmp_path / "target" / "plain").read_bytes() == expected_bytes(parts)
    assert (tmp_path / "target" / "patched").read_bytes() == expected_bytes(parts, patches)


def test_crcs_are_those_of_zipfile(tmp_path: Path) -> None:
    a = write_source(tmp_path / "sources" / "a", 300_000)
    content = a.read_bytes()
    archive = tmp_path / "archive.zip"
    members = {"first": content[5:200_000], "second": content[:77], "third": content[100_000:]}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    whole_zip = archive.read_bytes()
    blank, patches = bytearray(whole_zip), []
    directory = whole_zip.index(b"PK\x01\x02")
    for name, data in members.items():
        start = whole_zip.index(data)
        # Source: APPNOTE 6.3.10, 4.3.7 and 4.3.12: the CRC is at byte 14 of a local header, 16 of a central one.
        local = start - len(name) - 30 + 14
        central = whole_zip.index(name.encode(), directory) - 46 + 16
        for offset in (local, central):
            blank[offset : offset + 4] = bytes(4)
        patches.append(CrcPatch(byte_range=ByteRange(start=start, end=start + len(data)), offsets=(local, central)))
    starts = [patch.byte_range for patch in patches]
    parts: list[Part] = [bytes(blank[: starts[0].start])]
    for (name, data), here, following in zip(members.items(), starts, [*starts[1:], None], strict=True):
        offset = content.index(data)
        parts.append(file_range(a, offset, offset + len(data)))
        parts.append(bytes(blank[here.end : following.start if following else len(blank)]))
        assert name
    plan = CheckpointPlan(files=(FilePlan(name="archive.zip", parts=tuple(parts), crc_patches=tuple(patches)),))
    execute(plan, tmp_path / "target", chunk_nbytes=65536)
    assert (tmp_path / "target" / "archive.zip").read_bytes() == whole_zip
    with zipfile.ZipFile(tmp_path / "target" / "archive.zip") as file:
        assert file.testzip() is None


@pytest.mark.usefixtures("_small_things_too")
@pytest.mark.parametrize("threads", [1, 3])
def test_arithmetic_reads_its_operands_from_files(tmp_path: Path, threads: int) -> None:
    numel = 20_000
    values = np.random.default_rng(0).standard_normal(numel).astype(np.float32)
    source = tmp_path / "source"
    source.write_bytes(b"odd" + values.tobytes())
    tensor = file_vector(source, 3, numel)
    half = CastTensor(meta=TensorMeta(dtype="F16", shape=(numel,)), source=tensor)
    small = InlineTensor(meta=TensorMeta(dtype="F32", shape=(2,)), data=values[:2].tobytes())
    doubled = ScaledTensor(source=small, factor=2.0)
    quarter = ScaledTensor(source=tensor, factor=0.25)
    plan = plan_of(b"odd", whole(half), whole(quarter), TensorSlice(tensor=half, start=7, stop=99), whole(doubled))
    drop_from_cache(source)
    execute(plan, tmp_path / "target", threads=threads, chunk_nbytes=CHUNK)
    cast = values.astype(np.float16)
    expected = [cast.tobytes(), (values * np.float32(0.25)).tobytes(), cast[7:99].tobytes(), (values[:2] * 2).tobytes()]
    assert (tmp_path / "target" / "file.bin").read_bytes() == b"odd" + b"".join(expected)


def test_more_sources_than_may_be_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAX_OPEN", 3)
    paths = [write_source(tmp_path / "sources" / str(index), 100 + index) for index in range(20)]
    parts = tuple(file_range(path, 1, 100) for path in [*paths, *reversed(paths)])
    execute(plan_of(*parts), tmp_path / "target", threads=2, chunk_nbytes=4096)
    assert (tmp_path / "target" / "file.bin").read_bytes() == expected_bytes(parts)


def test_many_files(tmp_path: Path) -> None:
    source = write_source(tmp_path / "sources" / "a", 5000)
    files = tuple(FilePlan(name=f"{i % 7}/{i}", parts=(file_range(source, i, 2 * i),)) for i in range(300))
    execute(CheckpointPlan(files=files), tmp_path / "target")
    for file in files:
        assert (tmp_path / "target" / file.name).read_bytes() == expected_bytes(file.parts)


# Ways to write


class Refusing(LocalFileSystem):
    """Cannot go around the page cache; says so at once, or only when it is written to."""

    def __init__(self, *, at_once: bool) -> None:
        self._at_once = at_once
        self.refusals = 0
        self._direct: set[int] = set()

    def set_direct(self, descriptor: int, is_direct: bool) -> None:
        if is_direct and self._at_once:
            self.refusals += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        (self._direct.add if is_direct else self._direct.discard)(descriptor)

    def write_at(self, descriptor: int, buffer: memoryview, offset: int) -> None:
        if descriptor in self._direct:
            self.refusals += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        super().write_at(descriptor, buffer, offset)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_without_direct_writes_it_works_too(tmp_path: Path, at_once: bool, threads: int) -> None:
    plan = small_merge(tmp_path / "sources")
    filesystem = Refusing(at_once=at_once)
    execute(plan, tmp_path / "target", threads=threads, chunk_nbytes=CHUNK, filesystem=filesystem)
    assert filesystem.refusals
    check_small_merge(plan, tmp_path / "target")


def test_a_directory_in_memory_works() -> None:
    with memory_directory() as directory:
        plan = small_merge(directory / "sources")
        execute(plan, directory / "target", chunk_nbytes=CHUNK)
        check_small_merge(plan, directory / "target")


class Sharing(LocalFileSystem):
    """Shares blocks, as far as anybody can see."""

    def __init__(self, *, error: int | None = None) -> None:
        self.clones = 0
        self._error = error

    def clone(self, reader: int, writer: int) -> None:  # type: ignore[override]
        self.clones += 1
        if self._error is not None:
            raise OSError(self._error, os.strerror(self._error))
        os.write(writer, os.pread(reader, 2**30, 0))


def whole_file_plan(directory: Path) -> CheckpointPlan:
    source = write_source(directory / "sources" / "a", 2**20 + 5)
    other = write_source(directory / "sources" / "b", 2**20 + 5)
    partial = file_range(source, 0, 2**20)
    files = (FilePlan(name="whole", parts=(file_range(source, 0, 2**20 + 5),)), FilePlan(name="part", parts=(partial,)))
    return CheckpointPlan(files=(*files, FilePlan(name="other", parts=(file_range(other, 0, 2**20 + 5),))))


def test_blocks_of_whole_files_are_shared(tmp_path: Path) -> None:
    plan = whole_file_plan(tmp_path)
    filesystem = Sharing()
    done: list[int] = []
    written = execute(plan, tmp_path / "target", filesystem=filesystem, on_bytes=done.append)
    assert filesystem.clones == 2
    for file, record in zip(plan.files, written, strict=True):
        assert (tmp_path / "target" / file.name).read_bytes() == expected_bytes(file.parts)
        assert record.digest == digest_of(expected_bytes(file.parts))
    assert sum(done) == plan.nbytes


def test_blocks_are_not_shared_where_a_crc_goes_in(tmp_path: Path) -> None:
    source = write_source(tmp_path / "sources" / "a", 2**20 + 5)
    parts = (file_range(source, 0, 2**20 + 5),)
    patches = (CrcPatch(byte_range=ByteRange(start=8, end=2**20), offsets=(0,)),)
    plan = CheckpointPlan(files=(FilePlan(name="whole", parts=parts, crc_patches=patches),))
    filesystem = Sharing()
    execute(plan, tmp_path / "target", filesystem=filesystem)
    assert filesystem.clones == 0
    assert (tmp_path / "target" / "whole").read_bytes() == expected_bytes(parts, patches)


def test_sharing_blocks_is_tried_once_where_it_cannot_be(tmp_path: Path) -> None:
    plan = whole_file_plan(tmp_path)
    filesystem = Sharing(error=errno.EOPNOTSUPP)
    execute(plan, tmp_path / "target", filesystem=filesystem)
    assert filesystem.clones == 1
    for file in plan.files:
        assert (tmp_path / "target" / file.name).read_bytes() == expected_bytes(file.parts)
