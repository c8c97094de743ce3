from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from llmtailor.errors import NotFoundError, UnsupportedError
from llmtailor.hub import locate_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put_model(cache: Path, name: str) -> Path:
    """A model as the hub's client keeps it: blobs, and links to them in a snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "aa").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/aa")
    return snapshot


def test_directory_comes_before_a_model_of_that_name(cache: Path, tmp_path: Path) -> None:
    put_model(cache, "org/model")
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert locate_source("org/model") == Path("org/model")


@pytest.mark.parametrize("name", ["org/model", "org/model@main", f"org/model@{COMMIT}"])
def test_model_is_found_in_the_cache(cache: Path, name: str) -> None:
    snapshot = put_model(cache, "org/model")
    assert locate_source(name).resolve() == snapshot.resolve()


@pytest.mark.parametrize("name", ["org/gone", "org/gone@main", "org/gone@v1.0/a", f"org/gone@{COMMIT}"])
def test_model_that_is_nowhere_is_refused(cache: Path, name: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        locate_source(name)
    assert caught.value.kind == "missing-checkpoint"
    assert name in str(caught.value)


def test_without_a_commit_nothing_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def note(repository: str, **options: Any) -> str:
        asked.append({"repository": repository, **options})
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", note)
    locate_source("org/model")
    locate_source("org/model@main")
    locate_source(f"org/model@{COMMIT}")
    assert [(each["revision"], each["local_files_only"]) for each in asked] == [
        (None, True),
        ("main", True),
        (COMMIT, False),
    ]
    assert all(
        not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in each["allow_patterns"]) for each in asked
    )


@pytest.mark.parametrize("name", ["runs/a/checkpoint-4", "gone", "../up", "org/model@"])
def test_anything_else_is_a_path(cache: Path, name: str) -> None:
    assert locate_source(name) == Path(name)


@pytest.mark.parametrize("name", ["org/model+org/lora", f"org/model@{COMMIT}+org/lora@main", "org/model+runs/lora"])
def test_an_adapter_upon_a_model_is_refused_by_its_name(cache: Path, name: str) -> None:
    put_model(cache, "org/model")
    with pytest.raises(UnsupportedError, match="merge_and_unload") as caught:
        locate_source(name)
    assert caught.value.kind == "adapted-source"
