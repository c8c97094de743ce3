"""Budgets, in bytes per save and per step: what fits, in which order, what is too small, and when to save."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest

from llmtailor.errors import InvalidInputError
from llmtailor.layers import LayerKind
from llmtailor.strategies import Budget, BudgetPerStep, LayerStatus, Strategy, choose_layers
from strategies.made_up_runs import Model, context_of, make_blocks, make_layer, moved

BARE = {"first": 0, "last": 0, "auxiliary": False}


def names(*indices: int) -> set[str]:
    return {f"layers.{index}" for index in indices}


def blocks_of(*scored: tuple[int, float]) -> Model:
    """Blocks of these sizes and scores."""
    drifts = [moved(score, importance=score) for _, score in scored]
    return make_blocks(*drifts, nbytes=[nbytes for nbytes, _ in scored])


def saved_at(layers: Model, *steps: int | None) -> Model:
    return tuple(dataclasses.replace(layer, saved_step=step) for layer, step in zip(layers, steps, strict=True))


# ---- What fits ----


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (60, names(0, 1, 2)),
        (59, names(0, 1)),
        (30, names(0, 1)),
        (29, names(1)),
        (10, names(1)),
        (9, set()),
        (1.0, names(0, 1, 2)),
        (0.5, names(0, 1)),
        ("60B", names(0, 1, 2)),
        ("0.03 kB", names(0, 1)),
        ("1KiB", names(0, 1, 2)),
    ],
)
def test_budget_takes_what_fits(limit: float | str, expected: set[str]) -> None:
    # Per byte the scores are 0.1, 0.5 and 0.05.
    context = context_of(blocks_of((20, 2.0), (10, 5.0), (30, 1.5)))
    assert Budget(limit, **BARE).select(context) == expected


def test_importance_counts_per_byte_and_other_scores_do_not() -> None:
    blocks = saved_at(blocks_of((100, 9.0), (10, 5.0), (90, 8.0)), 10, 20, 30)
    assert Budget(100, by="importance", **BARE).select(context_of(blocks)) == names(1, 2)
    assert Budget(100, by="drift", **BARE).select(context_of(blocks)) == names(0)
    assert Budget(100, by="age", **BARE).select(context_of(blocks)) == names(0)


def test_what_does_not_fit_is_passed_over_for_what_does() -> None:
    blocks = blocks_of((30, 9.0), (50, 8.0), (20, 7.0), (1, 6.0))
    assert Budget(51, by="drift", **BARE).select(context_of(blocks)) == names(0, 2, 3)


def test_layers_that_did_not_move_are_not_written() -> None:
    blocks = blocks_of((10, 0.0), (10, 1.0), (0, 0.0), (10, -0.0))
    assert Budget(1.0, **BARE).select(context_of(blocks)) == names(1)


def test_diverged_layers_come_first() -> None:
    blocks = blocks_of((10, 5.0), (10, math.inf), (10, math.nan), (0, 1.0))
    assert Budget(10, **BARE).select(context_of(blocks)) == names(2, 3)
    assert Budget(20, **BARE).select(context_of(blocks)) == names(1, 2, 3)


def auxiliary(*saved: int) -> Model:
    """An embedding of 40 bytes, a norm of 1, a head of 30."""
    kinds = [("embed", LayerKind.EMBEDDING, 40), ("norm", LayerKind.OTHER, 1), ("head", LayerKind.HEAD, 30)]
    layers = [make_layer(name, kind, nbytes=nbytes, drift=moved(0.0)) for name, kind, nbytes in kinds]
    return saved_at(tuple(layers), *saved)


def test_layers_that_every_save_writes_come_before_scores() -> None:
    layers = (*auxiliary(90, 90, 90), *blocks_of((10, 1.0), (10, 1e9), (10, 1.0)))
    assert Budget(91).select(context_of(layers)) == {"embed", "norm", "head"} | names(0, 2)
    assert Budget(101).select(context_of(layers)) == {"embed", "norm", "head"} | names(0, 1, 2)
    assert Budget(11, **BARE).select(context_of(layers)) == {"norm"} | names(1)


def test_layers_that_are_too_old_come_before_all_and_count() -> None:
    # The middle block, 50 bytes, is overdue, so that of 91 bytes 41 are left: for the embedding, which is the oldest.
    layers = (*auxiliary(50, 60, 55), *saved_at(blocks_of((10, 1.0), (50, 1.0), (10, 1.0)), 90, 0, 80))
    strategy = Budget(91, max_age=99)
    written = {choice.layer: choice.reason for choice in choose_layers(strategy, context_of(layers)) if choice.is_saved}
    assert written == {"embed": "strategy", "norm": "strategy", "layers.1": "max age"}


def test_layers_that_are_too_old_may_exceed_the_budget_and_then_nothing_else_is_written() -> None:
    layers = saved_at(blocks_of((50, 1.0), (50, 1.0), (10, 1.0)), 0, 0, 90)
    choices = choose_layers(Budget(60, max_age=99, **BARE), context_of(layers))
    assert [choice.reason for choice in choices] == ["max age", "max age", "kept"]


def test_layer_that_every_save_writes_is_chosen_also_when_it_is_too_old() -> None:
    layers = saved_at(blocks_of((50, 1.0), (50, 1.0)), 0, 90)
    choices = choose_layers(Budget(50, last=0, max_age=99), context_of(layers))
    assert [choice.reason for choice in choices] == ["strategy", "kept"]


def test_layers_never_saved_count() -> None:
    layers = saved_at(blocks_of((50, 1.0), (11, 1.0), (10, 1.0)), None, 90, 90)
    choices = choose_layers(Budget(60, **BARE), context_of(layers))
    assert [choice.reason for choice in choices] == ["first save", "kept", "strategy"]


# ---- Too small ----


def test_budget_that_does_not_hold_what_every_save_writes_is_refused_at_the_first_save() -> None:
    layers = (*auxiliary(0, 0, 0), *blocks_of((10, 1.0), (10, 1.0), (909, 1.0)))
    first = context_of(saved_at(layers, *[None] * 6), save_index=0)
    with pytest.raises(InvalidInputError) as caught:
        choose_layers(Budget(0.5, last=0), dataclasses.replace(first, layers=layers[:4]))
    assert caught.value.kind == "budget-too-small"
    assert caught.value.expected == "at least 81 bytes, which those layers take"
    assert caught.value.found == "40 bytes (0.5 of 81)"
    assert "first=0, last=0, auxiliary=False: then 1 bytes are needed" in str(caught.value)
    assert choose_layers(Budget(0.5, **BARE), dataclasses.replace(first, layers=layers[:4]))
    with pytest.raises(InvalidInputError, match="80 bytes\n"):
        choose_layers(Budget(80, last=0), first)
    assert choose_layers(Budget(81, last=0), first)


def test_model_without_stacks_has_another_way_out() -> None:
    layers = [make_layer("mlp", LayerKind.OTHER, nbytes=100)]
    with pytest.raises(InvalidInputError, match=r"give more; norms, and layers outside of stacks"):
        Budget(99).select(context_of(layers))


# ---- Per step ----


@pytest.mark.parametrize(
    ("rate", "sizes", "steps"),
    [
        # 20 bytes of ends. Of the rest a tenth is 30, the largest layer 200.
        (1, [10, *[50] * 6, 10], 70),
        (1, [10, 200, 50, 50, 10], 220),
        (1, [10, *[10] * 300, 10], 320),
        (3, [10, *[10] * 300, 10], 107),
        (1000, [10, 200, 10], 1),
        ("1kB", [10, 980, 10], 1),
        ("1kB", [10, 981, 10], 2),
        (1, [10], 10),
        (1, [], 1),
    ],
)
def test_interval_is_when_the_budget_holds_a_save(rate: int | str, sizes: list[int], steps: int) -> None:
    layers = make_blocks(*[None] * len(sizes), nbytes=sizes)
    assert BudgetPerStep(rate).interval(layers) == steps


@pytest.mark.parametrize("strategy", [Budget(0.5), Budget("20GB")])
def test_budget_per_save_leaves_the_interval_to_the_caller(strategy: Strategy) -> None:
    assert strategy.interval(make_blocks(None)) is None


@pytest.mark.parametrize(
    ("step", "previous", "expected"),
    [
        (100, 90, names(0, 2)),
        (100, 85, names(0, 1, 2)),
        (100, 96, names(0)),
        (100, 99, set()),
    ],
)
def test_budget_of_a_save_is_what_accrued_since_the_one_before(step: int, previous: int, expected: set[str]) -> None:
    # 2 bytes a step; the first block is older than the last.
    layers = saved_at(blocks_of((8, 1.0), (10, 1.0), (8, 1.0)), 50, 60, 60)
    assert BudgetPerStep(2).select(context_of(layers, step=step, previous=previous)) == expected


def test_budget_per_step_that_would_wait_longer_than_max_age_is_refused() -> None:
    layers = make_blocks(*[moved()] * 3, nbytes=[10, 81, 10])
    assert BudgetPerStep(1, max_age=101).interval(layers) == 101
    strategy = BudgetPerStep(1, max_age=100)
    for refused in (lambda: strategy.interval(layers), lambda: strategy.select(context_of(layers))):
        with pytest.raises(InvalidInputError, match="then 0 bytes are needed; or a higher max_age") as caught:
            refused()
        assert caught.value.kind == "budget-too-small"
        assert caught.value.expected == "at least 2 bytes per step: a save takes 101 within max_age=100 steps"
        assert caught.value.found == "1 bytes per step, enough after 101 steps"


# ---- Arguments ----


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (lambda: Budget(0.0), "argument-range", r"budget\(0.5\)"),
        (lambda: Budget(1.5), "argument-range", "up to 1.0"),
        (lambda: Budget(math.nan), "argument-range", "nan"),
        (lambda: Budget(0), "argument-range", "'limit'"),
        (lambda: Budget(-5), "argument-range", "a share up to 1.0; or bytes"),
        (lambda: Budget("0GB"), "argument-range", "'0GB'"),
        (lambda: Budget("50%"), "argument-range", "a share up to 1.0"),
        (lambda: Budget("20 G"), "argument-range", "units are B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"),
        (lambda: Budget("-1GB"), "argument-range", "'-1GB'"),
        (lambda: Budget(True), "argument-type", "True"),
        (lambda: Budget(None), "argument-type", "None"),  # type: ignore[arg-type]
        (lambda: BudgetPerStep(0.5), "argument-type", "0.5"),  # type: ignore[arg-type]
        (lambda: BudgetPerStep("much"), "argument-range", "'rate' of strategy 'budget_per_step'"),
        (lambda: BudgetPerStep(1, by="x"), "argument-range", "by"),
        (lambda: BudgetPerStep(1, first=-1), "argument-range", "first"),
    ],
)
def test_budget_refuses_what_is_no_size(make: Callable[[], Strategy], kind: str, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said) as caught:
        make()
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1B", 1),
        ("1kB", 10**3),
        ("1MB", 10**6),
        ("1.5GB", 15 * 10**8),
        ("1TB", 10**12),
        ("1KiB", 2**10),
        ("1MiB", 2**20),
        ("1GiB", 2**30),
        ("1TiB", 2**40),
    ],
)
def test_sizes_have_units(text: str, nbytes: int) -> None:
    def fits(size: int) -> bool:
        layer: LayerStatus = make_layer("layers.0", nbytes=size, drift=moved())
        return bool(Budget(text, **BARE).select(context_of([layer])))

    assert fits(nbytes)
    assert not fits(nbytes + 1)
