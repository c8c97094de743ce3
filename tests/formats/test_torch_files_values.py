"""Options and per-parameter state, read from files without torch: the same as torch's values would have given."""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from formats.simple_writer import load_ref, write_plan
from formats.torch_trees import is_same
from llmtailor.catalog import StateRef
from llmtailor.errors import FormatError, UnsupportedError
from llmtailor.formats.numbers import decode_number, encode_number
from llmtailor.formats.torch_files import (
    Global,
    Instance,
    Size,
    TorchTensor,
    Tree,
    open_torch_file,
    plan_torch_file,
    read_option,
    read_state,
    write_option,
    write_state,
)
from llmtailor.optimizer_values import decode_option, encode_option, flatten_state, restore_state
from llmtailor.tensor_refs import InlineTensor, ScaledTensor
from llmtailor.tensors import TensorMeta

NUMPY_TYPES = [np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, np.float16,
               np.float32, np.float64]  # fmt: skip
OPTIONS = {
    "lr": 1e-3,
    "lr_tensor": torch.tensor(0.1),
    "lr_tensor_of_one": torch.tensor([0.1], dtype=torch.float64),
    "lr_bf16": torch.tensor(0.1, dtype=torch.bfloat16),
    "lr_f16": torch.tensor(0.1, dtype=torch.float16),
    "lr_inf": torch.tensor(math.inf),
    "lr_view": torch.tensor([0.1, 0.2, 0.3])[1],
    "count_tensor": torch.tensor(2**62),
    "count_unsigned": torch.tensor(2**63, dtype=torch.uint64),
    "flag_tensor": torch.tensor(True),
    "lr_parameter": torch.nn.Parameter(torch.tensor(0.5)),
    "betas": (0.9, 0.95),
    "nested": [1, (2, [3.5, None, "x"]), {"a": (), "b": {}}],
    "inf": math.inf,
    "minus_inf": -math.inf,
    "nan": math.nan,
    "minus_zero": -0.0,
    "none": None,
    "flag": True,
    "large": 2**80,
    "text": "adamw",
    "dtype": torch.bfloat16,
    **{f"numpy_{kind.__name__}": kind(1) for kind in NUMPY_TYPES},
    "numpy_lr": np.float64(0.1),
    "numpy_nan": np.float32(math.nan),
}


def read_saved(value: Any, directory: Path) -> Tree:
    path = directory / "saved.pt"
    torch.save(value, path)
    return open_torch_file(path)


def save_and_load(tree: Tree, directory: Path) -> Any:
    path = write_plan(plan_torch_file("new.pt", tree), directory)
    return torch.load(path, weights_only=False)  # numpy's scalars need more than plain torch allows


@pytest.mark.parametrize("name", OPTIONS)
def test_read_option_is_what_encode_option_says(name: str, tmp_path: Path) -> None:
    encoded = read_option(read_saved(OPTIONS[name], tmp_path))
    assert is_same(encoded, encode_option(OPTIONS[name]))
    json.dumps(encoded, allow_nan=False)


@pytest.mark.parametrize("name", OPTIONS)
def test_written_option_is_what_decode_option_gives(name: str, tmp_path: Path) -> None:
    encoded = json.loads(json.dumps(encode_option(OPTIONS[name])))
    loaded = save_and_load([write_option(encoded)], tmp_path)
    assert is_same(loaded, [decode_option(encoded)])


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2),
        torch.zeros(1, 1),
        torch.zeros((), dtype=torch.float8_e4m3fn),
        torch.zeros((), dtype=torch.complex64),
        {1: 2},
        {"a"},
        b"x",
        OrderedDict(a=1),
        torch.Size([1]),
        torch.device("cpu"),
        np.complex64(1),
        np.str_("x"),
    ],
    ids=str,
)
def test_option_without_a_form_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_option({"deep": [read_saved(value, tmp_path)]})
    assert caught.value.kind in ("option-type", "number-type")


def test_malformed_numpy_scalars_are_refused() -> None:
    cls, dtype = Global("numpy._core.multiarray", "scalar"), Global("numpy", "dtype")
    for code, order, data in [("f8", "<", b"x"), ("f8", ">", bytes(8)), ("f16", "<", bytes(16)), ("O", "|", b"x")]:
        described = Instance(dtype, (code, False, True), is_call=True, state=(3, order, None, None, None, -1, -1, 0))
        with pytest.raises(UnsupportedError):
            read_option(Instance(cls, (described, data), is_call=True))
    with pytest.raises(UnsupportedError):
        read_option(Instance(cls, (), is_call=True))


def test_unknown_class_among_options_is_named() -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_option([Instance(Global("my_training", "Schedule"))])
    assert caught.value.found == "my_training.Schedule"


@pytest.mark.parametrize(
    "encoded",
    [
        {},
        {"a": 1},
        {"tuple": 1},
        {"tuple": [], "more": 1},
        {"float": "1"},
        {"tensor": "x", "dtype": "F32"},
        {"tensor": [1, 2], "dtype": "F32"},
        {"tensor": 2**70, "dtype": "I64"},
        {"tensor": 1e300, "dtype": "F32"},
        {"tensor": 1, "dtype": "F7"},
        {"numpy": 1, "dtype": "object"},
        {"numpy": None, "dtype": "int8"},
        {"numpy": 300, "dtype": "int8"},
        {"dtype": "F7"},
        {"dict": [1]},
        b"x",
        object(),
    ],
    ids=lambda value: "an object" if type(value) is object else repr(value),
)
def test_what_is_no_option_is_refused(encoded: object) -> None:
    with pytest.raises(FormatError):
        write_option([encoded])


def test_option_too_deep_is_refused() -> None:
    encoded: object = 1
    for _ in range(5000):
        encoded = [encoded]
    with pytest.raises(FormatError):
        write_option(encoded)


@given(st.floats(width=32))
def test_bf16_is_rounded_as_torch_does(value: float) -> None:
    expected = torch.tensor(value, dtype=torch.float32).to(torch.bfloat16)
    encoded = encode_number(value, "BF16")
    if math.isnan(value):
        assert math.isnan(decode_number(encoded, "BF16"))
    else:
        assert encoded == expected.view(torch.uint16).numpy().tobytes()
        assert decode_number(encoded, "BF16") == expected.item()


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [(0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0x3F808001, 0x3F81), (0x7F7FFFFF, 0x7F80), (0x7FFFFFFF, 0x7FFF)],
    ids=["tie to even below", "tie to even above", "above a tie", "to infinity", "not a number"],
)
def test_bf16_between_two_numbers(bits: int, rounded: int) -> None:
    (value,) = struct.unpack("<f", struct.pack("<I", bits))
    assert encode_number(value, "BF16") == struct.pack("<H", rounded)


# State of one parameter.


def trained(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    optimizer = make(list(model.parameters()))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.rand(2, 4)).square().sum().backward()
        optimizer.step()
    return optimizer


OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, foreach=False),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True, foreach=False),
    "adafactor": lambda p: torch.optim.Adafactor(p, foreach=False),
    "transformers_adafactor": lambda p: transformers.Adafactor(p, scale_parameter=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "rprop": lambda p: torch.optim.Rprop(p, foreach=False),
    "asgd": lambda p: torch.optim.ASGD(p, foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, foreach=False),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2]),
}
STATES: dict[str, dict[str, Any]] = {
    "nested_8_bit": {
        "step": 3,
        "state1": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "quant": {"codes": torch.arange(4, dtype=torch.int8), "maps": (torch.rand(2), None), "scale": 0.5, "on": True},
        "mode": "fast",
        "list": [1, [2.5, (), {}], torch.tensor(1)],
        "a/b.c%": {"d/e": torch.ones(1)},
    },
    "numbers": {"nan": math.nan, "inf": -math.inf, "min": -(2**63), "max": 2**63 - 1, "zero": -0.0, "none": None},
    "momentum_none": {"momentum_buffer": None},
    "empty": {},
}


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    leaves, notes = flatten_state(state, "w")
    return leaves, notes


def check_state(state: dict[str, Any], tree: Mapping[Any, Tree], directory: Path) -> None:
    leaves, notes = flatten(state)
    read = read_state(tree, "w")
    assert list(read.tensors) == list(leaves)
    assert all(is_same(load_ref(ref), leaves[path]) for path, ref in read.tensors.items())
    assert list(read.notes.items()) == list(notes.items())
    loaded = save_and_load(write_state(read), directory)
    assert is_same(loaded, restore_state(leaves, notes, "w", lambda _, tensor: tensor))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_real_optimizers_is_what_flatten_state_gives(name: str, tmp_path: Path) -> None:
    saved = trained(OPTIMIZERS[name]).state_dict()
    tree = read_saved(saved, tmp_path)
    assert len(tree["state"]) == len(saved["state"])
    for index, state in saved["state"].items():
        (tmp_path / str(index)).mkdir()
        check_state(state, tree["state"][index], tmp_path / str(index))
    for group, group_tree in zip(saved["param_groups"], tree["param_groups"], strict=True):
        assert {key: encode_option(value) for key, value in group.items()} == {
            key: read_option(value) for key, value in group_tree.items()
        }


@pytest.mark.parametrize("name", STATES)
def test_any_state_is_what_flatten_state_gives(name: str, tmp_path: Path) -> None:
    check_state(STATES[name], read_saved(STATES[name], tmp_path), tmp_path)


_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(st.text(min_size=1), inner)),
    max_leaves=20,
)


@given(st.dictionaries(st.text(min_size=1), _VALUES))
def test_any_plain_state_comes_back(state: dict[str, Any]) -> None:
    leaves, notes = flatten(state)
    read = read_state(state, "w")
    assert list(read.notes.items()) == list(notes.items())
    assert list(read.tensors) == list(leaves)
    assert is_same(write_state(read), restore_state(leaves, notes, "w", lambda _, tensor: tensor))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (2**63, "an int of more than 64 bits"),
        (OrderedDict(), "a OrderedDict"),
        (Size([1]), "a Size"),
        (b"x", "a bytes"),
        ({1: 2}, "a name that is a int"),
        ({"": 2}, "a name that is an empty str"),
        (Instance(Global("torchao.optim", "OptimState8bit")), "torchao.optim.OptimState8bit"),
        (Global("torch", "float32"), "the class torch.float32"),
    ],
)
def test_state_without_a_form_is_refused_by_name(value: Tree, found: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_state({"a": {"b": value}}, "layer.weight")
    assert caught.value.found == found
    assert caught.value.fqn == "layer.weight"
    assert "a" in caught.value.what


def test_state_too_deep_is_refused() -> None:
    value: Tree = 1
    for _ in range(40):
        value = [value]
    with pytest.raises(UnsupportedError):
        read_state({"a": value}, "w")


def number(value: int) -> InlineTensor:
    return InlineTensor(meta=TensorMeta(dtype="I64", shape=()), data=struct.pack("<q", value))


@pytest.mark.parametrize(
    "state",
    [
        StateRef(tensors={"step": number(1)}, notes={"step": "float"}),
        StateRef(tensors={"step": number(1)}, notes={"step": {"str": "x"}}),
        StateRef(tensors={"a": number(1), "a/b": number(1)}),
        StateRef(tensors={"a/0": number(1)}, notes={"a": {"list": 2}}),
        StateRef(tensors={"a/1": number(1)}, notes={"a": {"tuple": 1}}),
        StateRef(tensors={"a/b": number(1)}, notes={"a": {"dict": ["c"]}}),
        StateRef(tensors={"a/b": number(1)}, notes={"a": "none"}),
        StateRef(tensors={}, notes={"a": "else"}),
        StateRef(tensors={"a//b": number(1)}),
        StateRef(tensors={"": number(1)}),
        StateRef(tensors={"/".join("a" * 40): number(1)}),
    ],
    ids=str,
)
def test_state_that_does_not_fit_its_notes_is_refused(state: StateRef) -> None:
    with pytest.raises(FormatError) as caught:
        write_state(state)
    assert caught.value.kind == "optimizer-notes"


def test_number_in_a_file_is_read(tmp_path: Path) -> None:
    (node,) = read_saved([torch.tensor(7)], tmp_path)
    assert type(node) is TorchTensor
    assert write_state(StateRef(tensors={"step": node.ref}, notes={"step": "int"})) == {"step": 7}


def test_computed_number_and_vanished_bytes_are_refused(tmp_path: Path) -> None:
    (node,) = read_saved([torch.tensor(7)], tmp_path)
    with pytest.raises(UnsupportedError):
        write_state(StateRef(tensors={"a": ScaledTensor(source=node.ref, factor=2.0)}, notes={"a": "int"}))
    (tmp_path / "saved.pt").write_bytes(b"")
    with pytest.raises(FormatError):
        write_state(StateRef(tensors={"a": node.ref}, notes={"a": "int"}))
