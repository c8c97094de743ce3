"""Python values of optimizers as files can hold them: plain tensors by path, and tagged JSON.

The state of one parameter is a tree: tensors, numbers, text and None in dicts, lists and tuples. ``flatten_state``
makes of it *leaves*, plain tensors by path that any safetensors reader understands, and *notes*, what tensors cannot
say; ``restore_state`` is its inverse.

    {"step": 3, "quant": {"codes": T, "maps": (T, None)}, "mode": "fast"}

    leaves   step, quant/codes, quant/maps/0
    notes    step: "int", quant: {"dict": ["codes", "maps"]}, quant/maps: {"tuple": 2}, quant/maps/1: "none",
             mode: {"str": "fast"}

A parameter group's options (``lr``, ``betas``) are small and go into the manifest as JSON: ``encode_option`` and
``decode_option``. Both ways keep values and Python types exactly. Neither knows of parameters or optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from .errors import FormatError, UnsupportedError
from .local_parts import detach_part
from .state_tree import MAX_DEPTH, NUMBERS, Note, assemble, escape, require_number
from .tensor_bytes import dtype_name, meta_of, torch_dtype, why_not_plain, why_not_stored
from .tensors import TensorMeta

__all__ = ["check_leaves", "decode_option", "encode_option", "flatten_state", "restore_state"]


def flatten_state(state: Mapping[Any, object], fqn: str) -> tuple[dict[str, torch.Tensor], dict[str, Note]]:
    """Take the state of one parameter apart.

    Args:
        state: Name -> value, as in ``optimizer.state[parameter]``.
        fqn: The parameter, for the error.

    Returns:
        Leaves and notes by path. A path is the state's name, with the keys and indices below it joined by ``/``;
        ``%``, ``/`` and ``.`` within a name are percent-encoded. Tensors are views (no copy), on their own devices; of
        a ``DTensor`` one of the same kind.

    Raises:
        UnsupportedError: A value is neither of these nor a plain tensor; names the path and the type.
    """
    leaves: dict[str, torch.Tensor] = {}
    notes: dict[str, Note] = {}
    if (plain := _plain_leaves(state)) is not None:
        return plain, notes
    for path, value in _walk("", dict(state), fqn):
        if isinstance(value, torch.Tensor):
            reason = why_not_stored(value)
            if reason is not None:
                raise _refuse(path, fqn, reason)
            leaves[path] = detach_part(value)
            continue
        notes[path] = _note_of(path, value, fqn)
        if isinstance(value, bool | int | float):
            leaves[path] = _number_tensor(path, value, fqn)
    return leaves, notes


def _plain_leaves(state: Mapping[Any, object]) -> dict[str, torch.Tensor] | None:
    """All of it, if it is as of most optimizers: tensors by plain names, thousands of them at every save."""
    leaves: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if type(value) is not torch.Tensor or type(name) is not str or not name.isidentifier():
            return None
        if why_not_plain(value) is not None:
            return None
        leaves[name] = value.detach()
    return leaves


def _walk(path: str, value: object, fqn: str) -> Iterator[tuple[str, object]]:
    """Every path with its value, containers before what is in them; without the root."""
    if path:
        yield path, value
    if path.count("/") >= MAX_DEPTH:
        raise _refuse(path[:200], fqn, f"containers nested more than {MAX_DEPTH} deep")
    children: Iterable[tuple[Any, object]] = ()
    if type(value) is dict:
        children = value.items()
    elif isinstance(value, list | tuple):
        children = ((str(index), item) for index, item in enumerate(value))
    for key, child in children:
        if type(key) is not str or not key:
            raise _refuse(path, fqn, f"the name {key!r}, {_type_name(key)}")
        yield from _walk(f"{path}/{escape(key)}" if path else escape(key), child, fqn)


def _note_of(path: str, value: object, fqn: str) -> Note:
    # Exact types: a subclass (IntEnum, namedtuple, OrderedDict, numpy.float64) would come back as its base.
    kind = type(value)
    if value is None:
        return "none"
    if kind in (bool, int, float):
        return kind.__name__
    if kind is str:
        return {"str": value}
    if kind is dict and isinstance(value, dict):
        return {"dict": list(value)}
    if kind in (list, tuple) and isinstance(value, list | tuple):
        return {kind.__name__: len(value)}
    raise _refuse(path, fqn, _type_name(value))


def _number_tensor(path: str, value: bool | int | float, fqn: str) -> torch.Tensor:
    kind = type(value)
    if kind is int and not -(2**63) <= value < 2**63:
        raise _refuse(path, fqn, "an int of more than 64 bits")
    return torch.tensor(value, dtype=torch_dtype(NUMBERS[kind.__name__].dtype), device="cpu")


def _refuse(path: str, fqn: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"cannot save the optimizer's state {path!r}: there is no exact form of it in a file yet",
        kind="optimizer-state-type",
        fqn=fqn,
        expected="a plain tensor, DTensor, int, float, bool, str, None, or dict, list or tuple of these",
        found=found,
    )


def restore_state(
    leaves: Mapping[str, torch.Tensor],
    notes: Mapping[str, Note],
    fqn: str,
    place: Callable[[str, torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """Put the state of one parameter together again; inverse of ``flatten_state``.

    Args:
        leaves: Tensor by path; any device.
        notes: As ``flatten_state`` gave them; a container without a note is a dict.
        fqn: The parameter, for the error.
        place: (path, tensor) -> the tensor to put into the state.

    Raises:
        FormatError: Leaves and notes do not fit together.
    """

    def make(path: str, leaf: torch.Tensor, note: Note | None) -> object:
        if note is None:
            return place(path, leaf)
        require_number(path, meta_of(leaf), note, fqn)
        return leaf.item()

    return assemble(leaves, notes, fqn, make)


def check_leaves(metas: Mapping[str, TensorMeta], notes: Mapping[str, Note], fqn: str) -> None:
    """Check that ``restore_state`` will succeed, before there are tensors.

    Raises:
        FormatError: Leaves and notes do not fit together.
    """

    def make(path: str, meta: TensorMeta, note: Note | None) -> None:
        if note is not None:
            require_number(path, meta, note, fqn)

    assemble(metas, notes, fqn, make)


def encode_option(value: object) -> object:
    """A parameter group's option as JSON.

    None, bool, int, finite float, str and list stand for themselves; the rest is tagged: ``{"float": "inf"}``,
    ``{"tuple": [...]}``, ``{"dict": {...}}``, ``{"tensor": 0.1, "dtype": "F32"}`` (0-dim, or ``[0.1]``),
    ``{"numpy": 0.1, "dtype": "float64"}`` (learning rates computed with numpy), ``{"dtype": "BF16"}``.

    Raises:
        UnsupportedError: Anything else; carries the type, the caller adds where.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is list:
        return [encode_option(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [encode_option(item) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: encode_option(item) for key, item in value.items()}}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, np.generic) and value.dtype.name in _NUMPY_NAMES:
        return {"numpy": encode_option(value.item()), "dtype": value.dtype.name}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value)
    raise UnsupportedError("an option of this type cannot be stored", kind="option-type", found=_type_name(value))


def _encode_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    reason = why_not_plain(tensor)
    if reason is None and (tensor.shape not in ((), (1,)) or tensor.is_complex()):
        reason = f"a tensor {meta_of(tensor)}"
    if reason is not None:
        raise UnsupportedError("an option of this type cannot be stored", kind="option-type", found=reason)
    return {"tensor": encode_option(tensor.detach().tolist()), "dtype": dtype_name(tensor.dtype)}


def decode_option(encoded: object) -> object:
    """The value of an encoded option; inverse of ``encode_option``. Tensors are new, on the CPU.

    Raises:
        FormatError: Not an encoded option.
    """
    try:
        return _decode(encoded)
    # RuntimeError is torch's, and RecursionError.
    except (TypeError, ValueError, RuntimeError, OverflowError, UnsupportedError) as err:
        raise FormatError(
            "a group option cannot be understood", kind="option-encoding", found=repr(encoded)[:200]
        ) from err


def _decode(encoded: object) -> object:
    match encoded:
        case None | bool() | int() | float() | str():
            return encoded
        case list():
            return [_decode(item) for item in encoded]
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_decode(item) for item in items)
        case {"dict": dict(items), **rest} if not rest:
            return {key: _decode(item) for key, item in items.items()}
        case {"float": "inf" | "-inf" | "nan" as text, **rest} if not rest:
            return float(text)
        case {"tensor": value, "dtype": str(name), **rest} if not rest:
            return torch.tensor(_decode(value), dtype=torch_dtype(name))
        case {"numpy": value, "dtype": str(name), **rest} if not rest and name in _NUMPY_NAMES:
            return np.dtype(name).type(_decode(value))
        case {"dtype": str(name), **rest} if not rest:
            return torch_dtype(name)
    raise ValueError("no such tag")


_NUMPY_NAMES = {
    *("bool", "float16", "float32", "float64"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
}


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
