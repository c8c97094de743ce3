"""What several ranks cannot agree on without talking is refused, before anything is opened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtailor.checkpointer import Checkpointer
from llmtailor.codecs import parse_rest
from llmtailor.engine_options import refuse_interval
from llmtailor.errors import InvalidInputError, UnsupportedError
from llmtailor.integrations.lightning import TailorCallback
from llmtailor.integrations.preemption import check_on_ranks
from llmtailor.interval import Interval
from llmtailor.live_state import LiveReader
from llmtailor.ranks import Ranks
from llmtailor.save_plan import plan_save
from llmtailor.strategies import parse_strategy


def silent() -> Any:
    raise AssertionError("nobody is to be asked")


@pytest.mark.parametrize(("option", "value"), [("max_in_flight", 2), ("when_busy", "skip")])
def test_what_depends_on_the_moment(option: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        Checkpointer(tmp_path / "run", ranks=Ranks(0, 2, silent), **{option: value})  # type: ignore[arg-type]
    assert caught.value.kind == "ranks-option"
    assert option in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), True, "long"])
def test_deadlines_that_make_no_sense(timeout: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Checkpointer(tmp_path / "run", commit_timeout_secs=timeout)
    assert "commit_timeout_secs" in str(caught.value)


def test_a_last_save_at_the_signal() -> None:
    check_on_ranks({"on_sigterm": "save"}, None)
    with pytest.raises(UnsupportedError):
        check_on_ranks({"on_sigterm": "save"}, Ranks(1, 2, silent))


def test_codes_of_what_is_spread_over_ranks() -> None:
    live = LiveReader().read(torch.nn.Linear(4, 4), ())
    options: dict[str, Any] = {
        "step": 1,
        "contents": "weights",
        "strategy": parse_strategy("full"),
        "rest": parse_rest("q8"),
        "parent": None,
        "is_linkable": lambda layer, files: True,
    }
    plan_save(live, **options)
    with pytest.raises(UnsupportedError) as caught:
        plan_save(replace(live, layout="xxh3_128:" + "0" * 32), **options)
    assert caught.value.kind == "sharded-codes"


def test_an_interval_is_for_what_saves_by_itself(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="interval has no say here"):
        TailorCallback(tmp_path, interval="auto")
    with pytest.raises(InvalidInputError, match="interval has no say here"):
        refuse_interval({"interval": Interval(mtbf_hours=3)})
    refuse_interval({"interval": None})
