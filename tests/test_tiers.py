"""Two tiers behind one Checkpointer: which one resume takes, what durable means, and branches that were left."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtailor import Run
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import InvalidInputError, SaveFailedWarning, SupersededWarning, WriteError
from llmtailor.retention import Keep
from llmtailor.storage import PINS_NAME, LocalFileSystem, add_pin, list_checkpoints
from llmtailor.verify import verify_checkpoint
from llmtailor.writer import SaveState
from tiny_models import assert_same, build_llama, snapshot_model, snapshot_optimizer, token_rows


class Loop:
    def __init__(self, run: Path, mirror: Path, **options: Any) -> None:
        self.model = build_llama(num_layers=2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.run = Run(run, self.model, self.optimizer, mirror=mirror, **options)

    def train_to(self, step: int) -> Any:
        batch = token_rows()[step : step + 2]
        self.model(input_ids=batch, labels=batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.run.save(step)

    def state(self) -> dict[str, Any]:
        return snapshot_model(self.model) | snapshot_optimizer(self.model, self.optimizer)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "local" / "run", tmp_path / "shared" / "run"


def steps(directory: Path) -> list[int]:
    return [entry.step for entry in list_checkpoints(directory)]


def test_resume_takes_the_mirror_when_the_machine_is_gone(places: tuple[Path, Path]) -> None:
    local, mirror = places
    loop = Loop(local, mirror, durable="mirror")
    for step in (1, 2, 3):
        assert loop.train_to(step).result() == local / f"checkpoint-{step}"
    expected = loop.state()
    loop.run.close()
    shutil.rmtree(local)

    resumed = Loop(local, mirror, strategy="parity")
    assert resumed.run.resume() == 3
    assert_same(resumed.state(), expected)
    resumed.train_to(4).result()
    resumed.run.close()
    assert verify_checkpoint(local / "checkpoint-4").is_good
    assert verify_checkpoint(mirror / "checkpoint-4").is_good
    assert steps(mirror) == [1, 2, 3, 4], "the run goes on; nothing of it was set aside"


def test_resume_takes_whichever_tier_is_newer(places: tuple[Path, Path]) -> None:
    local, mirror = places
    loop = Loop(local, mirror, durable="mirror", keep=1, mirror_keep=3)
    for step in (1, 2, 3, 4):
        loop.train_to(step).result()
    loop.run.close()
    assert (steps(local), steps(mirror)) == ([4], [2, 3, 4])
    shutil.rmtree(local / "checkpoint-4")
    resumed = Loop(local, mirror)
    assert resumed.run.resume() == 4
    resumed.run.close()


def test_branch_that_was_left_is_set_aside_in_the_mirror_before_the_new_one_is_published(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    local, mirror = places
    loop = Loop(local, mirror, durable="mirror")
    for step in (1, 2, 3):
        loop.train_to(step).result()
    loop.run.close()

    again = Loop(local, mirror)
    assert again.run.resume(local / "checkpoint-1") == 1
    # The process dies after the publish, before the copy.
    monkeypatch.setattr("llmtailor.tiers.Tiers.follow_up", lambda *_: None)
    again.train_to(2).result()
    with pytest.warns(SupersededWarning):
        again.run.close()
    expected = again.state()
    monkeypatch.undo()

    resumed = Loop(local, mirror)
    assert resumed.run.resume() == 2
    assert_same(resumed.state(), expected)
    resumed.run.close()


def fail_in(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing can be created there."""
    create = LocalFileSystem.create

    def full(self: LocalFileSystem, path: Path, mode: int = 0o444) -> int:
        if path.is_relative_to(directory):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return create(self, path, mode)

    monkeypatch.setattr(LocalFileSystem, "create", full)


def test_full_mirror_only_warns_where_local_is_durable(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    local, mirror = places
    loop = Loop(local, mirror)
    fail_in(mirror, monkeypatch)
    handle = loop.train_to(1)
    assert handle.result() == local / "checkpoint-1"
    with pytest.warns(SaveFailedWarning, match="could not be mirrored"):
        loop.run.close()
    assert handle.state is SaveState.PUBLISHED
    assert steps(local) == [1]


def test_full_mirror_is_a_failed_save_where_the_mirror_counts(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    local, mirror = places
    loop = Loop(local, mirror, durable="mirror")
    with monkeypatch.context() as patch:
        fail_in(mirror, patch)
        with pytest.raises(WriteError):
            loop.train_to(1).result()
    with pytest.warns(SaveFailedWarning, match="checkpoint-1 was not saved"):
        handle = loop.train_to(2)
    handle.result()
    assert handle.state is SaveState.MIRRORED
    loop.run.close()
    assert (steps(local), steps(mirror)) == ([1, 2], [2])


def test_checkpoint_on_its_way_to_the_mirror_is_not_removed(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    local, mirror = places
    loop = Loop(local, mirror, keep=1)
    for step in range(1, 6):
        loop.train_to(step)
    loop.run.close()
    assert steps(local)[-1] == 5
    assert steps(mirror)[-1] == 5
    assert all(verify_checkpoint(mirror / f"checkpoint-{step}").is_good for step in steps(mirror))


def contents(directory: Path) -> dict[int, str]:
    return {entry.step: open_checkpoint(entry.path).manifest.contents for entry in list_checkpoints(directory)}


def test_rules_of_the_run_are_applied_after_each_publish(places: tuple[Path, Path]) -> None:
    local, mirror = places
    loop = Loop(local, mirror, durable="mirror", keep="last=2, every=4, optimizer=1, consistent=no", mirror_keep=3)
    for step in range(1, 8):
        published = loop.train_to(step).result()
        assert open_checkpoint(published).manifest.contents == "full"
    loop.run.close()
    assert contents(local) == {4: "weights", 6: "weights", 7: "full"}
    assert contents(mirror) == {5: "full", 6: "full", 7: "full"}


def test_optimizer_state_goes_while_other_saves_are_in_flight(places: tuple[Path, Path]) -> None:
    local, mirror = places
    keep = Keep(optimizer=1, consistent=False)
    loop = Loop(local, mirror, strategy="parity", max_in_flight=3, pool_nbytes=2**17, keep=keep)
    for step in range(1, 13):
        loop.train_to(step)
    loop.run.close()
    assert steps(local) == list(range(1, 13))
    found = [contents(local)[step] for step in steps(local)]
    assert found[-1] == "full"
    assert found.count("weights") >= 6
    assert all(verify_checkpoint(local / f"checkpoint-{step}").is_good for step in steps(local))
    assert set(contents(mirror).values()) == {"full"}
    expected = loop.state()
    resumed = Loop(local, mirror, strategy="full")
    assert resumed.run.resume() == 12
    resumed.run.close()
    assert resumed.state().keys() == expected.keys()


def test_the_mirror_has_the_state_that_the_first_directory_gave_up(places: tuple[Path, Path]) -> None:
    local, mirror = places
    loop = Loop(local, mirror, durable="mirror", keep=Keep(optimizer=1, consistent=False))
    expected = {}
    for step in (1, 2, 3, 4):
        loop.train_to(step).result()
        expected[step] = loop.state()
    loop.run.close()
    assert contents(local)[2] == "weights"
    for place in places:
        for step in (3, 4):
            shutil.rmtree(place / f"checkpoint-{step}")
    resumed = Loop(local, mirror)
    assert resumed.run.resume() == 2
    assert_same(resumed.state(), expected[2])
    resumed.run.close()


def test_pins_are_read_at_each_publish(places: tuple[Path, Path]) -> None:
    local, mirror = places
    loop = Loop(local, mirror, durable="mirror", keep=1, mirror_keep=1)
    for step in (1, 2, 3, 4):
        loop.train_to(step).result()
        if step == 1:
            add_pin(local, 1)
    add_pin(local, 9)
    loop.run.close()
    assert (steps(local)[0], steps(local)[-1], steps(mirror)) == (1, 4, [4])


def test_pin_that_cannot_be_read_is_told_and_nothing_is_removed(places: tuple[Path, Path]) -> None:
    local, mirror = places
    loop = Loop(local, mirror, keep=1)
    loop.train_to(1).result()
    (local / PINS_NAME).mkdir()
    (local / PINS_NAME / "best").touch()
    loop.train_to(2).result()
    with pytest.warns(SaveFailedWarning, match="cannot tell which checkpoint is pinned"):
        loop.run.close()
    assert steps(local) == [1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"keep": "lats=3"},
        {"keep": "3, every=1000"},
        {"keep": 2.5},
        {"capture": "eager"},
        {"max_in_flight": 0},
        {"when_busy": "drop"},
        {"durable": "remote"},
        {"durable": "mirror"},
        {"mirror_keep": 2},
        {"pool_nbytes": 100},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(InvalidInputError):
        Run(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    Run(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1)).close()
