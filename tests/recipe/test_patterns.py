"""Layers as recipes name them: names, ranges, globs; and that what is written takes what was meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.recipe.patterns import LayerNames, split_patterns, summarize_names, write_patterns

LLAMA = ("embed_tokens", *(f"layers.{i}" for i in range(12)), "norm", "lm_head")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("norm", ("norm",)),
        ("layers.0-2", ("layers.0", "layers.1", "layers.2")),
        ("layers.9-11", ("layers.9", "layers.10", "layers.11")),
        ("layers.10-999999999", ("layers.10", "layers.11")),
        ("layers.3-3", ("layers.3",)),
        ("layers.1?", ("layers.10", "layers.11")),
        ("layers.[02]", ("layers.0", "layers.2")),
        ("*", LLAMA),
        ("*_*", ("embed_tokens", "lm_head")),
        ("layers", ()),
        ("Norm", ()),
        ("layers.01", ()),
        ("layers.00-2", ()),
        ("layers.-1", ()),
    ],
)
def test_pattern_takes_these_names(pattern: str, names: tuple[str, ...]) -> None:
    assert LayerNames(LLAMA).match(pattern) == names


def test_range_of_a_model_whose_blocks_are_its_own_children() -> None:
    assert LayerNames(["0", "1", "2", "x.1"]).match("0-1") == ("0", "1")


def test_range_keeps_to_its_stack() -> None:
    names = LayerNames(["encoder.block.1", "decoder.block.1", "layers.1", "layers.1.experts.1"])
    assert names.match("decoder.block.0-5") == ("decoder.block.1",)
    assert names.match("layers.1.experts.0-1") == ("layers.1.experts.1",)


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("norm", ("norm",)),
        ("layers.0-15, norm", ("layers.0-15", "norm")),
        (" a ,b,  c ", ("a", "b", "c")),
        ("layers.[0,1], norm", ("layers.[0,1]", "norm")),
        ("a[[], b", ("a[[]", "b")),
        ("a[b, c", ("a[b", "c")),
        ("", ("",)),
        ("a,,b", ("a", "", "b")),
        ("a,", ("a", "")),
    ],
)
def test_split_patterns_at_commas_outside_brackets(text: str, patterns: tuple[str, ...]) -> None:
    assert split_patterns(text) == patterns


def test_write_patterns_makes_ranges() -> None:
    assert write_patterns(LLAMA) == ("embed_tokens", "layers.0-11", "norm", "lm_head")
    assert write_patterns(["layers.1", "layers.3", "layers.4"]) == ("layers.1", "layers.3-4")


def test_name_that_looks_like_a_range_is_written_as_a_name() -> None:
    assert write_patterns(["l.0-1"]) == ("l.0[-]1",)
    assert LayerNames(["l.0", "l.1", "l.0-1"]).match("l.0[-]1") == ("l.0-1",)


def test_summary_is_cut_off() -> None:
    assert summarize_names([f"layers.{2 * i}" for i in range(20)], most=2) == "layers.0, layers.2, ... and 18 more"


# The characters that mean something in patterns, so that they meet each other.
NAMES = (
    st.text("ab.,-0123456789[]*?! ]", min_size=1, max_size=8)
    | st.sampled_from(["l.0-1", "l.1-2", "0-3"])
    | st.builds("l.{}".format, st.integers(0, 12))
)


@given(st.lists(NAMES, unique=True, min_size=1, max_size=12), st.data())
def test_written_patterns_take_these_names_and_no_others(names: list[str], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    known = LayerNames(names)
    text = ", ".join(write_patterns(wanted))
    taken = [name for pattern in split_patterns(text) for name in known.match(pattern)]
    assert sorted(taken) == sorted(wanted)
