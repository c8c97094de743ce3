"""Every operation on the file system fails once, in every way, at every place of a merge."""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from assembly.merge_plans import check_small_merge, digests, left_over, small_merge
from faults import Fault, FaultyFileSystem, SimulatedCrash, memory_directory, open_descriptors
from llmtailor.assembly import execute
from llmtailor.errors import WriteError

KINDS = {errno.EIO: "io", errno.ENOSPC: "no-space", errno.EACCES: "read-only"}
# Of these nothing is lost but space, until the next merge to the same place.
MAY_LEAVE_RUBBISH = {"remove_tree", "remove_empty_directory"}
# Only a hint to the kernel; nobody has to know.
MAY_GO_UNNOTICED = MAY_LEAVE_RUBBISH | {"start_writeback"}
CHUNK = 65536


@pytest.fixture
def place() -> Iterator[Path]:
    with memory_directory() as directory:
        yield directory


class Faulty(FaultyFileSystem):
    """Also loses the second half of what is written at an offset."""

    def _perform_in_part(self, moment: str, name: str, *args: Any) -> None:
        if moment == "half" and name == "write_at":
            self._local.write_at(args[0], args[1][: args[1].nbytes // 2], args[2])
        super()._perform_in_part(moment, name, *args)


def merge(place: Path, filesystem: Any, threads: int) -> WriteError | None:
    try:
        execute(
            small_merge(place / "sources"),
            place / "new" / "deep" / "target",
            threads=threads,
            chunk_nbytes=CHUNK,
            filesystem=filesystem,
        )
    except WriteError as err:
        return err
    return None


@pytest.mark.parametrize("number", list(KINDS))
@pytest.mark.parametrize("moment", ["before", "after", "half"])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_operation_may_fail(place: Path, number: int, moment: Any, threads: int) -> None:
    plan = small_merge(place / "sources")
    before = digests(place / "sources")
    failed: Counter[str] = Counter()
    descriptors = open_descriptors()
    for at in itertools.count(1):
        filesystem = Faulty(Fault(at=at, errno=number, moment=moment))
        target = place / "new" / "deep" / "target"
        err = merge(place, filesystem, threads)
        if err is not None:
            # Whatever cleaned up after the fault counts, too; what failed is the operation with its number.
            name = filesystem.calls[at - 1]
            failed[name] += 1
            assert err.kind == KINDS[number]
            assert err.path is not None
            assert [path.name for path in place.iterdir()] == ["sources"], name
        else:
            check_small_merge(plan, target)
            if not filesystem.has_fired:
                break
            assert filesystem.calls[at - 1] in MAY_GO_UNNOTICED
            rubbish = left_over(target.parent)
            assert not rubbish or filesystem.calls[at - 1] in MAY_LEAVE_RUBBISH
            FaultyFileSystem().remove_tree(place / "new")
        assert digests(place / "sources") == before
        assert open_descriptors() == descriptors
    assert {"make_directory", "create", "allocate", "write_at", "link", "fsync", "close", "rename"} <= set(failed)
    assert failed["fsync_directory"] >= 4
    assert failed.keys() & MAY_GO_UNNOTICED == set()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_world_may_stop_at_any_operation(place: Path, threads: int) -> None:
    plan = small_merge(place / "sources")
    before = digests(place / "sources")
    target = place / "new" / "deep" / "target"
    seen: Counter[str] = Counter()
    for at in itertools.count(1):
        filesystem: Any = Faulty(Fault(at=at, errno=None))
        try:
            merge(place, filesystem, threads)
        except SimulatedCrash:
            filesystem.bury()
        if target.exists():
            seen["published"] += 1
            check_small_merge(plan, target)
            FaultyFileSystem().remove_tree(target)
        elif target.parent.exists():
            seen["rubbish"] += len(left_over(target.parent))
        assert merge(place, FaultyFileSystem(), threads) is None
        check_small_merge(plan, target)
        assert [path.name for path in target.parent.iterdir()] == ["target"]
        assert digests(place / "sources") == before
        FaultyFileSystem().remove_tree(place / "new")
        if not filesystem.has_fired:
            break
    assert seen["published"] >= 2
    assert seen["rubbish"] >= 10
