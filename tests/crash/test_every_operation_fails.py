"""Every operation on the file system fails once, in every way, at every place of a run's life.

After SQLite's I/O error tests: the scenario is repeated with the fault at operation 1, 2, ... until none fires.
"""

from __future__ import annotations

import errno
import itertools
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from faults import (
    Fault,
    FaultyFileSystem,
    RunLog,
    SimulatedCrash,
    expected_path,
    memory_directory,
    new_tree,
    open_descriptors,
    play_life_of_a_run,
    save_fake,
    staged_names,
)
from llmtailor.checkpoint import Checkpoint, open_checkpoint
from llmtailor.errors import TailorWarning, WriteError
from llmtailor.resume import find_resumable
from llmtailor.storage import RunDirectory, direct_file, list_checkpoints
from llmtailor.verify import verify_checkpoint
from llmtailor.writer import engine

pytestmark = pytest.mark.usefixtures("nothing_is_left_of_other_tests")

KINDS = {errno.EIO: "io", errno.ENOSPC: "no-space", errno.EDQUOT: "no-space", errno.EACCES: "read-only"}
# Of these two, as of a removal that stopped half way, nothing is lost but space, until the next save.
MAY_LEAVE_RUBBISH = {"remove_tree", "remove_empty_directory"}


@pytest.fixture
def fast_directory() -> Iterator[Path]:
    with memory_directory() as directory:
        yield directory


@pytest.fixture(autouse=True)
def _no_warnings() -> None:
    warnings.simplefilter("ignore", TailorWarning)


@pytest.fixture(params=["page cache", "direct"])
def path_of_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Layer files are written through the page cache, or around it."""
    if request.param == "direct":
        monkeypatch.setattr(direct_file, "_MIN_DIRECT_NBYTES", 1)
    return request.param


@pytest.fixture(params=["one writer", "two writers"])
def writers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One thread writes layer files: operations come in the same order every time, so none is missed. Or two, as in
    life: the fault hits one while the other is at work."""
    if request.param == "one writer":
        monkeypatch.setattr(engine, "_NUM_WRITERS", 1)
    return request.param


def find_set_aside(run: Path, step: int, digest: str) -> Path | None:
    set_aside = run.glob(f"_checkpoint-{step}.superseded*")
    return next((path for path in set_aside if open_checkpoint(path).digest == digest), None)


def is_found(run: Path, step: int, digest: str, log: RunLog) -> bool:
    """True if an acknowledged checkpoint is where it belongs, or the save that was replacing it is."""
    path = expected_path(run, step)
    if path.is_dir() and open_checkpoint(path).digest == digest:
        return True
    if step in log.removing:
        return True
    newer = [
        entry for entry in list_checkpoints(run) if open_checkpoint(entry.path).digest not in log.acknowledged.values()
    ]
    return step in log.replacing and bool(newer) and find_set_aside(run, step, digest) is not None


def check_nothing_lost(run: Path, log: RunLog, *, is_undo_hopeless: bool) -> None:
    for entry in list_checkpoints(run):
        report = verify_checkpoint(entry.path)
        assert report.is_good, report.problems
    for step, digest in log.acknowledged.items():
        if is_undo_hopeless and step in log.replacing and not expected_path(run, step).exists():
            set_aside = find_set_aside(run, step, digest)
            assert set_aside is not None
            assert verify_checkpoint(set_aside).is_good
        else:
            assert is_found(run, step, digest, log), (step, sorted(path.name for path in run.iterdir()))


def find(run: RunDirectory) -> Checkpoint | None:
    return find_resumable(run)


def go_on(run: RunDirectory, log: RunLog) -> None:
    """Resume, and save on top of what was found."""
    found = find(run)
    must_be_there = set(log.acknowledged) - log.removing - log.replacing
    if must_be_there:
        assert found is not None
        assert found.manifest.step >= max(must_be_there)
    saved = save_fake(
        run, 100, parent=found, layers={"layers.1"} if found else ("embed_tokens", "layers.0", "layers.1", "norm")
    )
    assert verify_checkpoint(saved.path).is_good
    again = find(run)
    assert again is not None
    assert again.digest == saved.digest


def run_with(fault: Fault, directory: Path, *, refused: Mapping[str, int] | None = None) -> FaultyFileSystem:
    """Play the scenario with one fault, check what must hold after it."""
    before = open_descriptors()
    base = new_tree(directory)
    path = base / "runs" / "a"
    filesystem = FaultyFileSystem(fault, refused=refused)
    log = RunLog()
    stopped_by: BaseException | None = None
    try:
        play_life_of_a_run(path, filesystem, log)
    except (WriteError, SimulatedCrash) as err:
        stopped_by = err
    filesystem.heal()
    filesystem.bury()
    check_reason(stopped_by, fault, has_fired=filesystem.has_fired)
    if path.is_dir():
        check_after(path, filesystem, log, fault)
    elif log.run is not None:
        log.run.close()
    assert open_descriptors() == before
    return filesystem


def check_reason(stopped_by: BaseException | None, fault: Fault, *, has_fired: bool) -> None:
    if isinstance(stopped_by, WriteError):
        assert stopped_by.kind == KINDS[fault.errno]
        assert stopped_by.hint
    else:
        assert (stopped_by is not None) == (fault.errno is None and has_fired)


def check_after(path: Path, filesystem: FaultyFileSystem, log: RunLog, fault: Fault) -> None:
    failed = filesystem.calls[fault.at - 1] if filesystem.has_fired else ""
    is_tidy = fault.errno is not None and not fault.is_persistent and not (log.removing or failed in MAY_LEAVE_RUBBISH)
    if is_tidy and (path / "_staging").is_dir():
        assert staged_names(path) == set(), failed
    check_nothing_lost(path, log, is_undo_hopeless=fault.is_persistent or fault.errno is None)
    if log.run is not None and fault.errno is not None and log.run._lock.is_held:
        go_on(log.run, log)  # the same process saves on
        assert staged_names(path) == set()
    if log.run is not None:
        log.run.close()
    run = RunDirectory(path)
    assert staged_names(path) == set()
    if fault.errno is None:
        go_on(run, log)
    run.close()


def run_at_every_operation(
    directory: Path, *, refused: Mapping[str, int] | None = None, **how: object
) -> tuple[int, Counter[str]]:
    hit: Counter[str] = Counter()
    for number in itertools.count(1):
        filesystem = run_with(Fault(at=number, **how), directory, refused=refused)  # type: ignore[arg-type]
        if not filesystem.has_fired:
            return number - 1, hit
        hit[filesystem.calls[number - 1]] += 1
    raise AssertionError("unreachable")


EVERY_OPERATION = {
    "make_directory", "create", "open_for_reading", "allocate", "write", "write_at", "read", "fsync", "close",
    "make_read_only", "link", "rename", "fsync_directory", "remove_tree", "remove_empty_directory", "free_space",
}  # fmt: skip
OPERATIONS_ON_THE_PATH = {"page cache": {"start_writeback"}, "direct": {"set_direct", "truncate"}}


# Everything with everything would take a quarter of an hour.
ONE, TWO = ("direct", "one writer"), ("page cache", "two writers")
on_both = pytest.mark.parametrize(("path_of_bytes", "writers"), [ONE, TWO], indirect=True, ids=["one", "two"])


@pytest.mark.slow
@pytest.mark.parametrize("is_persistent", [False, True], ids=["once", "persistently"])
@pytest.mark.parametrize(
    ("path_of_bytes", "writers", "number"),
    [
        (*how, number)
        for number, hows in {
            errno.EIO: [ONE, TWO],
            errno.ENOSPC: [ONE, TWO],
            errno.EDQUOT: [ONE],
            errno.EACCES: [TWO],
        }.items()
        for how in hows
    ],
    indirect=["path_of_bytes", "writers"],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value,
)
def test_error_at_every_operation(
    fast_directory: Path, path_of_bytes: str, writers: str, number: int, is_persistent: bool
) -> None:
    num_faults, hit = run_at_every_operation(fast_directory, errno=number, is_persistent=is_persistent)
    assert num_faults > 300
    assert set(hit) == EVERY_OPERATION | OPERATIONS_ON_THE_PATH[path_of_bytes]


@pytest.mark.slow
@on_both
@pytest.mark.parametrize("moment", ["after", "half"])
def test_error_after_the_deed_at_every_operation(
    fast_directory: Path, path_of_bytes: str, writers: str, moment: str
) -> None:
    """As a network file system does: the server did it, and the answer was lost."""
    num_faults, _ = run_at_every_operation(fast_directory, errno=errno.EIO, moment=moment)
    assert num_faults > 300


@pytest.mark.parametrize(
    ("path_of_bytes", "writers"),
    [pytest.param(*ONE, id="one"), pytest.param(*TWO, id="two", marks=pytest.mark.slow)],
    indirect=True,
)
def test_crash_at_every_operation(fast_directory: Path, path_of_bytes: str, writers: str) -> None:
    num_faults, hit = run_at_every_operation(fast_directory, errno=None)
    assert num_faults > 300
    assert set(hit) == EVERY_OPERATION | OPERATIONS_ON_THE_PATH[path_of_bytes]


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EIO, None], ids=["error", "crash"])
def test_fault_at_every_operation_without_hard_links(fast_directory: Path, writers: str, number: int | None) -> None:
    num_faults, hit = run_at_every_operation(fast_directory, errno=number, refused={"link": errno.EPERM})
    assert num_faults > 400
    assert hit["create"] > 50  # the copies'


def test_crash_at_every_operation_of_recovery(fast_directory: Path) -> None:
    """A crash, then another while the next process sweeps, sets a bad checkpoint aside and saves on."""
    template = new_tree(fast_directory, "template")
    with_log = RunLog()
    play_life_of_a_run(template / "a", FaultyFileSystem(), with_log)
    run = RunDirectory(template / "a")
    first = save_fake(run, 50, parent=find(run), layers={"norm"})
    save_fake(run, 60, parent=first, layers={"layers.0"})
    run.close()
    (template / "a" / "checkpoint-60" / "model-norm.safetensors").unlink()
    (template / "a" / "_staging" / "70-dead" / "checkpoint-70").mkdir(parents=True)
    num_faults = 0
    for number in itertools.count(1):
        path = fast_directory / "copy"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(template / "a", path)
        filesystem = FaultyFileSystem(Fault(at=number, errno=None))
        recovering = None
        try:
            recovering = RunDirectory(path, filesystem)  # type: ignore[arg-type]
            save_fake(recovering, 70, parent=find(recovering), layers={"embed_tokens"})
        except SimulatedCrash:
            num_faults += 1
        filesystem.bury()
        if recovering is not None:
            recovering.close()
        again = RunDirectory(path)
        found = find(again)
        assert found is not None
        assert found.manifest.step in {50, 70}
        assert staged_names(path) == set()
        again.close()
        if not filesystem.has_fired:
            break
    assert num_faults > 30
