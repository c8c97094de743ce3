from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mounts import Mounts


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    yield mounts
    mounts.close()
