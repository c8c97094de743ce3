from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from mounts import Mounts


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    yield mounts
    mounts.close()


@pytest.fixture
def nothing_is_left_of_other_tests() -> None:
    """For tests that count open files: runs that a test before forgot about would be closed in the middle of them."""
    gc.collect()  # for half a second, where many libraries were imported
