"""While training goes on, a save is what the state was when it was asked for: bit for bit, and never anything else.

A difference of one bit between a checkpoint and a copy taken at the same moment is a torn checkpoint. The last tests
show that this would be seen: they take the optimizers' hook away.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks

from faults import open_descriptors
from llmtailor import checkpointer
from llmtailor.errors import IntegrityError, SaveFailedWarning
from llmtailor.storage import list_checkpoints
from llmtailor.verify import verify_checkpoint
from llmtailor.writer.copying import ImageReader
from llmtailor.writer.handle import SaveHandle
from llmtailor.writer.pool import MIN_POOL_NBYTES
from llmtailor.writer.saving import Saving
from writer.trainings import OPTIMIZERS, Gate, Training

ONE_TENSOR = 96 * 48 * 4

CASES: dict[str, dict[str, Any]] = {
    "one at a time": {},
    "fused": {"optimizer_name": "fused"},
    "plain loop over parameters": {"optimizer_name": "plain"},
    "momentum, bf16": {"optimizer_name": "momentum", "dtype": torch.bfloat16},
    "bf16": {"dtype": torch.bfloat16},
    "fused, bf16": {"optimizer_name": "fused", "dtype": torch.bfloat16},
    "amsgrad, pool of one tensor": {"optimizer_name": "amsgrad", "options": {"pool_nbytes": ONE_TENSOR}},
    "smallest pool": {"options": {"pool_nbytes": MIN_POOL_NBYTES}},
    "smallest pool, fused": {"optimizer_name": "fused", "options": {"pool_nbytes": MIN_POOL_NBYTES}},
    "three in flight": {"options": {"max_in_flight": 3}},
    "three in flight, one tensor": {"options": {"max_in_flight": 3, "pool_nbytes": ONE_TENSOR}},
    "parity, links resolved late": {"options": {"strategy": "parity", "max_in_flight": 2}},
    "parity, three in flight, smallest pool": {
        "options": {"strategy": "parity", "max_in_flight": 3, "pool_nbytes": MIN_POOL_NBYTES}
    },
    "blocking": {"options": {"capture": "blocking"}},
}


def train_and_compare(directory: Path, num_saves: int, **how: Any) -> Training:
    """Save after every step but a few, while the optimizer works in place as fast as it can."""
    training = Training(directory=directory / "run", **how)
    chance = random.Random(1)
    for _ in range(num_saves):
        training.train(chance.choice([1, 1, 1, 2]))
        training.save()
    for handle in training.handles:
        path = handle.result()
        training.check(path)
        assert verify_checkpoint(path).is_good
    training.close()
    assert [entry.step for entry in list_checkpoints(training.directory)] == sorted(training.states)
    return training


@pytest.mark.parametrize("case", CASES)
def test_a_save_is_the_state_at_the_moment_it_was_asked_for(fast_directory: Path, case: str) -> None:
    train_and_compare(fast_directory, 12, **CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_hundred_saves_are_the_state_at_the_moment_each_was_asked_for(fast_directory: Path, case: str) -> None:
    before = open_descriptors()
    train_and_compare(fast_directory, 200, **CASES[case])
    assert open_descriptors() == before


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_a_slow_capture_holds_the_optimizer_up_and_nothing_else(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, optimizer_name: str
) -> None:
    """Forward and backward, which change buffers, run while the capture has not begun; the step waits for its end."""
    training = Training(directory=fast_directory / "run", optimizer_name=optimizer_name)
    training.train()
    gate = Gate(monkeypatch)
    handle = training.save()
    gate.wait_until_reached()
    for _ in range(3):
        training.backward()
    assert handle.state == "capturing"
    before = training.state()
    stepped = []

    def open_later() -> None:
        time.sleep(0.1)
        stepped.append(any(not torch.equal(before[name], value) for name, value in training.state().items()))
        gate.open()

    opener = threading.Thread(target=open_later)
    opener.start()
    training.optimizer.step()
    opener.join()
    assert stepped == [False], "the step did not wait"
    training.check(handle.result())
    assert handle.stats is not None
    assert handle.stats.stall_secs > 0.09
    training.close()


def test_the_hook_is_for_every_optimizer_of_the_process(fast_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the run was not told of may change its model, too; one made before or after the run."""
    training = Training(directory=fast_directory / "run")
    stranger = torch.optim.SGD(training.model.parameters(), lr=0.1)
    training.train()
    training.backward()
    gate = Gate(monkeypatch)
    handle = training.save()
    gate.wait_until_reached()
    threading.Timer(0.1, gate.open).start()
    stranger.step()
    training.check(handle.result())
    training.close()


def test_a_closed_run_holds_no_optimizer_up(fast_directory: Path) -> None:
    before = len(_global_optimizer_pre_hooks)
    training = Training(directory=fast_directory / "run")
    assert len(_global_optimizer_pre_hooks) == before + 1
    training.close()
    assert len(_global_optimizer_pre_hooks) == before


# Without the hook


class NoHook:
    def remove(self) -> None:
        pass


@pytest.fixture
def _no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing holds optimizers up, and copying is slow."""
    monkeypatch.setattr(checkpointer, "hold_back", lambda engine, gradients: NoHook())
    fill = ImageReader.fill

    def fill_slowly(reader: ImageReader, piece: Any, nbytes: int) -> None:
        time.sleep(0.005)
        fill(reader, piece, nbytes)

    monkeypatch.setattr(ImageReader, "fill", fill_slowly)


def outcome(training: Training, handle: SaveHandle) -> str:
    try:
        training.check(handle.result())
    except IntegrityError as err:
        return err.kind
    except AssertionError:
        return "torn"
    return "same"


@pytest.mark.usefixtures("_no_hook")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_without_the_hook_a_step_that_comes_too_early_is_noticed(
    fast_directory: Path, optimizer_name: str, dtype: torch.dtype
) -> None:
    training = Training(directory=fast_directory / "run", optimizer_name=optimizer_name, dtype=dtype)
    training.train()
    handle = training.save()
    training.train(2)
    assert outcome(training, handle) == "changed-during-capture"
    assert list_checkpoints(training.directory) == []
    with pytest.warns(SaveFailedWarning, match="changed while it was being captured"):
        training.checkpointer.collect()
    later = training.save()  # captured before it returns, now
    training.train(2)
    assert later.error is None
    assert outcome(training, later) == "same"
    training.close()


@pytest.mark.usefixtures("_no_hook")
def test_without_hook_and_without_watch_checkpoints_are_torn_and_the_comparison_sees_it(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Saving, "check_unchanged", lambda self: None)
    training = Training(directory=fast_directory / "run", options={"max_in_flight": 3})
    for _ in range(5):
        training.train()
        training.save()
    outcomes = [outcome(training, handle) for handle in training.handles]
    training.close()
    assert outcomes.count("torn") >= 3, outcomes
