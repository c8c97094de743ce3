from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from faults import LAYERS, flip_bit, overwrite, save_fake
from llmtailor.checkpoint import Checkpoint
from llmtailor.errors import (
    FormatError,
    IncompatibleError,
    IncompleteError,
    IntegrityError,
    NotFoundError,
    QuarantineWarning,
)
from llmtailor.manifest import MANIFEST_NAME, FileRecord, digest_of, encode_manifest
from llmtailor.resume import Fill, find_resumable, load_named, load_resumable, open_resumable
from llmtailor.storage import FileReader, RunDirectory
from llmtailor.verify import changed_bytes, open_published

Find = Callable[..., Any]


def plan_to_read(found: Checkpoint) -> Fill:
    """Reads the layer files as a load does, and keeps nothing."""

    def fill(on_file: Callable[[FileRecord], None]) -> None:
        for record in (record for layer in found.manifest.layers for record in layer.files):
            with open_published(found.path, record) as descriptor:
                digest = FileReader().digest(descriptor, record.bytes, found.path / record.path)
            if digest != record.digest:
                raise changed_bytes(found.path / record.path, record.digest, digest)

    return fill


def load(run: RunDirectory | Sequence[RunDirectory], **how: Any) -> Checkpoint | None:
    return load_resumable(run, plan_to_read, **how)


@pytest.fixture(params=[find_resumable, load], ids=["find", "load"])
def find(request: pytest.FixtureRequest) -> Find:
    """Both take the same checkpoint, and do the same with those that are not good."""
    way: Find = request.param
    return way


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


def step_of(found: Checkpoint | None) -> int | None:
    return None if found is None else found.manifest.step


def test_newest_is_found(run: RunDirectory, saved: dict[int, Checkpoint], find: Find) -> None:
    assert find(run) == saved[30]
    assert names(run) == {"checkpoint-10", "checkpoint-20", "checkpoint-30"}


def test_newest_by_number_not_by_text_or_time(run: RunDirectory, find: Find) -> None:
    first = save_fake(run, 9)
    save_fake(run, 100, parent=first)
    os.utime(first.path)
    assert step_of(find(run)) == 100


def test_nothing_to_find(run: RunDirectory, find: Find) -> None:
    assert find(run) is None


def test_bad_one_is_set_aside_with_the_reason(run: RunDirectory, saved: dict[int, Checkpoint], find: Find) -> None:
    spoil(saved[30])
    with pytest.warns(QuarantineWarning, match=r"checkpoint-30 does not verify \(scheduler.pt"):
        assert step_of(find(run)) == 20
    assert names(run) == {"checkpoint-10", "checkpoint-20", "_checkpoint-30.bad"}
    assert "scheduler.pt: the file's bytes changed" in (run.path / "_checkpoint-30.bad/tailor-reason.txt").read_text()


def test_bad_ones_are_set_aside_one_after_the_other(
    run: RunDirectory, saved: dict[int, Checkpoint], find: Find
) -> None:
    for step in (20, 30):
        spoil(saved[step])
    with pytest.warns(QuarantineWarning) as warned:
        assert step_of(find(run)) == 10
    assert len(warned) == 2


def test_file_that_two_share_spoils_both(run: RunDirectory, saved: dict[int, Checkpoint], find: Find) -> None:
    fourth = save_fake(run, 40, parent=saved[30], layers={"norm"})
    spoil(fourth, "model-layers.0.safetensors")
    with pytest.warns(QuarantineWarning) as warned:
        assert step_of(find(run)) == 20
    assert len(warned) == 2


def test_numbers_of_bad_ones_are_counted_up(run: RunDirectory, find: Find) -> None:
    first = save_fake(run, 10)
    for suffix in ("bad", "bad-2", "bad-3"):
        spoil(save_fake(run, 20, parent=first))
        with pytest.warns(QuarantineWarning, match=rf"kept as _checkpoint-20\.{suffix}$"):
            assert step_of(find(run)) == 10
    assert names(run) == {"checkpoint-10", "_checkpoint-20.bad", "_checkpoint-20.bad-2", "_checkpoint-20.bad-3"}


def test_bad_one_is_not_looked_at_again(run: RunDirectory, saved: dict[int, Checkpoint], find: Find) -> None:
    spoil(saved[30])
    with pytest.warns(QuarantineWarning):
        find(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step_of(find(run)) == 20


def test_all_are_bad(run: RunDirectory, saved: dict[int, Checkpoint], find: Find) -> None:
    for checkpoint in saved.values():
        spoil(checkpoint)
    with pytest.warns(QuarantineWarning), pytest.raises(IntegrityError) as caught:
        find(run)
    assert caught.value.kind == "none-verifies"
    for step in saved:
        assert f"checkpoint-{step}: scheduler.pt" in str(caught.value)


def test_damaged_manifest_is_set_aside(run: RunDirectory, saved: dict[int, Checkpoint], find: Find) -> None:
    flip_bit(saved[30].path / MANIFEST_NAME, 500)
    with pytest.warns(QuarantineWarning, match=MANIFEST_NAME):
        assert step_of(find(run)) == 20


def test_manifest_of_a_newer_program_is_raised_and_left_alone(
    run: RunDirectory, saved: dict[int, Checkpoint], find: Find
) -> None:
    """It is good, and going back behind it would throw work away."""
    text, _ = encode_manifest(saved[30].manifest)
    body = text.rpartition(b",\n")[0].replace(b'"format_version": 1', b'"format_version": 2')
    newer = body + f',\n"digest": "{digest_of(body)}"\n}}\n'.encode()
    overwrite(saved[30].path / MANIFEST_NAME, newer)
    with pytest.raises(FormatError) as caught:
        find(run)
    assert caught.value.kind == "format-version"
    assert "checkpoint-30" in names(run)


@pytest.mark.parametrize("make", ["pytorch_model.bin", "trainer_state.json", None])
def test_directory_of_another_tool_is_left_alone(
    run: RunDirectory, saved: dict[int, Checkpoint], make: str | None, find: Find
) -> None:
    theirs = run.path / "checkpoint-500"
    theirs.mkdir()
    if make is not None:
        (theirs / make).write_text("theirs")
    with pytest.warns(QuarantineWarning, match="left alone"):
        assert step_of(find(run)) == 30
    assert theirs.is_dir()
    assert "checkpoint-500" in names(run)


def test_only_directories_of_another_tool(run: RunDirectory, find: Find) -> None:
    (run.path / "checkpoint-500").mkdir()
    with pytest.warns(QuarantineWarning, match="left alone"):
        assert find(run) is None


def test_checkpoint_of_weights_is_passed_over(run: RunDirectory, saved: dict[int, Checkpoint], find: Find) -> None:
    save_fake(run, 40, parent=saved[30], contents="weights")
    assert step_of(find(run)) == 30
    assert "checkpoint-40" in names(run)


def test_only_checkpoints_of_weights(run: RunDirectory, find: Find) -> None:
    save_fake(run, 10, contents="weights")
    with pytest.raises(IncompleteError) as caught:
        find(run)
    assert caught.value.kind == "weights-only"


def test_bad_file_whose_name_reads_like_a_reason(run: RunDirectory, find: Find) -> None:
    def write(directory: Path, step: int) -> None:
        (directory / "without.json").write_text("0" * 64)

    spoil(save_fake(run, 10, write_small_files=write), "without.json")
    with pytest.warns(QuarantineWarning), pytest.raises(IntegrityError):
        find(run)


def test_consistent_takes_the_newest_of_one_step(run: RunDirectory, saved: dict[int, Checkpoint], find: Find) -> None:
    shutil.rmtree(saved[30].path)
    assert step_of(find(run)) == 20
    assert step_of(find(run, consistent=True)) == 10
    assert names(run) == {"checkpoint-10", "checkpoint-20"}


def test_none_is_consistent(run: RunDirectory, saved: dict[int, Checkpoint], find: Find) -> None:
    for step in (10, 30):
        run.remove(saved[step].path)
    with pytest.raises(IncompleteError) as caught:
        find(run, consistent=True)
    assert caught.value.kind == "no-consistent"
    assert step_of(find(run)) == 20


@pytest.mark.filterwarnings("ignore::llmtailor.errors.QuarantineWarning")
@pytest.mark.parametrize(("limit", "is_refused"), [(None, False), (0, True), (9, True), (10, False), (100, False)])
def test_max_rollback_steps(
    run: RunDirectory, saved: dict[int, Checkpoint], limit: int | None, is_refused: bool, find: Find
) -> None:
    spoil(saved[30])
    if is_refused:
        with pytest.raises(IncompleteError) as caught:
            find(run, max_rollback_steps=limit)
        assert caught.value.kind == "rollback-limit"
    else:
        assert step_of(find(run, max_rollback_steps=limit)) == 20


@pytest.mark.filterwarnings("ignore::llmtailor.errors.QuarantineWarning")
def test_max_rollback_steps_holds_when_asked_again(run: RunDirectory, saved: dict[int, Checkpoint], find: Find) -> None:
    """The first time set the bad one aside; the loss is still there."""
    spoil(saved[30])
    for _ in range(2):
        with pytest.raises(IncompleteError):
            find(run, max_rollback_steps=5)
    assert step_of(find(run, max_rollback_steps=10)) == 20


def test_max_rollback_steps_counts_consistency_too(run: RunDirectory, saved: dict[int, Checkpoint], find: Find) -> None:
    run.remove(saved[30].path)
    with pytest.raises(IncompleteError):
        find(run, consistent=True, max_rollback_steps=9)
    assert step_of(find(run, consistent=True, max_rollback_steps=10)) == 10


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", [MANIFEST_NAME, "scheduler.pt", "model-norm.safetensors"])
def test_failing_device_is_raised_and_nothing_is_renamed(
    run: RunDirectory, saved: dict[int, Checkpoint], monkeypatch: pytest.MonkeyPatch, name: str, number: int, find: Find
) -> None:
    real = os.open

    def fail(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path) == str(saved[30].path / name):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(OSError) as caught:
            find(run)
        assert caught.value.errno == number
    assert names(run) == {"checkpoint-10", "checkpoint-20", "checkpoint-30"}
    assert step_of(find(run)) == 30


def test_half_removed_and_staged_checkpoints_are_never_found(
    run: RunDirectory, saved: dict[int, Checkpoint], find: Find
) -> None:
    shutil.copytree(saved[30].path, run.path / "_staging" / "40-abc" / "checkpoint-40")
    shutil.copytree(saved[30].path, run.path / "_checkpoint-50.superseded")
    assert step_of(find(run)) == 30


# load_resumable and load_named

SPOILED = "not to be used"
LAYER_FILE = "model-layers.0.safetensors"


def spoil_layer(checkpoint: Checkpoint) -> None:
    """The last bit: no header tells."""
    flip_bit(checkpoint.path / LAYER_FILE, 8 * (checkpoint.path / LAYER_FILE).stat().st_size - 1)


def refusing(error: Exception, *steps: int) -> Callable[[Checkpoint], Fill]:
    def plan(found: Checkpoint) -> Fill:
        if found.manifest.step in steps:
            raise error
        return plan_to_read(found)

    return plan


def other_model() -> IncompatibleError:
    return IncompatibleError("another model", kind="other-model", hint="take the same")


def test_load_reads_each_file_once(
    run: RunDirectory, saved: dict[int, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    real = FileReader.digest

    def digest(self: FileReader, descriptor: int, nbytes: int, path: Path, *rest: Any) -> str:
        read.append(path)
        return real(self, descriptor, nbytes, path, *rest)

    monkeypatch.setattr(FileReader, "digest", digest)
    assert load(run) == saved[30]
    assert sorted(read) == sorted(saved[30].path / record.path for record in saved[30].manifest.all_files)


def test_damage_found_while_loading_is_set_aside_with_all_that_is_wrong(
    run: RunDirectory, saved: dict[int, Checkpoint]
) -> None:
    spoil_layer(saved[30])
    flip_bit(saved[30].path / "model-norm.safetensors", 8 * 4100)
    with pytest.warns(QuarantineWarning, match="checkpoint-30 does not verify"):
        assert step_of(load(run)) == 20
    reason = (run.path / "_checkpoint-30.bad/tailor-reason.txt").read_text()
    assert reason.count("the file's bytes changed") == 2


def test_bytes_that_were_wrong_once_are_not_trusted_when_they_verify_later(
    run: RunDirectory, saved: dict[int, Checkpoint]
) -> None:
    wrong = changed_bytes(saved[30].path / LAYER_FILE, "this", "that")
    with pytest.warns(QuarantineWarning, match=rf"{LAYER_FILE}: the file's bytes changed"):
        assert step_of(load_resumable(run, refusing(wrong, 30))) == 20


def test_what_the_plan_refuses_of_a_good_checkpoint_is_raised_and_nothing_is_renamed(
    run: RunDirectory, saved: dict[int, Checkpoint]
) -> None:
    for error in (other_model(), FormatError("bad notes", kind="optimizer-notes"), RuntimeError("no memory")):
        with pytest.raises(type(error)) as caught:
            load_resumable(run, refusing(error, 30))
        assert caught.value is error
        assert SPOILED not in str(error)
    assert names(run) == {"checkpoint-10", "checkpoint-20", "checkpoint-30"}


def test_what_the_plan_refuses_of_a_damaged_checkpoint_is_put_down_to_the_damage(
    run: RunDirectory, saved: dict[int, Checkpoint]
) -> None:
    spoil_layer(saved[30])
    with pytest.warns(QuarantineWarning, match="checkpoint-30 does not verify"):
        assert step_of(load_resumable(run, refusing(other_model(), 30))) == 20


@pytest.mark.filterwarnings("ignore::llmtailor.errors.QuarantineWarning")
@pytest.mark.parametrize("is_loaded_in_part", [True, False])
def test_only_after_a_load_in_part_the_values_are_said_to_be_unusable(
    run: RunDirectory, saved: dict[int, Checkpoint], is_loaded_in_part: bool
) -> None:
    (spoil_layer if is_loaded_in_part else spoil)(saved[30])
    with pytest.raises(IncompatibleError) as refused:
        load_resumable(run, refusing(other_model(), 20))
    assert (SPOILED in str(refused.value)) == is_loaded_in_part
    assert "take the same" in str(refused.value)
    (spoil_layer if is_loaded_in_part else spoil)(saved[20])
    spoil(saved[10])
    with pytest.raises(IntegrityError) as caught:
        load(run)
    assert caught.value.kind == "none-verifies"
    assert (SPOILED in str(caught.value)) == is_loaded_in_part


def test_device_that_fails_while_loading_is_raised_and_nothing_is_renamed(
    run: RunDirectory, saved: dict[int, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def fail(descriptor: int, *rest: Any) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(LAYER_FILE):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        load(run)
    assert any(SPOILED in note for note in caught.value.__notes__)
    assert names(run) == {"checkpoint-10", "checkpoint-20", "checkpoint-30"}


def test_a_load_too_far_back_is_refused_before_anything_is_changed(
    run: RunDirectory, saved: dict[int, Checkpoint]
) -> None:
    spoil(saved[30])
    with pytest.warns(QuarantineWarning), pytest.raises(IncompleteError) as caught:
        load_resumable(run, refusing(AssertionError("planned"), 20), max_rollback_steps=5)
    assert caught.value.kind == "rollback-limit"


def test_load_named(run: RunDirectory, saved: dict[int, Checkpoint]) -> None:
    assert load_named(saved[20].path, plan_to_read) == saved[20]
    with pytest.raises(IncompatibleError):
        load_named(saved[20].path, refusing(other_model(), 20))
    with pytest.raises(NotFoundError):
        load_named(run.path / "checkpoint-1", plan_to_read)


@pytest.mark.parametrize("is_loaded_in_part", [True, False])
def test_load_named_refuses_a_bad_one_and_leaves_it(
    run: RunDirectory, saved: dict[int, Checkpoint], is_loaded_in_part: bool
) -> None:
    (spoil_layer if is_loaded_in_part else spoil)(saved[20])
    with pytest.raises(IntegrityError) as caught:
        load_named(saved[20].path, plan_to_read)
    assert "1 of 12 files" in str(caught.value)
    assert (SPOILED in str(caught.value)) == is_loaded_in_part
    assert "checkpoint-20" in names(run)


# Several directories


@pytest.fixture
def mirror(run: RunDirectory, saved: dict[int, Checkpoint], tmp_path: Path) -> Iterator[RunDirectory]:
    """Holds what the run holds, but for the newest."""
    shutil.copytree(run.path, tmp_path / "mirror", ignore=shutil.ignore_patterns("_staging", "checkpoint-30"))
    mirror = RunDirectory(tmp_path / "mirror")
    yield mirror
    mirror.close()


def test_newest_of_all_directories_is_taken_and_the_first_is_preferred(
    run: RunDirectory, mirror: RunDirectory, saved: dict[int, Checkpoint], find: Find
) -> None:
    assert find([run, mirror]) == saved[30]
    run.remove(saved[30].path)
    assert find([run, mirror]) == saved[20]
    run.remove(saved[20].path)
    assert find([run, mirror]).path == mirror.path / "checkpoint-20"
    assert find([mirror, run]).path == mirror.path / "checkpoint-20"


def test_damage_in_one_directory_says_nothing_of_the_same_step_in_another(
    run: RunDirectory, mirror: RunDirectory, saved: dict[int, Checkpoint], find: Find
) -> None:
    for step in (20, 30):
        spoil_layer(saved[step])
    with pytest.warns(QuarantineWarning) as warned:
        assert find([run, mirror]).path == mirror.path / "checkpoint-20"
    assert len(warned) == 2
    assert names(run) == {"checkpoint-10", "_checkpoint-20.bad", "_checkpoint-30.bad"}
    assert names(mirror) == {"checkpoint-10", "checkpoint-20"}


def test_damage_in_the_mirror_is_set_aside_there(
    run: RunDirectory, mirror: RunDirectory, saved: dict[int, Checkpoint], find: Find
) -> None:
    for step in (20, 30):
        run.remove(saved[step].path)
    flip_bit(mirror.path / "checkpoint-20" / "scheduler.pt", 99)
    with pytest.warns(QuarantineWarning, match=f"{mirror.path}/checkpoint-20 does not verify"):
        assert find([run, mirror]) == saved[10]
    assert names(mirror) == {"checkpoint-10", "_checkpoint-20.bad"}


def test_all_are_bad_in_all_directories(
    run: RunDirectory, mirror: RunDirectory, saved: dict[int, Checkpoint], find: Find
) -> None:
    for directory in (run, mirror):
        for path in directory.path.glob("checkpoint-*"):
            flip_bit(path / "scheduler.pt", 99)
    with pytest.warns(QuarantineWarning), pytest.raises(IntegrityError) as caught:
        find([run, mirror])
    for name in ("checkpoint-30: sch", f"{mirror.path}/checkpoint-20: sch", f"{mirror.path}/checkpoint-10: sch"):
        assert name in str(caught.value)


def test_mirror_of_a_run_before_this_one_is_never_fallen_back_to(
    run: RunDirectory, saved: dict[int, Checkpoint], tmp_path: Path, find: Find
) -> None:
    with contextlib.closing(RunDirectory(tmp_path / "mirror")) as mirror:
        save_fake(mirror, 100, run_id="1" * 32)
        assert find([run, mirror], max_rollback_steps=0) == saved[30]
        for checkpoint in saved.values():
            spoil(checkpoint)
        with pytest.warns(QuarantineWarning), pytest.raises(IntegrityError) as caught:
            find([run, mirror])
        assert "checkpoint-100: of another run" in str(caught.value)
        assert names(mirror) == {"checkpoint-100"}
        # All of the run is gone: then the mirror is all there is.
        assert step_of(find([run, mirror])) == 100


def test_rollback_is_counted_from_the_newest_of_all_directories(
    run: RunDirectory, mirror: RunDirectory, saved: dict[int, Checkpoint], find: Find
) -> None:
    spoil(saved[30])
    with pytest.warns(QuarantineWarning), pytest.raises(IncompleteError) as caught:
        find([mirror, run], max_rollback_steps=9)
    assert caught.value.kind == "rollback-limit"
    assert step_of(find([mirror, run], max_rollback_steps=10)) == 20


def test_nothing_to_find_in_any_directory(run: RunDirectory, tmp_path: Path, find: Find) -> None:
    with contextlib.closing(RunDirectory(tmp_path / "mirror")) as mirror:
        assert find([run, mirror]) is None


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
