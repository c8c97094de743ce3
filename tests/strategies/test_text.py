"""Strategies as text: what is read, what is refused and how, and that text comes back as it went."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import InvalidInputError
from llmtailor.strategies import Custom, Filter, Full, Parity, RoundRobin, SaveContext, Strategy, parse_strategy


def choose_all(context: SaveContext) -> Iterable[str]:
    return [layer.name for layer in context.layers]


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("full", Full()),
        ("full()", Full()),
        (" parity ", Parity()),
        ("parity()", Parity()),
        ("parity(max_age=500)", Parity(max_age=500)),
        ("filter", Filter(first=2, last=2, every=5)),
        ("filter(first=3)", Filter(first=3)),
        ("filter(2, 3)", Filter(first=2, last=3)),
        ("filter(2, 3, 4, max_age=9)", Filter(first=2, last=3, every=4, max_age=9)),
        ("filter(0, every=1)", Filter(first=0, every=1)),
        ("filter(\n  first=1_0,\n)", Filter(first=10)),
        ("round_robin", RoundRobin(n=10)),
        ("round_robin(4)", RoundRobin(n=4)),
        ("round_robin(n=4, max_age=9)", RoundRobin(n=4, max_age=9)),
    ],
)
def test_parse_strategy_reads_names_and_calls(text: str, strategy: Strategy) -> None:
    assert parse_strategy(text) == strategy


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        (Full(), "full()"),
        (Parity(), "parity()"),
        (Parity(max_age=500), "parity(max_age=500)"),
        (Filter(), "filter(first=2, last=2, every=5)"),
        (Filter(every=3, max_age=7), "filter(first=2, last=2, every=3, max_age=7)"),
        (RoundRobin(), "round_robin(n=10)"),
        (RoundRobin(3, max_age=7), "round_robin(n=3, max_age=7)"),
        (Custom(choose_all, max_age=50), "custom(choose_all, max_age=50)"),
    ],
)
def test_text_is_canonical(strategy: Strategy, text: str) -> None:
    assert strategy.text == text


def test_text_of_callable_without_a_name_is_its_class() -> None:
    class Chooser:
        def __call__(self, context: SaveContext) -> Iterable[str]:
            return []

    assert Custom(Chooser()).text.endswith("Chooser, max_age=1000)")


def test_parse_strategy_leaves_strategies_alone() -> None:
    strategy = Parity()
    assert parse_strategy(strategy) is strategy


def test_parse_strategy_makes_functions_custom() -> None:
    assert parse_strategy(choose_all) == Custom(choose_all, max_age=1000)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("", "strategy-syntax", "''"),
        ("filter(", "strategy-syntax", "filter"),
        ("filter(first=2) + 1", "strategy-syntax", "function"),
        ("a.filter()", "strategy-syntax", "strategy"),
        ("filter()()", "strategy-syntax", "strategy"),
        ("filter(*x)", "strategy-syntax", "strategy"),
        ("filter(**x)", "strategy-syntax", "strategy"),
        ("lambda: 1", "strategy-syntax", "strategy"),
        ("__import__('os').system('true')", "strategy-syntax", "strategy"),
        ("__import__('os')", "unknown-strategy", "strategy"),
        ("parity\0", "strategy-syntax", "strategy"),
        ("(" * 150, "strategy-syntax", "strategy"),
        ("-" * 150 + "1", "strategy-syntax", "strategy"),
        ("parity" + " " * 10_000, "strategy-syntax", "10006 characters"),
        ("pairity", "unknown-strategy", r"did you mean parity\?"),
        ("Filter(2)", "unknown-strategy", r"did you mean filter\?"),
        ("drift(3)", "unknown-strategy", "filter, full, parity, round_robin"),
        ("Round_Robin(3)", "unknown-strategy", r"did you mean round_robin\?"),
        ("roundrobin", "unknown-strategy", r"did you mean round_robin\?"),
        ("round-robin", "strategy-syntax", r"did you mean round_robin\?"),
        (" Round-Robin(n=3)", "strategy-syntax", r"did you mean round_robin\?"),
        ("custom(choose_all, max_age=50)", "unknown-strategy", "pass the function itself"),
        ("filter(frist=2)", "unknown-argument", r"did you mean first\?"),  # codespell:ignore
        ("full(max_age=2)", "unknown-argument", "no arguments"),
        ("parity(500)", "unknown-argument", "max_age"),
        ("filter(1, 2, 3, 4)", "unknown-argument", "3 arguments"),
        ("filter(1, first=2)", "argument-twice", "first"),
        ("filter(last=1, last=2)", "argument-twice", "last"),
        ("filter(first=True)", "argument-type", "True"),
        ("filter(first='2')", "argument-type", "'2'"),
        ("filter(2.0)", "argument-type", "2.0"),
        ("filter(first=1+1)", "argument-type", r"1 \+ 1"),
        ("filter(first=first)", "argument-type", "first"),
        ("parity(max_age=None)", "argument-type", "None"),
        ("filter(first=-1)", "argument-range", "-1"),
        ("filter(last=-1)", "argument-range", "last"),
        ("filter(every=0)", "argument-range", "at least 1"),
        ("parity(max_age=0)", "argument-range", "max_age"),
        ("round_robin(3, 4)", "unknown-argument", "1 arguments"),
        ("round_robin(k=3)", "unknown-argument", "n, max_age"),
        ("round_robin(0)", "argument-range", "at least 1"),
        ("round_robin(max_age=0)", "argument-range", "max_age"),
    ],
)
def test_parse_strategy_refuses(text: str, kind: str, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said) as caught:
        parse_strategy(text)
    error = caught.value
    assert error.kind == kind
    assert None not in (error.expected, error.found, error.hint)


@pytest.mark.parametrize(("value", "said"), [(3, '"parity"'), (None, "None"), (Parity, "call the class"), (int, "int")])
def test_parse_strategy_refuses_other_things(value: object, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said) as caught:
        parse_strategy(value)  # type: ignore[arg-type]
    assert caught.value.kind == "strategy-type"


MAX_AGE = st.none() | st.integers(1)
STRATEGIES = st.one_of(
    st.just(Full()),
    st.builds(Parity, max_age=MAX_AGE),
    st.builds(Filter, st.integers(0), st.integers(0), st.integers(1), max_age=MAX_AGE),
    st.builds(RoundRobin, st.integers(1), max_age=MAX_AGE),
)


@given(STRATEGIES)
def test_parse_strategy_reads_back_text(strategy: Strategy) -> None:
    assert parse_strategy(strategy.text) == strategy


@given(st.text(max_size=40) | st.text("filterparity_robin(),=12 -'first", max_size=30))
def test_parse_strategy_raises_nothing_else(text: str) -> None:
    try:
        strategy = parse_strategy(text)
    except InvalidInputError:
        return
    assert parse_strategy(strategy.text) == strategy
