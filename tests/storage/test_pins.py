from __future__ import annotations

import errno
from pathlib import Path

import pytest

from faults import Fault, FaultyFileSystem
from llmtailor.errors import InvalidInputError, NotFoundError, WriteError
from llmtailor.storage import PINS_NAME, add_pin, read_pins, remove_pin


def test_pins_come_and_go(tmp_path: Path) -> None:
    assert read_pins(tmp_path) == frozenset()
    for step in (400, 0, 400):
        add_pin(tmp_path, step)
    assert read_pins(tmp_path) == {0, 400}
    remove_pin(tmp_path, 400)
    assert read_pins(tmp_path) == {0}


def test_whoever_has_touch_can_pin(tmp_path: Path) -> None:
    (tmp_path / PINS_NAME).mkdir()
    for name in ("400", "checkpoint-500", ".nfs0001", "checkpoint-400"):
        (tmp_path / PINS_NAME / name).touch()
    assert read_pins(tmp_path) == {400, 500}
    remove_pin(tmp_path, 400)
    assert read_pins(tmp_path) == {500}


@pytest.mark.parametrize("name", ["step400", "0400", "checkpoint-", "\u0664", "-1"])
def test_a_pin_that_names_no_step_is_refused(tmp_path: Path, name: str) -> None:
    """Somebody meant to keep something."""
    add_pin(tmp_path, 1)
    (tmp_path / PINS_NAME / name).touch()
    with pytest.raises(InvalidInputError) as caught:
        read_pins(tmp_path)
    assert caught.value.kind == "pin-name"


def test_a_step_that_is_not_pinned_cannot_be_let_go(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="step 7 is not pinned"):
        remove_pin(tmp_path, 7)
    add_pin(tmp_path, 5)
    with pytest.raises(NotFoundError) as caught:
        remove_pin(tmp_path, 7)
    assert caught.value.expected == "one of 5"


def test_a_pin_is_durable(tmp_path: Path) -> None:
    filesystem = FaultyFileSystem()
    add_pin(tmp_path, 1, filesystem)  # type: ignore[arg-type]
    assert filesystem.calls == ["make_directory", "create", "close", "fsync_directory", "fsync_directory"]
    remove_pin(tmp_path, 1, filesystem)  # type: ignore[arg-type]
    assert filesystem.calls[5:] == ["remove_file", "fsync_directory"]


@pytest.mark.parametrize("at", range(1, 6))
def test_a_pin_that_fails_says_so(tmp_path: Path, at: int) -> None:
    filesystem = FaultyFileSystem(Fault(at=at, errno=errno.ENOSPC))
    with pytest.raises(WriteError, match="cannot pin a checkpoint") as caught:
        add_pin(tmp_path, 1, filesystem)  # type: ignore[arg-type]
    assert caught.value.kind == "no-space"


@pytest.mark.parametrize("at", [1, 2])
def test_a_pin_that_cannot_be_taken_away_says_so(tmp_path: Path, at: int) -> None:
    add_pin(tmp_path, 1)
    with pytest.raises(WriteError, match="cannot unpin a checkpoint"):
        remove_pin(tmp_path, 1, FaultyFileSystem(Fault(at=at, errno=errno.EIO)))  # type: ignore[arg-type]
