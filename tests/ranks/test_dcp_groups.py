"""DCP by a process group of its own, and a rank of it that sees storage late; on real gloo ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from llmtailor.integrations.dcp import TailorPlanner, TailorReader, TailorWriter
from llmtailor.integrations.dcp import reader as reader_module
from llmtailor.verify import verify_checkpoint
from ranks.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

PROGRAM = Path(__file__).parent / "dcp_groups.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("groups")
    run_ranks(PROGRAM, 3, found, timeout_secs=120)
    return found


@pytest.fixture(scope="module")
def told(directory: Path) -> list[Any]:
    return [json.loads((directory / f"told-{rank}.json").read_text()) for rank in (1, 2)]


def test_a_rank_that_sees_the_newest_checkpoint_late_fails_one_save(told: list[Any], directory: Path) -> None:
    for saves in (each["saves"] for each in told):
        assert "the checkpoints that ranks follow differ: rank 1 has step 3" in saves[2]
        assert "Stale file handle" in saves[6]
        assert [number for number, each in enumerate(saves, 1) if each != "saved"] == [3, 7]
    for step in (1, 2, 4, 5, 6, 8, 9):
        assert verify_checkpoint(directory / "run" / f"checkpoint-{step}").is_good


def test_a_group_that_is_not_of_all_ranks_loads_what_it_saved(told: list[Any]) -> None:
    assert told[0]["loaded"] == told[1]["loaded"]
    assert set(told[0]["loaded"].values()) <= {90.0, 91.0, 92.0, 80.0, 81.0, 82.0}


def test_headers_are_read_once_for_all_numbers_of_an_optimizers_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = TailorPlanner("full")
    writer = TailorWriter(tmp_path / "run", planner)
    model = {f"a.{layer}.w": torch.ones(2) for layer in range(4)}
    state = {name: {"count": 3, "mean": torch.ones(2)} for name in model}
    whole = {"model": model, "optim": {"state": state, "param_groups": [{"lr": 0.1, "params": [*model]}]}}
    dcp.save(whole, checkpoint_id="1", storage_writer=writer, planner=planner)
    writer.close()
    read, calls = reader_module.read_saved_states, []
    monkeypatch.setattr(reader_module, "read_saved_states", lambda found: calls.append(found) or read(found))
    for values in state.values():
        values["count"] = 0
    dcp.load(whole, storage_reader=TailorReader(tmp_path / "run"))
    assert [values["count"] for values in state.values()] == [3, 3, 3, 3]
    assert len(calls) == 1
