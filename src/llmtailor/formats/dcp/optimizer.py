"""An optimizer by name, between its state dict as torch gives it and a catalog; nested or flat.

    {"state": {<fqn>: {<leaf>: ...}}, "param_groups": [{"params": [<fqn>, ...], <option>: ...}, ...]}
    {"state.<fqn>.<leaf>": ..., "param_groups.<fqn>.<option>": ...}         flatten_optimizer_state_dict=True

Source: torch 2.13, distributed/checkpoint/state_dict.py (_get_optim_state_dict, _flatten_optim_state_dict).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...catalog import GroupRef, OptimizerRef, StateRef
from ...errors import FormatError, IncompleteError, TailorError, UnsupportedError
from ..torch_files import TorchTensor, Tree, read_option, read_state, write_option, write_state
from .contents import OptimizerItems
from .metadata import Item, ItemPath, TensorItem
from .stored import StoredTensor, read_value

__all__ = [
    "Optimizer",
    "parameters_of",
    "parameters_of_tree",
    "plan_flat",
    "plan_nested",
    "read_flat",
    "read_nested",
    "read_tree",
]

_PARAMETERS = "params"


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """An optimizer, its parameters by the names that the checkpoint has."""

    groups: tuple[GroupRef, ...]
    states: Mapping[str, StateRef]

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group.parameters)

    def renamed(self, names: Mapping[str, str]) -> Optimizer:
        """The same with other names; all must be there."""
        groups = (
            GroupRef(parameters=tuple(names[name] for name in group.parameters), options=group.options)
            for group in self.groups
        )
        return Optimizer(groups=tuple(groups), states={names[name]: state for name, state in self.states.items()})

    def as_refs(self) -> tuple[OptimizerRef, ...]:
        return (OptimizerRef(name=None, groups=self.groups),)


def read_nested(items: OptimizerItems, path: Path) -> Optimizer:
    """Read the nested form.

    Raises:
        FormatError: It is not what torch writes.
        UnsupportedError: State or an option without a form of ours; parameters by number.
        IncompleteError: A parameter's state belongs to no group.
    """
    values = ((place, _value(item)) for place, item in items.by_place.items())
    return read_tree(_nest(values, path), path)


def read_tree(tree: Tree, path: Path) -> Optimizer:
    """Read an optimizer's state dict that is one tree; raises as ``read_nested``."""
    states, groups = (tree.get("state", {}), tree.get("param_groups")) if isinstance(tree, dict) else (None, None)
    if not isinstance(states, dict) or not isinstance(groups, list) or not groups:
        raise _refuse(path, "state: a dict, and param_groups: a list")
    found = tuple(_read_group(group, path) for group in groups)
    return _checked(found, states, path)


def parameters_of(items: OptimizerItems, path: Path) -> tuple[str, ...] | None:
    """The names of an optimizer's parameters alone; None if it does not name them. Its state need not be understood.

    Raises:
        FormatError: Its groups are not what torch writes.
    """
    if items.is_flat:
        options = [str(place[1]) for place in items.by_place if len(place) == 2 and place[0] != "state"]
        return tuple(dict.fromkeys(option.rpartition(".")[0] for option in options))
    values = ((place, _value(item)) for place, item in items.by_place.items() if place[0] != "state")
    return parameters_of_tree(_nest(values, path))


def parameters_of_tree(tree: Tree) -> tuple[str, ...] | None:
    """As ``parameters_of``, for a state dict that is one tree."""
    groups = tree.get("param_groups") if isinstance(tree, dict) else None
    if not isinstance(groups, list):
        return None
    held = [group.get(_PARAMETERS) if isinstance(group, dict) else None for group in groups]
    names = [name for each in held if isinstance(each, list) for name in each]
    is_named = all(isinstance(each, list) for each in held) and all(isinstance(name, str) for name in names)
    return tuple(names) if names and is_named else None


def _checked(groups: tuple[GroupRef, ...], states: Mapping[Any, Tree], path: Path) -> Optimizer:
    names = Counter(name for group in groups for name in group.parameters)
    if any(count > 1 for count in names.values()):
        raise _refuse(path, "each parameter in one group, once")
    for name, state in states.items():
        if not isinstance(state, dict):
            raise _refuse(path, "state: a dict for each parameter", str(name)[:200])
        if name not in names:
            raise IncompleteError(
                "there is state of a parameter that is in no group",
                kind="dcp-groups",
                path=path,
                fqn=str(name)[:200],
                expected=f"the {len(names)} parameters of {len(groups)} groups",
            )
    # A state without entries is one of SGD without momentum: the same as none.
    return Optimizer(groups=groups, states={name: read_state(state, name) for name, state in states.items() if state})


def _read_group(group: Tree, path: Path) -> GroupRef:
    names = group.get(_PARAMETERS) if isinstance(group, dict) else None
    if isinstance(names, list) and names and all(type(name) is int for name in names):
        raise UnsupportedError(
            "the parameters of the optimizer are numbered, not named",
            kind="dcp-numbered",
            path=path,
            expected="names, as get_optimizer_state_dict and FSDP.optim_state_dict give them",
            found="numbers, as optimizer.state_dict() gives them",
            hint="load it into the training and save it again with get_optimizer_state_dict",
        )
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _refuse(path, "params: a list of names in each group")
    return GroupRef(parameters=tuple(names), options=_read_options(group, path))


def _read_options(group: Mapping[Any, Tree], path: Path) -> dict[str, object]:
    options = {}
    for name, value in group.items():
        if not isinstance(name, str):
            raise _refuse(path, "options by name")
        if name != _PARAMETERS:
            options[name] = _read_option(name, value, path)
    return options


def _read_option(name: str, value: Tree, path: Path) -> object:
    try:
        return read_option(value)
    except TailorError as err:
        raise type(err)(
            f"the option {name!r} of the optimizer cannot be taken over",
            kind=err.kind,
            path=path,
            expected="plain values and single numbers",
            found=err.found,
        ) from err


def read_flat(items: OptimizerItems, path: Path) -> Optimizer:
    """Read the flat form, in which each parameter has its own options; equal ones make a group again.

    Raises:
        As ``read_nested``.
    """
    options: dict[str, dict[str, object]] = {}
    rests: dict[str, Item] = {}
    for (kind, rest), item in ((place, item) for place, item in items.by_place.items() if len(place) == 2):
        if kind == "state":
            rests[str(rest)] = item
        else:
            name, _, option = str(rest).rpartition(".")
            options.setdefault(name, {})[option] = _read_option(option, _value(item), path)
    members: dict[str, list[str]] = {}
    for name, own in options.items():
        members.setdefault(json.dumps(own, sort_keys=True), []).append(name)
    groups = (GroupRef(parameters=tuple(names), options=options[names[0]]) for names in members.values())
    places = ((_split_flat(rest, options, path), _value(item)) for rest, item in rests.items())
    return _checked(tuple(groups), _nest(places, path), path)


def _split_flat(rest: str, names: Collection[str], path: Path) -> ItemPath:
    """``<fqn>.<leaf>`` or ``<fqn>.<key>.<leaf>`` with names that may have dots of their own."""
    name = rest
    while name:
        name = name.rpartition(".")[0]
        if name in names:
            return (name, *rest[len(name) + 1 :].split("."))
    raise IncompleteError(
        "there is state of a parameter that has no options",
        kind="dcp-groups",
        path=path,
        fqn=rest,
        expected=f"state of one of {len(names)} parameters",
    )


def _value(item: Item) -> Tree:
    return TorchTensor(ref=StoredTensor(item)) if isinstance(item, TensorItem) else read_value(item)


def _nest(values: Iterable[tuple[ItemPath, Tree]], path: Path) -> Tree:
    """The nested dicts and lists that values were taken out of; numbers are positions in lists."""
    root: dict[str | int, Any] = {}
    containers = {id(root)}
    for place, value in values:
        container = root
        for part in place[:-1]:
            if part not in container:
                container[part] = {}
                containers.add(id(container[part]))
            container = container[part]
            if id(container) not in containers:
                raise _refuse(path, "a value or a container at each place", ".".join(map(str, place)))
        if place[-1] in container:
            raise _refuse(path, "one value at each place", ".".join(map(str, place)))
        container[place[-1]] = value
    return _with_lists(root, containers, path)


def _with_lists(node: Tree, containers: Collection[int], path: Path) -> Tree:
    if id(node) not in containers:
        return node
    built = {key: _with_lists(child, containers, path) for key, child in node.items()}
    if not any(isinstance(key, int) for key in built):
        return built
    if {*built} != {*range(len(built))}:
        raise _refuse(path, "positions in a list without gaps", str([*built])[:200])
    return [built[index] for index in range(len(built))]


def plan_nested(optimizer: Optimizer) -> Tree:
    """The nested form as a tree; inverse of ``read_tree``."""
    return {
        "state": {name: write_state(state) for name, state in optimizer.states.items()},
        "param_groups": [
            {**{name: write_option(value) for name, value in group.options.items()}, _PARAMETERS: [*group.parameters]}
            for group in optimizer.groups
        ],
    }


def plan_flat(optimizer: Optimizer) -> dict[str, Tree]:
    """The flat form; values under keys without the optimizer's own prefix."""
    flat: dict[str, Tree] = {}
    for name, state in optimizer.states.items():
        _flatten_into(flat, f"state.{name}", write_state(state))
    for group in optimizer.groups:
        for name in group.parameters:
            flat |= {f"param_groups.{name}.{option}": write_option(value) for option, value in group.options.items()}
    return flat


def _flatten_into(flat: dict[str, Tree], prefix: str, state: Mapping[str, Tree]) -> None:
    for key, value in state.items():
        if isinstance(value, dict):
            _flatten_into(flat, f"{prefix}.{key}", value)
        else:
            flat[f"{prefix}.{key}"] = value


def _refuse(path: Path, expected: str, found: str | None = None) -> FormatError:
    return FormatError(
        "not an optimizer's state, as torch writes it", kind="dcp-optimizer", path=path, expected=expected, found=found
    )
