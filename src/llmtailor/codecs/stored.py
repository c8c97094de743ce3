"""What stands in a codes file: each tensor as arrays of codes, and what the header says about them.

A codes file is a safetensors file. A tensor ``K`` (a parameter's fqn, or ``state.<fqn>.<leaf>``) is in it as one or
more arrays ``K|<array>``; the ``__metadata__`` entry ``llmtailor.codes`` says for every ``K`` which codec they are of,
and the type and shape of the tensor they stand for. Pure; no bytes.

| codec          | of             | arrays: n elements, in b = ceil(n / 64) blocks             | relative to       |
|----------------|----------------|------------------------------------------------------------|-------------------|
| exact          | anything       | values: as the tensor                                      |                   |
| int8, int4     | F32, BF16, F16 | codes: I8 [n] or U8 [32 b]; scales: BF16 [b]               |                   |
| log8, log4     | F32, BF16, F16 | codes: U8 [n] or U8 [32 b]; lows: BF16 [b]; steps: U16 [b] |                   |
| delta8, delta4 | F32            | as int8, int4                                              | the exact tensor  |
| tail8, tail4   | F32            | codes: I8 [n] or U8 [32 b]                                 | its BF16 rounding |
| tail16         | F32            | codes: I16 [n]; ties: I64 [any]                            | its BF16 rounding |
| xor            | BF16, F16      | planes: U8 [any]; ends: I64 [ceil(n / 2^20)]               | the exact tensor  |
| round          | BF16, F16      | none                                                       | its master        |

The codes of a master, ``state.<fqn>.<leaf>``, are relative to the exact master, or to its weight, which is BF16.
``tail16`` is without loss, and what an optimizer file may hold a master as.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import FormatError
from ..strict_json import parse_object
from ..tensors import DTYPE_BITS, TensorMeta

__all__ = [
    "BASE_KEY",
    "BLOCK_NUMEL",
    "CODES_KEY",
    "FRAME_NUMEL",
    "STATE_BASE_KEY",
    "StoredCodes",
    "array_name",
    "parse_codes",
    "record_codes",
]

CODES_KEY = "llmtailor.codes"
"""In the ``__metadata__`` of a codes file."""
BASE_KEY = "llmtailor.base"
"""In the same: digest of the earlier weights file that the codes are relative to, if they are."""
STATE_BASE_KEY = "llmtailor.state_base"
"""In the same: digest of the earlier optimizer file that the codes are relative to, if they are to that, too."""
BLOCK_NUMEL = 64
"""Elements, in row-major order, that share a scale."""
FRAME_NUMEL = 2**20
"""Elements that are compressed as one."""

_FLOATS = frozenset({"F32", "BF16", "F16"})
_DTYPES_OF = {
    "exact": frozenset(DTYPE_BITS),
    "int8": _FLOATS,
    "int4": _FLOATS,
    "log8": _FLOATS,
    "log4": _FLOATS,
    "delta8": frozenset({"F32"}),
    "delta4": frozenset({"F32"}),
    "tail8": frozenset({"F32"}),
    "tail4": frozenset({"F32"}),
    "tail16": frozenset({"F32"}),
    "xor": frozenset({"BF16", "F16"}),
    "round": frozenset({"BF16", "F16"}),
}
# Arrays whose size is only known when they are written, and their type.
_OPEN_ARRAYS = {"xor": {"planes": "U8"}, "tail16": {"ties": "I64"}}

Base = Literal["exact", "rounded", "master"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCodes:
    """One tensor of a codes file."""

    codec: str
    meta: TensorMeta
    """Of the tensor that the codes stand for."""

    @property
    def arrays(self) -> Mapping[str, TensorMeta]:
        """Type and shape of each array; those whose size is only known when they are written are left out here."""
        numel = self.meta.numel
        blocks = -(-numel // BLOCK_NUMEL)
        scales = {"scales": TensorMeta(dtype="BF16", shape=(blocks,))}
        packed = {"codes": TensorMeta(dtype="U8", shape=(blocks * BLOCK_NUMEL // 2,))}
        signed = {"codes": TensorMeta(dtype="I8", shape=(numel,))}
        bounds = {
            "lows": TensorMeta(dtype="BF16", shape=(blocks,)),
            "steps": TensorMeta(dtype="U16", shape=(blocks,)),
        }
        match self.codec:
            case "exact":
                return {"values": self.meta}
            case "int8" | "delta8":
                return {**signed, **scales}
            case "int4" | "delta4":
                return {**packed, **scales}
            case "log8":
                return {"codes": TensorMeta(dtype="U8", shape=(numel,)), **bounds}
            case "log4":
                return {**packed, **bounds}
            case "tail8":
                return signed
            case "tail4":
                return packed
            case "tail16":
                return {"codes": TensorMeta(dtype="I16", shape=(numel,))}
            case "xor":
                return {"ends": TensorMeta(dtype="I64", shape=(-(-numel // FRAME_NUMEL),))}
            case "round":
                return {}
        raise AssertionError(self.codec)

    @property
    def max_ties(self) -> int:
        """Of ``tail16``: how many there may be, so that whoever looks for one finds all in memory."""
        return self.meta.numel // BLOCK_NUMEL

    @property
    def array_names(self) -> tuple[str, ...]:
        """Of all arrays."""
        return (*self.arrays, *_OPEN_ARRAYS.get(self.codec, ()))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays; of ``xor``, what it takes where it does not pay."""
        known = sum(array.nbytes for array in self.arrays.values())
        return known + self.meta.nbytes if self.codec == "xor" else known

    @property
    def base(self) -> Base | None:
        """What the codes are relative to: the tensor's exact earlier values, its own BF16 rounding (of a master: its
        weight), its master, or nothing."""
        if self.codec in ("delta8", "delta4", "xor"):
            return "exact"
        if self.codec == "round":
            return "master"
        return "rounded" if self.codec in ("tail8", "tail4", "tail16") else None


def array_name(key: str, array: str) -> str:
    """Name of an array in a file. Unique: what follows the last ``|`` is the array."""
    return f"{key}|{array}"


def record_codes(tensors: Mapping[str, StoredCodes]) -> str:
    """What stands under ``CODES_KEY``; by key."""
    entries = {
        key: {"codec": each.codec, "dtype": each.meta.dtype, "shape": list(each.meta.shape)}
        for key, each in sorted(tensors.items())
    }
    return json.dumps(entries, separators=(",", ":"))


def parse_codes(text: str | None, arrays: Mapping[str, TensorMeta], path: Path | str) -> dict[str, StoredCodes]:
    """Check what a file says of its codes against the arrays it has.

    Args:
        text: What stands under ``CODES_KEY``; None if nothing does.
        arrays: Every tensor in the file, by name.
        path: For the error.

    Returns:
        By key.

    Raises:
        FormatError: It is not a codes file, names a codec we do not know, or does not hold exactly the arrays that
            its codecs need.
    """
    if text is None:
        raise _refuse(path, None, f"{CODES_KEY} in its __metadata__", "no such entry")
    # What is not Unicode is refused there.
    entries = parse_object(text.encode(errors="surrogatepass"), what="header of a codes file", path=path)
    result = {key: _parse_entry(key, entry, path) for key, entry in entries.items()}
    expected: dict[str, TensorMeta] = {}
    for key, each in result.items():
        expected.update({array_name(key, array): meta for array, meta in each.arrays.items()})
        for array, dtype in _OPEN_ARRAYS.get(each.codec, {}).items():
            name = array_name(key, array)
            expected[name] = _check_open_array(name, dtype, arrays, path)
            if array == "ties" and expected[name].numel > each.max_ties:
                raise _refuse(path, name, f"at most I64[{each.max_ties}]", expected[name])
    for name in sorted(expected.keys() | arrays.keys()):
        if expected.get(name) != arrays.get(name):
            raise _refuse(path, name, expected.get(name, "no such array"), arrays.get(name, "no such array"))
    return result


def _parse_entry(key: str, entry: Any, path: Path | str) -> StoredCodes:
    if not isinstance(entry, dict) or set(entry) != {"codec", "dtype", "shape"}:
        raise _refuse(path, key, "codec, dtype, shape", str(entry)[:200])
    codec, dtype, shape = entry["codec"], entry["dtype"], entry["shape"]
    if not isinstance(codec, str) or codec not in _DTYPES_OF:
        raise FormatError(
            "a tensor was written with a codec this program does not know",
            kind="codec",
            path=path,
            fqn=key,
            expected=", ".join(_DTYPES_OF),
            found=str(codec)[:80],
            hint="upgrade llmtailor",
        )
    if not isinstance(dtype, str) or dtype not in _DTYPES_OF[codec]:
        raise _refuse(path, key, f"an element type that {codec} is of", str(dtype)[:80])
    sizes = isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    if not sizes:
        raise _refuse(path, key, "a shape", str(shape)[:200])
    return StoredCodes(codec=codec, meta=TensorMeta(dtype=dtype, shape=tuple(shape)))


def _check_open_array(name: str, dtype: str, arrays: Mapping[str, TensorMeta], path: Path | str) -> TensorMeta:
    found = arrays.get(name)
    if found is None or found.dtype != dtype or len(found.shape) != 1:
        raise _refuse(path, name, f"{dtype}[any]", found or "no such array")
    return found


def _refuse(path: Path | str, key: str | None, expected: object, found: object) -> FormatError:
    return FormatError(
        "the file does not hold the codes it says", kind="codes", path=path, fqn=key, expected=expected, found=found
    )
