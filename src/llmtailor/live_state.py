"""The state of a training as layers and images of the files that this rank writes, at every save.

It is read anew only where it changed. Most saves find the same tensors as the one before, with other values. What
follows from names, types and shapes (the schema, the layouts, the headers) is then the same, and takes most of the time
that a save holds training up.

What a rank writes follows from how tensors are cut and from its seat, without a word to the others. A layer's weights,
and apart from them its optimizer state, are

    in a whole file     if none of their tensors is spread over ranks; its owner writes it
    in parts            else: each rank writes the shards that it is the first to hold, the owner also what all hold
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .layers import Layer, file_stem
from .local_parts import LocalPart, Seat, describe_cut, is_dtensor, local_part
from .manifest import GroupRecord, OptimizerRecord, TensorRecord, digest_of
from .model_state import ModelReader, ModelState
from .optimizer_state import (
    ParameterNames,
    ParameterState,
    StateReader,
    optimizer_class,
    parameter_names,
    read_groups,
    shared_parameter,
    unwrap_optimizer,
)
from .shards import Shards
from .state_keys import state_key
from .tensor_bytes import meta_of
from .writer import LayerImage, find_masters, optimizer_image, weights_image

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
        self._optimizers: list[StateReader] = []
        self._state: ModelState | None = None
        self._planned: dict[str, tuple[list[ParameterState], _PlannedLayer]] = {}

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
        readers = self._readers([unwrap_optimizer(optimizer) for optimizer in optimizers])
        states = _unite([reader.read(names) for reader in readers])
        layers = tuple(layer for layer in state.layers if any(fqn in state.tensors for fqn in layer.fqns))
        if state is not self._state:
            self._state, self._planned = state, {}
        planned = {layer.name: self._plan(number, layer, state, states) for number, layer in enumerate(layers)}
        cuts = [each.cuts for each in planned.values() if each.cuts]
        return LiveLayers(
            tensors=state.records,
            optimizers=tuple(_record_optimizer(reader.optimizer, names) for reader in readers),
            layers=layers,
            images={name: each.image for name, each in planned.items() if each.image is not None},
            nbytes={name: each.nbytes for name, each in planned.items()},
            layout=digest_of(*cuts) if cuts else None,
        )

    def _readers(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[StateReader]:
        known = {id(reader.optimizer): reader for reader in self._optimizers}
        self._optimizers = [known.get(id(optimizer)) or StateReader(optimizer) for optimizer in optimizers]
        return self._optimizers

    def _plan(
        self, number: int, layer: Layer, state: ModelState, states: Mapping[str, ParameterState]
    ) -> _PlannedLayer:
        fqns = [fqn for fqn in layer.fqns if fqn in state.tensors]
        found = [states[fqn] for fqn in fqns if fqn in states]
        known = self._planned.get(layer.name)
        if known is not None and len(known[0]) == len(found) and all(map(_is, known[0], found)):
            return known[1]
        weights = {fqn: state.tensors[fqn] for fqn in fqns}
        own = {fqn: states[fqn] for fqn in fqns if fqn in states}
        planned = _plan_layer(layer, weights, own, rank=self._seat.rank, is_owner=self._seat.owns(number))
        self._planned[layer.name] = found, planned
        return planned


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


def _is(one: object, other: object) -> bool:
    return one is other


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlannedLayer:
    """What follows from the types and shapes of a layer's tensors."""

    image: LayerImage | None
    """None if this rank writes nothing of it."""
    nbytes: int
    cuts: bytes
    """How its tensors are cut that are spread over ranks, by name; empty if none is."""


def _plan_layer(
    layer: Layer,
    weights: Mapping[str, torch.Tensor],
    states: Mapping[str, ParameterState],
    *,
    rank: int,
    is_owner: bool,
) -> _PlannedLayer:
    tensors = {state_key(fqn, leaf): value for fqn, each in states.items() for leaf, value in each.tensors.items()}
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
    image = LayerImage(layer=layer.name, weights=weights_file, optimizer=optimizer_file, masters=masters)
    cuts = sorted({**of_weights.cuts, **of_state.cuts}.items())
    return _PlannedLayer(
        image=image if image.files else None,
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
