"""What the layers of a checkpoint must hold where some are codes, from copies of the state at each save.

Everything is worked out from the copies: which codec a tensor gets, its arrays by the reference kernels, and what they
stand for by the specification; ``writer.coding`` and ``codecs.decoding`` have no part in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from coded_checkpoints import Tensors, decode_slowly, encode_slowly, meta_of, read_tensors
from llmtailor.formats.safetensors import open_file
from llmtailor.manifest import LayerRecord, Manifest
from tiny_models import Snapshot, assert_same

CODECS = {
    "q8": ("delta8", "int8", "log8"),
    "q4": ("delta4", "int4", "log4"),
    "compact": ("tail8", "int8", "log8"),
    "compact4": ("tail4", "int4", "log4"),
}
"""``rest`` -> codec of F32 weights, first moments, second moments."""
COMPONENTS = {
    "exp_avg": "first",
    "momentum_buffer": "first",
    "exp_avg_sq": "second",
    "max_exp_avg_sq": "second",
}
_PLACES = {"weights": 0, "first": 1, "second": 2}
_SMALL_NUMEL = 4096
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

States = Mapping[int, Snapshot]
"""Step of a save -> copies of all that it saved, by fqn and ``state.<fqn>.<leaf>``."""


def component_of(key: str) -> str:
    return COMPONENTS.get(key.rpartition(".")[2], "other") if key.startswith("state.") else "weights"


def codec_for(key: str, tensor: torch.Tensor, codecs: tuple[str, str, str]) -> str:
    """What a tensor is written with, by what it is and by its values."""
    component = component_of(key)
    if tensor.numel() < _SMALL_NUMEL or tensor.dtype not in _FLOATS or component == "other":
        return "exact"
    if component == "weights" and tensor.dtype is not torch.float32:
        return "xor" if codecs[0].startswith("delta") else "exact"
    has_sense = bool(tensor.isfinite().all()) and tensor.abs().max().item() < 2.0**120
    if not has_sense or (component == "second" and bool((tensor < 0).any())):
        return "exact"
    return codecs[_PLACES[component]]


def keys_of(manifest: Manifest, layer: LayerRecord, snapshot: Snapshot) -> Iterator[str]:
    """Names of what a layer holds: weights, then state."""
    fqns = {tensor.fqn for tensor in manifest.tensors if tensor.layer == layer.name and tensor.tied_to is None}
    yield from (key for key in snapshot if key in fqns)
    for key in snapshot:
        if key.startswith("state.") and key.removeprefix("state.").rpartition(".")[0] in fqns:
            yield key


def check_layers(
    checkpoint: Path, manifest: Manifest, states: States, codecs: tuple[str, str, str] | None = None
) -> Snapshot:
    """Every file of every layer is what it has to be, bit for bit.

    Args:
        checkpoint: The directory.
        manifest: Its manifest.
        states: Copies from its save and those before it.
        codecs: Of the run; None finds them by the policy's name.

    Returns:
        What a resume must load, by key: of coded layers, what the codes stand for.
    """
    truth: Snapshot = {}
    for layer in manifest.layers:
        plain = {key: states[layer.step][key] for key in keys_of(manifest, layer, states[layer.step])}
        if layer.encoding is None or layer.encoding.base == "exact":
            _check_plain_files(checkpoint, layer, plain)
        if layer.encoding is None:
            truth |= plain
            continue
        live = states[layer.encoding.step]
        tensors = {key: live[key] for key in keys_of(manifest, layer, live)}
        truth |= _check_codes(checkpoint, layer, tensors, codecs or CODECS[layer.encoding.rest])
    return truth


def _check_plain_files(checkpoint: Path, layer: LayerRecord, expected: Snapshot) -> None:
    found = {key: tensor for file in layer.plain_files for key, tensor in read_tensors(checkpoint / file.path).items()}
    if layer.optimizer is None:
        expected = {key: tensor for key, tensor in expected.items() if not key.startswith("state.")}
    assert_same(found, expected)


def _check_codes(checkpoint: Path, layer: LayerRecord, live: Snapshot, codecs: tuple[str, str, str]) -> Snapshot:
    assert layer.encoding is not None
    path = checkpoint / layer.encoding.codes.path
    metadata = open_file(path).header.metadata
    weights = read_tensors(checkpoint / layer.weights.path)
    is_relative = codecs[0].startswith("delta")
    told: dict[str, str] = {}
    arrays: Tensors = {}
    of_weights_file: Tensors = {}
    truth: Snapshot = {}
    for key, tensor in live.items():
        codec = codec_for(key, tensor, codecs)
        if not is_relative and component_of(key) == "weights" and codec == "exact":
            truth[key] = of_weights_file[key] = tensor
            continue
        found, rounded = encode_slowly(codec, tensor, weights.get(key))
        if codec == "xor" and found["planes"].numel() >= tensor.nbytes:
            codec, found = "exact", {"values": tensor}
        if rounded is not None:
            of_weights_file[key] = rounded
        truth[key] = decode_slowly(codec, meta_of(tensor), found, weights.get(key) if rounded is None else rounded)
        told[key] = codec
        arrays |= {f"{key}|{name}": array for name, array in found.items()}
    assert {key: entry["codec"] for key, entry in json.loads(metadata["llmtailor.codes"]).items()} == told
    assert set(told.values()) - {"exact"}, "nothing of the layer is in codes"
    assert_same(read_tensors(path), arrays)
    if is_relative:
        assert layer.encoding.base == "exact"
        assert metadata["llmtailor.base"] == layer.weights.digest
    else:
        assert layer.encoding.base == ("rounded" if codecs[0].startswith("tail") else "none")
        assert "llmtailor.base" not in metadata
        assert_same(weights, of_weights_file)
        assert layer.optimizer is None
        assert layer.step == layer.encoding.step
    return truth


def check_errors(manifest: Manifest, loaded: Snapshot, states: States) -> None:
    """The errors in a manifest are those of what was loaded, by float64."""
    for layer in manifest.layers:
        if layer.encoding is None:
            continue
        live = states[layer.encoding.step]
        found: dict[str, list[tuple[float, float, float]]] = {}
        for key in keys_of(manifest, layer, live):
            true, near = live[key].double(), loaded[key].double()
            if _same_bits(live[key], loaded[key]):
                continue
            error = near - true
            largest = float(error.abs().max() / true.abs().max())
            if component_of(key) == "second":
                largest = float((error / true)[true != 0].abs().max())
            found.setdefault(component_of(key), []).append(
                (float(error.square().sum()), float(true.square().sum()), largest)
            )
        # Tensors of a component that are coded without any error count, too; those kept exactly do not.
        for key in keys_of(manifest, layer, live):
            component = component_of(key)
            if component in found and _same_bits(live[key], loaded[key]) and is_coded(key, live[key]):
                found[component].append((0.0, float(live[key].double().square().sum()), 0.0))
        assert layer.encoding.errors.keys() == found.keys(), layer.name
        for component, parts in found.items():
            told = layer.encoding.errors[component]  # type: ignore[index]
            l2 = (sum(part[0] for part in parts) / sum(part[1] for part in parts)) ** 0.5
            largest = max(part[2] for part in parts)
            assert abs(told.l2 - l2) <= 2e-3 * l2, (layer.name, component, told, l2)
            if component == "second":
                assert largest <= told.max * 1.001 <= max(8 * largest, 1e-6), (layer.name, told, largest)
            else:
                assert abs(told.max - largest) <= 2e-3 * largest, (layer.name, component, told, largest)


def is_coded(key: str, tensor: torch.Tensor) -> bool:
    return codec_for(key, tensor, CODECS["q8"]) not in ("exact", "xor")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))
