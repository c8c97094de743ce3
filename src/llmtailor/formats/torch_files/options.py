"""Options of a parameter group (``lr``, ``betas``) between a tree and the tagged JSON of our manifest.

The same as ``optimizer_values.encode_option`` and ``decode_option`` for values that were never loaded.
"""

from __future__ import annotations

import math

from ...errors import FormatError, UnsupportedError
from ...tensor_refs import InlineTensor
from ...tensors import DTYPE_BITS, TensorMeta
from ..numbers import Number, decode_number, encode_number, read_number
from .nodes import Global, Instance, TorchTensor, Tree
from .storages import DTYPE_OF_GLOBAL, GLOBAL_OF_DTYPE

__all__ = ["read_option", "write_option"]

# numpy's names of scalar types, by their spelling in a pickle and ours. Source: numpy 2.3, numpy/_core/src/multiarray/
# descriptor.c (arraydescr_reduce), methods.c (gentype_reduce).
_NUMPY_TYPES = {
    "b1": ("bool", "BOOL"),
    "i1": ("int8", "I8"),
    "i2": ("int16", "I16"),
    "i4": ("int32", "I32"),
    "i8": ("int64", "I64"),
    "u1": ("uint8", "U8"),
    "u2": ("uint16", "U16"),
    "u4": ("uint32", "U32"),
    "u8": ("uint64", "U64"),
    "f2": ("float16", "F16"),
    "f4": ("float32", "F32"),
    "f8": ("float64", "F64"),
}
_CODE_OF_NUMPY = {name: code for code, (name, _) in _NUMPY_TYPES.items()}
_NUMPY_SCALARS = frozenset({Global("numpy._core.multiarray", "scalar"), Global("numpy.core.multiarray", "scalar")})
_NUMPY_DTYPE = Global("numpy", "dtype")
_MAX_DEPTH = 64


def read_option(tree: Tree) -> object:
    """An option of a tree as tagged JSON; a tensor's few bytes are read from its file.

    Raises:
        UnsupportedError: There is no form for it; carries the type, the caller adds where.
        FormatError: A number is malformed.
    """
    if tree is None or type(tree) in (bool, int, str):
        return tree
    if type(tree) is float:
        return _encode_float(tree)
    if type(tree) is list:
        return [read_option(item) for item in tree]
    if type(tree) is tuple:
        return {"tuple": [read_option(item) for item in tree]}
    if type(tree) is dict and all(type(key) is str for key in tree):
        return {"dict": {key: read_option(item) for key, item in tree.items()}}
    if type(tree) is Global and tree in DTYPE_OF_GLOBAL:
        return {"dtype": DTYPE_OF_GLOBAL[tree]}
    if type(tree) is TorchTensor and tree.ref.meta.shape in ((), (1,)):
        value = _encode_number(read_number(tree.ref))
        return {"tensor": [value] if tree.ref.meta.shape else value, "dtype": tree.ref.meta.dtype}
    if type(tree) is Instance and tree.cls in _NUMPY_SCALARS:
        return _read_numpy(tree)
    raise UnsupportedError("an option of this type cannot be stored", kind="option-type", found=_describe(tree))


def _encode_float(value: float) -> object:
    return value if math.isfinite(value) else {"float": repr(value)}


def _encode_number(value: Number) -> object:
    return _encode_float(value) if type(value) is float else value


def _read_numpy(node: Instance) -> dict[str, object]:
    match node.arguments:
        case (Instance(cls=cls, arguments=(str(code), *_), state=(int(), str(order), *_)), bytes(data)):
            name, dtype = _NUMPY_TYPES.get(code, (None, ""))
            is_known = cls == _NUMPY_DTYPE and order in ("<", "|") and name is not None
            if is_known and 8 * len(data) == DTYPE_BITS[dtype]:
                return {"numpy": _encode_number(decode_number(data, dtype)), "dtype": name}
    raise UnsupportedError(
        "an option of this type cannot be stored", kind="option-type", found="another numpy scalar than a number"
    )


def _describe(tree: Tree) -> str:
    match tree:
        case Instance():
            return str(tree.cls)
        case Global():
            return f"the class {tree}"
        case TorchTensor():
            return f"a tensor {tree.ref.meta}"
    return type(tree).__name__


def write_option(value: object) -> Tree:
    """An option as a tree; inverse of ``read_option``.

    Raises:
        FormatError: Not tagged JSON.
    """
    return _write(value, 0)


def _write(value: object, depth: int) -> Tree:
    if depth > _MAX_DEPTH:
        raise _refuse("containers too deep inside each other")
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [_write(item, depth + 1) for item in value]
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_write(item, depth + 1) for item in items)
        case {"dict": dict(items), **rest} if not rest:
            return {key: _write(item, depth + 1) for key, item in items.items()}
        case {"float": "inf" | "-inf" | "nan" as text, **rest} if not rest:
            return float(text)
        case {"tensor": number, "dtype": str(name), **rest} if not rest and name in DTYPE_BITS:
            shape = (1,) if isinstance(number, list) else ()
            (element,) = number if isinstance(number, list) and len(number) == 1 else (number,)
            data = encode_number(_number(element), name)
            return TorchTensor(ref=InlineTensor(meta=TensorMeta(dtype=name, shape=shape), data=data))
        case {"numpy": number, "dtype": str(name), **rest} if not rest and name in _CODE_OF_NUMPY:
            return _numpy_scalar(_number(number), _CODE_OF_NUMPY[name])
        case {"dtype": str(name), **rest} if not rest and name in GLOBAL_OF_DTYPE:
            return GLOBAL_OF_DTYPE[name]
    raise _refuse(repr(value)[:200])


def _number(value: object) -> Number:
    match value:
        case bool() | int() | float():
            return value
        case {"float": "inf" | "-inf" | "nan" as text, **rest} if not rest:
            return float(text)
    raise _refuse(repr(value)[:200])


def _numpy_scalar(value: Number, code: str) -> Instance:
    state = (3, "<" if code[1] != "1" else "|", None, None, None, -1, -1, 0)
    dtype = Instance(_NUMPY_DTYPE, (code, False, True), is_call=True, state=state)
    data = encode_number(value, _NUMPY_TYPES[code][1])
    return Instance(Global("numpy._core.multiarray", "scalar"), (dtype, data), is_call=True)


def _refuse(found: str) -> FormatError:
    return FormatError("a group option cannot be understood", kind="option-encoding", found=found)
