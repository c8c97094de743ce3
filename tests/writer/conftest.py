from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(autouse=True)
def _no_thread_dies() -> Iterator[None]:
    """An error that ends a thread of the engine's would be said nowhere else."""
    died: list[Any] = []
    before, threading.excepthook = threading.excepthook, died.append
    yield
    threading.excepthook = before
    assert not died
