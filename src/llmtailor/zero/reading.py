"""What a DeepSpeed engine holds on this rank, by parameter name: no copies, and no word to the other ranks.

Names are those of a checkpoint: ``<fqn>`` for weights and buffers, ``state.<fqn>.<leaf>`` for the optimizer's. The
fp32 master of a 16-bit weight is the leaf ``master``; in fp32 the weights are the masters, and none is told of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import UnsupportedError
from ..local_parts import LocalPart
from ..manifest import digest_of
from ..model_state import find_saved
from ..optimizer_state import ParameterGroup
from ..optimizer_values import encode_option
from ..shards import Shard, whole_shard
from ..state_keys import state_key
from ..state_tree import Note
from ..tensor_bytes import dtype_name, meta_of
from ..tensors import TensorMeta
from .engines import World, find_flats, find_groups, find_world, inner_optimizer, name_parameters, whole_shape
from .flats import Flat, cut, describe, holds_start, place, read_state

__all__ = ["MASTER", "ZeroState", "read_groups", "read_options", "read_weights", "read_zero"]

MASTER = "master"


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroState:
    """The state of a training, as far as it is here. All but ``parts`` and ``notes`` is the same on every rank."""

    world: World
    weights: Mapping[str, TensorMeta]
    """Parameters and buffers as a whole, by fqn, in model order; also where nothing of them is here."""
    states: Mapping[str, Mapping[str, TensorMeta]]
    """The same of the optimizer's state: fqn -> leaf."""
    spread: frozenset[str]
    """Names of those whose elements are spread over the ranks."""
    parts: Mapping[str, LocalPart]
    """By name, what is here: views. Of what exists once for a parameter (``step``), the rank with its first element
    has it; what is the same everywhere (weights at stages 1 and 2, buffers) every rank has."""
    notes: Mapping[str, Note]
    """By name, of ``parts``: what tensors cannot say, see ``optimizer_values``."""
    groups: tuple[ParameterGroup, ...]
    layout: str
    """Digest of how everything is cut: of one digest, every element lies in the same place."""

    @property
    def metas(self) -> dict[str, TensorMeta]:
        """Every tensor as a whole, by name."""
        leaves = ((fqn, leaf, meta) for fqn, each in self.states.items() for leaf, meta in each.items())
        return {**self.weights, **{state_key(fqn, leaf): meta for fqn, leaf, meta in leaves}}


def read_zero(engine: Any) -> ZeroState:
    """Read an engine between two of its steps; called on any rank, talks to none.

    Args:
        engine: Of stages 1 to 3; not changed.

    Raises:
        UnsupportedError: It spreads its state in a way that is not known here, its optimizer's state cannot be told
            apart by parameters, or a value cannot be held in a file.
        IncompatibleError: Two different tensors have one canonical name.
    """
    world = find_world(engine)
    names = name_parameters(engine.module)
    flats = find_flats(engine, names, world)
    collected = _Collected(ranks=world.ranks, weights={}, states={}, spread=set(), parts={}, notes={})
    for fqn, tensor in find_saved(engine.module, {fqn: tensor for tensor, fqn in names.items()}).items():
        meta, part = read_weights(tensor, fqn, world)
        collected.weights[fqn], collected.parts[fqn] = meta, part
        if part.is_sharded:
            collected.spread.add(fqn)
    for flat in flats:
        _collect_state(collected, flat, inner_optimizer(engine).state.get(flat.master, {}))
    # What is not kept in the parts: a run that is nothing.
    parts = {name: part for name, part in collected.parts.items() if part.shard.numel or not part.is_sharded}
    text = f"zero-{world.stage} of {world.ranks}\n{describe(flats)}"
    return ZeroState(
        world=world,
        weights=collected.weights,
        states=collected.states,
        spread=frozenset(collected.spread),
        parts=parts,
        notes=collected.notes,
        groups=read_groups(engine, find_groups(engine, names, world)),
        layout=digest_of(text.encode()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Collected:
    ranks: int
    weights: dict[str, TensorMeta]
    states: dict[str, dict[str, TensorMeta]]
    spread: set[str]
    parts: dict[str, LocalPart]
    notes: dict[str, Note]


def read_weights(tensor: torch.Tensor, fqn: str, world: World) -> tuple[TensorMeta, LocalPart]:
    """A parameter or buffer: as a whole, and what of it is here.

    At stage 3 a parameter is a run of its elements, in the memory that the next forward gathers it from; also one
    that is frozen, or so small that it stays gathered (between steps the two are the same).

    Args:
        tensor: Of the module.
        fqn: Its name, for the error.
        world: The ranks.

    Raises:
        UnsupportedError: It is no plain tensor, or partitioned over other ranks.
    """
    partition = getattr(tensor, "ds_tensor", None)
    shape = whole_shape(tensor)
    numel = math.prod(shape)
    if partition is None or not numel:
        part = LocalPart(tensor=tensor, shard=whole_shard(shape), is_sharded=False, is_first=True)
        return TensorMeta(dtype=meta_of(tensor).dtype, shape=shape), part
    share = -(-numel // world.ranks)
    if partition.numel() != share or partition.dtype != tensor.dtype:
        raise UnsupportedError(
            "a parameter is not partitioned evenly over all ranks, or is quantized",
            kind="deepspeed-engine",
            fqn=fqn,
            expected=f"{tensor.dtype}[{share}] on each of {world.ranks} ranks",
            found=f"{partition.dtype}{list(partition.shape)}",
        )
    start = min(world.rank * share, numel)
    shard = Shard(shape=shape, offsets=(start,), sizes=(min(share, numel - start),), is_run=True)
    part = place(partition, 0, shard, world.ranks)
    # What only an optimizer's step changes is known by its class.
    part = replace(part, tensor=torch.nn.Parameter(part.tensor, requires_grad=False))
    return TensorMeta(dtype=dtype_name(partition.dtype), shape=shape), part


def _collect_state(collected: _Collected, flat: Flat, values: Mapping[str, object]) -> None:
    state = read_state(flat, values)
    tensors = {MASTER: flat.master, **state.tensors} if flat.has_masters else state.tensors
    for leaf, tensor in tensors.items():
        for fqn, shape in flat.shapes.items():
            meta = TensorMeta(dtype=dtype_name(tensor.dtype), shape=shape)
            collected.states.setdefault(fqn, {})[leaf] = meta
            if collected.ranks > 1:
                collected.spread.add(state_key(fqn, leaf))
        collected.parts.update({state_key(fqn, leaf): part for fqn, part in cut(flat, tensor).items()})
    for leaf, number in state.numbers.items():
        for fqn in flat.shapes:
            collected.states.setdefault(fqn, {})[leaf] = meta_of(number)
        part = LocalPart(tensor=number, shard=whole_shard(()), is_sharded=False, is_first=True)
        for fqn in holds_start(flat):
            collected.parts[state_key(fqn, leaf)] = part
            if leaf in state.notes:
                collected.notes[state_key(fqn, leaf)] = state.notes[leaf]


def read_groups(engine: Any, parameters: Sequence[tuple[str, ...]]) -> tuple[ParameterGroup, ...]:
    """The optimizer's groups: parameters by name, options as JSON.

    Args:
        engine: The engine.
        parameters: As ``find_groups``.

    Raises:
        UnsupportedError: An option that JSON and our tags cannot say.
    """
    groups = inner_optimizer(engine).param_groups
    return tuple(
        ParameterGroup(parameters=fqns, options=read_options(group, index))
        for index, (fqns, group) in enumerate(zip(parameters, groups, strict=True))
    )


def read_options(group: Mapping[str, object], index: int) -> dict[str, object]:
    """The options of one of the optimizer's groups, as JSON.

    Raises:
        UnsupportedError: As ``read_groups``.
    """
    options = {}
    for name, value in group.items():
        if name in ("params", "param_names"):
            continue
        try:
            options[name] = encode_option(value)
        except UnsupportedError as err:
            raise UnsupportedError(
                f"cannot save option {name!r} of optimizer group {index}", kind="option-type", found=err.found
            ) from err
    return options
