"""Masters that an optimizer file holds as what their BF16 weights lack of them.

Pure: of headers and the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...codecs import CODES_KEY, Component, StoredCodes, array_name, component_of, parse_codes
from ...errors import FormatError
from ...manifest import LayerRecord, Manifest
from ...state_keys import split_state_key
from ...strict_json import parse_object
from ...tensor_refs import CodedTensor, FileTensor, TensorRef
from ...tensors import TensorMeta
from ..safetensors import Header

__all__ = ["check_packed", "read_packed", "state_metas", "unpack_refs"]

_CODEC = "tail16"


def read_packed(path: Path | str, header: Header) -> Mapping[str, StoredCodes]:
    """What an optimizer file holds in pieces, by ``state.<fqn>.<leaf>``; nothing in most.

    Args:
        path: Of the file, for the error.
        header: Its header.

    Raises:
        FormatError: It does not hold the arrays it says, or others.
    """
    text = header.metadata.get(CODES_KEY)
    if text is None:
        return {}
    keys = parse_object(text.encode(errors="surrogatepass"), what="header of an optimizer file", path=path).keys()
    arrays = {name: each.meta for name, each in header.tensors.items() if name.rpartition("|")[0] in keys}
    packed = parse_codes(text, arrays, path)
    for key, stored in packed.items():
        if stored.codec != _CODEC or key in header.tensors:
            found = f"{stored.codec} codes" if stored.codec != _CODEC else "that, and all of it"
            raise _refuse(path, key, f"{_CODEC} codes of a master", found)
    return packed


def check_packed(path: Path | str, manifest: Manifest, layer: LayerRecord, packed: Mapping[str, StoredCodes]) -> None:
    """Raise unless all that an optimizer file holds in pieces are masters of BF16 weights in its layer's weights file.

    Raises:
        FormatError: They are not.
    """
    if not packed:
        return
    if layer.weights is None:
        raise _refuse(path, next(iter(packed)), "no codes: the layer's weights are in parts", f"{_CODEC} codes")
    held = {each.fqn: each for each in manifest.tensors if each.layer == layer.name and each.tied_to is None}
    for key, stored in packed.items():
        weight = held.get(split_state_key(key)[0]) if component_of(key) is Component.MASTER else None
        if weight is None or weight.meta != TensorMeta(dtype="BF16", shape=stored.meta.shape):
            expected = f"a master of a BF16 weight of {layer.name}, and of its shape"
            raise _refuse(path, key, expected, f"{stored.meta} of {'none' if weight is None else weight.meta}")


def state_metas(header: Header, packed: Mapping[str, StoredCodes]) -> dict[str, TensorMeta]:
    """Type and shape of each tensor that an optimizer file stands for, by name."""
    arrays = _arrays_of(packed)
    plain = {name: each.meta for name, each in header.tensors.items() if name not in arrays}
    return {**plain, **{key: stored.meta for key, stored in packed.items()}}


def unpack_refs(
    tensors: Mapping[str, FileTensor], packed: Mapping[str, StoredCodes], weights: Mapping[str, FileTensor]
) -> dict[str, TensorRef]:
    """Each tensor that an optimizer file stands for, by name.

    Args:
        tensors: Every tensor of the file.
        packed: As ``read_packed`` gave it, and checked.
        weights: Every tensor of the layer's weights file.
    """
    arrays = _arrays_of(packed)
    found: dict[str, TensorRef] = {name: each for name, each in tensors.items() if name not in arrays}
    for key, stored in packed.items():
        of_codec = {name: tensors[array_name(key, name)] for name in stored.array_names}
        base = weights[split_state_key(key)[0]]
        found[key] = CodedTensor(meta=stored.meta, codec=stored.codec, arrays=of_codec, base=base)
    return found


def _arrays_of(packed: Mapping[str, StoredCodes]) -> frozenset[str]:
    return frozenset(array_name(key, name) for key, stored in packed.items() for name in stored.array_names)


def _refuse(path: Path | str, key: str, expected: str, found: str) -> FormatError:
    return FormatError(
        "the optimizer file does not hold what it says",
        kind="schema",
        path=path,
        fqn=key,
        expected=expected,
        found=found,
        hint="llmtailor verify tells which files of the checkpoint are good; take the layer from another one",
    )
