"""Strategies that look at how layers move: what they choose, in which order, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import pytest

from llmtailor.drift import LayerDrift
from llmtailor.errors import InvalidInputError
from llmtailor.layers import LayerKind
from llmtailor.strategies import Budget, Drift, Monitored, SaveContext, Strategy, TopK
from llmtailor.strategies.adaptive import Adaptive
from strategies.made_up_runs import Plan, Save, context_of, make_blocks, make_layer, moved, replay

BARE = {"first": 0, "last": 0, "auxiliary": False}
"""Arguments that leave all blocks, embeddings and heads to be chosen."""


def names(*indices: int) -> set[str]:
    return {f"layers.{index}" for index in indices}


def refuse(strategy: Strategy, context: SaveContext) -> InvalidInputError:
    with pytest.raises(InvalidInputError) as caught:
        strategy.select(context)
    assert None not in (caught.value.expected, caught.value.found, caught.value.hint)
    return caught.value


# ---- What is always written ----


MODEL = (
    make_layer("embed", LayerKind.EMBEDDING, drift=moved()),
    *make_blocks(*[moved()] * 4),
    *(dataclasses.replace(each, name=f"vision.{each.index}", stack="vision") for each in make_blocks(*[moved()] * 3)),
    make_layer("norm", LayerKind.OTHER, drift=moved()),
    make_layer("head", LayerKind.HEAD, drift=moved()),
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"embed", "head", "norm", "layers.0", "layers.3", "vision.0", "vision.2"}),
        ({"first": 2, "last": 0}, {"embed", "head", "norm", "layers.0", "layers.1", "vision.0", "vision.1"}),
        ({"auxiliary": False}, {"norm", "layers.0", "layers.3", "vision.0", "vision.2"}),
        (BARE, {"norm"}),
    ],
)
def test_ends_of_stacks_and_auxiliary_layers_are_always_written(
    arguments: Mapping[str, int], expected: set[str]
) -> None:
    strategy = Drift(0.5, **arguments)
    assert strategy.always(MODEL) == expected
    assert strategy.select(context_of(MODEL)) == expected
    assert {layer.name for layer in strategy.others(MODEL)} == {layer.name for layer in MODEL} - expected


def test_what_is_always_written_needs_no_measurement() -> None:
    model = [dataclasses.replace(layer, drift=None) for layer in MODEL]
    assert Drift(0.5, first=9).select(context_of(model)) == {layer.name for layer in model}


# ---- The order ----


def of_importance(*values: float | None) -> list[LayerDrift]:
    return [moved(importance=value) for value in values]


@pytest.mark.parametrize(
    ("k", "importance", "expected"),
    [
        (1, (1.0, 3.0, 2.0), names(1)),
        (2, (1.0, 3.0, 2.0), names(1, 2)),
        (9, (1.0, 3.0, 2.0), names(0, 1, 2)),
        (2, (0.0, 3.0, 0.0), names(1)),
        (1, (math.inf, math.nan, 2.0), names(1)),
        (2, (math.nan, 1e300, math.inf), names(0, 2)),
        (1, (2.0, 2.0, 2.0), names(0)),
    ],
)
def test_top_k_takes_the_highest_scores(k: int, importance: tuple[float, ...], expected: set[str]) -> None:
    assert TopK(k, **BARE).select(context_of(make_blocks(*of_importance(*importance)))) == expected


def test_top_k_looks_at_what_it_is_told_to() -> None:
    drifts = [moved(0.1, importance=3.0), moved(0.3, importance=1.0), moved(0.2, importance=2.0)]
    blocks = make_blocks(*drifts)
    aged = [dataclasses.replace(block, saved_step=at) for block, at in zip(blocks, (50, 40, 30), strict=True)]
    assert TopK(1, by="importance", **BARE).select(context_of(aged)) == names(0)
    assert TopK(1, by="drift", **BARE).select(context_of(aged)) == names(1)
    assert TopK(1, by="age", **BARE).select(context_of(aged)) == names(2)


def test_equals_go_by_age_and_then_in_the_order_of_the_model() -> None:
    blocks = make_blocks(*[moved()] * 4)
    aged = [dataclasses.replace(block, saved_step=at) for block, at in zip(blocks, (50, 40, 60, 40), strict=True)]
    chosen = [TopK(k, **BARE).select(context_of(aged)) for k in (1, 2, 3)]
    assert chosen == [names(1), names(1, 3), names(1, 3, 0)]
    assert TopK(1, by="age", **BARE).select(context_of(aged[::-1])) == names(3)


def test_layer_saved_at_this_very_step_has_no_age() -> None:
    assert TopK(3, by="age", **BARE).select(context_of(make_blocks(None, None, saved=100))) == set()


# ---- Thresholds ----


@pytest.mark.parametrize(("relative", "is_written"), [(0.0, False), (0.1, False), (0.11, True), (math.inf, True)])
def test_drift_writes_what_moved_further_than_the_threshold(relative: float, is_written: bool) -> None:
    context = context_of(make_blocks(moved(relative, importance=None, update=None)))
    assert Drift(0.1, **BARE).select(context) == (names(0) if is_written else set())


@pytest.mark.parametrize("strategy", [Drift(1e9, **BARE), Monitored(1e9, end=1e9, **BARE)])
def test_diverged_layer_exceeds_every_threshold(strategy: Strategy) -> None:
    assert strategy.select(context_of(make_blocks(moved(math.nan, update=math.nan), moved(0.1)))) == names(0)


def test_monitored_threshold_decays_from_start_to_end() -> None:
    strategy = Monitored(0.1, end=0.01, decay=50)
    assert strategy.threshold_at(0) == 0.1
    assert strategy.threshold_at(50) == pytest.approx(0.01 + 0.09 / math.e)
    assert strategy.threshold_at(10**9) == 0.01
    assert Monitored(0.1, end=0.1, decay=1e-300).threshold_at(10**6) == 0.1


@pytest.mark.parametrize(("step", "expected"), [(90, set()), (120, names(0))])
def test_monitored_writes_large_updates(step: int, expected: set[str]) -> None:
    # 0.01 + 0.09 * exp(-100 / 50) = 0.0222 at step 100.
    context = context_of(make_blocks(moved(update=0.022), moved(update=0.01)), step=step)
    assert Monitored(0.1, end=0.01, decay=50, **BARE).select(context) == expected


def test_layer_that_its_optimizer_never_saw_has_no_update() -> None:
    context = context_of(make_blocks(moved(0.0, update=None), moved(0.1, update=1.0)))
    assert Monitored(0.1, **BARE).select(context) == names(1)


# ---- What is refused ----

ADAPTIVE: list[Callable[..., Adaptive]] = [
    lambda **more: TopK(2, **more),
    lambda **more: Drift(0.1, **more),
    lambda **more: Budget(0.5, **more),
    lambda **more: Monitored(0.1, **more),
]


@pytest.mark.parametrize("make", ADAPTIVE)
@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"first": -1}, "argument-range", "first"),
        ({"last": 1.0}, "argument-type", "last"),
        ({"auxiliary": 1}, "argument-type", "auxiliary"),
        ({"auxiliary": "yes"}, "argument-type", "True or False"),
        ({"max_age": 0}, "argument-range", "max_age"),
        ({"max_age": None}, "argument-type", "max_age"),
    ],
)
def test_common_arguments_that_make_no_sense_are_refused(
    make: Callable[..., Adaptive], arguments: dict[str, object], kind: str, said: str
) -> None:
    with pytest.raises(InvalidInputError, match=said) as caught:
        make(**arguments)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (lambda: TopK(0), "argument-range", "at least 1"),
        (lambda: TopK(2.0), "argument-type", "2.0"),  # type: ignore[arg-type]
        (lambda: TopK(2, by="Importence"), "argument-range", 'did you mean by="importance"'),  # codespell:ignore
        (lambda: TopK(2, by="size"), "argument-range", '"importance", "drift", "age"'),
        (lambda: TopK(2, by=1), "argument-type", 'by="importance"'),  # type: ignore[arg-type]
        (lambda: Drift(0), "argument-range", "above 0"),
        (lambda: Drift(-0.1), "argument-range", "-0.1"),
        (lambda: Drift(math.nan), "argument-range", "nan"),
        (lambda: Drift(math.inf), "argument-range", "inf"),
        (lambda: Drift(10**400), "argument-range", "above 0"),
        (lambda: Drift(True), "argument-type", "True"),
        (lambda: Drift("0.1"), "argument-type", "'0.1'"),  # type: ignore[arg-type]
        (lambda: Monitored(0), "argument-range", "start"),
        (lambda: Monitored(1e-6), "argument-range", "below 'end'"),
        (lambda: Monitored(0.1, end=0), "argument-range", "end"),
        (lambda: Monitored(0.1, decay=-1), "argument-range", "decay"),
    ],
)
def test_own_arguments_that_make_no_sense_are_refused(make: Callable[[], Strategy], kind: str, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said) as caught:
        make()
    assert caught.value.kind == kind


@pytest.mark.parametrize("strategy", [TopK(2), TopK(2, by="drift"), Drift(0.1), Budget(1.0), Monitored(0.1)])
def test_strategy_that_nobody_measures_for_says_so(strategy: Strategy) -> None:
    assert strategy.needs_drift
    # At the first save, not at the second.
    error = refuse(strategy, context_of(make_blocks(*[None] * 4, saved=None), save_index=0))
    assert (error.kind, error.layer) == ("no-drift", "layers.1")
    assert "layers.1, layers.2" in str(error)


def test_drift_that_is_not_known_is_not_measured() -> None:
    unknown = dataclasses.replace(moved(), relative=None)
    error = refuse(TopK(2, **BARE), context_of(make_blocks(moved(), unknown)))
    assert (error.kind, error.layer) == ("no-drift", "layers.1")


@pytest.mark.parametrize("strategy", [TopK(2, by="age", **BARE), Budget(1.0, by="age", **BARE)])
def test_age_needs_no_measurement(strategy: Strategy) -> None:
    assert not strategy.needs_drift
    assert strategy.select(context_of(make_blocks(None, None))) == names(0, 1)


@pytest.mark.parametrize("strategy", [TopK(2), Budget(1.0)])
def test_importance_that_the_optimizer_does_not_tell_is_refused(strategy: Strategy) -> None:
    blocks = make_blocks(*of_importance(None, 1.0, *[None] * 9))
    error = refuse(strategy, context_of(blocks))
    assert (error.kind, error.layer) == ("no-importance", "layers.2")
    assert 'by="drift"' in str(error)
    # The ends are written anyhow, so their importance is nobody's concern.
    assert "layers.2, layers.3, layers.4, layers.5, layers.6 and 3 more" in str(error)
    assert dataclasses.replace(strategy, by="drift").select(context_of(blocks))


def test_update_that_the_optimizer_does_not_tell_is_refused() -> None:
    error = refuse(Monitored(0.1, **BARE), context_of(make_blocks(moved(0.1), moved(0.1, update=None))))
    assert (error.kind, error.layer) == ("no-update", "layers.1")


# ---- Why budgets ----


def decaying_run(strategy: Strategy) -> list[Save]:
    """Sixteen blocks that drift by 1/step per step, some a little more than others, saved at every tenth step."""
    model = make_blocks(*[None] * 16, saved=None)
    saves: list[Save] = []
    saved = {layer.name: 0 for layer in model}
    for step in range(10, 2010, 10):
        drifts = {
            layer.name: moved((1 + 0.01 * (layer.index or 0)) * math.log((step + 10) / (saved[layer.name] + 10)))
            for layer in model
        }
        # As far as is known: how layers moved until the next save depends on what this one writes.
        past: list[tuple[int, dict[str, LayerDrift]]] = [(save.context.step, {}) for save in saves]
        plan = Plan(model, strategy, (*past, (step, drifts)))
        saves += replay(plan, saves[-1].manifest if saves else None)
        saved |= {name: step - age for name, age in saves[-1].ages.items()}
    return saves


def worst_age(saves: list[Save]) -> int:
    return max(max(save.ages.values()) for save in saves)


def test_threshold_floods_early_and_starves_later_where_a_budget_does_neither() -> None:
    full = 16 * 10
    by_threshold = decaying_run(Drift(0.1, **BARE))
    by_budget = decaying_run(Budget(0.25, by="drift", **BARE))
    # While layers move fast, every save is full; once they move slowly, layers wait, the longer the later.
    assert [save.nbytes for save in by_threshold[:8]] == [full] * 8
    assert sum(save.nbytes for save in by_threshold[100:]) < 100 * full // 10
    assert worst_age(by_threshold[100:]) > 150
    # A quarter of the layers at every save, so each at every fourth.
    assert {save.nbytes for save in by_budget[1:]} == {full // 4}
    assert worst_age(by_budget) == 30
