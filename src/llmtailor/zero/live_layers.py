"""What a rank of a DeepSpeed training writes, as layers and images of files: ``live_state`` for ZeRO.

A layer's weights are in whole files at stages 1 and 2, and in parts at stage 3; its optimizer state is always in parts,
for each flat begins and ends somewhere in the middle of a layer. A rank that is alone writes whole files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..layers import Layer, LayerMap, file_stem, find_ties, map_names, named_tensors
from ..live_state import LiveLayers
from ..local_parts import LocalPart, Seat
from ..manifest import GroupRecord, OptimizerRecord, TensorRecord
from ..model_state import ModelState, find_saved, refuse_extra_state
from ..optimizer_state import ParameterGroup, optimizer_class
from ..shards import Shards
from ..state_keys import state_key
from ..tensor_bytes import meta_of
from ..writer import LayerImage, find_masters, optimizer_image, weights_image
from .engines import inner_optimizer, whole_shape
from .reading import ZeroState, read_zero

__all__ = ["ZeroReader"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """Of the tensors of a layer, in a checkpoint."""

    weights: tuple[str, ...]
    states: tuple[str, ...]


class ZeroReader:
    """Reads one engine again and again; a ``TrainingReader`` for the checkpointer.

    Args:
        engine: Of stages 1 to 3.
        seat: Which rank this is.
        split_experts: As in ``layers.map_module``.
        overrides: As in ``layers.map_module``.
    """

    def __init__(
        self,
        engine: Any,
        *,
        seat: Seat,
        split_experts: bool = False,
        overrides: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._engine = engine
        self._seat = seat
        self._split_experts = split_experts
        self._overrides = overrides

    def read_model(self, module: torch.nn.Module) -> ModelState:
        """The model as a whole: its layers and schema; its tensors are the module's own, empty where partitioned.

        Raises:
            UnsupportedError: As ``model_state.read_model``.
        """
        for name, owner in module.named_modules():
            refuse_extra_state(name, owner, elsewhere="in the client_state")
        ties = find_ties(module)
        tensors = named_tensors(module)
        shapes = {fqn: whole_shape(tensor) for fqn, tensor in tensors.items() if fqn not in ties}
        named = map_names(shapes, split_experts=self._split_experts, overrides=self._overrides)
        layers = LayerMap(named.layers, ties)
        kept = find_saved(module, tensors)
        return ModelState(
            layers=layers,
            records=tuple(_record(fqn, tensor, layers) for fqn, tensor in kept.items()),
            tensors={fqn: tensor for fqn, tensor in kept.items() if fqn not in ties},
        )

    def read(self, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> LiveLayers:
        """All that is to be saved; called on any rank, talks to none.

        Args:
            module: The engine's.
            optimizers: The engine's; none to save weights alone.

        Raises:
            UnsupportedError, IncompatibleError: As ``read_zero``.
        """
        model = self.read_model(module)
        state = read_zero(self._engine)
        states = state.states if optimizers else {}
        metas = state.metas
        layers = tuple(layer for layer in model.layers if any(fqn in model.tensors for fqn in layer.fqns))
        images, nbytes = {}, {}
        for number, layer in enumerate(layers):
            names = _Names(
                weights=tuple(fqn for fqn in layer.fqns if fqn in state.weights),
                states=tuple(state_key(fqn, leaf) for fqn in layer.fqns for leaf in states.get(fqn, ())),
            )
            nbytes[layer.name] = sum(metas[name].nbytes for name in (*names.weights, *names.states))
            image = _plan_image(layer, names, state, seat=self._seat, is_owner=self._seat.owns(number))
            if image.files:
                images[layer.name] = image
        return LiveLayers(
            tensors=model.records,
            optimizers=(self._record_optimizer(state.groups),) if optimizers else (),
            layers=layers,
            images=images,
            nbytes=nbytes,
            layout=state.layout if state.world.ranks > 1 else None,
        )

    def _record_optimizer(self, groups: Sequence[ParameterGroup]) -> OptimizerRecord:
        records = tuple(GroupRecord(parameters=group.parameters, options=dict(group.options)) for group in groups)
        name = optimizer_class(inner_optimizer(self._engine))
        return OptimizerRecord.model_validate({"class": name, "groups": records})


def _is_trained(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad


def _record(fqn: str, tensor: torch.Tensor, layers: LayerMap) -> TensorRecord:
    return TensorRecord(
        fqn=fqn,
        kind="parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer",
        layer=layers.layer_of(fqn).name,
        dtype=meta_of(tensor).dtype,
        shape=whole_shape(tensor),
        trainable=_is_trained(tensor),
        tied_to=layers.ties.get(fqn),
    )


def _plan_image(layer: Layer, names: _Names, state: ZeroState, *, seat: Seat, is_owner: bool) -> LayerImage:
    stem = file_stem(layer)
    is_alone = state.world.ranks == 1
    # What is not spread, every rank has. Of the optimizer's state nothing is the same on all, unless there is one rank.
    weights = {name: state.parts[name] for name in names.weights if name in state.parts}
    weights = {name: part for name, part in weights.items() if name in state.spread or is_owner}
    states = {name: state.parts[name] for name in names.states if name in state.parts and (is_owner or not is_alone)}
    weights_file = None
    if weights:
        are_parts = any(name in state.spread for name in names.weights)
        tensors, shards = _split(weights)
        weights_file = weights_image(stem, tensors, shards=shards, rank=seat.rank if are_parts else None)
    tensors, shards = _split(states)
    notes = {name: state.notes[name] for name in states if name in state.notes}
    optimizer_file = optimizer_image(stem, tensors, notes, shards=shards, rank=None if is_alone else seat.rank)
    return LayerImage(
        layer=layer.name,
        weights=weights_file,
        optimizer=optimizer_file,
        masters=find_masters(weights_file, optimizer_file),
    )


def _split(parts: Mapping[str, LocalPart]) -> tuple[dict[str, torch.Tensor], Shards]:
    tensors = {name: part.tensor for name, part in parts.items()}
    return tensors, {name: part.shard for name, part in parts.items() if part.is_sharded}
