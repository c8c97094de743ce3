"""The power fails after every operation, and what was not fsynced is lost in every combination: nothing that was
acknowledged goes, and nothing is seen that is not whole. Each guard of the protocol, taken away, is missed."""

from __future__ import annotations

import copy
import errno
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crash_model import CrashState, RecordingFileSystem, build_image, crash_states
from faults import (
    LAYERS,
    RunLog,
    SimulatedCrash,
    expected_path,
    memory_directory,
    new_tree,
    play_life_of_a_run,
    save_fake,
)
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import IntegrityError, TailorWarning
from llmtailor.manifest import MANIFEST_NAME
from llmtailor.resume import find_resumable
from llmtailor.storage import (
    RunDirectory,
    StagedCheckpoint,
    StagedFile,
    direct_file,
    list_checkpoints,
    run_directory,
    staging,
)
from llmtailor.verify import verify_checkpoint
from llmtailor.writer import engine

RUN = Path("runs") / "a"


@pytest.fixture
def fast_directory() -> Iterator[Path]:
    with memory_directory() as directory:
        yield directory


@pytest.fixture(autouse=True)
def _quiet_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.simplefilter("ignore", TailorWarning)
    # The same journal every time.
    monkeypatch.setattr(staging, "_FSYNC_THREADS", 1)
    monkeypatch.setattr(engine, "_NUM_WRITERS", 1)


@pytest.fixture(params=["page cache", "direct"])
def path_of_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Layer files are written through the page cache, or around it."""
    if request.param == "direct":
        monkeypatch.setattr(direct_file, "_MIN_DIRECT_NBYTES", 1)
    return request.param


def record(root: Path, play: Callable[..., None] = play_life_of_a_run, **how: Any) -> RecordingFileSystem:
    """Play a scenario and return its journal; a mutant may break the scenario itself, what came before it counts."""
    filesystem = RecordingFileSystem(new_tree(root, "live"), **how)
    log = RunLog()

    def mark(_: str) -> None:
        filesystem.mark(copy.deepcopy((log.acknowledged, log.replacing, log.removing)))

    try:
        play(root / "live" / RUN, filesystem, log, mark)
    except (OSError, IntegrityError):
        assert filesystem.journal
    finally:
        filesystem.bury()
        if log.run is not None:
            log.run.close()
    return filesystem


def play_killed_removal(path: Path, filesystem: Any, log: RunLog, mark: Callable[[str], None]) -> None:
    """A process is killed while it removes a checkpoint; the next one sweeps, then the power fails."""
    log.run = RunDirectory(path, filesystem)
    first = save_fake(log.run, 10)
    second = save_fake(log.run, 20, parent=first, layers={"norm"})
    log.acknowledged = {10: first.digest, 20: second.digest}
    mark("both are acknowledged")
    log.removing = {10}
    mark("removing")
    with pytest.raises(SimulatedCrash):
        log.run.remove(first.path)
    log.run.close()
    log.run = RunDirectory(path, filesystem)
    third = save_fake(log.run, 30, parent=second, layers={"layers.0"})
    log.acknowledged[30] = third.digest
    mark("acknowledged")


def what_is_wrong(journal: list[Any], crash: CrashState, root: Path) -> str | None:
    """Build what the disk holds, recover, and say which promise is broken."""
    acknowledged, replacing, removing = crash.state or ({}, set(), set())
    build_image(journal, crash.image, root)
    path = root / RUN
    if not path.is_dir():
        return "the run is gone" if acknowledged else None
    runs = set()
    for entry in list_checkpoints(path):
        if not entry.has_manifest:
            return f"{entry.path.name} is visible without a manifest"
        report = verify_checkpoint(entry.path)
        if not report.is_good:
            return f"{entry.path.name} is visible and not whole: {report.problems[0].path} {report.problems[0].detail}"
        runs.add(open_checkpoint(entry.path).manifest.run_id)
    if len(runs) > 1:
        return "checkpoints of two runs are visible together"
    for step, digest in acknowledged.items():
        fault = find_acknowledged(path, step, digest, step in replacing)
        if step not in removing and fault is not None:
            return fault
    return go_on(path, max(set(acknowledged) - removing - replacing, default=None))


def find_acknowledged(path: Path, step: int, digest: str, is_being_replaced: bool) -> str | None:
    expected = expected_path(path, step)
    candidates = [expected, *(path.glob(f"_{expected.name}.superseded*") if is_being_replaced else ())]
    for each in candidates:
        if (
            (each / MANIFEST_NAME).is_file()
            and verify_checkpoint(each).is_good
            and open_checkpoint(each).digest == digest
        ):
            return None
    return f"checkpoint-{step} was acknowledged and is not there"


def go_on(path: Path, newest: int | None) -> str | None:
    run = RunDirectory(path)
    try:
        found = find_resumable(run)
        if newest is not None and (found is None or found.manifest.step < newest):
            return f"resume does not find checkpoint-{newest} or newer"
        saved = save_fake(run, 1000, parent=found, layers={"layers.1"} if found else LAYERS)
        return None if verify_checkpoint(saved.path).is_good else "the next save is not whole"
    finally:
        run.close()


def violations(filesystem: RecordingFileSystem, root: Path, counts: Counter[str] | None = None) -> Iterator[str]:
    """What is wrong with the states a disk may be in; states that look the same are checked once."""
    seen: set[Hashable] = set()
    counts = Counter() if counts is None else counts
    for crash in crash_states(filesystem.journal):
        counts["states"] += 1
        looks = (repr(crash.state), frozenset(crash.image.items()))
        if looks in seen:
            continue
        seen.add(looks)
        counts["distinct"] += 1
        fault = what_is_wrong(filesystem.journal, crash, root / "image")
        if fault is not None:
            yield f"after operation {crash.after}: {fault}"


SCENARIOS: dict[str, dict[str, Any]] = {
    "life": {},
    "no hard links": {"refused": {"link": errno.EPERM}},
    "killed removal": {"play": play_killed_removal, "dies_removing": True},
}


@pytest.mark.parametrize(
    ("path_of_bytes", "scenario", "least"),
    [
        ("page cache", "life", 30_000),
        ("page cache", "no hard links", 40_000),
        ("page cache", "killed removal", 10_000),
        ("direct", "life", 30_000),
        pytest.param("direct", "no hard links", 40_000, marks=pytest.mark.slow),
        ("direct", "killed removal", 10_000),
    ],
    indirect=["path_of_bytes"],
)
def test_nothing_acknowledged_is_lost(fast_directory: Path, path_of_bytes: str, scenario: str, least: int) -> None:
    filesystem = record(fast_directory, **SCENARIOS[scenario])
    assert bool(filesystem.direct) == (path_of_bytes == "direct")
    counts: Counter[str] = Counter()
    assert list(violations(filesystem, fast_directory, counts)) == []
    assert counts["states"] > least
    assert counts["distinct"] > 10


@pytest.mark.parametrize("path_of_bytes", [pytest.param("page cache", marks=pytest.mark.slow), "direct"], indirect=True)
def test_nothing_acknowledged_is_lost_in_whatever_order_threads_write(
    fast_directory: Path, path_of_bytes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writers and eight that fsync, as in life; every time in another order."""
    monkeypatch.undo()
    if path_of_bytes == "direct":
        monkeypatch.setattr(direct_file, "_MIN_DIRECT_NBYTES", 1)
    filesystem = record(fast_directory)
    counts: Counter[str] = Counter()
    assert list(violations(filesystem, fast_directory, counts)) == []
    assert counts["states"] > 30_000


def lie_about(name: str, is_meant: Callable[[Path, Path], bool]) -> dict[str, Any]:
    """A file system on which some calls of fsync do nothing."""
    return {"is_lie": lambda called, path, moved: called == name and is_meant(path, moved)}


def is_run(path: Path) -> bool:
    return path.name == RUN.name


DROPPED = {
    "weights": lie_about("fsync", lambda path, _: path.name.startswith("model-")),
    "optimizer": lie_about("fsync", lambda path, _: path.parent.name == "optimizer"),
    "small files": lie_about("fsync", lambda path, _: path.name == "scheduler.pt"),
    "small files below": lie_about("fsync", lambda path, _: path.name == "vocab.txt"),
    "manifest": lie_about("fsync", lambda path, _: path.name == MANIFEST_NAME),
    "copies": lie_about("fsync", lambda path, _: path.name == "model-norm.safetensors")
    | {"refused": {"link": errno.EPERM}},
    "subdirectory": lie_about("fsync_directory", lambda path, _: path.name == "optimizer"),
    "subdirectory of the trainer": lie_about("fsync_directory", lambda path, _: path.name == "tokenizer"),
    "checkpoint": lie_about("fsync_directory", lambda path, _: path.name.startswith("checkpoint-")),
    "run after publish": lie_about(
        "fsync_directory", lambda path, moved: is_run(path) and moved.name.removeprefix("checkpoint-").isdecimal()
    ),
    "run after set aside": lie_about(
        "fsync_directory", lambda path, moved: is_run(path) and moved.name.endswith(".superseded")
    ),
    "run after removal": lie_about("fsync_directory", lambda path, moved: is_run(path) and "remove-" in moved.name),
    "directory above a new run": lie_about("fsync_directory", lambda path, _: path.name == "runs"),
    "two directories above a new run": lie_about("fsync_directory", lambda path, _: path.name == "live"),
    "run before the sweep": lie_about("fsync_directory", lambda path, moved: is_run(path) and "remove-" in moved.name)
    | SCENARIOS["killed removal"],
}


@pytest.mark.parametrize("dropped", DROPPED)
def test_every_fsync_is_needed(fast_directory: Path, path_of_bytes: str, dropped: str) -> None:
    filesystem = record(fast_directory, **DROPPED[dropped])
    assert next(violations(filesystem, fast_directory), None) is not None


@pytest.mark.parametrize("path_of_bytes", ["direct"], indirect=True)
def test_bytes_that_went_around_the_page_cache_are_not_durable(fast_directory: Path, path_of_bytes: str) -> None:
    filesystem = record(fast_directory, trusts_direct=True)
    assert filesystem.direct
    assert next(violations(filesystem, fast_directory), None) is not None


def rename_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish, then make durable."""
    seal, publish = StagedCheckpoint.seal, StagedCheckpoint.publish
    manifests: list[bytes] = []
    monkeypatch.setattr(StagedCheckpoint, "seal", lambda self, manifest: manifests.append(manifest))

    def rename_and_seal(self: StagedCheckpoint) -> Path:
        target = publish(self)
        self._directories = {target / each.relative_to(self.path) for each in self._directories}
        self.path = target
        seal(self, manifests.pop())
        return target

    monkeypatch.setattr(StagedCheckpoint, "publish", rename_and_seal)


def fsync_files_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is durable and published; the files it names become so a little later."""
    seal, publish = StagedCheckpoint.seal, StagedCheckpoint.publish
    late: list[int] = []

    def seal_manifest(self: StagedCheckpoint, manifest: bytes) -> None:
        late.extend(self._open_files)
        self._open_files = []
        seal(self, manifest)

    def publish_and_sync(self: StagedCheckpoint) -> Path:
        target = publish(self)
        self._open_files = late[:]
        late.clear()
        self._fsync_files()
        return target

    monkeypatch.setattr(StagedCheckpoint, "seal", seal_manifest)
    monkeypatch.setattr(StagedCheckpoint, "publish", publish_and_sync)


def write_manifest_last_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish a directory and put the manifest into it afterwards."""
    publish = StagedCheckpoint.publish
    manifests: list[bytes] = []

    def seal_without(self: StagedCheckpoint, manifest: bytes) -> None:
        manifests.append(manifest)
        self._fsync_files()

    def publish_and_write(self: StagedCheckpoint) -> Path:
        self.path = publish(self)
        descriptor = self._filesystem.create(self.path / MANIFEST_NAME)
        self._open_files.append(descriptor)
        self._filesystem.write(descriptor, memoryview(manifests.pop()))
        self._fsync_files()
        self._filesystem.fsync_directory(self.path)
        return self.path

    monkeypatch.setattr(StagedCheckpoint, "seal", seal_without)
    monkeypatch.setattr(StagedCheckpoint, "publish", publish_and_write)


def remove_before_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make room first: retention before the new checkpoint is there."""
    publish = RunDirectory.publish

    def remove_and_publish(self: RunDirectory, staged: StagedCheckpoint, step: int, *, is_first: bool) -> Path:
        for entry in list_checkpoints(self.path):
            self.remove(entry.path)
        return publish(self, staged, step, is_first=is_first)

    monkeypatch.setattr(RunDirectory, "publish", remove_and_publish)


def remove_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """``rm -rf`` instead of a rename first."""
    monkeypatch.setattr(RunDirectory, "remove", lambda self, path: self._filesystem.remove_tree(path))


def supersede_by_removing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the way is deleted, not set aside."""

    def remove(self: RunDirectory, targets: Any) -> None:
        for path in targets:
            self.remove(path)

    monkeypatch.setattr(RunDirectory, "_move", remove)


def supersede_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run before stays visible beside the new one."""
    choose = RunDirectory._choose_superseded
    monkeypatch.setattr(
        RunDirectory, "_choose_superseded", lambda self, step, *, is_first: choose(self, step, is_first=False)
    )


def write_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write straight into the run, under the final name."""
    init = StagedCheckpoint.__init__

    def init_in_place(self: StagedCheckpoint, filesystem: Any, attempt: Path, target: Path, *rest: Any) -> None:
        init(self, filesystem, attempt, target, *rest)
        filesystem.remove_tree(attempt)
        filesystem.make_directory(target)
        self.path = target

    monkeypatch.setattr(StagedCheckpoint, "__init__", init_in_place)
    monkeypatch.setattr(StagedCheckpoint, "publish", lambda self: self.path)
    monkeypatch.setattr(RunDirectory, "_choose_superseded", lambda self, step, *, is_first: {})


def leave_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written around the page cache ends at a page."""
    monkeypatch.setattr(direct_file.DirectFile, "finish", lambda self: None)


def fsync_before_cutting_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are durable, the file's length is not."""
    finish = direct_file.DirectFile.finish
    files: dict[int, direct_file.DirectFile] = {}
    monkeypatch.setattr(direct_file.DirectFile, "finish", lambda self: files.update({self.descriptor: self}))

    def fsync_and_cut_off(self: StagedCheckpoint, descriptor: int) -> None:
        self._filesystem.fsync(descriptor)
        self._open_files.remove(descriptor)
        if descriptor in files:
            finish(files.pop(descriptor))
        self._filesystem.close(descriptor)

    monkeypatch.setattr(StagedCheckpoint, "_fsync_and_close", fsync_and_cut_off)


MUTANTS = [
    rename_first,
    fsync_files_last,
    write_manifest_last_of_all,
    remove_before_publish,
    remove_in_place,
    supersede_by_removing,
    supersede_nothing,
    write_in_place,
]


@pytest.mark.parametrize("mutate", MUTANTS, ids=[each.__name__ for each in MUTANTS])
def test_every_order_is_needed(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mutate(monkeypatch)
    filesystem = record(fast_directory)
    monkeypatch.undo()  # recovery is the real one
    assert next(violations(filesystem, fast_directory), None) is not None


@pytest.mark.parametrize("path_of_bytes", ["direct"], indirect=True)
@pytest.mark.parametrize("mutate", [leave_the_padding, fsync_before_cutting_off])
def test_every_order_is_needed_around_the_page_cache(
    fast_directory: Path,
    path_of_bytes: str,
    monkeypatch: pytest.MonkeyPatch,
    mutate: Callable[[pytest.MonkeyPatch], None],
) -> None:
    mutate(monkeypatch)
    filesystem = record(fast_directory)
    monkeypatch.undo()
    assert next(violations(filesystem, fast_directory), None) is not None


def test_links_may_not_be_moves(fast_directory: Path) -> None:
    filesystem = record(fast_directory, is_thief=True)
    assert next(violations(filesystem, fast_directory), None) is not None


def test_model_knows_its_own_limits() -> None:
    """If these go, the mutants above test something else than they say."""
    assert run_directory.StagedCheckpoint is StagedCheckpoint
    assert {"_move", "_choose_superseded", "remove", "publish"} <= set(vars(RunDirectory))
    assert {"seal", "publish", "_fsync_files", "_fsync_and_close"} <= set(vars(StagedCheckpoint))
    assert {"write", "finish"} <= set(vars(StagedFile)) & set(vars(direct_file.DirectFile))
    assert engine._NUM_WRITERS == 1
