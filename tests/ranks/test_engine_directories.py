"""A DeepSpeed engine that saves to two directories in turn, again after ``close``, and one step under two tags."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtailor.checkpoint import open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.errors import FormatError, NotFoundError, SupersededWarning, UnsupportedError
from llmtailor.integrations.deepspeed_tags import TAGS_NAME, add_tag, find_tag
from llmtailor.verify import verify_checkpoint
from llmtailor.zero import ENGINE_STATE_NAME
from ranks.launch import run_ranks

PROGRAM = Path(__file__).with_name("engine_directories.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    directory = tmp_path_factory.mktemp("directories")
    run_ranks(PROGRAM, 2, directory)
    for path in directory.glob("*/checkpoint-*"):
        assert verify_checkpoint(path).problems == ()
    found: Mapping[str, Any] = json.loads((directory / "seen.json").read_text())
    return found


def test_another_directory_and_back_leaves_the_run_as_it_was(seen: Mapping[str, Any]) -> None:
    found = seen["there and back"]
    # The newest, and the newest whose layers are all of one step; nothing was set aside.
    assert found["runs"] == ["checkpoint-1", "checkpoint-7"]
    assert found["best"] == ["checkpoint-3", "checkpoint-6"]
    assert found["latest"] == "checkpoint-7"
    assert found["steps"] == [6, 7]


def test_drift_is_measured_from_the_save_before_the_other_directory(seen: Mapping[str, Any]) -> None:
    for name in ("there and back", "after close"):
        assert seen[name]["drifts"]
        assert all(drift > 0 for drift in seen[name]["drifts"])


def test_a_save_after_close_goes_on_with_the_run(seen: Mapping[str, Any]) -> None:
    found = seen["after close"]
    assert found["runs"] == ["checkpoint-1", "checkpoint-8"]
    assert found["steps"] == [7, 8]


def test_a_step_that_is_saved_again_gets_the_tag(seen: Mapping[str, Any]) -> None:
    found = seen["named twice"]
    assert found["results"] == [True, True, "client-state"]
    assert found["latest"] == "checkpoint-9"
    assert seen["after loading by tag"]["runs"] == ["checkpoint-1", "checkpoint-10"]


def test_a_step_whose_save_failed_is_saved_under_the_tag(seen: Mapping[str, Any]) -> None:
    assert seen["failed once"] == {"found": "checkpoint-11", "step": 11}


def test_a_run_whose_newest_checkpoint_is_gone_begins_anew(seen: Mapping[str, Any]) -> None:
    found = seen["gone"]
    assert found["steps"] == [12]
    assert found["runs"] == ["_checkpoint-1.superseded", "checkpoint-12"]


def test_what_was_loaded_from_elsewhere_follows_nothing_here(seen: Mapping[str, Any]) -> None:
    assert seen["from the other directory"]["steps"] == [7]
    assert "_checkpoint-12.superseded" in seen["from the other directory"]["runs"]
    # A checkpoint of stock DeepSpeed, loaded while a run is open.
    assert seen["from stock"]["steps"] == [1]
    assert [name for name in seen["from stock"]["runs"] if not name.startswith("_")] == ["checkpoint-1"]


class Run:
    """A run of a tiny model, whose checkpoints have what an engine adds."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._model = torch.nn.Linear(2, 2)
        self._checkpointer = Checkpointer(directory)

    def save(self, step: int, tag: str | None = None, **client_state: Any) -> Path:
        def write(staged: Path) -> None:
            torch.save({"engine": {}, "client_state": client_state, "tag": tag}, staged / ENGINE_STATE_NAME)

        return self._checkpointer.save(step, self._model, [], write, contents="weights").result()

    def go_back(self, path: Path) -> None:
        self._checkpointer.begin(open_checkpoint(path))

    def add(self, path: Path, tag: str | None, **client_state: Any) -> None:
        add_tag(path, tag, client_state or None, self._checkpointer.write_pointer)

    def close(self) -> None:
        self._checkpointer.close()


@pytest.fixture
def run(tmp_path: Path) -> Any:
    run = Run(tmp_path / "run")
    yield run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SupersededWarning)
        run.close()


def test_the_newest_checkpoint_that_has_a_tag_is_found(run: Run) -> None:
    first, second, third = run.save(1, "best"), run.save(2), run.save(3, "last")
    assert find_tag(run.directory, "best") == first
    run.add(second, "best")
    run.add(second, "best")
    run.add(second, "good")
    assert find_tag(run.directory, "best") == second
    assert find_tag(run.directory, "good") == second
    assert find_tag(run.directory, "last") == third
    assert find_tag(run.directory, "global_step1") == first
    assert json.loads((run.directory / TAGS_NAME).read_text())["checkpoint-2"]["tags"] == ["best", "good"]
    with pytest.raises(NotFoundError) as caught:
        find_tag(run.directory, "none")
    assert caught.value.kind == "missing-checkpoint"


def test_names_that_a_checkpoint_has_anyhow_need_no_file(run: Run) -> None:
    path = run.save(2, "best", epoch=1)
    for tag in (None, "best", "checkpoint-2", "global_step2"):
        run.add(path, tag)
    assert not (run.directory / TAGS_NAME).exists()


def test_a_tag_is_not_that_of_another_checkpoint_of_the_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run.save(1, "best"), run.save(2)
    run.add(second, "best")
    run.go_back(first)
    monkeypatch.setattr("time.gmtime", lambda *_: (2030, 1, 1, 0, 0, 0, 1, 1, 0))
    again = run.save(2)
    assert find_tag(run.directory, "best") == first
    run.add(again, "other")
    assert json.loads((run.directory / TAGS_NAME).read_text())["checkpoint-2"]["tags"] == ["other"]


@pytest.mark.parametrize(
    "state",
    [
        {"weights": torch.zeros(2)},
        {"weights": torch.ones(2), "more": 1},
        {"weights": torch.ones(2).double()},
        {"weights": [1.0, 1.0]},
    ],
)
def test_another_client_state_of_a_step_is_refused(run: Run, state: Mapping[str, Any]) -> None:
    kept = {"weights": torch.ones(2), "nested": [float("nan"), {"a": (1, "b")}]}
    path = run.save(1, **kept)
    run.add(path, "best", **kept)
    with pytest.raises(UnsupportedError) as caught:
        run.add(path, "other", **{**kept, **state})
    assert caught.value.kind == "client-state"
    with pytest.raises(NotFoundError):
        find_tag(run.directory, "other")


@pytest.mark.parametrize("text", ["[]", '{"checkpoint-1": ["best"]}', '{"checkpoint-1": {"tags": []}}', "{"])
def test_a_file_of_tags_that_is_not_ours_is_refused(run: Run, text: str) -> None:
    path = run.save(1)
    (run.directory / TAGS_NAME).write_text(text)
    for ask in (lambda: find_tag(run.directory, "best"), lambda: run.add(path, "best")):
        with pytest.raises(FormatError) as caught:
            ask()
        assert caught.value.path is not None
    assert (run.directory / TAGS_NAME).read_text() == text
