"""``optimizer.pt``: state by position in the file, by name here.

    {"state": {0: {"step": ..., "exp_avg": ...}, ...}, "param_groups": [{"lr": ..., "params": [0, 1, ...]}, ...]}

Source: torch 2.13, optim/optimizer.py (Optimizer.state_dict, load_state_dict).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...catalog import GroupRef, OptimizerRef, StateRef
from ...errors import FormatError, UnsupportedError
from ...file_plan import FilePlan
from ...layers import canonical_name
from ..torch_files import open_torch_file, plan_torch_file, read_option, read_state, write_option, write_state
from .parameter_order import ParameterOrder
from .positions import name_positions

__all__ = ["Optimizer", "plan_optimizer", "read_optimizer"]

# Kept in a group beside its options. Source: torch 2.13, optim/optimizer.py (add_param_group: ``param_names`` where
# the optimizer was given named parameters).
_POSITIONS, _NAMES = "params", "param_names"


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """An optimizer by name."""

    states: Mapping[str, StateRef]
    """By fqn; a parameter that was never updated is absent."""
    ref: OptimizerRef


def read_optimizer(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    find_order: Callable[[], ParameterOrder],
    given: Sequence[str] | None,
) -> Optimizer:
    """Read an optimizer's state and find its parameters' names.

    Args:
        path: A resolved path.
        shapes: The model's tensors by name, each once.
        find_order: Gives the model's order of parameters; called only where it is needed.
        given: The user's list of names; see ``positions.name_positions``.

    Raises:
        FormatError: Not a file of ``torch.save``, or not an optimizer's ``state_dict``.
        UnsupportedError: A ``state_dict`` of another kind, or state that is not plain.
        IncompatibleError: The names cannot be told, or do not fit.
    """
    tree = open_torch_file(path)
    if not isinstance(tree, dict) or set(tree) != {"state", "param_groups"}:
        keys = list(tree)[:8] if isinstance(tree, dict) else type(tree).__name__
        raise UnsupportedError(
            "the optimizer's state is not that of one torch optimizer",
            kind="optimizer-layout",
            path=path,
            expected="state and param_groups",
            found=str(keys)[:200],
        )
    groups = _check_groups(tree["param_groups"], path)
    by_position = _check_state(tree["state"], groups, path)
    states = {position: read_state(state, f"optimizer position {position}") for position, state in by_position.items()}
    named = _stored_names(groups, shapes, path) or name_positions(
        [[states.get(position) for position in group[_POSITIONS]] for group in groups],
        shapes,
        find_order=find_order,
        given=given,
        path=path,
    )
    refs = []
    by_name = {}
    for group, names in zip(groups, named, strict=True):
        options = {key: read_option(value) for key, value in group.items() if key not in (_POSITIONS, _NAMES)}
        refs.append(GroupRef(parameters=names, options=options))
        for position, name in zip(group[_POSITIONS], names, strict=True):
            if position in states:
                by_name[name] = states[position]
    return Optimizer(states=by_name, ref=OptimizerRef(name=None, groups=tuple(refs)))


def _check_groups(value: object, path: Path) -> list[dict[str, Any]]:
    seen: set[int] = set()
    if not isinstance(value, list) or not value:
        raise _refuse(path, "param_groups: a list of groups", value)
    for group in value:
        if not isinstance(group, dict) or not all(isinstance(key, str) for key in group):
            raise _refuse(path, "a group: names and options", group)
        positions = group.get(_POSITIONS)
        if not isinstance(positions, list) or not all(type(position) is int for position in positions):
            raise _refuse(path, "params: a list of numbers", positions)
        if len(set(positions)) != len(positions) or seen & set(positions):
            raise _refuse(path, "each parameter in one group, once", positions)
        seen |= set(positions)
    return value


def _check_state(value: object, groups: Sequence[Mapping[str, Any]], path: Path) -> dict[int, Mapping[Any, Any]]:
    if not isinstance(value, dict):
        raise _refuse(path, "state: a dict", value)
    positions = {position for group in groups for position in group[_POSITIONS]}
    for position, state in value.items():
        if type(position) is not int or position not in positions or not isinstance(state, dict):
            raise _refuse(path, "state by number of a parameter that is in a group", position)
    # A state without entries is one of SGD without momentum: the same as none.
    return {position: state for position, state in value.items() if state}


def _refuse(path: Path, expected: str, found: object) -> FormatError:
    # Not repr(found): of a container of containers that may be endless.
    return FormatError(
        "not an optimizer's state",
        kind="bad-optimizer",
        path=path,
        expected=expected,
        found=str(found)[:80] if isinstance(found, int | str) else type(found).__name__,
    )


def _stored_names(
    groups: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> tuple[tuple[str, ...], ...] | None:
    """The names the file itself has, where the optimizer was made from named parameters."""
    if not all(_NAMES in group for group in groups):
        return None
    named = []
    for group in groups:
        names = group[_NAMES]
        if not isinstance(names, list) or len(names) != len(group[_POSITIONS]):
            raise _refuse(path, "as many param_names as params", names)
        if not all(isinstance(name, str) and canonical_name(name) in shapes for name in names):
            return None
        named.append(tuple(canonical_name(name) for name in names))
    flat = [name for names in named for name in names]
    return tuple(named) if len(set(flat)) == len(flat) else None


def plan_optimizer(name: str, groups: Sequence[GroupRef], states: Mapping[str, StateRef]) -> FilePlan:
    """An optimizer's file, by position again: the parameters are numbered through the groups, from 0.

    Args:
        name: Of the file.
        groups: Parameters and encoded options.
        states: By fqn; a parameter without an entry gets no state.
    """
    position = 0
    tree_groups = []
    tree_states = {}
    for group in groups:
        positions = list(range(position, position + len(group.parameters)))
        position += len(positions)
        options = {key: write_option(value) for key, value in group.options.items()}
        tree_groups.append({**options, _POSITIONS: positions})
        for number, fqn in zip(positions, group.parameters, strict=True):
            if fqn in states:
                tree_states[number] = write_state(states[fqn])
    return plan_torch_file(name, {"state": tree_states, "param_groups": tree_groups})
