"""Strategies as text: what is read, what is refused and how, and that text comes back as it went."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import InvalidInputError
from llmtailor.strategies import (
    Budget,
    BudgetPerStep,
    Custom,
    Drift,
    Filter,
    Full,
    Monitored,
    Parity,
    RoundRobin,
    SaveContext,
    Strategy,
    TopK,
    parse_strategy,
)


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
        ("top_k(4)", TopK(4)),
        ("top_k(k=4, by='age', auxiliary=False)", TopK(4, by="age", auxiliary=False)),
        ("drift(0.02)", Drift(0.02)),
        ("drift(2e-2, first=0)", Drift(0.02, first=0)),
        ("budget(0.3)", Budget(0.3)),
        ("budget(300)", Budget(300)),
        ('budget("20GB", by="drift")', Budget("20GB", by="drift")),
        ("budget('1.5 GiB', last=2, max_age=9)", Budget("1.5 GiB", last=2, max_age=9)),
        ('budget_per_step("50MB")', BudgetPerStep("50MB")),
        ("monitored(0.01)", Monitored(0.01, end=1e-5, decay=100)),
        ("monitored(start=1, end=0.5, decay=7)", Monitored(1, end=0.5, decay=7)),
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
        (TopK(4), 'top_k(k=4, by="importance", first=1, last=1, auxiliary=True, max_age=1000)'),
        (Drift(0.02, first=0), "drift(threshold=0.02, first=0, last=1, auxiliary=True, max_age=1000)"),
        (
            Budget("20GB", by="age"),
            'budget(limit="20GB", by="age", first=1, last=1, auxiliary=True, max_age=1000)',
        ),
        (
            BudgetPerStep(50, auxiliary=False),
            'budget_per_step(rate=50, by="importance", first=1, last=1, auxiliary=False, max_age=1000)',
        ),
        (
            Monitored(0.01, max_age=7),
            "monitored(start=0.01, end=1e-05, decay=100, first=1, last=1, auxiliary=True, max_age=7)",
        ),
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
        (
            "sometimes(3)",
            "unknown-strategy",
            "budget, budget_per_step, drift, filter, full, monitored, parity, round_robin, top_k",
        ),
        ("top-k(3)", "strategy-syntax", r"did you mean top_k\?"),
        ("topk(3)", "unknown-strategy", r"did you mean top_k\?"),
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
        ("top_k", "argument-missing", "needs an argument: k"),
        (
            "budget(by='age')",
            "argument-missing",
            r"needs an argument: limit\n  expected  limit, first(.*\n)*.*write budget\(limit=\.\.\.\)",
        ),
        ("monitored(end=1)", "argument-missing", "start"),
        ("budget(0.5, 'age')", "unknown-argument", "takes 1 arguments"),
        ("budget(0.5, bye='age')", "unknown-argument", r"did you mean by\?"),
        ("budget(0.5, by=age)", "argument-type", 'text goes in quotes: by="age"'),
        ("budget(20GB)", "strategy-syntax", r'a size goes in quotes, as in budget\("20GB"\)'),
        ("budget(b'20GB')", "argument-type", "b'20GB'"),
        ("budget(f'{1}GB')", "argument-type", "a number, quoted text, True or False"),
        ("budget(-0.5)", "argument-range", "-0.5"),
        ("budget(True)", "argument-type", "True"),
        ("budget(-True)", "argument-type", "-True"),
        ("budget(1j)", "argument-type", "1j"),
        ("drift(-1)", "argument-range", "-1"),
        ("drift(1e999)", "argument-range", "inf"),
        ("drift(threshold=[1])", "argument-type", r"\[1\]"),
        ("drift(-'a')", "argument-type", "-'a'"),
        ("drift(0.1, auxiliary=no)", "argument-type", "quotes"),
        ("drift(0.1, auxiliary=0)", "argument-type", "True or False"),
        ("top_k(4, by='drfit')", "argument-range", 'did you mean by="drift"'),
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
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False) | st.integers(1, 10**9)
NBYTES = st.integers(1) | st.from_regex(r"[1-9][0-9]{0,8}(\.[0-9]{1,3})? ?([kMGT]|[KMGT]i)?B", fullmatch=True)
COMMON = {
    "first": st.integers(0),
    "last": st.integers(0),
    "auxiliary": st.booleans(),
    "max_age": st.integers(1),
}
RANKING = COMMON | {"by": st.sampled_from(["importance", "drift", "age"])}
STRATEGIES = st.one_of(
    st.just(Full()),
    st.builds(Parity, max_age=MAX_AGE),
    st.builds(Filter, st.integers(0), st.integers(0), st.integers(1), max_age=MAX_AGE),
    st.builds(RoundRobin, st.integers(1), max_age=MAX_AGE),
    st.builds(TopK, st.integers(1), **RANKING),
    st.builds(Drift, POSITIVE, **COMMON),
    st.builds(Budget, NBYTES | st.floats(0, 1, exclude_min=True), **RANKING),
    st.builds(BudgetPerStep, NBYTES, **RANKING),
    st.tuples(POSITIVE, POSITIVE).flatmap(
        lambda ends: st.builds(Monitored, st.just(max(ends)), end=st.just(min(ends)), decay=POSITIVE, **COMMON)
    ),
)


@given(STRATEGIES)
def test_parse_strategy_reads_back_text(strategy: Strategy) -> None:
    read = parse_strategy(strategy.text)
    assert read == strategy
    assert read.text == strategy.text


@given(
    st.text(max_size=40)
    | st.text("filterparity_robin(),=12 -'first", max_size=30)
    | st.builds(
        "{}({})".format,
        st.sampled_from(["top_k", "drift", "budget", "budget_per_step", "monitored"]),
        st.text("0123456789.e-+,='\"kMGiBTrue ", max_size=12),
    )
)
def test_parse_strategy_raises_nothing_else(text: str) -> None:
    try:
        strategy = parse_strategy(text)
    except InvalidInputError:
        return
    assert parse_strategy(strategy.text) == strategy
