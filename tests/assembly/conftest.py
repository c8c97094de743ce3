from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import open_descriptors
from llmtailor.assembly import reading
from llmtailor.storage import direct_file
from mounts import Mounts


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    yield mounts
    mounts.close()


@pytest.fixture(autouse=True)
def _no_descriptor_stays_open() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture(params=["around the page cache", "through it"])
def _small_things_too(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat a few kilobytes as gigabytes are treated."""
    nbytes = 1 if request.param == "around the page cache" else 2**62
    monkeypatch.setattr(reading, "_MIN_DIRECT_NBYTES", nbytes)
    monkeypatch.setattr(direct_file, "_MIN_DIRECT_NBYTES", nbytes)
