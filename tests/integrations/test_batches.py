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
