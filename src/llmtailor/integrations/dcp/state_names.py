"""What the keys of a state dict stand for: a tensor of the model, a value of its optimizer, or something else.

Whoever uses ``torch.distributed.checkpoint`` (DCP) makes the dict; these shapes are understood, by names alone:

    {"model": {fqn: T}, "optim": {"state": {fqn: {leaf: T}}, "param_groups": [{..., "params": [fqn]}]}}
    the same with flatten_optimizer_state_dict:  {"optim": {"state.<fqn>.<leaf>": T, "param_groups.<fqn>.<option>": v}}
    either of them below another key, as a Stateful gives it:  {"app": {"model": ..., "optim": ...}}
    {fqn: T, "optimizer": {"state.<fqn>.<leaf>": T, ...}, "lr_scheduler": ..., ...}    torchtitan
    {fqn: T}                                                                           a model alone

Everything else is the *rest*. Pure: of paths and names; values are looked at for being tensors alone.

Source: torch 2.13, distributed/checkpoint/state_dict.py (get_state_dict, _flatten_optim_state_dict); torchtitan,
    components/checkpointer/dcp.py (CheckpointManager) and base.py (ModelWrapper), 2026-10.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from ...errors import IncompatibleError, UnsupportedError
from ...layers import canonical_name
from ...optimizer_values import encode_option
from ...state_tree import escape

__all__ = ["Entry", "Group", "Names", "Path", "StateNames", "join_key", "name_entries"]

Path: TypeAlias = tuple[str | int, ...]
"""Keys and indices that lead to a value of a state dict."""

_STATE, _GROUPS, _MEMBERS = "state", "param_groups", "params"
_MODEL = "model"


def join_key(path: Path) -> str:
    """The key that DCP has for a path.

    Source: torch 2.13, distributed/checkpoint/_nested_dict.py (flatten_state_dict).
    """
    return ".".join(map(str, path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Where in a state dict the model and its optimizer are; None: it is found out."""

    model: str | None = None
    """Dotted; empty for the top of the dict."""
    optimizer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A value of a state dict."""

    path: Path
    value: object
    role: Literal["weight", "state", "rest"]
    fqn: str = ""
    """Of the model's tensor; of the parameter that the state is of."""
    leaf: str = ""
    """Of a state: as in an optimizer file."""

    @property
    def key(self) -> str:
        """As DCP has it."""
        return join_key(self.path)


@dataclass(slots=True, kw_only=True)
class Group:
    """Parameters of an optimizer that share options."""

    parameters: list[str]
    options: dict[str, object]
    """JSON, see ``optimizer_values.encode_option``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateNames:
    """A state dict, every value of it named."""

    entries: tuple[Entry, ...]
    """In the order of the dict."""
    groups: tuple[tuple[Group, ...], ...]
    """Of each optimizer."""
    has_optimizer: bool = field(default=False)


def name_entries(values: Mapping[Path, object], names: Names = Names()) -> StateNames:
    """Find out what each value of a state dict stands for.

    Args:
        values: By path.
        names: Where the model and its optimizer are, if that is known.

    Raises:
        IncompatibleError: There is no tensor of a model, or optimizer state of none of its parameters.
        UnsupportedError: An option of an optimizer group that JSON and our tags cannot say.
    """
    optimizers = _find_optimizers(values, names.optimizer)
    model = _find_model(values, names.model, optimizers)
    weights = {path: fqn for path in values if (fqn := _fqn_of(path, values[path], model, optimizers)) is not None}
    if not weights:
        raise IncompatibleError(
            "there is no tensor of a model in the state dict",
            kind="no-model",
            expected='{"model": {fqn: tensor}, "optim": ...} as get_state_dict gives it, or {fqn: tensor}',
            found=", ".join(sorted({str(path[0]) for path in values})[:8]) or "an empty dict",
            hint='say where it is: TailorPlanner(..., model_key="app.net", optimizer_key="app.opt")',
        )
    fqns = frozenset(weights.values())
    entries = tuple(_entry(path, value, weights, optimizers, fqns) for path, value in values.items())
    groups = tuple(_read_groups(values, root, fqns) for root in optimizers)
    return StateNames(entries=entries, groups=groups, has_optimizer=bool(optimizers))


def _find_optimizers(values: Iterable[Path], named: str | None) -> tuple[Path, ...]:
    """Paths below which there are ``state`` and ``param_groups``, nested or as the beginnings of keys."""
    found: dict[Path, None] = {}
    for path in values:
        for index, item in enumerate(path):
            if item == _GROUPS or str(item).startswith(f"{_GROUPS}."):
                found[path[:index]] = None
                break
    if named is None:
        return tuple(found)
    return tuple(root for root in found if join_key(root) == named)


def _find_model(values: Mapping[Path, object], named: str | None, optimizers: Sequence[Path]) -> Path:
    if named is not None:
        roots = {path[:length] for path in values for length in range(len(path))}
        return next((root for root in roots if join_key(root) == named), (named,))
    parents = [root[:-1] for root in optimizers if root] or [()]
    siblings: list[Path] = [(*parent, _MODEL) for parent in parents]
    for root in siblings:
        if any(path[: len(root)] == root and len(path) > len(root) for path in values):
            return root
    return parents[0]


def _fqn_of(path: Path, value: object, model: Path, optimizers: Sequence[Path]) -> str | None:
    """The name of a model's tensor; None if it is none."""
    if not isinstance(value, torch.Tensor) or path[: len(model)] != model or len(path) == len(model):
        return None
    if any(path[: len(root)] == root and _is_of_optimizer(path[len(root) :]) for root in optimizers):
        return None
    is_named = bool(model) and model[-1] == _MODEL
    # At the top of a dict, whatever lies deeper is state of something else.
    if len(path) != len(model) + 1 and not is_named:
        return None
    return canonical_name(join_key(path[len(model) :]))


def _is_of_optimizer(rest: Path) -> bool:
    first = str(rest[0]) if rest else ""
    return first in (_STATE, _GROUPS) or first.startswith((f"{_STATE}.", f"{_GROUPS}."))


def _entry(
    path: Path, value: object, weights: Mapping[Path, str], optimizers: Sequence[Path], fqns: frozenset[str]
) -> Entry:
    if path in weights:
        return Entry(path=path, value=value, role="weight", fqn=weights[path])
    for root in optimizers:
        if path[: len(root)] == root:
            found = _split_state(path, path[len(root) :], fqns)
            if found is not None:
                return Entry(path=path, value=value, role="state", fqn=found[0], leaf=found[1])
    return Entry(path=path, value=value, role="rest")


def _split_state(path: Path, rest: Path, fqns: frozenset[str]) -> tuple[str, str] | None:
    """Parameter and leaf of a value of an optimizer's state; None if it is something else of the optimizer."""
    first = str(rest[0]) if rest else ""
    if first == _STATE and len(rest) > 2:
        fqn, names = canonical_name(str(rest[1])), [str(item) for item in rest[2:]]
        if fqn in fqns:
            return fqn, "/".join(map(escape, names))
    elif first.startswith(f"{_STATE}."):
        found = _split_name(first.removeprefix(f"{_STATE}."), fqns)
        if found is not None:
            return found[0], "/".join(escape(name) for name in (*found[1], *map(str, rest[1:])))
    else:
        return None
    raise IncompatibleError(
        "the state dict has optimizer state of a parameter that it does not have",
        kind="unnamed-state",
        fqn=join_key(path),
        expected="<optimizer>.state.<fqn>.<name>, of a parameter of the model that is in the dict",
        hint="make the dict with torch.distributed.checkpoint.state_dict.get_state_dict, which names parameters; "
        "optimizer.state_dict() numbers them",
    )


def _split_name(text: str, fqns: frozenset[str]) -> tuple[str, list[str]] | None:
    """The longest fqn that a dotted name begins with, and what follows."""
    parts = text.split(".")
    for length in range(len(parts) - 1, 0, -1):
        fqn = canonical_name(".".join(parts[:length]))
        if fqn in fqns:
            return fqn, parts[length:]
    return None


def _read_groups(values: Mapping[Path, object], root: Path, fqns: frozenset[str]) -> tuple[Group, ...]:
    nested: dict[str, dict[str, Any]] = defaultdict(dict)
    of_fqn: dict[str, dict[str, Any]] = defaultdict(dict)
    for path, value in values.items():
        rest = path[len(root) :]
        if path[: len(root)] != root or not rest:
            continue
        if rest[0] == _GROUPS and len(rest) == 3:
            nested[str(rest[1])][str(rest[2])] = value
        elif str(rest[0]).startswith(f"{_GROUPS}."):
            found = _split_name(str(rest[0]).removeprefix(f"{_GROUPS}."), fqns)
            if found is not None:
                of_fqn[found[0]][".".join((*found[1], *map(str, rest[1:])))] = value
    groups = [
        Group(parameters=[canonical_name(str(fqn)) for fqn in options.pop(_MEMBERS, ())], options=_encode(options, key))
        for key, options in nested.items()
    ]
    return (*groups, *_join_groups(of_fqn))


def _join_groups(of_fqn: Mapping[str, Mapping[str, object]]) -> list[Group]:
    """Groups of the parameters that have the same options, each of which stands there for each parameter."""
    joined: dict[str, Group] = {}
    for fqn, options in of_fqn.items():
        encoded = _encode(options, fqn)
        group = joined.setdefault(json.dumps(encoded, sort_keys=True), Group(parameters=[], options=encoded))
        group.parameters.append(fqn)
    return list(joined.values())


def _encode(options: Mapping[str, object], where: str) -> dict[str, object]:
    encoded: dict[str, object] = {}
    for name, value in options.items():
        if name == "param_names":
            continue
        try:
            encoded[name] = encode_option(value)
        except UnsupportedError as err:
            raise UnsupportedError(
                f"cannot save option {name!r} of optimizer group {where}", kind="option-type", found=err.found
            ) from err
    return encoded
