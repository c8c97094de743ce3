"""How layers move, measured by several ranks together: each says what it holds, and all hear the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmtailor.errors import UnsupportedError, WriteError
from llmtailor.meeting import Meeting
from llmtailor.ranks import Ranks
from ranks.launch import run_ranks
from ranks.rank_threads import Mailbox, together

PROGRAM = Path(__file__).parent / "monitor_trainings.py"
CASES = ["ddp", "ddp-spread", "fsdp"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, object]]]]:
    directory = tmp_path_factory.mktemp("monitor")
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    outputs = run_ranks(PROGRAM, 2, directory, *CASES, environment=environment)
    lines = [[json.loads(line) for line in output.splitlines() if line.startswith('{"case"')] for output in outputs]
    return directory, lines


@pytest.mark.parametrize("case", CASES)
def test_ranks_measure_the_truth_together(measured: tuple[Path, list[list[dict[str, object]]]], case: str) -> None:
    found = json.loads((measured[0] / f"{case}.json").read_text())
    for layer in ("embed", "layers.0", "layers.1", "layers.2", "norm", "head"):
        assert found["first"][f"drift/{layer}"] == pytest.approx(found["truth"][layer], rel=0.06), layer
        assert found["first"][f"gradient/{layer}"] == pytest.approx(found["truth"][f"gradient/{layer}"], rel=1e-4)
        assert found["first"][f"importance/{layer}"] > 0
        assert found["first"][f"update/{layer}"] > 0


def test_every_rank_hears_the_same_and_chooses_the_same(
    measured: tuple[Path, list[list[dict[str, object]]]],
) -> None:
    one, other = measured[1]
    assert len(one) == len(CASES)
    assert one == other
    for each in one:
        first, *later = each["choices"]  # type: ignore[misc]
        assert len(first) == 7  # the buffer that is in no layer, too
        assert all(len(choice) == 2 for choice in later)


def meetings(mailbox: Mailbox, size: int) -> list[Meeting]:
    return [Meeting(Ranks(rank, size, lambda rank=rank: mailbox.connect(rank))) for rank in range(size)]  # type: ignore[misc]


def read(total: bytes | BaseException) -> list[float]:
    assert isinstance(total, bytes), total
    found: list[float] = np.frombuffer(total, np.float32).tolist()
    return found


def ones(count: int = 1) -> bytes:
    return np.ones(count, np.float32).tobytes()


def test_sums_are_the_same_bits_on_all_and_leave_nothing_behind() -> None:
    mailbox = Mailbox()
    values = np.random.default_rng(0).random((3, 50)).astype(np.float32)
    each = meetings(mailbox, 3)
    for _ in range(4):
        sums = together(3, lambda rank: each[rank].add_up(values[rank].tobytes(), None, 5.0))
        assert sums[0] == sums[1] == sums[2]
        assert read(sums[0]) == pytest.approx(values.sum(0), rel=1e-6)
    assert {*mailbox.values, *mailbox.counts} == {"sum/3", "sum/3/count", "sum/3/1", "sum/3/2"}


def test_a_rank_that_cannot_say_stops_the_save_on_all() -> None:
    each = meetings(Mailbox(), 3)
    error = UnsupportedError("no such state", kind="tensor-kind")

    def add_up(rank: int) -> bytes:
        return each[rank].add_up(None if rank == 1 else ones(), error if rank == 1 else None, 5.0)

    outcomes = together(3, add_up)
    assert outcomes[1] is error
    for outcome in (outcomes[0], outcomes[2]):
        assert isinstance(outcome, UnsupportedError)
        assert "rank 1" in str(outcome)
    sums = together(3, lambda rank: each[rank].add_up(ones(), None, 5.0))
    assert [read(total) for total in sums] == [[3.0]] * 3


def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_agreed() -> None:
    first, second, third = meetings(Mailbox(), 3)
    outcomes = together(2, lambda rank: (first, third)[rank].add_up(ones(), None, 0.5))
    # What the late one hears when it comes; then all are in step again.
    for outcome in (*outcomes, *together(1, lambda rank: second.add_up(ones(), None, 0.5))):
        assert isinstance(outcome, WriteError)
        assert outcome.kind == "rank-late"
        assert "rank 1" in str(outcome)
    sums = together(3, lambda rank: (first, second, third)[rank].add_up(ones(), None, 5.0))
    assert [read(total) for total in sums] == [[3.0]] * 3
