from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from assembly.merge_plans import (
    check_small_merge,
    digests,
    file_range,
    left_over,
    link_plan,
    plan_of,
    small_merge,
    write_source,
)
from faults import FaultyFileSystem
from llmtailor.assembly import execute
from llmtailor.errors import (
    AlreadyExistsError,
    FormatError,
    IntegrityError,
    LinkFallbackWarning,
    UnsupportedError,
    WriteError,
)
from llmtailor.file_plan import CheckpointPlan, FilePlan, LinkPlan, WrittenFile
from llmtailor.manifest import digest_of
from llmtailor.storage import LocalFileSystem
from llmtailor.tensor_refs import InlineTensor, ScaledTensor, whole
from llmtailor.tensors import TensorMeta
from mounts import Mounts

CHUNK = 8192


# Modes, links, seal


@pytest.fixture
def umask() -> Iterator[None]:
    old = os.umask(0o027)
    yield
    os.umask(old)


@pytest.mark.usefixtures("umask")
def test_files_of_a_stock_format_can_be_changed_by_their_owner(tmp_path: Path) -> None:
    execute(plan_of(b"text"), tmp_path / "target")
    assert stat.S_IMODE((tmp_path / "target" / "file.bin").stat().st_mode) == 0o640


def test_files_of_a_sealed_checkpoint_are_read_only(tmp_path: Path) -> None:
    plan = small_merge(tmp_path / "sources")
    execute(plan, tmp_path / "target")
    files = [path for path in (tmp_path / "target").rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o444}


def test_small_merge_is_right_and_leaves_its_sources_alone(tmp_path: Path) -> None:
    plan = small_merge(tmp_path / "sources")
    before = digests(tmp_path / "sources")
    done: list[int] = []
    written = execute(plan, tmp_path / "target", on_bytes=done.append)
    check_small_merge(plan, tmp_path / "target")
    assert digests(tmp_path / "sources") == before
    assert [file.name for file in written] == [
        "model.bin", "optimizer/patched.bin", "empty.txt", "optimizer/linked.bin", "seal.txt",
    ]  # fmt: skip
    assert sum(done) == plan.nbytes


def test_seal_is_made_of_all_other_files(tmp_path: Path) -> None:
    plan = small_merge(tmp_path / "sources")
    seen: dict[str, WrittenFile] = {}

    def seal(written: Mapping[str, WrittenFile]) -> FilePlan:
        seen.update(written)
        return FilePlan(name="last", parts=(b"last",))

    execute(CheckpointPlan(files=plan.files, links=plan.links, seal=seal), tmp_path / "target")
    assert list(seen) == ["model.bin", "optimizer/patched.bin", "empty.txt", "optimizer/linked.bin"]
    assert seen["optimizer/linked.bin"].digest == plan.links[0].digest
    assert seen["model.bin"].digest == digest_of((tmp_path / "target" / "model.bin").read_bytes())


def test_seal_is_made_when_the_others_are_durable(tmp_path: Path) -> None:
    class Watched(LocalFileSystem):
        def __init__(self) -> None:
            self.synced: list[str] = []

        def fsync(self, descriptor: int) -> None:
            super().fsync(descriptor)
            self.synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    filesystem = Watched()
    before: list[str] = []

    def seal(written: Mapping[str, WrittenFile]) -> FilePlan:
        before.extend(filesystem.synced)
        return FilePlan(name="last", parts=(b"last",))

    files = small_merge(tmp_path / "sources").files
    execute(CheckpointPlan(files=files, seal=seal), tmp_path / "target", filesystem=filesystem)
    assert sorted(before) == ["empty.txt", "model.bin", "patched.bin"]
    assert filesystem.synced == [*before, "last"]


def test_a_seal_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def seal(written: Mapping[str, WrittenFile]) -> FilePlan:
        raise UnsupportedError("no", kind="no")

    with pytest.raises(UnsupportedError):
        execute(CheckpointPlan(files=plan_of(b"text").files, seal=seal), tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_file_is_linked(tmp_path: Path) -> None:
    source = write_source(tmp_path / "sources" / "a", 5000, mode=0o444)
    execute(CheckpointPlan(files=(), links=(link_plan("x/linked", source),)), tmp_path / "target")
    assert (tmp_path / "target" / "x" / "linked").samefile(source)


@pytest.mark.parametrize("nbytes", [0, 5000])
def test_a_file_that_can_be_changed_is_copied(tmp_path: Path, nbytes: int) -> None:
    source = write_source(tmp_path / "sources" / "a", nbytes, mode=0o644)
    link = link_plan("linked", source)
    plan = CheckpointPlan(files=(), links=(link,), seal=lambda written: FilePlan(name="last", parts=(b"last",)))
    with pytest.warns(LinkFallbackWarning, match="changed in place"):
        written = execute(plan, tmp_path / "target")
    copy = tmp_path / "target" / "linked"
    assert not copy.samefile(source)
    assert copy.read_bytes() == source.read_bytes()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o444
    assert written[0] == WrittenFile(name="linked", nbytes=nbytes, digest=link.digest)


def test_a_copy_of_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "sources" / "a", 5000)
    link = LinkPlan(name="linked", source=source, nbytes=5000, digest=digest_of(b"as it was"))
    warnings.simplefilter("ignore", LinkFallbackWarning)
    with pytest.raises(IntegrityError) as caught:
        execute(CheckpointPlan(files=(), links=(link,)), tmp_path / "target")
    assert caught.value.kind == "digest-mismatch"
    assert caught.value.path == str(source)
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_are_refused_files_are_copied(tmp_path: Path, number: int) -> None:
    plan = small_merge(tmp_path / "sources")
    filesystem: Any = FaultyFileSystem(refused={"link": number})
    with pytest.warns(LinkFallbackWarning, match="published.bin"):
        execute(plan, tmp_path / "target", filesystem=filesystem)
    check_small_merge(plan, tmp_path / "target")
    assert not (tmp_path / "target" / "optimizer" / "linked.bin").samefile(plan.links[0].source)


# Names and targets


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/etc/x", "a/../../x", "a//b", "a/", "./a", "a\0b", "\udc80", "a" * 2000]
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError) as caught:
        execute(plan_of(b"text", name=name), tmp_path / "target")
    assert caught.value.kind == "file-name"
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "sources" / "a", 10, mode=0o444)
    files = plan_of(b"text", name="x").files
    twice = [
        CheckpointPlan(files=(*files, *files)),
        CheckpointPlan(files=files, links=(link_plan("x", source),)),
        CheckpointPlan(files=files, seal=lambda written: files[0]),
    ]
    for plan in twice:
        with pytest.raises(FormatError) as caught:
            execute(plan, tmp_path / "target")
        assert caught.value.kind == "file-name"
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_a_file_and_a_directory_of_one_name_are_refused(tmp_path: Path) -> None:
    plan = CheckpointPlan(files=(FilePlan(name="x", parts=()), FilePlan(name="x/y", parts=())))
    with pytest.raises(WriteError):
        execute(plan, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_integers_are_not_computed_with(tmp_path: Path) -> None:
    tensor = InlineTensor(meta=TensorMeta(dtype="I64", shape=(1,)), data=bytes(8))
    with pytest.raises(UnsupportedError):
        execute(plan_of(whole(ScaledTensor(source=tensor, factor=0.5))), tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("directory", "file", "dangling"):
        with pytest.raises(AlreadyExistsError):
            execute(plan_of(b"text"), tmp_path / name)
    assert (tmp_path / "file").read_text() == "precious"
    assert list((tmp_path / "directory").iterdir()) == []


# The process


def test_torch_is_not_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from llmtailor.assembly import execute; "
        "from llmtailor.file_plan import CheckpointPlan, FilePlan; "
        "execute(CheckpointPlan(files=(FilePlan(name='a', parts=(b'a',)),)), Path(sys.argv[1])); "
        "assert 'torch' not in sys.modules; assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "target")], check=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupt_leaves_nothing(tmp_path: Path, threads: int) -> None:
    plan = small_merge(tmp_path / "sources")

    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "target", threads=threads, chunk_nbytes=CHUNK, on_bytes=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_nothing_is_closed_under_a_threads_feet_however_often_it_is_interrupted(tmp_path: Path) -> None:
    main = threading.get_ident()

    class Slow(LocalFileSystem):
        def __init__(self) -> None:
            self.outcomes: list[bool] = []
            self._is_first = threading.Lock()

        def write_at(self, descriptor: int, buffer: memoryview, offset: int) -> None:
            for _ in range(2 * self._is_first.acquire(blocking=False)):
                signal.pthread_kill(main, signal.SIGINT)
                time.sleep(0.2)
            time.sleep(0.05)
            self.outcomes.append(str(tmp_path) in os.readlink(f"/proc/self/fd/{descriptor}"))
            super().write_at(descriptor, buffer, offset)

    filesystem = Slow()
    source = write_source(tmp_path / "sources" / "a", 20 * CHUNK)
    with pytest.raises(KeyboardInterrupt):
        execute(
            plan_of(file_range(source, 0, 20 * CHUNK)),
            tmp_path / "target",
            threads=2,
            chunk_nbytes=CHUNK,
            filesystem=filesystem,
        )
    assert filesystem.outcomes
    assert all(filesystem.outcomes)
    assert len(filesystem.outcomes) < 20
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_of_many_writers_to_one_target_one_wins(tmp_path: Path) -> None:
    plan = small_merge(tmp_path / "sources")
    target = tmp_path / "target"
    outcomes: list[BaseException | None] = []
    gate = threading.Barrier(6)

    def merge() -> None:
        gate.wait()
        try:
            execute(plan, target, threads=2, chunk_nbytes=CHUNK)
            outcomes.append(None)
        except BaseException as err:
            outcomes.append(err)

    for _ in range(5):
        outcomes.clear()
        workers = [threading.Thread(target=merge) for _ in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        losers = [outcome for outcome in outcomes if outcome is not None]
        assert len(losers) == 5
        assert all(isinstance(outcome, AlreadyExistsError) for outcome in losers), losers
        check_small_merge(plan, target)
        assert left_over(tmp_path) == []
        shutil.rmtree(target)


# Disks


def test_a_read_only_disk_is_said(tmp_path: Path, mounts: Mounts) -> None:
    plan = small_merge(tmp_path / "sources")
    place = tmp_path / "place"
    place.mkdir()
    mounts.cover_read_only(place)
    with pytest.raises(WriteError) as caught:
        execute(plan, place / "target")
    assert caught.value.kind == "read-only"


def test_a_disk_that_is_too_small_is_found_out_before_anything_is_written(tmp_path: Path, mounts: Mounts) -> None:
    plan = small_merge(tmp_path / "sources")
    place = mounts.mount("tmpfs", "size=256k")
    filesystem: Any = FaultyFileSystem()
    with pytest.raises(WriteError) as caught:
        execute(plan, place / "target", filesystem=filesystem)
    assert caught.value.kind == "no-space"
    assert "make_directory" not in filesystem.calls
    assert list(place.iterdir()) == []


class Blind(LocalFileSystem):
    """Does not see a full disk coming, as under a quota."""

    def free_space(self, path: Path) -> Any:
        return super().free_space(Path("/"))


@pytest.mark.filterwarnings("ignore::llmtailor.errors.LinkFallbackWarning")
def test_a_disk_that_runs_full_keeps_nothing(tmp_path: Path, mounts: Mounts) -> None:
    plan = small_merge(tmp_path / "sources")
    place = mounts.mount("tmpfs", "size=256k")
    with pytest.raises(WriteError) as caught:
        execute(plan, place / "target", filesystem=Blind())
    assert caught.value.kind == "no-space"
    assert list(place.iterdir()) == []
