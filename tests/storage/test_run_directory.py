from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import LAYERS, Fault, FaultyFileSystem, save_fake, staged_names
from llmtailor.errors import LockedError, NotFoundError, SupersededWarning, WriteError
from llmtailor.storage import LocalFileSystem, RunDirectory, list_checkpoints, newest_step_seen
from llmtailor.storage import run_directory as run_directory_module
from llmtailor.verify import verify_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    run = RunDirectory(tmp_path / "run")
    yield run
    run.close()


def names(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.path.iterdir() if path.name != "_staging")


# Names of checkpoints


def test_list_checkpoints_in_order_of_steps(tmp_path: Path) -> None:
    for name in ["checkpoint-100", "checkpoint-9", "checkpoint-0", "checkpoint-20"]:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9" / "tailor.json").write_text("{}")
    assert [(entry.step, entry.has_manifest) for entry in list_checkpoints(tmp_path)] == [
        (0, False), (9, True), (20, False), (100, False),
    ]  # fmt: skip


OTHER_NAMES = ["checkpoint", "checkpoint-", "checkpoint-05", "checkpoint-1a", "checkpoint--1", "_checkpoint-1.bad"]
OTHER_NAMES += [
    "_checkpoint-1.superseded",
    "xcheckpoint-1",
    "checkpoint-\u0661",
    "checkpoint-1 ",
    "checkpoint-1\n",
    "tmp",
]


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_list_checkpoints_leaves_other_names_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == []


def test_list_checkpoints_wants_directories(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").write_text("a file")
    (tmp_path / "checkpoint-2").symlink_to("nowhere")
    (tmp_path / "checkpoint-3").symlink_to("checkpoint-3")
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("a file")])
def test_list_checkpoints_of_no_run(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "run")
    with pytest.raises(NotFoundError) as caught:
        list_checkpoints(tmp_path / "run")
    assert caught.value.kind == "missing-run"


def test_list_checkpoints_does_not_take_a_failing_device_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    monkeypatch.setattr(os, "stat", refuse_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        list_checkpoints(tmp_path)


def refuse_with(number: int) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize(
    ("made", "newest"),
    [
        ([], None),
        (["checkpoint-5"], 5),
        (["checkpoint-5", "_checkpoint-10.bad"], 10),
        (["checkpoint-5", "_checkpoint-10.bad-3"], 10),
        (["checkpoint-5", "_checkpoint-10.superseded"], 5),
        (["_checkpoint-10.superseded-2", "tmp"], None),
    ],
)
def test_newest_step_seen(tmp_path: Path, made: list[str], newest: int | None) -> None:
    for name in made:
        (tmp_path / name).mkdir()
    assert newest_step_seen(tmp_path) == newest


# Opening and closing


def test_open_makes_all_directories(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / "_staging" / "lock").is_file()
    run.close()


def test_open_syncs_the_directory_above_a_run_that_is_there(tmp_path: Path) -> None:
    """Whoever made the run may have been killed before that."""
    (tmp_path / "run").mkdir()
    filesystem = FaultyFileSystem()
    RunDirectory(tmp_path / "run", filesystem).close()  # type: ignore[arg-type]
    assert filesystem.calls == ["fsync_directory", "make_directory", "fsync_directory"]


def test_open_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(WriteError):
        RunDirectory(tmp_path / "run")


def test_open_twice_is_refused_and_sweeps_nothing(run: RunDirectory) -> None:
    staged = run.stage(10, 0, 0)
    with pytest.raises(LockedError):
        RunDirectory(run.path)
    assert staged.path.is_dir()
    run.close()
    RunDirectory(run.path).close()
    assert not staged.path.exists()


def test_open_that_fails_lets_go_of_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse_with(errno.EIO))
        with pytest.raises(WriteError):
            RunDirectory(tmp_path / "run")
    RunDirectory(tmp_path / "run").close()


def test_open_sweeps_what_dead_writers_left(tmp_path: Path) -> None:
    staging = tmp_path / "run" / "_staging"
    (staging / "10-abc" / "checkpoint-10" / "optimizer").mkdir(parents=True)
    (staging / "10-abc" / "checkpoint-10" / "a").write_text("a")
    (staging / "remove-checkpoint-5-abc").mkdir()
    run = RunDirectory(tmp_path / "run")
    assert staged_names(run.path) == set()
    run.close()


def test_sweep_follows_no_symlink(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("x")
    (tmp_path / "run" / "_staging").mkdir(parents=True)
    (tmp_path / "run" / "_staging" / "10-abc").symlink_to(tmp_path / "victim")
    (tmp_path / "run" / "_staging" / "11-abc").mkdir()
    (tmp_path / "run" / "_staging" / "11-abc" / "inner").symlink_to(tmp_path / "victim")
    RunDirectory(tmp_path / "run").close()
    assert (tmp_path / "victim" / "precious").is_file()


def test_sweep_removes_nothing_when_the_run_cannot_be_made_durable(tmp_path: Path) -> None:
    """The name of a checkpoint half removed might come back after a power failure; then its files must be there."""
    (tmp_path / "run" / "_staging" / "remove-checkpoint-5-abc").mkdir(parents=True)
    filesystem = FaultyFileSystem(refused={"fsync_directory": errno.EIO})
    run = RunDirectory(tmp_path / "run", filesystem)  # type: ignore[arg-type]
    assert "remove_tree" not in filesystem.calls
    run.close()


def test_next_attempt_sweeps_what_the_one_before_could_not_remove(tmp_path: Path) -> None:
    """A disk that fails for a minute must not keep a hundred gigabytes until the process ends."""
    filesystem = FaultyFileSystem()
    run = RunDirectory(tmp_path / "run", filesystem)  # type: ignore[arg-type]
    filesystem.fault = Fault(at=len(filesystem.calls) + 8, errno=errno.EIO, is_persistent=True)
    with pytest.raises(WriteError):
        save_fake(run, 10)
    assert len(staged_names(run.path)) == 1
    filesystem.heal()
    save_fake(run, 20)
    assert staged_names(run.path) == set()
    run.close()


@pytest.mark.parametrize("use", ["stage", "quarantine", "remove"])
def test_closed_run_changes_nothing(run: RunDirectory, use: str) -> None:
    saved = save_fake(run, 10)
    run.close()
    run.close()
    calls = {
        "stage": lambda: run.stage(20, 0, 0),
        "quarantine": lambda: run.quarantine(saved.path, "why"),
        "remove": lambda: run.remove(saved.path),
    }
    with pytest.raises(WriteError) as caught:
        calls[use]()
    assert caught.value.kind == "closed"
    assert names(run) == ["checkpoint-10"]


def test_stage_that_fits_in_no_disk(run: RunDirectory) -> None:
    with pytest.raises(WriteError) as caught:
        run.stage(10, 2**60, 10)
    assert caught.value.kind == "no-space"
    assert "bytes free" in str(caught.value.found)
    assert staged_names(run.path) == set()


def test_stage_that_needs_too_many_inodes(run: RunDirectory) -> None:
    if LocalFileSystem().free_space(run.path).inodes is None:
        pytest.skip("the file system does not count inodes")
    with pytest.raises(WriteError) as caught:
        run.stage(10, 0, 2**50)
    assert "inodes free" in str(caught.value.found)


# Superseding


def test_first_save_sets_the_run_before_aside(run: RunDirectory) -> None:
    first = save_fake(run, 10)
    save_fake(run, 30, parent=first)
    (run.path / "checkpoint-20").mkdir()  # another tool's, of an earlier step: left alone
    with pytest.warns(SupersededWarning) as warned:
        save_fake(run, 25)
    assert names(run) == ["_checkpoint-10.superseded", "_checkpoint-30.superseded", "checkpoint-20", "checkpoint-25"]
    assert len(warned) == 2
    assert verify_checkpoint(run.path / "_checkpoint-30.superseded").is_good


def test_a_run_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever trains may go to another directory, while a save is in flight too."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(Path("run"))
    first = save_fake(run, 10)
    monkeypatch.chdir(tmp_path / "elsewhere")
    save_fake(run, 20, parent=first, layers={"norm"})
    run.close()
    assert [entry.step for entry in list_checkpoints(tmp_path / "run")] == [10, 20]
    assert os.listdir(tmp_path / "elsewhere") == []


def test_save_behind_sets_the_abandoned_branch_aside(run: RunDirectory) -> None:
    first = save_fake(run, 10)
    second = save_fake(run, 20, parent=first, layers={"norm"})
    save_fake(run, 30, parent=second, layers={"norm"})
    with pytest.warns(SupersededWarning):
        save_fake(run, 20, parent=first, layers={"layers.0"})
    assert names(run) == ["_checkpoint-20.superseded", "_checkpoint-30.superseded", "checkpoint-10", "checkpoint-20"]


def test_same_step_again_is_linked_from_the_one_it_replaces(run: RunDirectory) -> None:
    first = save_fake(run, 10)
    with pytest.warns(SupersededWarning):
        again = save_fake(run, 10, parent=first, layers={"norm"})
    assert verify_checkpoint(again.path).is_good
    assert names(run) == ["_checkpoint-10.superseded", "checkpoint-10"]


def test_save_ahead_supersedes_nothing(run: RunDirectory) -> None:
    first = save_fake(run, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_fake(run, 20, parent=first, layers={"norm"})
    assert names(run) == ["checkpoint-10", "checkpoint-20"]


def test_save_ahead_looks_at_no_earlier_checkpoint(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that keeps thousands would pay for each of them at every save."""
    first = save_fake(run, 10)
    looked: list[Path] = []
    look = run_directory_module._is
    monkeypatch.setattr(run_directory_module, "_is", lambda kind, path: looked.append(path) or look(kind, path))
    save_fake(run, 20, parent=first, layers={"norm"})
    assert looked == []
    assert [entry.step for entry in list_checkpoints(run.path, first_step=11)] == [20]


def test_directory_of_another_tool_under_the_same_name_is_set_aside(run: RunDirectory) -> None:
    (run.path / "checkpoint-10").mkdir()
    (run.path / "checkpoint-10" / "pytorch_model.bin").write_text("theirs")
    with pytest.warns(SupersededWarning):
        save_fake(run, 10)
    assert (run.path / "_checkpoint-10.superseded" / "pytorch_model.bin").read_text() == "theirs"


def test_names_of_what_is_set_aside_are_counted_up(run: RunDirectory) -> None:
    for number in range(4):
        with pytest.warns(SupersededWarning) if number else warnings.catch_warnings():
            save_fake(run, 10)
    assert names(run) == [*(f"_checkpoint-10.superseded{suffix}" for suffix in ("", "-2", "-3")), "checkpoint-10"]


@pytest.mark.parametrize("operation", ["free_space", "create", "link", "write", "fsync", "fsync_directory", "rename"])
def test_save_that_fails_supersedes_nothing(tmp_path: Path, operation: str) -> None:
    """Be it the first of its kind that fails or the last before the name is there."""

    def replace_all(path: Path, fault: Fault | None) -> FaultyFileSystem:
        run = RunDirectory(path)
        first = save_fake(run, 10)
        save_fake(run, 20, parent=first)
        run.close()
        filesystem = FaultyFileSystem(fault)
        run = RunDirectory(path, filesystem)  # type: ignore[arg-type]
        try:
            save_fake(run, 10, parent=first, layers={"norm"})
        except WriteError:
            assert names(run) == ["checkpoint-10", "checkpoint-20"]
            assert fault is not None
        finally:
            run.close()
        return filesystem

    with pytest.warns(SupersededWarning):
        calls = replace_all(tmp_path / "dry", None).calls
    published = max(index for index, name in enumerate(calls) if name == "rename")
    places = [index for index, name in enumerate(calls[: published + 1]) if name == operation]
    for index in {places[1 if operation == "fsync_directory" else 0], places[-1]}:
        again = replace_all(tmp_path / str(index), Fault(at=index + 1, errno=errno.EIO))
        assert again.has_fired
        assert again.calls[index] == operation


# Quarantine and removal


def test_quarantine_says_why_and_counts_up(run: RunDirectory) -> None:
    for number, suffix in enumerate(["bad", "bad-2", "bad-3"]):
        saved = save_fake(run, 10)
        target = run.quarantine(saved.path, f"reason {number}")
        assert target.name == f"_checkpoint-10.{suffix}"
        assert (target / "tailor-reason.txt").read_text() == f"reason {number}\n"
    assert names(run) == ["_checkpoint-10.bad", "_checkpoint-10.bad-2", "_checkpoint-10.bad-3"]


def test_quarantine_goes_on_where_the_reason_cannot_be_written(run: RunDirectory) -> None:
    saved = save_fake(run, 10)
    (saved.path / "tailor-reason.txt").mkdir()
    assert run.quarantine(saved.path, "why").name == "_checkpoint-10.bad"


def test_removed_checkpoint_leaves_every_other_whole(run: RunDirectory) -> None:
    saved = [save_fake(run, 10)]
    for step, layer in zip([20, 30, 40, 50], LAYERS, strict=True):
        saved.append(save_fake(run, step, parent=saved[-1], layers={layer}))
    for index in (1, 0, 3, 2):
        run.remove(saved[index].path)
        for entry in list_checkpoints(run.path):
            assert verify_checkpoint(entry.path).is_good
    assert names(run) == ["checkpoint-50"]
    assert staged_names(run.path) == set()
    for path in (run.path / "checkpoint-50").rglob("*.safetensors"):
        assert path.stat().st_nlink == 1


def test_removing_what_is_not_there(run: RunDirectory) -> None:
    with pytest.raises(WriteError) as caught:
        run.remove(run.path / "checkpoint-10")
    assert caught.value.kind == "io"


def test_checkpoint_is_gone_from_sight_before_its_files_are_removed(tmp_path: Path) -> None:
    filesystem = FaultyFileSystem(refused={"remove_tree": errno.EIO})
    run = RunDirectory(tmp_path / "run", filesystem)  # type: ignore[arg-type]
    saved = save_fake(run, 10)
    with pytest.raises(WriteError):
        run.remove(saved.path)
    assert list_checkpoints(run.path) == []
    run.close()
    RunDirectory(tmp_path / "run").close()
    assert staged_names(run.path) == set()
