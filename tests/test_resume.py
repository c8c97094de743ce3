from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import LAYERS, flip_bit, overwrite, save_fake
from llmtailor.checkpoint import Checkpoint
from llmtailor.errors import FormatError, IncompleteError, IntegrityError, NotFoundError, QuarantineWarning
from llmtailor.manifest import MANIFEST_NAME, digest_of, encode_manifest
from llmtailor.resume import find_resumable, open_resumable
from llmtailor.storage import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    run = RunDirectory(tmp_path / "run")
    yield run
    run.close()


@pytest.fixture
def saved(run: RunDirectory) -> dict[int, Checkpoint]:
    """Steps 10, 20, 30; 20 is a composite; none shares a file with 30."""
    first = save_fake(run, 10)
    second = save_fake(run, 20, parent=first, layers={"norm"})
    third = save_fake(run, 30, parent=second, layers=LAYERS)
    return {10: first, 20: second, 30: third}


def spoil(checkpoint: Checkpoint, name: str = "scheduler.pt") -> None:
    flip_bit(checkpoint.path / name, 99)


def names(run: RunDirectory) -> set[str]:
    return {path.name for path in run.path.iterdir()} - {"_staging"}


def found_step(run: RunDirectory, **how: Any) -> int | None:
    found = find_resumable(run, **how)
    return None if found is None else found.manifest.step


def test_newest_is_found(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    assert find_resumable(run) == saved[30]
    assert names(run) == {"checkpoint-10", "checkpoint-20", "checkpoint-30"}


def test_newest_by_number_not_by_text_or_time(run: RunDirectory) -> None:
    first = save_fake(run, 9)
    save_fake(run, 100, parent=first)
    os.utime(first.path)
    assert found_step(run) == 100


def test_nothing_to_find(run: RunDirectory) -> None:
    assert find_resumable(run) is None


def test_bad_one_is_set_aside_with_the_reason(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    spoil(saved[30])
    with pytest.warns(QuarantineWarning, match=r"checkpoint-30 does not verify \(scheduler.pt"):
        assert found_step(run) == 20
    assert names(run) == {"checkpoint-10", "checkpoint-20", "_checkpoint-30.bad"}
    assert "scheduler.pt: the file's bytes changed" in (run.path / "_checkpoint-30.bad/tailor-reason.txt").read_text()


def test_bad_ones_are_set_aside_one_after_the_other(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    for step in (20, 30):
        spoil(saved[step])
    with pytest.warns(QuarantineWarning) as warned:
        assert found_step(run) == 10
    assert len(warned) == 2


def test_file_that_two_share_spoils_both(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    fourth = save_fake(run, 40, parent=saved[30], layers={"norm"})
    spoil(fourth, "model-layers.0.safetensors")
    with pytest.warns(QuarantineWarning) as warned:
        assert found_step(run) == 20
    assert len(warned) == 2


def test_numbers_of_bad_ones_are_counted_up(run: RunDirectory) -> None:
    first = save_fake(run, 10)
    for suffix in ("bad", "bad-2", "bad-3"):
        spoil(save_fake(run, 20, parent=first))
        with pytest.warns(QuarantineWarning, match=rf"kept as _checkpoint-20\.{suffix}$"):
            assert found_step(run) == 10
    assert names(run) == {"checkpoint-10", "_checkpoint-20.bad", "_checkpoint-20.bad-2", "_checkpoint-20.bad-3"}


def test_bad_one_is_not_looked_at_again(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    spoil(saved[30])
    with pytest.warns(QuarantineWarning):
        find_resumable(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found_step(run) == 20


def test_all_are_bad(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    for checkpoint in saved.values():
        spoil(checkpoint)
    with pytest.warns(QuarantineWarning), pytest.raises(IntegrityError) as caught:
        find_resumable(run)
    assert caught.value.kind == "none-verifies"
    for step in saved:
        assert f"checkpoint-{step}: scheduler.pt" in str(caught.value)


def test_damaged_manifest_is_set_aside(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    flip_bit(saved[30].path / MANIFEST_NAME, 500)
    with pytest.warns(QuarantineWarning, match=MANIFEST_NAME):
        assert found_step(run) == 20


def test_manifest_of_a_newer_program_is_raised_and_left_alone(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    """It is good, and going back behind it would throw work away."""
    text, _ = encode_manifest(saved[30].manifest)
    body = text.rpartition(b",\n")[0].replace(b'"format_version": 1', b'"format_version": 2')
    newer = body + f',\n"digest": "{digest_of(body)}"\n}}\n'.encode()
    overwrite(saved[30].path / MANIFEST_NAME, newer)
    with pytest.raises(FormatError) as caught:
        find_resumable(run)
    assert caught.value.kind == "format-version"
    assert "checkpoint-30" in names(run)


@pytest.mark.parametrize("make", ["pytorch_model.bin", "trainer_state.json", None])
def test_directory_of_another_tool_is_left_alone(
    run: RunDirectory, saved: dict[int, Checkpoint], make: str | None
) -> None:
    theirs = run.path / "checkpoint-500"
    theirs.mkdir()
    if make is not None:
        (theirs / make).write_text("theirs")
    with pytest.warns(QuarantineWarning, match="left alone"):
        assert found_step(run) == 30
    assert theirs.is_dir()
    assert "checkpoint-500" in names(run)


def test_only_directories_of_another_tool(run: RunDirectory) -> None:
    (run.path / "checkpoint-500").mkdir()
    with pytest.warns(QuarantineWarning, match="left alone"):
        assert find_resumable(run) is None


def test_checkpoint_of_weights_is_passed_over(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    save_fake(run, 40, parent=saved[30], contents="weights")
    assert found_step(run) == 30
    assert "checkpoint-40" in names(run)


def test_only_checkpoints_of_weights(run: RunDirectory) -> None:
    save_fake(run, 10, contents="weights")
    with pytest.raises(IncompleteError) as caught:
        find_resumable(run)
    assert caught.value.kind == "weights-only"


def test_bad_file_whose_name_reads_like_a_reason(run: RunDirectory) -> None:
    def write(directory: Path, step: int) -> None:
        (directory / "without.json").write_text("0" * 64)

    spoil(save_fake(run, 10, write_small_files=write), "without.json")
    with pytest.warns(QuarantineWarning), pytest.raises(IntegrityError):
        find_resumable(run)


def test_consistent_takes_the_newest_of_one_step(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    shutil.rmtree(saved[30].path)
    assert found_step(run) == 20
    assert found_step(run, consistent=True) == 10
    assert names(run) == {"checkpoint-10", "checkpoint-20"}


def test_none_is_consistent(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    for step in (10, 30):
        run.remove(saved[step].path)
    with pytest.raises(IncompleteError) as caught:
        find_resumable(run, consistent=True)
    assert caught.value.kind == "no-consistent"
    assert found_step(run) == 20


@pytest.mark.filterwarnings("ignore::llmtailor.errors.QuarantineWarning")
@pytest.mark.parametrize(("limit", "is_refused"), [(None, False), (0, True), (9, True), (10, False), (100, False)])
def test_max_rollback_steps(
    run: RunDirectory, saved: dict[int, Checkpoint], limit: int | None, is_refused: bool
) -> None:
    spoil(saved[30])
    if is_refused:
        with pytest.raises(IncompleteError) as caught:
            find_resumable(run, max_rollback_steps=limit)
        assert caught.value.kind == "rollback-limit"
    else:
        assert found_step(run, max_rollback_steps=limit) == 20


@pytest.mark.filterwarnings("ignore::llmtailor.errors.QuarantineWarning")
def test_max_rollback_steps_holds_when_asked_again(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    """The first time set the bad one aside; the loss is still there."""
    spoil(saved[30])
    for _ in range(2):
        with pytest.raises(IncompleteError):
            find_resumable(run, max_rollback_steps=5)
    assert found_step(run, max_rollback_steps=10) == 20


def test_max_rollback_steps_counts_consistency_too(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    run.remove(saved[30].path)
    with pytest.raises(IncompleteError):
        find_resumable(run, consistent=True, max_rollback_steps=9)
    assert found_step(run, consistent=True, max_rollback_steps=10) == 10


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", [MANIFEST_NAME, "scheduler.pt", "model-norm.safetensors"])
def test_failing_device_is_raised_and_nothing_is_renamed(
    run: RunDirectory, saved: dict[int, Checkpoint], monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    real = os.open

    def fail(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path) == str(saved[30].path / name):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(OSError) as caught:
            find_resumable(run)
        assert caught.value.errno == number
    assert names(run) == {"checkpoint-10", "checkpoint-20", "checkpoint-30"}
    assert found_step(run) == 30


def test_half_removed_and_staged_checkpoints_are_never_found(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    shutil.copytree(saved[30].path, run.path / "_staging" / "40-abc" / "checkpoint-40")
    shutil.copytree(saved[30].path, run.path / "_checkpoint-50.superseded")
    assert found_step(run) == 30


# open_resumable


def test_open_resumable(saved: dict[int, Checkpoint]) -> None:
    assert open_resumable(saved[20].path) == saved[20]


def test_open_resumable_refuses_a_bad_one_and_leaves_it(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    spoil(saved[20])
    with pytest.raises(IntegrityError):
        open_resumable(saved[20].path)
    assert "checkpoint-20" in names(run)


def test_open_resumable_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_resumable(tmp_path / "checkpoint-1")
