"""Values to save with torch, and trees of torch files as the values they stand for, to compare the two."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from formats.simple_writer import load_ref
from llmtailor.formats.torch_files import Global, Instance, Size, TorchStorage, TorchTensor, Tree, metadata_of
from llmtailor.formats.torch_files.storages import DTYPE_OF_GLOBAL
from llmtailor.tensor_bytes import torch_dtype


def a_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


def an_optimizer() -> torch.optim.Optimizer:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), foreach=False)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


VALUES: dict[str, Callable[[], Any]] = {
    "state_dict": lambda: a_model().state_dict(),
    "optimizer": lambda: an_optimizer().state_dict(),
    "tensor": lambda: torch.arange(6.0).reshape(2, 3),
    "scalar": lambda: torch.tensor(3, dtype=torch.int64),
    "empty": lambda: [torch.zeros(0), torch.zeros(0, 3), torch.zeros(2, 0, 3, dtype=torch.int8)],
    "parameters": lambda: [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False)],
    "requires_grad": lambda: torch.ones(2, requires_grad=True),
    "views": lambda: (lambda t: [t, t.t(), t[1], t[:, 1], t[1:, ::2], t.unsqueeze(0), t[0, 0]])(torch.rand(4, 6)),
    "channels_last": lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "windows": lambda: torch.arange(10.0).as_strided((4, 2), (2, 1), 1),
    "plain": lambda: {"a": [1, -1, 2**40, -(2**40), 2**100, -(2**100), 1.5, -0.0, math.inf, True, None, "x\ud800"],
                      "b": (), "c": (1,), "d": (1, 2), "e": (1, 2, 3), "f": (1, 2, 3, 4), "g": {}, "h": [], 5: 6},
    "bytes": lambda: [b"", b"abc", bytes(range(256))],
    "sets": lambda: {"a": {"x"}, "b": {1, 2}, "c": set()},
    "size": lambda: torch.Size([2, 0, 3]),
    "ordered": lambda: OrderedDict([("b", 1), ("a", OrderedDict())]),
    "dtypes": lambda: [torch.float32, torch.bfloat16, torch.bool, torch.uint16, torch.float8_e4m3fn],
    "long": lambda: [list(range(2500)), {n: str(n) for n in range(2500)}],
}  # fmt: skip

_ATOMS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary())
_KEYS = st.one_of(st.text(), st.integers(-(2**63), 2**63), st.tuples(st.text(), st.integers(0, 9)))
PLAIN_TREES = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(_KEYS, inner),
        st.dictionaries(_KEYS, inner).map(OrderedDict),
        st.sets(st.one_of(st.text(), st.integers(0, 99))),
    ),
    max_leaves=30,
)


def load_tree(tree: Tree) -> Any:
    """The values; instances stay as they are."""
    match tree:
        case TorchTensor():
            tensor = load_ref(tree.ref).clone()
            if tree.is_parameter:
                return torch.nn.Parameter(tensor, requires_grad=tree.requires_grad)
            return tensor.requires_grad_(tree.requires_grad)
        case Size():
            return torch.Size(tree)
        case Global() if tree in DTYPE_OF_GLOBAL:
            return torch_dtype(DTYPE_OF_GLOBAL[tree])
        case OrderedDict():
            loaded = OrderedDict((key, load_tree(value)) for key, value in tree.items())
            if metadata_of(tree) is not None:
                loaded._metadata = load_tree(metadata_of(tree))  # type: ignore[attr-defined]
            return loaded
        case dict():
            return {key: load_tree(value) for key, value in tree.items()}
        case list() | tuple():
            return type(tree)(load_tree(item) for item in tree)
    return tree


def is_same(a: Any, b: Any) -> bool:
    """Equal in value and type, all the way down; tensors bit for bit, trees by what they say."""
    if type(a) is not type(b):
        return False
    match a:
        case torch.Tensor():
            return a.requires_grad == b.requires_grad and is_same_tensor(a.detach(), b.detach())
        case dict():
            same = list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
            return same and is_same(getattr(a, "_metadata", None), getattr(b, "_metadata", None))
        case list() | tuple():
            return len(a) == len(b) and all(map(is_same, a, b))
        case Instance():
            names = ("cls", "arguments", "is_call", "state", "items", "entries")
            return all(is_same(getattr(a, name), getattr(b, name)) for name in names)
        case TorchTensor():
            flags = (a.requires_grad, a.is_parameter) == (b.requires_grad, b.is_parameter)
            return flags and is_same_tensor(load_ref(a.ref), load_ref(b.ref))
        case TorchStorage():
            return a.cls == b.cls and is_same_tensor(load_ref(a.ref), load_ref(b.ref))
        case float() | np.generic():
            return repr(a) == repr(b)
    return bool(a == b)


def is_same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def stock_load(path: Path, **options: Any) -> Any:
    return torch.load(path, weights_only=True, **options)
