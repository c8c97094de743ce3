"""A checkpoint loses its optimizer state, and the power fails, or the process is killed, at any instant: a whole
checkpoint of the step is there, as it was or thinned, and the run goes on."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crash_model import CrashState, RecordingFileSystem, build_image, crash_states
from faults import memory_directory, new_tree, save_fake, staged_names
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import TailorWarning
from llmtailor.manifest import MANIFEST_NAME
from llmtailor.pruning import apply_retention
from llmtailor.resume import find_resumable
from llmtailor.retention import Keep
from llmtailor.storage import RunDirectory, list_checkpoints, staging, thinning
from llmtailor.verify import verify_checkpoint
from llmtailor.writer import engine

RUN = Path("runs") / "a"
KEEP = Keep(every=10, optimizer=1, consistent=False)
STEPS = (10, 20, 30)
WAYS: dict[str, dict[str, int]] = {"exchange": {}, "two renames": {"exchange": errno.EINVAL}}
in_both_ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def fast_directory() -> Iterator[Path]:
    with memory_directory() as directory:
        yield directory


@pytest.fixture(autouse=True)
def _quiet_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.simplefilter("ignore", TailorWarning)
    monkeypatch.setattr(staging, "_FSYNC_THREADS", 1)
    monkeypatch.setattr(engine, "_NUM_WRITERS", 1)


def save_all(run: RunDirectory) -> dict[int, str]:
    """Three checkpoints, of which the later ones share layers with those before; returns their digests."""
    first = save_fake(run, 10)
    second = save_fake(run, 20, parent=first, layers={"norm"})
    third = save_fake(run, 30, parent=second, layers={"layers.0", "norm"})
    return {checkpoint.manifest.step: checkpoint.digest for checkpoint in (first, second, third)}


def record(root: Path, **how: Any) -> RecordingFileSystem:
    """Save, thin the first two, save on: the journal of it."""
    filesystem: Any = RecordingFileSystem(new_tree(root, "live"), **how)
    run = RunDirectory(root / "live" / RUN, filesystem)
    digests = save_all(run)
    filesystem.mark((copy.copy(digests), frozenset(digests)))
    assert apply_retention(run, keep=KEEP) is None
    thinned = {step: open_checkpoint(run.path / f"checkpoint-{step}").digest for step in (10, 20)}
    assert set(thinned.values()).isdisjoint(digests.values())
    filesystem.mark((digests | thinned, frozenset()))
    save_fake(run, 40, parent=open_checkpoint(run.path / "checkpoint-30"), layers={"embed_tokens"})
    run.close()
    filesystem.bury()
    return filesystem


def what_is_wrong(journal: list[Any], crash: CrashState, root: Path) -> str | None:
    """Build what the disk holds, let the next writer put it right, and say which promise is broken."""
    if crash.state is None:
        return None
    digests, free = crash.state
    build_image(journal, crash.image, root)
    run = RunDirectory(root / RUN)
    try:
        found = {entry.step: entry.path for entry in list_checkpoints(run.path)}
        for step, digest in digests.items():
            if step not in found:
                return f"checkpoint-{step} is not there"
            report = verify_checkpoint(found[step])
            if not report.is_good:
                return f"checkpoint-{step} is not whole: {report.problems[0]}"
            if step not in free and open_checkpoint(found[step]).digest != digest:
                return f"checkpoint-{step} is not the one that was acknowledged"
        if left := sorted(path.name for path in run.path.glob("_checkpoint*")):
            return f"{left} were left"
        resumable = find_resumable(run)
        if resumable is None or resumable.manifest.step < 30:
            return "resume does not find the newest"
        saved = save_fake(run, 1000, parent=resumable, layers={"layers.1"})
        return None if verify_checkpoint(saved.path).is_good else "the next save is not whole"
    finally:
        run.close()


def violations(filesystem: RecordingFileSystem, root: Path, counts: Counter[str] | None = None) -> Iterator[str]:
    seen: set[Any] = set()
    counts = Counter() if counts is None else counts
    for crash in crash_states(filesystem.journal):
        if crash.state is None:
            continue
        counts["states"] += 1
        looks = (repr(crash.state), frozenset(crash.image.items()))
        if looks in seen:
            continue
        seen.add(looks)
        counts["distinct"] += 1
        fault = what_is_wrong(filesystem.journal, crash, root / "image")
        if fault is not None:
            yield f"after operation {crash.after}: {fault}"


@in_both_ways
def test_power_failure_at_any_instant_leaves_a_whole_checkpoint_of_each_step(fast_directory: Path, way: str) -> None:
    counts: Counter[str] = Counter()
    assert list(violations(record(fast_directory, refused=WAYS[way]), fast_directory, counts)) == []
    assert counts["states"] > 1_000
    assert counts["distinct"] >= (5 if way == "exchange" else 9)


def drop(name: str, is_meant: Callable[[Path, Path], bool]) -> dict[str, Any]:
    return {"is_lie": lambda called, path, moved: called == name and is_meant(path, moved)}


def is_run(path: Path) -> bool:
    return path.name == RUN.name


NEEDED = {
    "manifest": ("exchange", drop("fsync", lambda path, _: path.name == MANIFEST_NAME and "thin-" in str(path))),
    "links": ("exchange", drop("fsync_directory", lambda path, _: "thin-" in str(path))),
    "run after the exchange": ("exchange", drop("fsync_directory", lambda path, _: is_run(path))),
    "run between the renames": (
        "two renames",
        drop("fsync_directory", lambda path, moved: is_run(path) and moved.parent.name == RUN.name),
    ),
}


@pytest.mark.parametrize("dropped", NEEDED)
def test_every_fsync_is_needed(fast_directory: Path, dropped: str) -> None:
    way, how = NEEDED[dropped]
    filesystem = record(fast_directory, refused=WAYS[way], **how)
    assert next(violations(filesystem, fast_directory), None) is not None


def remove_first(filesystem: Any, new: Path, checkpoint: Path) -> None:
    filesystem.remove_tree(checkpoint)
    filesystem.rename(new, checkpoint)


def keep_the_old_in_staging(filesystem: Any, new: Path, checkpoint: Path) -> None:
    """Where the next writer sweeps it."""
    filesystem.rename(checkpoint, new.with_name("old"))
    filesystem.rename(new, checkpoint)


@pytest.mark.parametrize("swap", [remove_first, keep_the_old_in_staging])
def test_every_order_is_needed(fast_directory: Path, monkeypatch: pytest.MonkeyPatch, swap: Any) -> None:
    monkeypatch.setattr(thinning, "_swap", swap)
    filesystem = record(fast_directory)
    monkeypatch.undo()  # recovery is the real one
    assert next(violations(filesystem, fast_directory), None) is not None


# A kill


@pytest.fixture
def killer() -> Iterator[Callable[[Path, str, int], bool]]:
    """Has a process thin a run and be killed at an operation; tells if it came that far."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("killable_pruner.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def kill(run: Path, way: str, number: int) -> bool:
        stdin.write(f"{run} {WAYS[way].get('exchange', 0)} {number}\n")
        stdin.flush()
        said = stdout.readline().strip()
        assert said in {f"signal {signal.SIGKILL}", "exit 0"}, said
        return said != "exit 0"

    yield kill
    process.communicate()


@in_both_ways
def test_sigkill_at_every_operation_leaves_a_whole_checkpoint_of_each_step(
    fast_directory: Path, killer: Callable[[Path, str, int], bool], way: str
) -> None:
    template = new_tree(fast_directory, "template") / "a"
    run = RunDirectory(template)
    save_all(run)
    run.close()
    contents: set[tuple[str, ...]] = set()
    is_hidden = False
    for number in range(1, 200):
        path = new_tree(fast_directory, "tree") / "a"
        subprocess.run(["cp", "-a", template, path], check=True)
        was_killed = killer(path, way, number)
        is_hidden = is_hidden or len(list_checkpoints(path)) < len(STEPS)
        run = RunDirectory(path)
        found = [open_checkpoint(entry.path) for entry in list_checkpoints(path)]
        assert tuple(each.manifest.step for each in found) == STEPS, number
        assert all(verify_checkpoint(each.path).is_good for each in found)
        contents.add(tuple(each.manifest.contents for each in found))
        assert staged_names(path) == set()
        assert sorted(name for name in os.listdir(path) if name.startswith("_")) == ["_staging"]
        assert apply_retention(run, keep=KEEP) is None, "the next one does what is left"
        assert [open_checkpoint(entry.path).manifest.contents for entry in list_checkpoints(path)] == [
            *("weights", "weights", "full"),
        ]
        run.close()
        if not was_killed:
            break
    assert number > 30
    assert contents == {("full", "full", "full"), ("weights", "full", "full"), ("weights", "weights", "full")}
    assert is_hidden == (way == "two renames")
    shutil.rmtree(template)
