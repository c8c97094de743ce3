"""The codes file of a layer: what it has to hold, what the weights file holds beside it, and its tensors by reference.

Pure: of headers and the manifest.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from ...codecs import (
    BASE_KEY,
    CODES_KEY,
    STATE_BASE_KEY,
    Component,
    StoredCodes,
    array_name,
    component_of,
    parse_codes,
)
from ...errors import FormatError, IncompatibleError, IntegrityError
from ...manifest import FileRecord, LayerRecord, Manifest, TensorRecord
from ...state_keys import NOTES_KEY, split_state_key
from ...state_tree import Note
from ...strict_json import parse_object
from ...tensor_refs import CastTensor, CodedTensor, FileTensor, TensorRef
from ...tensors import TensorMeta
from ..safetensors import Header

__all__ = [
    "Base",
    "LayerCodes",
    "check_state_base",
    "read_codes_header",
    "state_refs",
    "weights_metas",
    "weights_refs",
]

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

    @property
    def masters(self) -> Mapping[str, str]:
        """Weight -> its master among ``states``; of weights that are codes of that, there is one."""
        return {split_state_key(key)[0]: key for key in self.states if component_of(key) is Component.MASTER}

    @property
    def is_relative_to_state(self) -> bool:
        """True if some are relative to the optimizer file."""
        return any(stored.base == "exact" for stored in self.states.values())


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
        IntegrityError: The codes are relative to other files than the layer's.
    """
    assert layer.encoding is not None
    base = layer.encoding.base
    _check_base(path, header.metadata.get(BASE_KEY), layer.weights if base == "exact" else None, layer)
    metas = {name: stored.meta for name, stored in header.tensors.items()}
    codes = parse_codes(header.metadata.get(CODES_KEY), metas, path)
    held = [tensor for tensor in manifest.tensors if tensor.layer == layer.name and tensor.tied_to is None]
    fqns = {tensor.fqn for tensor in held}
    weights = {key: each for key, each in codes.items() if key in fqns}
    states = {key: each for key, each in codes.items() if key not in fqns}
    notes = _parse_notes(path, header)
    faults = itertools.chain(
        _codec_faults(codes),
        _weights_faults(held, weights, base),
        _state_faults(manifest, held, states, notes),
        _master_faults(held, weights, states, base),
    )
    fault = next(faults, None)
    if fault is None:
        found = LayerCodes(base=base, weights=weights, states=states, notes=notes)
        _check_base(
            path, header.metadata.get(STATE_BASE_KEY), layer.optimizer if found.is_relative_to_state else None, layer
        )
        return found
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


def check_state_base(path: Path | str, layer: LayerRecord, codes: LayerCodes, found: Mapping[str, TensorMeta]) -> None:
    """Raise unless the optimizer file of a layer holds what its codes are relative to.

    Args:
        path: Of the optimizer file, for the error.
        layer: Whose file it is.
        codes: Of the layer.
        found: What the file holds, by name.

    Raises:
        FormatError: A tensor is missing, or of another type or shape.
    """
    for key, stored in codes.states.items():
        if stored.base == "exact" and found.get(key) != stored.meta:
            raise FormatError(
                "the optimizer file does not hold what the codes are relative to",
                kind="schema",
                path=path,
                layer=layer.name,
                fqn=key,
                expected=str(stored.meta),
                found=str(found.get(key, "no such tensor")),
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
    codes: LayerCodes,
    arrays: Mapping[str, FileTensor],
    weights: Mapping[str, FileTensor],
    state: Mapping[str, TensorRef],
) -> dict[str, TensorRef]:
    """The weights of a layer, as they were when it was encoded; by fqn.

    Args:
        codes: Of the layer.
        arrays: Every tensor of the codes file.
        weights: Every tensor of the weights file, which are those of ``weights_metas``.
        state: State that codes are relative to; see ``check_state_base``.
    """
    return {**weights, **{fqn: _reference(fqn, codes, arrays, {**weights, **state}) for fqn in codes.weights}}


def state_refs(
    codes: LayerCodes,
    arrays: Mapping[str, FileTensor],
    weights: Mapping[str, FileTensor],
    state: Mapping[str, TensorRef],
) -> dict[str, TensorRef]:
    """The optimizer state of a layer; by ``state.<fqn>.<leaf>``. The arguments are those of ``weights_refs``."""
    return {key: _reference(key, codes, arrays, {**weights, **state}) for key in codes.states}


def _reference(
    key: str, codes: LayerCodes, arrays: Mapping[str, FileTensor], exact: Mapping[str, TensorRef]
) -> TensorRef:
    stored = codes.weights[key] if key in codes.weights else codes.states[key]
    match stored.base:
        case "master":
            return CastTensor(meta=stored.meta, source=_reference(codes.masters[key], codes, arrays, exact))
        case "rounded" if key in codes.states:
            base: TensorRef | None = exact[split_state_key(key)[0]]
        case _:
            base = None if stored.base is None else exact[key]
    if stored.codec == "exact":
        return arrays[array_name(key, "values")]
    of_codec = {name: arrays[array_name(key, name)] for name in stored.array_names}
    return CodedTensor(meta=stored.meta, codec=stored.codec, arrays=of_codec, base=base)


def _check_base(path: Path | str, found: str | None, base: FileRecord | None, layer: LayerRecord) -> None:
    if base is None:
        if found is not None:
            raise _refuse_base(path, layer, "no earlier file: they are relative to none", found)
    elif found is None:
        raise _refuse_base(path, layer, f"the digest of {base.path} in its __metadata__", "no such entry")
    elif found != base.digest:
        raise IntegrityError(
            "the codes are relative to another file than the layer's",
            kind="codes-base",
            path=path,
            layer=layer.name,
            expected=f"{base.digest}, {base.path}",
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
    return parse_object(text.encode(errors="surrogatepass"), what="notes of a codes file", path=path) if text else {}


@dataclass(frozen=True, slots=True)
class _Fault:
    """What is wrong with one tensor of a codes file."""

    key: str
    expected: str
    found: str


def _codec_faults(found: Mapping[str, StoredCodes]) -> Iterator[_Fault]:
    return (
        _Fault(key, "a codec of codes files", f"{each.codec}, which is of optimizer files")
        for key, each in found.items()
        if each.codec == "tail16"
    )


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
        elif key in found and found[key].base is not None and component_of(key) is not Component.MASTER:
            yield _Fault(key, "a codec that is relative to nothing", found[key].codec)


def _master_faults(
    held: Sequence[TensorRecord], weights: Mapping[str, StoredCodes], states: Mapping[str, StoredCodes], base: Base
) -> Iterator[_Fault]:
    """What is wrong with masters that are relative to something, and with weights that are relative to masters."""
    masters: dict[str, list[str]] = defaultdict(list)
    for key in states:
        if component_of(key) is Component.MASTER:
            masters[split_state_key(key)[0]].append(key)
    for tensor in held:
        keys = masters[tensor.fqn]
        relative = [key for key in keys if states[key].base is not None]
        is_rounded = tensor.fqn in weights and weights[tensor.fqn].base == "master"
        if not relative and not is_rounded:
            continue
        if len(keys) != 1:
            yield _Fault(tensor.fqn, "one master", ", ".join(keys) or "none")
            continue
        master, dtypes = states[keys[0]], ("BF16",) if base == "rounded" else ("BF16", "F16")
        expected = TensorMeta(dtype="F32", shape=tensor.shape)
        if master.meta != expected or tensor.dtype not in dtypes:
            yield _Fault(
                keys[0], f"{expected}, the master of a weight that is {dtypes[0]}", f"{master.meta} of {tensor.meta}"
            )
        elif relative and master.base != base:
            yield _Fault(keys[0], f"a codec that is relative to what is {base}", master.codec)
