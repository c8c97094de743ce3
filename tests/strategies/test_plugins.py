"""Strategies of other packages: found by name, imported when used, and refused if they are none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtailor.errors import InvalidInputError
from llmtailor.strategies import Parity, choose_layers, parse_strategy
from strategies.made_up_runs import context_of, make_blocks, moved

MODULE = """
from dataclasses import dataclass, field
from llmtailor.strategies import Strategy

@dataclass(frozen=True)
class Mine(Strategy):
    k: int
    words: str = "a"
    max_age: int | None = field(default=None, kw_only=True)
    place: int = field(default=0, init=False)

    def __post_init__(self):
        if self.k < 0:
            raise ValueError("k is below 0")

    def select(self, context):
        return frozenset()

    @property
    def text(self):
        return f"mine(k={self.k})"

class Undecorated(Mine):
    pass

@dataclass(frozen=True)
class Boundless(Strategy):
    text = "boundless()"
    def select(self, context):
        return frozenset()

@dataclass(frozen=True)
class Bounded(Boundless):
    max_age: int

@dataclass
class Fluid(Mine.__base__):
    max_age: int | None = None
    text = "fluid()"
    def select(self, context):
        return frozenset()

@dataclass(frozen=True)
class Unfinished(Strategy):
    max_age: int | None = None
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a package with these entry points and this module importable."""

    def install(module: str = MODULE, *, name: str = "strategy_pack", **points: str) -> None:
        root = tmp_path / name
        info = root / f"{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = [f"{key} = {name}:{value}" for key, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[llmtailor.strategies]", *lines]))
        (root / f"{name}.py").write_text(module)
        monkeypatch.syspath_prepend(root)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return install


@pytest.mark.parametrize("text", ["mine(3)", "mine(k=3)", "mine(3, words='b', max_age=9)"])
def test_plugin_is_found_by_its_name(install: Install, text: str) -> None:
    install(mine="Mine")
    strategy = parse_strategy(text)
    assert (type(strategy).__name__, strategy.text) == ("Mine", "mine(k=3)")
    assert parse_strategy(strategy.text).text == strategy.text


def test_plugin_without_max_age_bounds_no_age(install: Install) -> None:
    install(mine="Boundless")
    layers = make_blocks(moved(), moved(), saved=0)
    choices = choose_layers(parse_strategy("mine"), context_of(layers, step=10**6, previous=10))
    assert [choice.reason for choice in choices] == ["kept", "kept"]


def test_max_age_of_a_plugin_may_be_an_argument_that_has_to_be_given(install: Install) -> None:
    install(mine="Bounded")
    with pytest.raises(InvalidInputError, match="needs an argument: max_age"):
        parse_strategy("mine")
    choices = choose_layers(parse_strategy("mine(max_age=9)"), context_of(make_blocks(moved()), step=10, previous=9))
    assert [choice.reason for choice in choices] == ["max age"]


def test_plugin_is_imported_when_it_is_used(install: Install) -> None:
    install("raise RuntimeError('no GPU here')", broken="Mine", parity="Mine")
    assert parse_strategy("parity") == Parity()
    with pytest.raises(InvalidInputError, match="there is no strategy 'other'"):
        parse_strategy("other")
    assert "strategy_pack" not in sys.modules
    with pytest.raises(InvalidInputError, match="RuntimeError: no GPU here") as caught:
        parse_strategy("broken")
    assert caught.value.kind == "strategy-plugin"
    assert "'broken' of strategy_pack 1.2 cannot be imported" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("Missing", "has no attribute 'Missing'"),
        ("MODULE", "no attribute"),
        ("dataclass", "no subclass of Strategy"),
        ("Strategy.select", "no subclass of Strategy"),
        ("Strategy", "which lacks select, text"),
        ("Unfinished", "which lacks select, text"),
        ("Undecorated", "Undecorated, which is no frozen dataclass"),
        ("Fluid", "Fluid, which is no frozen dataclass"),
    ],
)
def test_plugin_that_is_no_strategy_is_refused(install: Install, value: str, said: str) -> None:
    install(mine=value)
    with pytest.raises(InvalidInputError, match=said) as caught:
        parse_strategy("mine(3)")
    assert caught.value.kind == "strategy-plugin"
    assert f"at strategy_pack:{value}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("mine", "argument-missing", "needs an argument: k"),
        ("mine(3, k=3)", "argument-twice", "k"),
        ("mine(3, place=1)", "unknown-argument", "k, words, max_age"),
        ("mine(3, 'b', 9)", "unknown-argument", "takes 2 arguments"),
        ("mine(-1)", "argument-range", "k is below 0"),
        ("mine('a')", "argument-range", "not supported between"),
    ],
)
def test_arguments_that_a_plugin_does_not_take_are_refused(install: Install, text: str, kind: str, said: str) -> None:
    install(mine="Mine")
    with pytest.raises(InvalidInputError, match=said) as caught:
        parse_strategy(text)
    assert caught.value.kind == kind


def test_unknown_name_lists_plugins_beside_what_is_built_in(install: Install) -> None:
    install(mine="Mine", full="Mine")
    with pytest.raises(InvalidInputError, match=r"did you mean mine\?") as caught:
        parse_strategy("mime(3)")
    assert caught.value.expected == (
        "budget, budget_per_step, drift, filter, full, monitored, parity, round_robin, top_k, mine"
    )


def test_first_package_on_the_path_has_the_name(install: Install) -> None:
    install("", name="other_pack", mine="Mine")
    install(mine="Mine")
    assert parse_strategy("mine(3)").text == "mine(k=3)"
