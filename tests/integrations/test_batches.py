"""The position in the data, saved and resumed again and again; whole trainings are in tests/resume."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from llmtailor.integrations.batches import Batches
from llmtailor.integrations.small_files import capture_rng, restore_rng


def new() -> Batches[torch.Tensor]:
    return Batches(DataLoader(torch.arange(8), batch_size=2, shuffle=True))


def resumed(state: dict[str, Any], rng: dict[str, Any]) -> Batches[torch.Tensor]:
    torch.manual_seed(99)
    batches = new()
    batches.load_state_dict(state)
    restore_rng(rng)
    return batches


def test_a_second_resume_is_in_the_epoch_that_the_first_began() -> None:
    torch.manual_seed(0)
    batches = new()
    list(batches)
    batches = resumed(batches.state_dict(), capture_rng())  # saved between two epochs
    epoch = iter(batches)
    used = [next(epoch).tolist() for _ in range(2)]
    state, rng = batches.state_dict(), capture_rng()  # and again in the middle of the second
    rest = [batch.tolist() for batch in epoch]
    assert [batch.tolist() for batch in resumed(state, rng)] == rest
    assert sorted(number for batch in used + rest for number in batch) == list(range(8))


def test_an_epoch_left_by_break_counts() -> None:
    torch.manual_seed(0)
    batches = new()
    for expected in range(3):
        assert batches.epoch == expected
        for number, _ in enumerate(batches):
            if number == 1:
                break
        assert batches.num_used == 2
        state, rng = batches.state_dict(), capture_rng()
        batches = resumed(state, rng)
        list(batches)


def test_epochs_left_by_break_one_after_the_other_count() -> None:
    torch.manual_seed(0)
    batches = new()
    for _ in range(3):
        next(iter(batches))
    assert (batches.epoch, batches.num_used) == (2, 1)
    list(batches)
    assert batches.epoch == 4


def test_position_is_found_again_on_another_number_of_devices() -> None:
    """Loaders draw on the host; the state of devices that are gone is not asked for."""
    torch.manual_seed(0)
    batches = new()
    epoch = iter(batches)
    next(epoch)
    state, rng = batches.state_dict(), capture_rng()
    state["epoch_rng"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 9
    rest = [batch.tolist() for batch in epoch]
    assert [batch.tolist() for batch in resumed(state, rng)] == rest
