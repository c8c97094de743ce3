"""The calls in a torch pickle that only build values, as the values they build; every other call as an ``Instance``.

Recognized by name alone, nothing is imported: ``OrderedDict()``, ``set([...])``, ``torch.Size``, bytes of protocol 2,
tensors and parameters on storages.

Source: torch 2.13, torch/_utils.py (_rebuild_*), torch/_tensor.py (Tensor._reduce_ex_internal,
_rebuild_from_type_v2); CPython 3.11, Lib/pickle.py (save_bytes, save_set).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from ...errors import FormatError
from .class_names import is_hostile
from .nodes import Global, Instance, Size, TorchStorage, TorchTensor, Tree
from .storages import DTYPE_OF_GLOBAL, Views, view_dtype

__all__ = ["Rebuilder", "refuse_persistent"]

FindStorage: TypeAlias = Callable[[Tree], TorchStorage]
_Arguments: TypeAlias = tuple[Tree, ...]


def refuse_persistent(path: Path | None) -> FindStorage:
    """For pickles outside torch files: there is nothing their persistent ids could mean."""

    def find(_: Tree) -> TorchStorage:
        raise FormatError("not a valid pickle: it refers to data outside", kind="pickle", path=path)

    return find


class Rebuilder:
    """Makes values and nodes of calls; one for each file."""

    def __init__(self, path: Path, find_storage: FindStorage) -> None:
        self._path = path
        self._find_storage = find_storage
        self._views = Views(path)

    def persistent(self, identifier: Tree) -> TorchStorage:
        """The storage with this id."""
        return self._find_storage(identifier)

    def check_global(self, found: Global) -> None:
        """Refuse names that stand in no checkpoint but in attacks."""
        if is_hostile(found):
            raise FormatError(
                "the file was made to run a program; nothing of it was run",
                kind="pickle-hostile",
                path=self._path,
                expected="names of data",
                found=str(found),
                hint="do not open it with torch.load; get the checkpoint from its author again",
            )

    def call(self, function: Global, arguments: _Arguments) -> Tree:
        """The value of a call, or an ``Instance`` that notes it."""
        rebuild = _REBUILDERS.get(function)
        value = None if rebuild is None else rebuild(self, arguments)
        return Instance(function, arguments, is_call=True) if value is None else value

    def tensor(self, arguments: _Arguments, dtype: str | None, metadata: _Arguments) -> TorchTensor | None:
        """A tensor on a storage; None if it is not a plain one (quantized, conjugated, an unusual type)."""
        if len(arguments) != 6 or not isinstance(arguments[0], TorchStorage) or len(metadata) > 1:
            raise self._malformed("a tensor")
        storage, offset, size, stride, requires_grad, hooks = arguments
        if type(requires_grad) is not bool or not isinstance(hooks, Mapping | None) or hooks:
            raise self._malformed("a tensor")
        if dtype is None or (metadata and metadata[0]):
            return None
        return TorchTensor(ref=self._views.view(storage, dtype, offset, size, stride), requires_grad=requires_grad)

    def parameter(self, arguments: _Arguments) -> TorchTensor | None:
        """A parameter; None if it is one of something else than a plain tensor."""
        if len(arguments) != 3 or type(arguments[1]) is not bool:
            raise self._malformed("a parameter")
        data, requires_grad, _ = arguments
        if not isinstance(data, TorchTensor):
            return None
        return TorchTensor(ref=data.ref, requires_grad=requires_grad, is_parameter=True)

    def from_type(self, arguments: _Arguments) -> Tree:
        """A tensor with attributes of its own, which are dropped: DeepSpeed's notes to itself; None for subclasses."""
        if len(arguments) != 4 or type(arguments[0]) is not Global or type(arguments[2]) is not tuple:
            raise self._malformed("a tensor")
        function, cls, inner, _ = arguments
        # Not this function itself: it could be its own argument any number of times. Nor one that copies what it is
        # given: the copy would be dropped, unseen by whoever counts what a file asks for.
        if type(cls) is not Global or cls not in _PLAIN_TENSORS or function not in _TENSOR_FUNCTIONS:
            return None
        return _TENSOR_FUNCTIONS[function](self, inner)

    def _malformed(self, what: str) -> FormatError:
        return FormatError(f"not a valid torch file: {what} is malformed", kind="torch-tensor", path=self._path)

    def tensor_v2(self, arguments: _Arguments) -> TorchTensor | None:
        """``_rebuild_tensor_v2``: the storage knows the element type."""
        storage = arguments[0] if arguments else None
        dtype = view_dtype(storage) if isinstance(storage, TorchStorage) else None
        return self.tensor(arguments[:6], dtype, arguments[6:])

    def tensor_v3(self, arguments: _Arguments) -> TorchTensor | None:
        """``_rebuild_tensor_v3``: the storage is bytes, the element type an argument."""
        dtype = DTYPE_OF_GLOBAL.get(arguments[6]) if len(arguments) > 6 and type(arguments[6]) is Global else None
        return self.tensor(arguments[:6], dtype, arguments[7:])

    def parameter_with_state(self, arguments: _Arguments) -> TorchTensor | None:
        """``_rebuild_parameter_with_state``: the state, attributes of the parameter, is dropped."""
        return self.parameter(arguments[:3])

    def size(self, arguments: _Arguments) -> Size:
        """A ``torch.Size``."""
        (sizes,) = arguments if len(arguments) == 1 else (None,)
        if not isinstance(sizes, tuple | list) or not all(type(item) is int for item in sizes):
            raise self._malformed("a torch.Size")
        return Size(sizes)


def _set(_: Rebuilder, arguments: _Arguments) -> set[Tree] | None:
    (items,) = arguments if len(arguments) == 1 else (None,)
    return set(items) if type(items) is list and all(map(_is_plain_key, items)) else None


def _is_plain_key(item: Tree) -> bool:
    # Numbers of more than 64 bits can be made to collide, see pickle_reader.
    return type(item) in (str, bytes, bool, type(None)) or (type(item) is int and item.bit_length() <= 64)


def _encode(_: Rebuilder, arguments: _Arguments) -> bytes | None:
    if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] != "latin1":
        return None
    try:
        return arguments[0].encode("latin1")
    except UnicodeEncodeError:
        return None


def _bytes(_: Rebuilder, arguments: _Arguments) -> bytes | None:
    # As protocol 2 has the empty ones.
    return None if arguments else b""


def _ordered_dict(_: Rebuilder, arguments: _Arguments) -> OrderedDict[Tree, Tree] | None:
    # Entries follow. Python 2 gave them as arguments.
    return None if arguments else OrderedDict()


_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
_PLAIN_TENSORS = frozenset({
    Global("torch", "Tensor"),
    Global("torch._tensor", "Tensor"),
    Global("torch.nn.parameter", "Parameter"),
})  # fmt: skip

_TENSOR_FUNCTIONS: dict[Global, Callable[[Rebuilder, _Arguments], TorchTensor | None]] = {
    Global("torch._utils", "_rebuild_tensor_v2"): Rebuilder.tensor_v2,
    Global("torch._utils", "_rebuild_tensor_v3"): Rebuilder.tensor_v3,
    Global("torch._utils", "_rebuild_parameter"): Rebuilder.parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): Rebuilder.parameter_with_state,
}
_REBUILDERS: dict[Global, Callable[[Rebuilder, _Arguments], Tree]] = {
    Global("builtins", "bytes"): _bytes,
    Global("builtins", "set"): _set,
    Global("_codecs", "encode"): _encode,
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("torch", "Size"): Rebuilder.size,
    **_TENSOR_FUNCTIONS,
    _FROM_TYPE: Rebuilder.from_type,
}
