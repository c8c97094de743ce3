"""What holds of every strategy, whatever the model, the run and the numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle

from hypothesis import given
from hypothesis import strategies as st

from llmtailor.drift import LayerDrift
from llmtailor.layers import LayerKind
from llmtailor.strategies import Budget, BudgetPerStep, LayerStatus, SaveContext, choose_layers, parse_strategy
from llmtailor.strategies.adaptive import Adaptive, Ranking
from strategies.made_up_runs import Plan, Save, plans, replay


@given(plans())
def test_no_layer_is_older_than_max_age_after_a_save(plan: Plan) -> None:
    for save in replay(plan):
        assert plan.strategy.max_age is None or max(save.ages.values(), default=0) <= plan.strategy.max_age


@given(plans())
def test_first_save_is_full(plan: Plan) -> None:
    first = next(replay(plan))
    assert first.written == {layer.name for layer in plan.model}


def rebuild(context: SaveContext) -> SaveContext:
    """The same context as another process would have it: of values that were written down and read."""
    fields = json.loads(json.dumps(dataclasses.asdict(context)))
    layers = [
        LayerStatus(**each | {"kind": LayerKind(each["kind"]), "drift": each["drift"] and LayerDrift(**each["drift"])})
        for each in fields.pop("layers")
    ]
    return SaveContext(layers=tuple(layers), **fields)


@given(plans())
def test_every_rank_chooses_alike(plan: Plan) -> None:
    others = [parse_strategy(plan.strategy.text), pickle.loads(pickle.dumps(plan.strategy))]
    for save in replay(plan):
        for strategy in others:
            assert choose_layers(strategy, rebuild(save.context)) == save.choices
            assert strategy.interval(plan.model) == plan.strategy.interval(plan.model)


@given(plans(), st.data())
def test_resumed_run_chooses_as_one_that_went_on(plan: Plan, data: st.DataObject) -> None:
    saves = list(replay(plan))
    cut = data.draw(st.integers(1, len(saves)))
    resumed = replay(plan, saves[cut - 1].manifest)
    assert [save.choices for save in resumed] == [save.choices for save in saves[cut:]]


def forced_of(plan: Plan, save: Save) -> set[str]:
    return {layer.name for layer in save.context.layers if plan.strategy.must_write(layer, save.context)}


def nbytes_of(plan: Plan, names: set[str] | frozenset[str]) -> int:
    return sum(layer.nbytes for layer in plan.model if layer.name in names)


@given(plans(kinds="adaptive"))
def test_outer_blocks_and_auxiliary_layers_are_always_written(plan: Plan) -> None:
    strategy = plan.strategy
    assert isinstance(strategy, Adaptive)
    always = strategy.always(plan.model)
    for save in replay(plan):
        forced = forced_of(plan, save) - always
        # A budget goes to layers that are too old first; and BudgetPerStep has what accrued, be that enough or not.
        if not isinstance(strategy, BudgetPerStep) and not (isinstance(strategy, Budget) and forced):
            assert save.written >= always


@given(plans(kinds="adaptive"))
def test_what_is_chosen_is_not_of_score_0(plan: Plan) -> None:
    strategy = plan.strategy
    assert isinstance(strategy, Adaptive)
    for save in replay(plan):
        chosen = save.written - strategy.always(plan.model) - forced_of(plan, save)
        for layer in save.context.layers:
            if layer.name in chosen and isinstance(strategy, Ranking) and strategy.by == "age":
                assert save.context.age_of(layer) > 0
            elif layer.name in chosen:
                assert layer.drift is not None
                numbers = (layer.drift.relative, layer.drift.importance, layer.drift.update)
                assert any(number != 0 for number in numbers if number is not None)


def budget_of(plan: Plan, save: Save) -> int:
    """What a save may write, by the words of the documentation."""
    strategy, context = plan.strategy, save.context
    if isinstance(strategy, BudgetPerStep):
        assert type(strategy.rate) is int
        return strategy.rate * (context.step - (context.previous_step or 0))
    assert isinstance(strategy, Budget)
    if isinstance(strategy.limit, float):
        return math.floor(strategy.limit * sum(layer.nbytes for layer in plan.model))
    assert type(strategy.limit) is int
    return strategy.limit


@given(plans(kinds="budgeted"))
def test_budget_is_exceeded_by_layers_that_are_too_old_alone(plan: Plan) -> None:
    for save in replay(plan):
        forced = forced_of(plan, save)
        assert save.nbytes <= max(budget_of(plan, save), nbytes_of(plan, forced))


@given(plans(kinds="budgeted"))
def test_budget_leaves_out_only_what_does_not_fit_or_did_not_move(plan: Plan) -> None:
    strategy = plan.strategy
    assert isinstance(strategy, Budget | BudgetPerStep)
    for save in replay(plan):
        left = budget_of(plan, save) - save.nbytes
        wanted = strategy.always(plan.model) | {layer.name for layer in strategy.rank(save.context)}
        for layer in plan.model:
            assert layer.name in save.written or layer.name not in wanted or layer.nbytes > left


@given(plans(kinds="budgeted"), st.integers(1, 10**9))
def test_larger_budget_never_writes_fewer_bytes(plan: Plan, more: int) -> None:
    strategy = plan.strategy
    assert isinstance(strategy, Budget | BudgetPerStep)
    for save in replay(plan):
        if isinstance(strategy, Budget):
            larger: Budget | BudgetPerStep = dataclasses.replace(strategy, limit=budget_of(plan, save) + more)
        else:
            assert type(strategy.rate) is int
            larger = dataclasses.replace(strategy, rate=strategy.rate + more)
        assert Save(save.context, choose_layers(larger, save.context)).nbytes >= save.nbytes
