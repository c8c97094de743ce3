"""Memory of a DeepSpeed engine for what a checkpoint has, and what makes the engine consistent once it is filled.

    load_groups(engine, groups)          the options, which decide how moments are rescaled
    filling = ZeroFilling(engine, ...)   makes the optimizer's state where it has none yet
    filling.targets                      to be filled, by name, in any order, each rank by itself
    filling.finish()                     on every rank: masters, steps, and what DeepSpeed derives from both
    load_rest(engine, rest)              in ``rest``

Targets are shards of whole tensors, so it does not matter how many ranks the checkpoint was written by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import IncompatibleError
from ..optimizer_state import ParameterGroup
from ..optimizer_values import decode_option
from ..shards import Shard, whole_shard
from ..state_keys import split_state_key, state_key
from ..state_tree import Note
from ..tensor_bytes import torch_dtype
from ..tensor_filling import Target, Targets
from ..tensors import TensorMeta
from .engines import find_flats, find_groups, find_world, inner_optimizer, name_parameters
from .flats import Flat, cut, read_state
from .reading import MASTER, read_options, read_weights
from .steps import STEP, unify

__all__ = ["ZeroFilling", "load_groups"]


@dataclass(slots=True)
class _FlatFilling:
    """What of one flat comes from the checkpoint."""

    flat: Flat
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """By leaf, as the optimizer has them."""
    numbers: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """fqn -> leaf -> 0-dim, on the CPU."""
    masters: set[str] = field(default_factory=set)
    """Parameters whose master is in the checkpoint."""


class ZeroFilling:
    """Fills an engine from a checkpoint of any world; made on every rank, between two steps.

    Args:
        engine: Of stages 1 to 3, fresh or not.
        saved: Every tensor of the checkpoint as a whole, by name: ``<fqn>``, ``state.<fqn>.<leaf>``.
        notes: By the same names, of the optimizer's state.

    Raises:
        UnsupportedError: As ``read_zero``.
    """

    def __init__(self, engine: Any, saved: Mapping[str, TensorMeta], notes: Mapping[str, Note]) -> None:
        self._engine = engine
        self._notes = notes
        self._world = find_world(engine)
        self._names = name_parameters(engine.module)
        self._targets: dict[str, list[Target]] = {}
        for tensor, fqn in self._names.items():
            if fqn in saved:
                self._add_weights(tensor, fqn)
        leaves: dict[str, dict[str, TensorMeta]] = {}
        for name, meta in saved.items():
            if name not in self._targets and name.startswith("state."):
                fqn, leaf = split_state_key(name)
                leaves.setdefault(fqn, {})[leaf] = meta
        flats = find_flats(engine, self._names, self._world)
        self._flats = [self._plan(flat, {fqn: leaves.get(fqn, {}) for fqn in flat.shapes}) for flat in flats]

    @property
    def targets(self) -> Targets:
        """Weights at stages 1 and 2 and buffers on every rank whole, numbers of each parameter of a flat too."""
        return self._targets

    def _add(self, name: str, tensor: torch.Tensor, shard: Shard) -> None:
        if shard.numel:
            self._targets.setdefault(name, []).append(Target(tensor=tensor.detach(), shard=shard))

    def _add_weights(self, tensor: torch.Tensor, fqn: str) -> None:
        _, part = read_weights(tensor, fqn, self._world)
        self._add(fqn, part.tensor, part.shard)

    def _plan(self, flat: Flat, leaves: Mapping[str, Mapping[str, TensorMeta]]) -> _FlatFilling:
        filling = _FlatFilling(flat=flat)
        state = inner_optimizer(self._engine).state.get(flat.master, {})
        live = read_state(flat, state).tensors
        for fqn, metas in leaves.items():
            for leaf, meta in metas.items():
                if leaf == MASTER:
                    filling.masters.add(fqn)
                elif meta.shape == () and leaf not in live:
                    number = torch.zeros((), dtype=torch_dtype(meta.dtype))
                    filling.numbers.setdefault(fqn, {})[leaf] = number
                    self._add(state_key(fqn, leaf), number, whole_shard(()))
                elif leaf not in filling.tensors:
                    filling.tensors[leaf] = live[leaf] if leaf in live else _make_state(flat, meta)
        if flat.has_masters:
            self._add_runs(flat, MASTER, flat.master, filling.masters)
        for leaf, tensor in filling.tensors.items():
            self._add_runs(flat, leaf, tensor, {fqn for fqn, metas in leaves.items() if leaf in metas})
        return filling

    def _add_runs(self, flat: Flat, leaf: str, tensor: torch.Tensor, saved: set[str]) -> None:
        for fqn, part in cut(flat, tensor).items():
            if fqn in saved:
                self._add(state_key(fqn, leaf), part.tensor, part.shard)

    @torch.no_grad()
    def finish(self) -> None:
        """Make everything follow from what was filled; a collective at stage 3.

        A parameter that has no master in the checkpoint gets its weight for one; one that has no state begins with
        zeros. Where the parameters of a flat were saved at different steps, see ``steps``.

        Raises:
            IncompatibleError: Steps differ, and the group does not say its betas.
        """
        for filling in self._flats:
            self._finish_masters(filling)
            self._finish_state(filling)
        zero = self._engine.optimizer
        if self._world.stage == 3:
            # What was gathered is of the weights as they were. Source: DeepSpeed 0.19.8, runtime/engine.py
            # (load_checkpoint calls both), runtime/zero/stage3.py.
            zero.checkpoint_event_prologue()
            zero.checkpoint_event_epilogue()
        elif all(filling.tensors for filling in self._flats):
            # DeepSpeed links each parameter to its part of the state after a first step, and only once.
            # Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py (_lazy_init_hp_params_optimizer_state).
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _finish_masters(self, filling: _FlatFilling) -> None:
        flat = filling.flat
        for piece in flat.pieces:
            if not flat.has_masters or piece.fqn not in filling.masters:
                master = flat.master.detach().narrow(0, piece.at, piece.numel)
                master.copy_(flat.weights.detach().narrow(0, piece.at, piece.numel))

    def _finish_state(self, filling: _FlatFilling) -> None:
        if not filling.tensors and not filling.numbers:
            return
        optimizer = inner_optimizer(self._engine)
        flat = filling.flat
        options = read_options(optimizer.param_groups[flat.group], flat.group)
        moments = {
            leaf: {fqn: part.tensor for fqn, part in cut(flat, tensor).items()}
            for leaf, tensor in filling.tensors.items()
        }
        numbers = unify(filling.numbers, moments, options)
        state = optimizer.state[flat.master]
        state.update(filling.tensors)
        for leaf, (fqn, number) in numbers.items():
            state[leaf] = _place_number(optimizer, flat, leaf, number, self._notes.get(state_key(fqn, leaf)))


def _make_state(flat: Flat, meta: TensorMeta) -> torch.Tensor:
    return torch.zeros_like(flat.master, dtype=torch_dtype(meta.dtype), requires_grad=False)


def _place_number(
    optimizer: torch.optim.Optimizer, flat: Flat, leaf: str, number: torch.Tensor, note: Note | None
) -> object:
    """A number of the state as this optimizer keeps it: Python's, or a tensor on its device.

    Source:
        torch 2.13, optim/optimizer.py (_process_value_according_to_param_policy); DeepSpeed 0.19.8, ops/adam/*.py,
        whose kernels take a Python int.
    """
    live = optimizer.state[flat.master].get(leaf)
    if live is None:
        is_python = note is not None or type(optimizer).__module__.startswith("deepspeed.")
    else:
        is_python = not isinstance(live, torch.Tensor)
    if is_python:
        value = number.item()
        return int(value) if leaf == STEP else value
    if isinstance(live, torch.Tensor):
        return live.copy_(number)
    group = optimizer.param_groups[flat.group]
    is_on_device = leaf != STEP or group.get("capturable") or group.get("fused")
    return number.to(flat.master.device) if is_on_device else number


def load_groups(engine: Any, groups: Sequence[ParameterGroup]) -> None:
    """Set the options of each of the optimizer's groups to those its parameters were saved with.

    An option that the saved group lacks keeps its value.

    Args:
        engine: Its groups may be other than the saved ones.
        groups: As saved.

    Raises:
        IncompatibleError: A parameter that is trained is in none of them.
        FormatError: An option is not one of ours.
    """
    saved_of = {fqn: group for group in groups for fqn in group.parameters}
    names = name_parameters(engine.module)
    live = find_groups(engine, names, find_world(engine))
    for fqn in (fqn for fqns in live for fqn in fqns):
        if fqn not in saved_of:
            raise IncompatibleError(
                "the checkpoint's optimizer has no such parameter",
                kind="optimizer-mismatch",
                fqn=fqn,
                hint="train the parameters that the saved run trained; how they are grouped is free",
            )
    for fqns, group in zip(live, inner_optimizer(engine).param_groups, strict=True):
        if fqns:
            group.update({name: decode_option(value) for name, value in saved_of[fqns[0]].options.items()})
