"""What the files of each layer take, exactly and as codes: the layouts a save would plan, without tensors. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..codecs import (
    BASE_KEY,
    CODES_KEY,
    MAX_SHARE,
    MIN_NUMEL,
    STATE_BASE_KEY,
    Component,
    Rest,
    StoredCodes,
    array_name,
    component_of,
    record_codes,
)
from ..errors import InvalidInputError
from ..formats.safetensors import plan_layout
from ..layers import Layer, LayerKind
from ..state_keys import split_state_key, state_key
from ..tensors import TensorMeta
from .model import ModelTensors
from .training import Training

__all__ = ["CodedSize", "LayerSize", "code_layer", "measure_layers"]

# A digest has this length in a header.
_DIGEST = f"xxh3_128:{'0' * 32}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedSize:
    """A layer as codes."""

    codes_nbytes: int
    """Of the codes file."""
    weights_nbytes: int
    """Of the weights file, if it is written anew; 0 if the codes lie beside the layer's exact files."""
    has_exact_weights: bool
    """The weights file has the weights of its step as they were, so that the codes may go with the state."""

    @property
    def nbytes(self) -> int:
        """What is written."""
        return self.codes_nbytes + self.weights_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSize:
    """A layer in bytes, of all ranks together."""

    name: str
    kind: LayerKind
    stack: str | None
    index: int | None
    numel: int
    """Parameters that are trained."""
    nbytes: int
    """Of its tensors, weights and optimizer state; what a strategy is told."""
    weights_nbytes: int
    """Of its weights files, headers included."""
    optimizer_nbytes: int
    """Of its optimizer files; 0 if there are none."""
    rank_nbytes: int
    """Of both, on the rank that holds most."""
    coded: CodedSize | None
    """None if it is never written as codes."""

    @property
    def exact_nbytes(self) -> int:
        """What writing it exactly takes."""
        return self.weights_nbytes + self.optimizer_nbytes


def measure_layers(
    model: ModelTensors,
    training: Training | None,
    *,
    rest: Rest | None = None,
    ranks: int = 1,
    packs_masters: bool = False,
) -> tuple[LayerSize, ...]:
    """The sizes of each layer.

    Args:
        model: The tensors.
        training: How they are trained; None for what the checkpoint has that they are read from.
        rest: How layers that a strategy does not choose are written.
        ranks: Among which weights and state are spread evenly (ZeRO-3, FSDP).
        packs_masters: The master of a BF16 weight is written as the 16 bits that the weight lacks, as LLMTailor does
            where a layer is in whole files and its masters round to its weights.

    Raises:
        InvalidInputError: ``training.trainable`` has a glob that is of no parameter, or there are no ranks.
    """
    if ranks < 1:
        raise InvalidInputError("the number of ranks makes no sense", kind="ranks", expected="at least 1", found=ranks)
    if training is not None:
        training.check_globs([fqn for fqn in model.tensors if fqn not in model.buffers])
    sizes = []
    for layer in model.layers:
        tensors = _tensors_of(layer, model, training)
        packed = _packed(tensors) if packs_masters else frozenset[str]()
        sizes.append(_measure(layer, tensors, rest=rest, ranks=ranks, packed=packed))
    return tuple(sizes)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """What is saved of a layer."""

    weights: Mapping[str, TensorMeta]
    """By fqn."""
    state: Mapping[str, TensorMeta]
    """By ``state.<fqn>.<leaf>``."""
    numel: int
    """Parameters that are trained."""


def _tensors_of(layer: Layer, model: ModelTensors, training: Training | None) -> _Tensors:
    weights: dict[str, TensorMeta] = {}
    state: dict[str, TensorMeta] = {}
    numel = 0
    for fqn in layer.fqns:
        meta = weights[fqn] = model.tensors[fqn]
        leaves: Mapping[str, TensorMeta] = (model.state or {}).get(fqn, {})
        is_trained = fqn not in model.buffers
        if training is not None:
            is_trained = is_trained and training.is_trained(fqn)
            leaves = training.state(meta, layer.kind) if is_trained else {}
            weights[fqn] = meta if fqn in model.buffers else training.weight(meta)
        state |= {state_key(fqn, leaf): each for leaf, each in leaves.items()}
        numel += meta.numel if is_trained else 0
    return _Tensors(weights, state, numel)


def _measure(layer: Layer, tensors: _Tensors, *, rest: Rest | None, ranks: int, packed: frozenset[str]) -> LayerSize:
    weights, optimizer = _file_size(tensors.weights, ranks), _file_size(tensors.state, ranks, packed=packed)
    return LayerSize(
        name=layer.name,
        kind=layer.kind,
        stack=layer.stack,
        index=layer.index,
        numel=tensors.numel,
        nbytes=sum(meta.nbytes for each in (tensors.weights, tensors.state) for meta in each.values()),
        weights_nbytes=weights.total,
        optimizer_nbytes=optimizer.total,
        rank_nbytes=weights.of_a_rank + optimizer.of_a_rank,
        coded=None if rest is None else _coded_size(tensors, rest, weights, optimizer),
    )


def _find_masters(weights: Mapping[str, TensorMeta], state: Mapping[str, TensorMeta]) -> dict[str, str]:
    """fqn of a 16-bit weight -> ``state.<fqn>.<leaf>`` of its one F32 master; as ``writer.find_masters``."""
    if any("|" in key for key in state):
        return {}  # might be taken for arrays of codes
    found: dict[str, list[str]] = defaultdict(list)
    for key, meta in state.items():
        fqn = split_state_key(key)[0]
        weight = weights.get(fqn)
        if weight is None or component_of(key) is not Component.MASTER:
            continue
        if weight.dtype in ("BF16", "F16") and meta == TensorMeta(dtype="F32", shape=weight.shape):
            found[fqn].append(key)
    return {fqn: keys[0] for fqn, keys in found.items() if len(keys) == 1}


def _packed(tensors: _Tensors) -> frozenset[str]:
    """Keys of the masters that are written as what their weights lack; as ``LayerImage.weights_to_pack_with``."""
    weights = tensors.weights
    masters = _find_masters(weights, tensors.state).items()
    return frozenset(key for fqn, key in masters if weights[fqn].dtype == "BF16" and weights[fqn].numel >= MIN_NUMEL)


@dataclass(frozen=True, slots=True)
class _FileSize:
    total: int
    of_a_rank: int
    header: int
    """Of each rank's part."""


def _file_size(tensors: Mapping[str, TensorMeta], ranks: int, *, packed: frozenset[str] = frozenset()) -> _FileSize:
    """A file of these tensors, or the parts of it that ranks write who share them evenly."""
    if not tensors:
        return _FileSize(0, 0, 0)
    codes = {key: StoredCodes(codec="tail16", meta=tensors[key]) for key in packed}
    arrays = {key: meta for key, meta in tensors.items() if key not in packed}
    arrays |= _arrays_of(codes)
    layout = plan_layout([*arrays.items()], {"format": "pt"} | ({CODES_KEY: record_codes(codes)} if codes else {}))
    header = len(layout.prefix)
    data = layout.nbytes - header
    return _FileSize(data + header * ranks, -(-data // ranks) + header, header)


def _arrays_of(codes: Mapping[str, StoredCodes]) -> dict[str, TensorMeta]:
    """Arrays of codes by their name in a file. Those of which the values decide the size are as large as can be; ties
    of masters, which are as good as none, are empty."""
    arrays: dict[str, TensorMeta] = {}
    for key, each in codes.items():
        arrays.update({array_name(key, name): meta for name, meta in each.arrays.items()})
        if each.codec == "xor":
            arrays[array_name(key, "planes")] = TensorMeta(dtype="U8", shape=(each.meta.nbytes,))
        if each.codec == "tail16":
            arrays[array_name(key, "ties")] = TensorMeta(dtype="I64", shape=(0,))
    return arrays


def _coded_size(tensors: _Tensors, rest: Rest, weights: _FileSize, optimizer: _FileSize) -> CodedSize | None:
    codes = code_layer(tensors.weights, tensors.state, rest)
    if codes is None:
        return None
    told = {"format": "pt", CODES_KEY: record_codes(codes)}
    weights_nbytes, halved = 0, frozenset[str]()
    if rest.is_relative:
        masters = _find_masters(tensors.weights, tensors.state).values()
        told |= {BASE_KEY: _DIGEST} | ({STATE_BASE_KEY: _DIGEST} if any(map(codes.__contains__, masters)) else {})
    else:
        halved = frozenset(fqn for fqn in tensors.weights if fqn in codes and codes[fqn].base == "rounded")
        anew = {fqn: replace(meta, dtype="BF16") if fqn in halved else meta for fqn, meta in tensors.weights.items()}
        weights_nbytes = _file_size(anew, 1).total
    # As CodedImage.nbytes, which is before the codes file is laid out.
    planned_nbytes = weights.header + optimizer.header + sum(each.nbytes for each in codes.values()) + weights_nbytes
    if planned_nbytes >= MAX_SHARE * (weights.total + optimizer.total):
        return None
    codes_nbytes = plan_layout([*_arrays_of(codes).items()], told).nbytes
    return CodedSize(
        codes_nbytes=codes_nbytes,
        weights_nbytes=weights_nbytes,
        has_exact_weights=not rest.is_relative and not halved,
    )


def code_layer(
    weights: Mapping[str, TensorMeta], state: Mapping[str, TensorMeta], rest: Rest
) -> dict[str, StoredCodes] | None:
    """What the codes file of a layer would hold, if all values allow; as ``writer.code_layer``, which has tensors.

    Args:
        weights: By fqn.
        state: By ``state.<fqn>.<leaf>``.
        rest: How it is coded.

    Returns:
        By key; None if there can be no codes of such a layer.
    """
    if any(fqn.startswith("state.") for fqn in weights):
        return None
    masters = _find_masters(weights, state)
    weight_of = {key: weights[fqn] for fqn, key in masters.items()}
    planned: dict[str, StoredCodes] = {}
    for key, meta in {**weights, **state}.items():
        codes = rest.codes_for(key, meta, weight=weight_of.get(key))
        if codes.codec == "xor" and key in masters:
            codes = replace(codes, codec="round")
        is_there = component_of(key) is Component.WEIGHTS and not rest.is_relative
        if not is_there or codes.base == "rounded":
            planned[key] = codes
    return planned
