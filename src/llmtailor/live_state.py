"""The state of a training as layers and images of the files that this rank writes, at every save.

Most saves find tensors like those of the one before, with other values. What follows from names, types and shapes (the
schema, the layouts, the headers) is then the same and is kept, for it takes most of the time that a save holds training
up. The optimizer's tensors are not: a training may give them up until the next save, to make room on a GPU.

What a rank writes follows from how tensors are cut and from its seat, without a word to the others. A layer's weights,
and apart from them its optimizer state, are

    in a whole file     if none of their tensors is spread over ranks; its owner writes it
    in parts            else: each rank writes the shards that it is the first to hold, the owner also what all hold
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from .layers import Layer, file_stem
from .local_parts import LocalPart, Seat, describe_cut, is_dtensor, local_part, memory_of
from .manifest import GroupRecord, OptimizerRecord, TensorRecord, digest_of
from .model_state import ModelReader, ModelState
from .optimizer_state import (
    ParameterNames,
    ParameterState,
    optimizer_class,
    parameter_names,
    read_groups,
    read_state,
    shared_parameter,
    unwrap_optimizer,
)
from .shards import Shards
from .state_keys import state_key
from .tensor_bytes import meta_of
from .writer import FileImage, LayerImage, find_masters, optimizer_image, weights_image

__all__ = ["LiveLayers", "LiveReader", "TrainingReader"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveLayers:
    """What there is to save."""

    tensors: tuple[TensorRecord, ...]
    optimizers: tuple[OptimizerRecord, ...]
    layers: tuple[Layer, ...]
    """Those that have a tensor to save, in model order."""
    images: Mapping[str, LayerImage]
    """By layer; of live tensors, not held. Only layers of which this rank writes something."""
    nbytes: Mapping[str, int]
    """By layer: of its whole tensors, weights and optimizer state; the same on every rank."""
    layout: str | None
    """Digest of how every tensor is cut that is spread over ranks, the same on each; None if none is."""


class TrainingReader(Protocol):
    """What reads the live state of a training, at every save."""

    def read_model(self, module: torch.nn.Module) -> ModelState: ...

    def read(self, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> LiveLayers: ...


class LiveReader:
    """Reads one training again and again.

    Args:
        split_experts: As in ``layers.map_module``.
        overrides: As in ``layers.map_module``.
        seat: Which rank this is.
    """

    def __init__(
        self,
        *,
        split_experts: bool = False,
        overrides: Mapping[str, Sequence[str]] | None = None,
        seat: Seat = Seat(),  # noqa: B008
    ) -> None:
        self._model = ModelReader(split_experts=split_experts, overrides=overrides)
        self._seat = seat
        self._state: ModelState | None = None
        self._planned: dict[str, tuple[list[object], _PlannedLayer]] = {}

    def read_model(self, module: torch.nn.Module) -> ModelState:
        """The model: its layers, schema and live tensors."""
        return self._model.read(module)

    def read(self, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> LiveLayers:
        """All that is to be saved.

        Args:
            module: The bare model.
            optimizers: Its optimizers; none to save weights alone.

        Raises:
            UnsupportedError, IncompatibleError: Some state cannot be saved; for what of it is on this rank.
        """
        state = self.read_model(module)
        names = parameter_names(state.parameters())
        unwrapped = [unwrap_optimizer(optimizer) for optimizer in optimizers]
        states = _unite([read_state(optimizer, names) for optimizer in unwrapped])
        layers = tuple(layer for layer in state.layers if any(fqn in state.tensors for fqn in layer.fqns))
        if state is not self._state:
            self._state, self._planned = state, {}
        images, planned = {}, []
        for number, layer in enumerate(layers):
            weights = {fqn: state.tensors[fqn] for fqn in layer.fqns if fqn in state.tensors}
            own = {fqn: states[fqn] for fqn in weights if fqn in states}
            planned.append(self._plan(number, layer, weights, own))
            image = planned[-1].fill(layer.name, own)
            if image.files:
                images[layer.name] = image
        cuts = [each.cuts for each in planned if each.cuts]
        return LiveLayers(
            tensors=state.records,
            optimizers=tuple(_record_optimizer(optimizer, names) for optimizer in unwrapped),
            layers=layers,
            images=images,
            nbytes={layer.name: each.nbytes for layer, each in zip(layers, planned, strict=True)},
            layout=digest_of(*cuts) if cuts else None,
        )

    def _plan(
        self, number: int, layer: Layer, weights: Mapping[str, torch.Tensor], states: Mapping[str, ParameterState]
    ) -> _PlannedLayer:
        likeness = list(_likeness(weights, states))
        known = self._planned.get(layer.name)
        if known is not None and known[0] == likeness:
            return known[1]
        planned = _plan_layer(layer, weights, states, rank=self._seat.rank, is_owner=self._seat.owns(number))
        self._planned[layer.name] = likeness, planned
        return planned


def _likeness(weights: Mapping[str, torch.Tensor], states: Mapping[str, ParameterState]) -> Iterator[object]:
    """What a plan of a layer follows from, beside the schema of the model: equal for tensors that are alike."""
    for weight in weights.values():
        yield weight.device
    for fqn, state in states.items():
        yield fqn
        yield state.notes
        for leaf, tensor in state.tensors.items():
            yield leaf, tensor.dtype, tensor.shape, tensor.device
            if is_dtensor(tensor):
                yield memory_of(tensor).shape, tensor.placements, tensor.device_mesh  # type: ignore[attr-defined]


def _unite(of_optimizers: Sequence[Mapping[str, ParameterState]]) -> dict[str, ParameterState]:
    """The state of every parameter, by name.

    Raises:
        UnsupportedError: A parameter is in two optimizers.
    """
    united: dict[str, ParameterState] = {}
    for states in of_optimizers:
        for fqn, state in states.items():
            if fqn in united:
                raise shared_parameter(fqn)
            united[fqn] = state
    return united


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlannedLayer:
    """What follows from the types and shapes of a layer's tensors."""

    weights: FileImage | None
    """The file that this rank writes; of the live parameters, which stay the same when their memory is another."""
    optimizer: FileImage | None
    """The same, without its tensors."""
    masters: Mapping[str, str]
    nbytes: int
    cuts: bytes
    """How its tensors are cut that are spread over ranks, by name; empty if none is."""

    def fill(self, layer: str, states: Mapping[str, ParameterState]) -> LayerImage:
        """The layer's image, with the tensors that the optimizer has now."""
        optimizer = self.optimizer
        if optimizer is not None:
            tensors = _by_key(states)
            optimizer = replace(optimizer, tensors=tuple(tensors[each.name] for each in optimizer.layout.tensors))
        return LayerImage(layer=layer, weights=self.weights, optimizer=optimizer, masters=self.masters)


def _by_key(states: Mapping[str, ParameterState]) -> dict[str, torch.Tensor]:
    return {state_key(fqn, leaf): value for fqn, each in states.items() for leaf, value in each.tensors.items()}


def _plan_layer(
    layer: Layer,
    weights: Mapping[str, torch.Tensor],
    states: Mapping[str, ParameterState],
    *,
    rank: int,
    is_owner: bool,
) -> _PlannedLayer:
    tensors = _by_key(states)
    notes = {state_key(fqn, leaf): note for fqn, each in states.items() for leaf, note in each.notes.items()}
    of_weights, of_state = (_choose(each, rank=rank, is_owner=is_owner) for each in (weights, tensors))
    stem = file_stem(layer)
    weights_file = (
        weights_image(stem, of_weights.tensors, shards=of_weights.shards, rank=of_weights.rank)
        if of_weights.tensors
        else None
    )
    optimizer_file = optimizer_image(
        stem, of_state.tensors, notes if is_owner else {}, shards=of_state.shards, rank=of_state.rank
    )
    masters = find_masters(weights_file, optimizer_file)
    cuts = sorted({**of_weights.cuts, **of_state.cuts}.items())
    return _PlannedLayer(
        weights=weights_file,
        optimizer=None if optimizer_file is None else replace(optimizer_file, tensors=()),
        masters=masters,
        nbytes=sum(meta_of(tensor).nbytes for each in (weights, tensors) for tensor in each.values()),
        cuts=json.dumps(cuts).encode() if cuts else b"",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """What this rank writes of a layer's weights, or of its optimizer state."""

    tensors: Mapping[str, torch.Tensor]
    shards: Shards
    rank: int | None
    """None if it is in a whole file."""
    cuts: Mapping[str, str | None]


def _choose(tensors: Mapping[str, torch.Tensor], *, rank: int, is_owner: bool) -> _Chosen:
    parts = {name: local_part(tensor) for name, tensor in tensors.items() if is_dtensor(tensor)}
    sharded = {name: part for name, part in parts.items() if part.is_sharded}
    chosen = {
        name: tensor
        for name, tensor in tensors.items()
        if (_is_to_write(sharded[name]) if name in sharded else is_owner)
    }
    return _Chosen(
        tensors=chosen,
        shards={name: part.shard for name, part in sharded.items() if name in chosen},
        rank=rank if sharded else None,
        cuts={name: describe_cut(tensors[name]) for name in sharded},
    )


def _is_to_write(part: LocalPart) -> bool:
    return part.is_first and part.shard.numel > 0


def _record_optimizer(optimizer: torch.optim.Optimizer, names: ParameterNames) -> OptimizerRecord:
    groups = tuple(
        GroupRecord(parameters=group.parameters, options=dict(group.options)) for group in read_groups(optimizer, names)
    )
    return OptimizerRecord.model_validate({"class": optimizer_class(optimizer), "groups": groups})
