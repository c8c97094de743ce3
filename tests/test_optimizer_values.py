from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from llmtailor.errors import FormatError, UnsupportedError
from llmtailor.optimizer_values import (
    check_leaves,
    decode_option,
    encode_option,
    flatten_state,
    restore_state,
)
from llmtailor.tensor_bytes import meta_of


def is_same(a: object, b: object) -> bool:
    """Equal in value and in Python type, all the way down; NaN is NaN, and -0.0 is not 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and str(a.tolist()) == str(b.tolist())
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return repr(a) == repr(b)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


def round_trip(state: dict[str, Any]) -> dict[str, Any]:
    leaves, notes = flatten_state(state, "w")
    notes = through_json(notes)
    check_leaves({path: meta_of(leaf) for path, leaf in leaves.items()}, notes, "w")
    return restore_state(leaves, notes, "w", lambda path, tensor: tensor.clone())


STATE_VALUES = [
    torch.tensor(3.0),
    torch.zeros(512, 1),
    torch.arange(5, dtype=torch.uint8),
    torch.empty(0, 3),
    0,
    2**63 - 1,
    -(2**63),
    0.1,
    -0.0,
    5e-324,
    math.inf,
    math.nan,
    True,
    False,
    None,
    "",
    "text, \u00e4 \U0001f600",
    {},
    [],
    (),
    [1, [2.0, (None, {"a": {}})]],
    {"codes": torch.ones(2), "deep": {"er": (torch.zeros(1), True, "x")}},
    {"b": 1, "a": 2},
    list(range(12)),
]


@pytest.mark.parametrize("value", STATE_VALUES, ids=repr)
def test_state_round_trip_keeps_value_and_type(value: object) -> None:
    assert is_same(round_trip({"value": value}), {"value": value})


@pytest.mark.parametrize("name", ["a.b", "a/b", "%2F", "%", ".", "/", "0", "a b"])
def test_state_round_trip_keeps_odd_names(name: str) -> None:
    state = {name: {name: torch.ones(1)}, "other": 1}
    leaves, _ = flatten_state(state, "w")
    assert not any("." in path for path in leaves)
    assert is_same(round_trip(state), state)


def test_flatten_state_of_the_documented_example() -> None:
    tensor = torch.ones(2)
    leaves, notes = flatten_state({"step": 3, "quant": {"codes": tensor, "maps": (tensor, None)}, "mode": "fast"}, "w")
    assert list(leaves) == ["step", "quant/codes", "quant/maps/0"]
    assert notes == {
        "step": "int",
        "quant": {"dict": ["codes", "maps"]},
        "quant/maps": {"tuple": 2},
        "quant/maps/1": "none",
        "mode": {"str": "fast"},
    }


def test_flatten_state_of_tensors_needs_no_note_and_no_copy() -> None:
    tensor = torch.ones(2)
    leaves, notes = flatten_state({"exp_avg": tensor}, "w")
    assert notes == {}
    assert leaves["exp_avg"].data_ptr() == tensor.data_ptr()


class HoldsItself:
    pass


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"p": HoldsItself()}, "HoldsItself"),
        ({"p": OrderedDict(a=1)}, "OrderedDict"),
        ({"p": np.float64(1.0)}, "numpy.float64"),
        ({"p": 2**63}, "64 bits"),
        ({"p": {1: 2}}, "the name 1, int"),
        ({"p": {"": 2}}, "the name ''"),
        ({7: 1}, "the name 7, int"),
        ({"p": LOOP}, "nested"),
        ({"p": {"codes": torch.eye(2).to_sparse()}}, "sparse"),
        ({"p": torch.zeros(1).as_subclass(type("OptimState8bit", (torch.Tensor,), {}))}, "OptimState8bit"),
    ],
)
def test_flatten_state_refuses_what_it_cannot_keep(state: dict[Any, Any], found: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        flatten_state(state, "layers.0.weight")
    error = caught.value
    assert (error.kind, error.fqn) == ("optimizer-state-type", "layers.0.weight")
    assert found in str(error.found)


def test_restore_state_makes_dicts_where_there_is_no_note() -> None:
    state = restore_state({"a/b": torch.ones(1)}, {}, "w", lambda path, tensor: tensor)
    assert is_same(state, {"a": {"b": torch.ones(1)}})


DEEP = "/".join("a" * 40)
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("leaves", "notes"),
    [
        ({}, {"a": "int"}),
        ({"a": ONE}, {"a": "int"}),
        ({"a": torch.tensor(1.0)}, {"a": "float"}),
        ({"a": ONE}, {"a": "none"}),
        ({"a": ONE}, {"a": {"str": "x"}}),
        ({"a": ONE, "a/b": ONE}, {}),
        ({"a/b": ONE}, {"a": "none"}),
        ({"a/b": ONE}, {"a": {"str": "x"}}),
        ({}, {"a": {"dict": ["b"]}}),
        ({"a/b": ONE, "a/c": ONE}, {"a": {"dict": ["b"]}}),
        ({"a/b": ONE}, {"a": {"dict": ["b", "b"]}}),
        ({"a/b": ONE}, {"a": {"dict": [1]}}),
        ({"a/0": ONE}, {"a": {"list": 2}}),
        ({"a/1": ONE}, {"a": {"tuple": 1}}),
        ({}, {"a": {"list": 10**9}}),
        ({}, {"a": {"list": -1}}),
        ({}, {"a": {"dict": [], "list": 0}}),
        ({}, {"a": {"object": 1}}),
        ({}, {"a": None}),
        ({}, {"a": 3}),
        ({}, {"a": []}),
        ({"a//b": ONE}, {}),
        ({"": ONE}, {}),
        ({DEEP: ONE}, {}),
    ],
)
def test_leaves_and_notes_that_do_not_fit_are_refused(leaves: dict[str, torch.Tensor], notes: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as caught:
        check_leaves({path: meta_of(leaf) for path, leaf in leaves.items()}, notes, "w")
    assert (caught.value.kind, caught.value.fqn) == ("optimizer-notes", "w")
    with pytest.raises(FormatError):
        restore_state(leaves, notes, "w", lambda path, tensor: tensor)


OPTIONS = [
    None,
    True,
    0,
    2**80,
    1.0,
    0.1,
    1e-300,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    "match_rms_adamw",
    (0.9, 0.999),
    [0.9, (1, True), []],
    (),
    {"a": (1, {"tuple": [2]}), "b": {}},
    torch.tensor(1e-3),
    torch.tensor([0.5], dtype=torch.bfloat16),
    torch.tensor(math.inf),
    torch.tensor(7),
    torch.tensor(True),
    (torch.tensor(0.9), torch.tensor(0.99)),
    np.float64(0.1),
    np.float32(0.1),
    np.int64(3),
    np.bool(True),
    torch.bfloat16,
]


@pytest.mark.parametrize("value", OPTIONS, ids=repr)
def test_option_round_trip_keeps_value_and_type(value: object) -> None:
    assert is_same(decode_option(through_json(encode_option(value))), value)


def test_options_are_tagged_as_the_specification_says() -> None:
    options = [(1, 2.0), [1], torch.tensor(0.5), torch.tensor([0.5]), math.inf]
    assert [encode_option(value) for value in options] == [
        {"tuple": [1, 2.0]},
        [1],
        {"tensor": 0.5, "dtype": "F32"},
        {"tensor": [0.5], "dtype": "F32"},
        {"float": "inf"},
    ]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (object(), "object"),
        (len, "builtin_function_or_method"),
        ({1: 2}, "dict"),
        (torch.zeros(2), "F32[2]"),
        (torch.zeros(1, 1), "F32[1, 1]"),
        (torch.tensor(1j), "C64[]"),
        (np.zeros(1), "numpy.ndarray"),
        (np.datetime64(0, "s"), "numpy.datetime64"),
        (1j, "complex"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_encode_option_refuses_what_it_cannot_say(value: object, found: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        encode_option([value])
    assert found in str(caught.value.found)


@pytest.mark.parametrize(
    "encoded",
    [
        {},
        {"set": [1]},
        {"tuple": 1},
        {"tuple": [1], "more": 1},
        {"float": "0.1"},
        {"float": 1.0},
        {"tensor": 0.1},
        {"tensor": "x", "dtype": "F32"},
        {"tensor": 0.1, "dtype": "F3"},
        {"numpy": 0.1, "dtype": "object"},
        {"numpy": 300, "dtype": "uint8"},
        {"dtype": "F3"},
        [{"tuple": [{"nothing": 1}]}],
    ],
    ids=repr,
)
def test_decode_option_refuses_what_is_not_an_option(encoded: object) -> None:
    with pytest.raises(FormatError) as caught:
        decode_option(encoded)
    assert caught.value.kind == "option-encoding"
