from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import Fault, FaultyFileSystem, flip_bit
from llmtailor.errors import WriteError
from llmtailor.pruning import apply_retention
from llmtailor.storage import RunDirectory, list_checkpoints
from llmtailor.verify import verify_checkpoint
from writer.first_tiers import save_run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    """Checkpoints 1 to 5; all layers of 1 are of one step."""
    save_run(tmp_path / "run", range(1, 6))
    run = RunDirectory(tmp_path / "run")
    yield run
    run.close()


def steps_of(run: RunDirectory) -> list[int]:
    return [entry.step for entry in list_checkpoints(run.path)]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"keep": None}, [1, 2, 3, 4, 5]),
        ({"keep": 0}, [1, 2, 3, 4, 5]),
        ({"keep": 5}, [1, 2, 3, 4, 5]),
        ({"keep": 3}, [1, 4, 5]),
        ({"keep": 3, "keep_consistent": False}, [3, 4, 5]),
        ({"keep": 2, "pinned": {2}}, [1, 2, 5]),
        ({"keep": 1, "keep_consistent": False}, [5]),
    ],
)
def test_what_may_go_goes_and_the_rest_stays_whole(run: RunDirectory, options: dict[str, Any], left: list[int]) -> None:
    assert apply_retention(run, **options) is None
    assert steps_of(run) == left
    assert all(verify_checkpoint(entry.path).is_good for entry in list_checkpoints(run.path))


def test_directory_without_a_manifest_neither_counts_nor_goes(run: RunDirectory) -> None:
    (run.path / "checkpoint-0").mkdir()
    assert apply_retention(run, keep=2, keep_consistent=False) is None
    assert steps_of(run) == [0, 4, 5]


def test_damaged_manifest_does_not_count_as_consistent(run: RunDirectory) -> None:
    flip_bit(run.path / "checkpoint-1" / "tailor.json", 800)
    assert apply_retention(run, keep=2) is None
    assert steps_of(run) == [4, 5]


def test_removal_that_fails_is_returned_and_the_next_one_goes_on(tmp_path: Path) -> None:
    save_run(tmp_path, range(1, 4))
    filesystem: Any = FaultyFileSystem()
    run = RunDirectory(tmp_path, filesystem)
    filesystem.fault = Fault(at=len(filesystem.calls) + 1, errno=errno.EIO)
    error = apply_retention(run, keep=1, keep_consistent=False)
    assert isinstance(error, WriteError)
    assert (error.kind, steps_of(run)) == ("io", [1, 2, 3])
    assert apply_retention(run, keep=1, keep_consistent=False) is None
    assert steps_of(run) == [3]
    run.close()


def test_device_that_fails_is_returned_too(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "no such luck")

    monkeypatch.setattr("llmtailor.pruning.read_manifest", fail)
    error = apply_retention(run, keep=1)
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO
    assert steps_of(run) == [1, 2, 3, 4, 5]
