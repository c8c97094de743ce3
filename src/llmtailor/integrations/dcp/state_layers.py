"""A state dict as layers: its schema, which part of every tensor is on this rank, and what this rank writes of it.

The same records as those of a training with ``Run`` (``live_state``), from names, shapes and placements alone, so that
either may go on from the other's checkpoints. No message to another rank, no byte copied.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from ...errors import IncompatibleError, UnsupportedError
from ...layers import LayerMap, map_names
from ...live_state import LiveLayers
from ...local_parts import LocalPart, Seat, describe_cut, local_part, memory_of
from ...manifest import GroupRecord, OptimizerRecord, TensorRecord, digest_of
from ...model_state import ModelReader
from ...optimizer_values import flatten_state
from ...state_keys import state_key
from ...state_tree import Note
from ...tensor_bytes import meta_of
from .state_names import Entry, Group, Names, StateNames, name_entries

__all__ = ["LayerStateReader", "NamedState", "Part"]

# Buffers that models commonly save; everything else that a state dict does not tell is taken for a parameter.
_BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked", "inv_freq", "position_ids"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What of a tensor of the model, or of its optimizer's state, is on this rank."""

    key: str
    """In the state dict."""
    layer: str
    local: LocalPart
    cut: str | None
    """See ``describe_cut``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedState:
    """A state dict, understood."""

    entries: tuple[Entry, ...]
    live: LiveLayers
    """Without images."""
    parts: Mapping[str, Part]
    """By name in a layer file: fqn, or ``state.<fqn>.<leaf>``; tied names left out."""
    notes: Mapping[str, Note]
    """By the same: what tensors of the state cannot say."""
    ties: Mapping[str, str]
    """fqn -> the fqn that holds its bytes."""

    def is_in_parts(self, layer: str, *, of_state: bool) -> bool:
        """Whether a layer's weights, or its optimizer state, are spread over ranks."""
        return any(
            part.layer == layer and part.local.is_sharded and name.startswith("state.") == of_state
            for name, part in self.parts.items()
        )

    def written_by(self, seat: Seat, layers: frozenset[str]) -> list[str]:
        """Names of what a rank writes of some layers; as ``live_state`` has it."""
        numbers = {layer.name: number for number, layer in enumerate(self.live.layers)}
        return [
            name
            for name, part in self.parts.items()
            if part.layer in layers
            and (
                part.local.is_first and part.local.shard.numel > 0
                if part.local.is_sharded
                else seat.owns(numbers[part.layer])
            )
        ]


class LayerStateReader:
    """Reads state dicts of one training.

    Args:
        model: The module, where it is at hand: says what is a buffer, which parameters train and are tied.
        optimizers: Likewise: say of which class they are.
        names: Where in the dict the model and its optimizer are.
        split_experts: As in ``layers.map_module``.
        overrides: As in ``layers.map_module``.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module | None = None,
        optimizers: Sequence[str] = (),
        names: Names = Names(),  # noqa: B008
        split_experts: bool = False,
        overrides: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._module = model
        self._classes = optimizers
        self._names = names
        self._split_experts = split_experts
        self._overrides = overrides
        self._model = ModelReader(split_experts=split_experts, overrides=overrides)

    def read(self, state_dict: Mapping[str, Any]) -> NamedState:
        """Understand a state dict; called on all ranks.

        Raises:
            IncompatibleError: It is not understood; or two tensors have one name.
            UnsupportedError: A tensor that cannot be stored.
        """
        flat, mappings = flatten_state_dict(dict(state_dict))
        named = name_entries({mappings[key]: value for key, value in flat.items()}, self._names)
        records, ties = self._describe(named)
        layers = map_names(
            {record.fqn: record.shape for record in records if record.tied_to is None},
            split_experts=self._split_experts,
            overrides=self._overrides,
        )
        records = [
            record.model_copy(update={"layer": layers.layer_of(record.tied_to or record.fqn).name})
            for record in records
        ]
        parts, notes = _find_parts(named.entries, layers, ties)
        optimizers = tuple(
            _record_optimizer(self._classes[index] if index < len(self._classes) else None, groups, ties)
            for index, groups in enumerate(named.groups)
        )
        live = LiveLayers(
            tensors=tuple(records),
            optimizers=optimizers,
            layers=layers.layers,
            images={},
            nbytes=_sum_nbytes(named.entries, layers, ties),
            layout=_digest_layout(parts, layers),
        )
        return NamedState(entries=named.entries, live=live, parts=parts, notes=notes, ties=ties)

    def _describe(self, named: StateNames) -> tuple[list[TensorRecord], dict[str, str]]:
        """The schema, each tensor's layer left open, and what is tied to what."""
        known = {}
        if self._module is not None:
            known = {record.fqn: record for record in self._model.read(self._module).records}
        trained = {fqn for groups in named.groups for group in groups for fqn in group.parameters}
        ties: dict[str, str] = {}
        firsts: dict[object, str] = {}
        records: dict[str, TensorRecord] = {}
        for entry in named.entries:
            if entry.role != "weight":
                continue
            assert isinstance(entry.value, torch.Tensor)
            if entry.fqn in records:
                raise IncompatibleError("two tensors have one name", kind="duplicate-parameter-name", fqn=entry.fqn)
            record = known.get(entry.fqn) or _guess_record(entry, trained, has_optimizer=named.has_optimizer)
            first = firsts.setdefault(_memory_id(entry.value), entry.fqn)
            tied_to = record.tied_to if entry.fqn in known else (None if first == entry.fqn else first)
            if tied_to is not None:
                ties[entry.fqn] = tied_to
            meta = _meta_of(entry.value, entry.fqn)
            records[entry.fqn] = record.model_copy(
                update={"dtype": meta.dtype, "shape": meta.shape, "tied_to": tied_to}
            )
        return list(records.values()), ties


def _memory_id(tensor: torch.Tensor) -> object:
    """What is the same for two names of one tensor: by memory, for a state dict has a new view for each.

    Not by address: of what a rank holds nothing of, that is 0.
    """
    local = memory_of(tensor)
    return local.untyped_storage()._cdata, local.storage_offset(), tuple(tensor.shape), tensor.dtype, local.stride()


def _meta_of(tensor: torch.Tensor, name: str) -> Any:
    try:
        return meta_of(tensor)
    except UnsupportedError as err:
        err.fqn = name
        raise


def _guess_record(entry: Entry, trained: set[str], *, has_optimizer: bool) -> TensorRecord:
    """What a state dict tells of a tensor: its values are detached, so neither its class nor whether it trains."""
    value = entry.value
    assert isinstance(value, torch.Tensor)
    is_buffer = not (value.is_floating_point() or value.is_complex()) or entry.fqn.rpartition(".")[2] in _BUFFERS
    if has_optimizer and not entry.fqn.endswith(("weight", "bias")):
        is_buffer = True
    is_parameter = entry.fqn in trained or isinstance(value, torch.nn.Parameter) or not is_buffer
    is_trainable = entry.fqn in trained or (is_parameter and (not has_optimizer or value.requires_grad))
    return TensorRecord(
        fqn=entry.fqn,
        kind="parameter" if is_parameter else "buffer",
        layer="?",
        dtype="F32",
        shape=(),
        trainable=is_trainable,
        tied_to=None,
    )


def _find_parts(
    entries: Sequence[Entry], layers: LayerMap, ties: Mapping[str, str]
) -> tuple[dict[str, Part], dict[str, Note]]:
    parts: dict[str, Part] = {}
    notes: dict[str, Note] = {}
    for entry in entries:
        if entry.role == "rest" or (entry.role == "weight" and entry.fqn in ties):
            continue
        fqn = ties.get(entry.fqn, entry.fqn)
        tensors: Mapping[str, torch.Tensor]
        if entry.role == "weight":
            assert isinstance(entry.value, torch.Tensor)
            tensors = {fqn: entry.value}
        else:
            # By a name without a dot, which is then replaced by the whole path.
            found, told = flatten_state({"v": entry.value}, fqn)
            tensors = {state_key(fqn, entry.leaf + path[1:]): tensor for path, tensor in found.items()}
            notes |= {state_key(fqn, entry.leaf + path[1:]): note for path, note in told.items()}
        layer = layers.layer_of(fqn).name
        for name, tensor in tensors.items():
            if name in parts:  # the state of a tied parameter, under its other name
                continue
            parts[name] = Part(key=entry.key, layer=layer, local=local_part(tensor), cut=describe_cut(tensor))
    return parts, notes


def _sum_nbytes(entries: Sequence[Entry], layers: LayerMap, ties: Mapping[str, str]) -> dict[str, int]:
    """By layer, of whole tensors."""
    nbytes = dict.fromkeys(layers.names, 0)
    for entry in entries:
        if entry.role != "rest" and entry.fqn not in ties and isinstance(entry.value, torch.Tensor):
            nbytes[layers.layer_of(entry.fqn).name] += entry.value.numel() * entry.value.element_size()
    return nbytes


def _digest_layout(parts: Mapping[str, Part], layers: LayerMap) -> str | None:
    """As ``LiveReader`` has it, so that files of either's checkpoints can be linked from the other's."""
    cuts: dict[str, dict[str, str | None]] = defaultdict(dict)
    for name, part in parts.items():
        if part.local.is_sharded:
            cuts[part.layer][name] = part.cut
    found = [json.dumps(sorted(cuts[name].items())).encode() for name in layers.names if name in cuts]
    return digest_of(*found) if found else None


def _record_optimizer(name: str | None, groups: Sequence[Group], ties: Mapping[str, str]) -> OptimizerRecord:
    options = groups[0].options if groups else {}
    records = tuple(
        GroupRecord(
            parameters=tuple(dict.fromkeys(ties.get(fqn, fqn) for fqn in group.parameters)),
            options=dict(group.options),
        )
        for group in groups
    )
    return OptimizerRecord.model_validate({"class": name or _guess_class(options), "groups": records})


def _guess_class(options: Mapping[str, object]) -> str:
    """The class of an optimizer by its options; a state dict does not tell.

    Source: torch 2.13, optim/adam.py (``decoupled_weight_decay`` tells AdamW from Adam), optim/sgd.py.
    """
    if {"betas", "amsgrad", "decoupled_weight_decay"} <= options.keys():
        return "torch.optim.adamw.AdamW" if options["decoupled_weight_decay"] is True else "torch.optim.adam.Adam"
    if {"momentum", "dampening", "nesterov"} <= options.keys():
        return "torch.optim.sgd.SGD"
    return "unknown"
