"""The codes file of a layer: what it has to hold, what the weights file holds beside it, and its tensors by reference.

Pure: of headers and the manifest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from ...codecs import BASE_KEY, CODES_KEY, StoredCodes, array_name, parse_codes
from ...errors import FormatError, IncompatibleError, IntegrityError
from ...manifest import LayerRecord, Manifest, TensorRecord
from ...state_keys import NOTES_KEY, split_state_key
from ...state_tree import Note
from ...strict_json import parse_object
from ...tensor_refs import CodedTensor, FileTensor, TensorRef
from ...tensors import TensorMeta
from ..safetensors import Header

__all__ = ["Base", "LayerCodes", "read_codes_header", "state_refs", "weights_metas", "weights_refs"]

Base: TypeAlias = Literal["exact", "rounded", "none"]
"""What the weights file is to the codes; see ``EncodingRecord``."""

_HINT = "llmtailor verify tells which files of the checkpoint are good; take the layer from another one"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCodes:
    """What the codes file of a layer holds; it is known to be what it has to be."""

    base: Base
    weights: Mapping[str, StoredCodes]
    """By fqn. With base ``exact`` all weights of the layer; else those that the weights file does not hold as they
    are."""
    states: Mapping[str, StoredCodes]
    """By ``state.<fqn>.<leaf>``: all optimizer state of the layer."""
    notes: Mapping[str, Note]
    """By the same keys; a key with a note may have no tensor."""


def read_codes_header(path: Path | str, header: Header, manifest: Manifest, layer: LayerRecord) -> LayerCodes:
    """Check that a codes file holds what it has to, by its header.

    Args:
        path: Of the file, for the error.
        header: Its header.
        manifest: Of the checkpoint.
        layer: Whose codes they are; it has an ``encoding``.

    Raises:
        FormatError: It is no codes file; a tensor is missing, too many, or of another type or shape; a codec makes no
            sense there; there is state of another layer's parameter.
        IntegrityError: The codes are relative to another weights file than the layer's.
    """
    assert layer.encoding is not None
    base = layer.encoding.base
    _check_base(path, header.metadata.get(BASE_KEY), layer)
    metas = {name: stored.meta for name, stored in header.tensors.items()}
    codes = parse_codes(header.metadata.get(CODES_KEY), metas, path)
    held = [tensor for tensor in manifest.tensors if tensor.layer == layer.name and tensor.tied_to is None]
    fqns = {tensor.fqn for tensor in held}
    weights = {key: each for key, each in codes.items() if key in fqns}
    states = {key: each for key, each in codes.items() if key not in fqns}
    notes = _parse_notes(path, header)
    faults = itertools.chain(_weights_faults(held, weights, base), _state_faults(manifest, held, states, notes))
    fault = next(faults, None)
    if fault is None:
        return LayerCodes(base=base, weights=weights, states=states, notes=notes)
    raise FormatError(
        "the file does not hold the codes of its layer",
        kind="schema",
        path=path,
        layer=layer.name,
        fqn=fault.key,
        expected=fault.expected,
        found=fault.found,
        hint=_HINT,
    )


def weights_metas(manifest: Manifest, layer: LayerRecord, codes: LayerCodes | None) -> dict[str, TensorMeta]:
    """Type and shape of each tensor that the weights file of a layer has to hold.

    Args:
        manifest: Of the checkpoint.
        layer: One of its layers.
        codes: Of the layer; needed where the weights file may be rounded.

    Returns:
        By fqn, in model order: as in the schema, but BF16 for what only the codes hold in full.
    """
    assert codes is not None or layer.has_exact_weights
    narrowed = codes.weights.keys() if codes is not None and codes.base == "rounded" else frozenset()
    return {
        tensor.fqn: TensorMeta(dtype="BF16", shape=tensor.shape) if tensor.fqn in narrowed else tensor.meta
        for tensor in manifest.tensors
        if tensor.layer == layer.name and tensor.tied_to is None
    }


def weights_refs(
    codes: LayerCodes, arrays: Mapping[str, FileTensor], weights: Mapping[str, FileTensor]
) -> dict[str, TensorRef]:
    """The weights of a layer, as they were when it was encoded; by fqn.

    Args:
        codes: Of the layer.
        arrays: Every tensor of the codes file.
        weights: Every tensor of the weights file, which are those of ``weights_metas``.
    """
    coded = {fqn: _reference(fqn, stored, arrays, weights) for fqn, stored in codes.weights.items()}
    return {**weights, **coded}


def state_refs(codes: LayerCodes, arrays: Mapping[str, FileTensor]) -> dict[str, TensorRef]:
    """The optimizer state of a layer; by ``state.<fqn>.<leaf>``.

    Args:
        codes: Of the layer.
        arrays: Every tensor of the codes file.
    """
    return {key: _reference(key, stored, arrays, {}) for key, stored in codes.states.items()}


def _reference(
    key: str, stored: StoredCodes, arrays: Mapping[str, FileTensor], weights: Mapping[str, FileTensor]
) -> TensorRef:
    if stored.codec == "exact":
        return arrays[array_name(key, "values")]
    names = [*stored.arrays, *(["planes"] if stored.codec == "xor" else [])]
    return CodedTensor(
        meta=stored.meta,
        codec=stored.codec,
        arrays={name: arrays[array_name(key, name)] for name in names},
        base=None if stored.base is None else weights[key],
    )


def _check_base(path: Path | str, found: str | None, layer: LayerRecord) -> None:
    assert layer.encoding is not None
    if layer.encoding.base != "exact":
        if found is not None:
            raise _refuse_base(path, layer, "no earlier weights file: the layer's own is of the same step", found)
    elif found is None:
        raise _refuse_base(path, layer, f"{BASE_KEY} in its __metadata__", "no such entry")
    elif found != layer.weights.digest:
        raise IntegrityError(
            "the codes are relative to other weights than the layer's",
            kind="codes-base",
            path=path,
            layer=layer.name,
            expected=f"{layer.weights.digest}, {layer.weights.path}",
            found=found[:80],
            hint=_HINT,
        )


def _refuse_base(path: Path | str, layer: LayerRecord, expected: str, found: str) -> FormatError:
    return FormatError(
        "the codes do not say what they are relative to, or should not",
        kind="codes-base",
        path=path,
        layer=layer.name,
        expected=expected,
        found=found[:80],
        hint=_HINT,
    )


def _parse_notes(path: Path | str, header: Header) -> dict[str, Note]:
    text = header.metadata.get(NOTES_KEY)
    # What no UTF-8 can say is refused as any other text that is no JSON.
    return parse_object(text.encode("utf-8", "surrogatepass"), what="notes of a codes file", path=path) if text else {}


@dataclass(frozen=True, slots=True)
class _Fault:
    """What is wrong with one tensor of a codes file."""

    key: str
    expected: str
    found: str


def _weights_faults(held: Sequence[TensorRecord], found: Mapping[str, StoredCodes], base: Base) -> Iterator[_Fault]:
    """What is wrong with the weights of a codes file."""
    for tensor in held:
        codes = found.get(tensor.fqn)
        if codes is None:
            if base == "exact":
                yield _Fault(tensor.fqn, str(tensor.meta), "no such tensor")
        elif codes.meta != tensor.meta:
            yield _Fault(tensor.fqn, str(tensor.meta), str(codes.meta))
        elif base == "none":
            yield _Fault(tensor.fqn, "no weights: the weights file holds them", codes.codec)
        elif (codes.base == "rounded") != (base == "rounded"):
            other = "relative to a rounded weight" if base == "rounded" else "not relative to a rounded weight"
            yield _Fault(tensor.fqn, f"a codec that is {other}", codes.codec)


def _state_faults(
    manifest: Manifest, held: Sequence[TensorRecord], found: Mapping[str, StoredCodes], notes: Mapping[str, Note]
) -> Iterator[_Fault]:
    """What is wrong with the optimizer state of a codes file."""
    trained = {tensor.fqn for tensor in held if tensor.kind == "parameter"}
    if manifest.contents == "weights":
        trained = set()
    for key in [*found, *(key for key in notes if key not in found)]:
        try:
            fqn, _ = split_state_key(key)
        except IncompatibleError:
            yield _Fault(key, "a weight of the layer, or state of one of its parameters", "another name")
            continue
        if fqn not in trained:
            yield _Fault(key, "state of parameters of the layer alone", f"state of {fqn}")
        elif key in found and found[key].base is not None:
            yield _Fault(key, "a codec that is relative to nothing", found[key].codec)
