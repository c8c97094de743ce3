from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import memory_directory
from mounts import Mounts


@pytest.fixture
def fast_directory() -> Iterator[Path]:
    with memory_directory() as directory:
        yield directory


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    yield mounts
    mounts.close()
