"""Several strategies side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from estimate.real_runs import tensors_of
from llmtailor.codecs import parse_rest
from llmtailor.errors import InvalidInputError, UnsupportedError
from llmtailor.estimate import Schedule, Training, estimate_runs, list_strategies, measure_layers
from llmtailor.strategies.text import _STRATEGIES

SCHEDULE = Schedule(steps=1600, every=100)


def test_every_built_in_strategy_is_in_the_table(tmp_path: Path) -> None:
    texts = list_strategies(measure_layers(tensors_of("llama", tmp_path), Training()), SCHEDULE)
    assert {text.partition("(")[0] for text in texts} == {*_STRATEGIES}


def test_without_a_choice_all_are_estimated_or_refused_with_a_reason(tmp_path: Path) -> None:
    found = estimate_runs(tensors_of("llama", tmp_path), SCHEDULE)
    shown = [run.label.partition("(")[0] for run in found.runs]
    left_out = {refusal.label.partition("(")[0]: refusal.what for refusal in found.refusals}
    assert {*shown, *left_out} == {*_STRATEGIES}
    # Embedding, head and outer blocks are more than half of so small a model.
    assert left_out == {"budget": "the budget is too small for the layers that every save writes"}
    assert found.training == Training()
    assert found.ratio(found.full) == 1.0


def test_a_strategy_that_was_asked_for_is_not_left_out(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        estimate_runs(tensors_of("llama", tmp_path), SCHEDULE, strategies=["budget(0.5)"])
    assert caught.value.kind == "budget-too-small"


def test_assumed_drift_is_told_where_it_counts(tmp_path: Path) -> None:
    strategies = ["parity", "drift(0.02)", 'top_k(2, by="age")', "monitored(0.01)"]
    found = estimate_runs(tensors_of("llama", tmp_path), SCHEDULE, strategies=strategies)
    assert [run.is_drift_assumed for run in found.runs] == [False, True, False, True]
    fast = estimate_runs(tensors_of("llama", tmp_path), SCHEDULE, strategies=strategies, drift_per_step=1e-3)
    more = [one.run_nbytes > other.run_nbytes for one, other in zip(fast.runs, found.runs, strict=True)]
    assert more[:3] == [False, True, False]


def test_own_steps_are_told(tmp_path: Path) -> None:
    model = tensors_of("llama", tmp_path)
    strategies = ["full", "budget_per_step(1000000)"]
    runs = estimate_runs(model, SCHEDULE, strategies=strategies).runs
    assert [run.has_own_steps for run in runs] == [False, True]


def test_codes_of_sharded_layers_are_refused_as_a_run_refuses_them(tmp_path: Path) -> None:
    model = tensors_of("llama", tmp_path)
    with pytest.raises(UnsupportedError) as caught:
        estimate_runs(model, SCHEDULE, rest=parse_rest("q8"), ranks=2)
    assert caught.value.kind == "sharded-codes"


def test_a_run_without_saves_is_all_zeros(tmp_path: Path) -> None:
    found = estimate_runs(tensors_of("llama", tmp_path), Schedule(steps=5, every=10), strategies=["parity"])
    (run,) = found.runs
    assert (run.saves, run.run_nbytes, run.mean_nbytes, run.min_nbytes, run.max_nbytes) == ((), 0, 0.0, 0, 0)
    assert (run.disk_nbytes, run.peak_disk_nbytes, run.max_staleness, found.ratio(run)) == (0, 0, 0, 0.0)
