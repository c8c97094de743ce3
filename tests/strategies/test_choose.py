"""Which layers a save writes and why; what holds whatever the strategy and the history."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import InvalidInputError
from llmtailor.layers import LayerKind
from llmtailor.strategies import (
    Choice,
    Custom,
    Filter,
    Full,
    LayerStatus,
    Parity,
    RoundRobin,
    SaveContext,
    Strategy,
    choose_layers,
)

EMBEDDING = "embed_tokens"
NORM = "norm"
HEAD = "lm_head"


def make_layer(name: str, kind: LayerKind = LayerKind.OTHER, index: int | None = None) -> LayerStatus:
    stack = name.rpartition(".")[0] if kind is LayerKind.BLOCK else None
    return LayerStatus(name=name, kind=kind, stack=stack, index=index, nbytes=8, saved_step=None)


def make_blocks(*indices: int, stack: str = "layers") -> list[LayerStatus]:
    return [make_layer(f"{stack}.{index}", LayerKind.BLOCK, index) for index in indices]


def make_model(num_blocks: int, *, has_head: bool = True) -> tuple[LayerStatus, ...]:
    head = [make_layer(HEAD, LayerKind.HEAD)] if has_head else []
    return (make_layer(EMBEDDING, LayerKind.EMBEDDING), *make_blocks(*range(num_blocks)), make_layer(NORM), *head)


def select(strategy: Strategy, layers: Iterable[LayerStatus], save_index: int) -> set[str]:
    return set(strategy.select(SaveContext(step=1000 + save_index, save_index=save_index, layers=tuple(layers))))


def names(*indices: int, stack: str = "layers") -> set[str]:
    return {f"{stack}.{index}" for index in indices}


def test_full_selects_all() -> None:
    layers = make_model(4)
    assert select(Full(), layers, 3) == {layer.name for layer in layers}
    assert Full().max_age is None


@pytest.mark.parametrize(
    ("num_blocks", "save_index", "expected"),
    [
        (4, 0, names(0, 2) | {NORM, HEAD}),
        (4, 1, names(1, 3) | {NORM, EMBEDDING}),
        (4, 2, names(0, 2) | {NORM, HEAD}),
        (32, 7, names(*range(1, 32, 2)) | {NORM, EMBEDDING}),
        (32, 8, names(*range(0, 32, 2)) | {NORM, HEAD}),
    ],
)
def test_parity_selects_odd_blocks_with_embedding_and_even_with_head(
    num_blocks: int, save_index: int, expected: set[str]
) -> None:
    assert select(Parity(), make_model(num_blocks), save_index) == expected


def test_parity_needs_no_head() -> None:
    layers = make_model(4, has_head=False)
    assert select(Parity(), layers, 1) == names(1, 3) | {NORM, EMBEDDING}
    assert select(Parity(), layers, 2) == names(0, 2) | {NORM}


MIDDLE = range(2, 30)


@pytest.mark.parametrize(
    ("strategy", "num_blocks", "save_index", "expected"),
    [
        # Nothing is between the first two and the last two of four.
        (Filter(), 4, 1, names(0, 1, 2, 3) | {NORM}),
        (Filter(), 4, 5, names(0, 1, 2, 3) | {NORM, EMBEDDING}),
        (Filter(), 4, 10, names(0, 1, 2, 3) | {NORM, HEAD}),
        (Filter(), 32, 4, names(0, 1, 30, 31) | {NORM}),
        (Filter(), 32, 5, names(0, 1, 30, 31, *MIDDLE[1::2]) | {NORM, EMBEDDING}),
        (Filter(), 32, 6, names(0, 1, 30, 31) | {NORM}),
        (Filter(), 32, 10, names(0, 1, 30, 31, *MIDDLE[::2]) | {NORM, HEAD}),
        (Filter(), 32, 15, names(0, 1, 30, 31, *MIDDLE[1::2]) | {NORM, EMBEDDING}),
        (Filter(first=0, last=0), 4, 1, {NORM}),
        (Filter(first=1, last=0, every=2), 4, 2, names(0, 1, 3) | {NORM, EMBEDDING}),
        (Filter(first=0, last=1, every=1), 4, 2, names(0, 2, 3) | {NORM, HEAD}),
        (Filter(first=9, last=9), 4, 1, names(0, 1, 2, 3) | {NORM}),
        (Filter(first=0, last=5), 4, 1, names(0, 1, 2, 3) | {NORM}),
    ],
)
def test_filter_selects_ends_always_and_middle_by_halves(
    strategy: Strategy, num_blocks: int, save_index: int, expected: set[str]
) -> None:
    assert select(strategy, make_model(num_blocks), save_index) == expected


def test_filter_counts_each_stack_by_index() -> None:
    layers = [*make_blocks(10, 4, 7, 2), *make_blocks(0, 1, 2, stack="decoder.layers")]
    expected = names(2, 10) | names(0, 2, stack="decoder.layers")
    assert select(Filter(first=1, last=1), layers, 1) == expected


def context_of(
    layers: Sequence[LayerStatus], *, step: int = 100, save_index: int = 3, saved: int | None = 90
) -> SaveContext:
    layers = [dataclasses.replace(layer, saved_step=saved) for layer in layers]
    return SaveContext(step=step, save_index=save_index, layers=tuple(layers))


def nothing(context: SaveContext) -> list[str]:
    return []


@pytest.mark.parametrize(
    ("strategy", "context", "reason"),
    [
        (Custom(nothing, max_age=10), context_of([make_layer(NORM)], save_index=0), "first save"),
        (Custom(nothing, max_age=10), context_of([make_layer(NORM)], saved=None), "first save"),
        (Full(), context_of([make_layer(NORM)], saved=None), "first save"),
        (Full(), context_of([make_layer(NORM)]), "strategy"),
        (Parity(max_age=1), context_of([make_layer(NORM)]), "strategy"),
        (Custom(nothing, max_age=9), context_of([make_layer(NORM)]), "max age"),
        (Custom(nothing, max_age=10), context_of([make_layer(NORM)]), "kept"),
        (Parity(), context_of(make_blocks(0), saved=0), "kept"),
        (Parity(max_age=99), context_of(make_blocks(0), saved=0), "max age"),
    ],
)
def test_choose_layers_gives_the_first_reason_that_holds(strategy: Strategy, context: SaveContext, reason: str) -> None:
    (choice,) = choose_layers(strategy, context)
    assert choice == Choice(layer=context.layers[0].name, is_saved=reason != "kept", reason=reason)


@pytest.mark.parametrize(
    ("strategy", "context", "expected"),
    [
        (Full(), context_of([make_layer(NORM)], saved=None), True),
        (Full(), context_of([make_layer(NORM)], save_index=0), True),
        (Full(), context_of([make_layer(NORM)], saved=0), False),
        (Parity(max_age=10), context_of([make_layer(NORM)]), False),
        (Parity(max_age=9), context_of([make_layer(NORM)]), True),
    ],
)
def test_layers_never_saved_or_too_old_must_be_written(
    strategy: Strategy, context: SaveContext, expected: bool
) -> None:
    assert strategy.must_write(context.layers[0], context) is expected


def test_choose_layers_keeps_order() -> None:
    context = context_of(make_model(4))
    assert [choice.layer for choice in choose_layers(Parity(), context)] == [layer.name for layer in context.layers]


def test_custom_is_told_the_save_and_chooses_any_iterable() -> None:
    seen = []

    def cheapest(context: SaveContext) -> Iterable[str]:
        seen.append(context)
        return (layer.name for layer in context.layers if layer.nbytes < 9 and layer.kind is LayerKind.OTHER)

    context = context_of(make_model(4))
    assert Custom(cheapest).select(context) == {NORM}
    assert seen == [context]


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (["layers.1", "lm_heads", "nrom"], "unknown-layer", r"'lm_heads', 'nrom'\n(.*\n)*.*did you mean lm_head\?"),
        (["zzz"], "unknown-layer", r"'zzz'\n(.*\n)*.*layers are embed_tokens, layers\.0"),
        ([3], "unknown-layer", "3"),
        ("norm", "strategy-answer", "'norm'"),
        (None, "strategy-answer", "None"),
    ],
)
def test_custom_refuses_answers_that_are_no_layers(answer: object, kind: str, said: str) -> None:
    def choose(context: SaveContext) -> Iterable[str]:
        return answer  # type: ignore[return-value]

    with pytest.raises(InvalidInputError, match=said) as caught:
        choose_layers(Custom(choose), context_of(make_model(4)))
    assert caught.value.kind == kind


def test_choose_layers_refuses_unknown_layers_of_any_strategy() -> None:
    class Wrong(Strategy):
        max_age = None
        text = "wrong()"

        def select(self, context: SaveContext) -> frozenset[str]:
            return frozenset({"layers.9"})

    with pytest.raises(InvalidInputError, match=r"layers\.9"):
        choose_layers(Wrong(), context_of(make_model(4)))


@pytest.mark.parametrize("max_age", [None, 0, True, 1.5])
def test_custom_needs_a_bound(max_age: int) -> None:
    with pytest.raises(InvalidInputError, match="max_age"):
        Custom(nothing, max_age=max_age)


def test_custom_needs_a_function() -> None:
    with pytest.raises(InvalidInputError) as caught:
        Custom("norm")  # type: ignore[arg-type]
    assert caught.value.kind == "strategy-type"


@pytest.mark.parametrize("make", [lambda: Parity(max_age=0), lambda: Filter(first=-1), lambda: Filter(every=0)])
def test_strategies_refuse_numbers_out_of_range(make: Callable[[], Strategy]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        make()
    assert caught.value.kind == "argument-range"


def test_context_refuses_layers_saved_later() -> None:
    with pytest.raises(AssertionError, match="norm"):
        context_of([make_layer(NORM)], step=5, saved=6)


def replay(
    strategy: Strategy, layers: Sequence[LayerStatus], steps: Iterable[int], *, save_index: int = 0
) -> Iterable[tuple[int, dict[str, int]]]:
    """Step and saved steps after each save of a run that goes on with the given layers."""
    saved = {layer.name: layer.saved_step for layer in layers}
    for index, step in enumerate(steps, save_index):
        now = tuple(dataclasses.replace(layer, saved_step=saved[layer.name]) for layer in layers)
        choices = choose_layers(strategy, SaveContext(step=step, save_index=index, layers=now))
        saved |= {choice.layer: step for choice in choices if choice.is_saved}
        # No hole: a layer that was never written is written.
        yield step, {name: at for name, at in saved.items() if at is not None}


MAX_AGE = st.none() | st.integers(1, 300)
FILTERS = st.builds(Filter, st.integers(0, 4), st.integers(0, 4), st.integers(1, 6), max_age=MAX_AGE)
STRATEGIES = st.one_of(
    st.builds(Full),
    st.builds(Parity, max_age=MAX_AGE),
    FILTERS,
    st.builds(RoundRobin, st.integers(1, 20), max_age=MAX_AGE),
    st.builds(Custom, st.just(nothing), st.integers(1, 300)),
)
GAPS = st.lists(st.integers(0, 200), min_size=1, max_size=15)


@st.composite
def histories(draw: st.DrawFn) -> tuple[LayerStatus, ...]:
    """A model at step 1000 whose layers were saved at any time or never."""
    model = make_model(draw(st.integers(0, 9)), has_head=draw(st.booleans()))
    ages = st.none() | st.integers(0, 1000)
    return tuple(dataclasses.replace(layer, saved_step=draw(ages)) for layer in model)


@given(strategy=STRATEGIES, layers=histories(), gaps=GAPS, save_index=st.integers(0, 20))
def test_no_layer_is_staler_than_max_age_after_a_save(
    strategy: Strategy, layers: tuple[LayerStatus, ...], gaps: list[int], save_index: int
) -> None:
    steps = [1000 + sum(gaps[: i + 1]) for i in range(len(gaps))]
    for step, saved in replay(strategy, layers, steps, save_index=save_index):
        assert saved.keys() == {layer.name for layer in layers}
        assert strategy.max_age is None or max(step - at for at in saved.values()) <= strategy.max_age


@given(layers=histories(), save_index=st.integers(0, 20))
def test_two_parity_saves_in_a_row_cover_every_layer(layers: tuple[LayerStatus, ...], save_index: int) -> None:
    both = select(Parity(), layers, save_index) | select(Parity(), layers, save_index + 1)
    assert both == {layer.name for layer in layers}


@given(strategy=FILTERS, layers=histories(), save_index=st.integers(0, 20))
def test_filter_covers_every_layer_within_two_rounds(
    strategy: Filter, layers: tuple[LayerStatus, ...], save_index: int
) -> None:
    rounds = (select(strategy, layers, save_index + i) for i in range(2 * strategy.every))
    assert set().union(*rounds) == {layer.name for layer in layers}


class Compared(str):
    """A name that counts how often it is compared."""

    count = 0

    def __eq__(self, other: object) -> bool:
        Compared.count += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_a_model_of_thousands_of_layers_is_not_searched_for_each_of_them() -> None:
    # Experts that are layers of their own: 15,000 of them.
    layers = [make_layer(Compared(f"experts.{index}")) for index in range(500)]
    Compared.count = 0
    choose_layers(Full(), SaveContext(step=1, save_index=0, layers=tuple(layers)))
    assert Compared.count < 10 * len(layers)


def test_what_is_no_name_at_all_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"\['norm'\]") as caught:
        choose_layers(
            Custom(lambda context: [["norm"]]),  # type: ignore[list-item]
            SaveContext(step=1, save_index=0, layers=make_model(2)),
        )
    assert caught.value.kind == "unknown-layer"
