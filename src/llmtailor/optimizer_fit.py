"""Whether the optimizer state of merged layers is of the optimizers that the new checkpoint says it has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .catalog import Catalog
from .errors import IncompatibleError

__all__ = ["StateOrigin", "check_optimizers"]

# The same averages in all optimizers that have both, so their state may go from one to another.
_ADAM_LEAVES = frozenset({"exp_avg", "exp_avg_sq"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StateOrigin:
    """Where the optimizer state of a layer comes from."""

    name: str
    """The source, as the recipe has it."""
    source: Catalog
    fqns: Mapping[str, str]
    """fqn in the new checkpoint -> in the source."""


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of an optimizer."""

    optimizer: int
    number: int
    class_name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A parameter that was in one group and comes into another."""

    origin: StateOrigin
    fqn: str
    theirs: str
    """Its name in the source."""
    expected: _Group
    found: _Group
    like: str | None
    """Its name in ``state_from``, if that has state of it."""


def check_optimizers(state_from: Catalog, name: str, origins: Iterable[StateOrigin]) -> None:
    """Raise unless the groups of ``state_from`` go with the state that the layers bring.

    Args:
        state_from: Whose groups and options are taken.
        name: Of it, as the recipe has it.
        origins: Of every layer. One parameter is looked at for each pair of groups, so few files are opened.

    Raises:
        IncompatibleError: State of another optimizer; says the classes, and what they keep.
    """
    for pair in _choose_pairs(state_from, origins):
        brought = _leaves(pair.origin.source, pair.theirs)
        expected = None if pair.like is None else _leaves(state_from, pair.like)
        classes = {pair.expected.class_name, pair.found.class_name} - {None}
        is_same_class = len(classes) < 2 or (expected is not None and brought >= _ADAM_LEAVES)
        if expected in (None, brought) and is_same_class:
            continue
        raise IncompatibleError(
            "the optimizer state of a layer is not of the optimizer that state_from has",
            kind="other-optimizer",
            path=name,
            fqn=pair.fqn,
            expected=f"state of {_describe(pair.expected, expected)}, as in {name}",
            found=f"state of {_describe(pair.found, brought)}, from {pair.origin.name}",
            hint="take state_from from a run with the optimizer of the layers, or merge the weights alone with "
            "--weights-only",
        )


def _choose_pairs(state_from: Catalog, origins: Iterable[StateOrigin]) -> Iterable[_Pair]:
    """For each pair of groups a parameter that shows best whether they fit: one that both have state of."""
    ours = _groups(state_from)
    chosen: dict[tuple[str, _Group, _Group], _Pair] = {}
    theirs_of: dict[str, Mapping[str, _Group]] = {}
    for origin in origins:
        if origin.source is state_from:
            continue
        groups = theirs_of.setdefault(origin.name, _groups(origin.source))
        for fqn, theirs in origin.fqns.items():
            expected, found = ours.get(fqn, ours.get(theirs)), groups.get(theirs)
            if expected is None or found is None:
                continue
            key = origin.name, expected, found
            if (key in chosen and chosen[key].like is not None) or theirs not in origin.source.states:
                continue
            like = next((each for each in (fqn, theirs) if each in state_from.states), None)
            chosen[key] = _Pair(origin=origin, fqn=fqn, theirs=theirs, expected=expected, found=found, like=like)
    return chosen.values()


def _groups(catalog: Catalog) -> Mapping[str, _Group]:
    """fqn -> the group that has it."""
    return {
        fqn: _Group(place, number, optimizer.name)
        for place, optimizer in enumerate(catalog.optimizers)
        for number, group in enumerate(optimizer.groups)
        for fqn in group.parameters
    }


def _leaves(catalog: Catalog, fqn: str) -> frozenset[str]:
    # Some keep the step per group; writers bring it into the form of the target.
    return frozenset(catalog.states[fqn].tensors) - {"step"}


def _describe(group: _Group, leaves: frozenset[str] | None) -> str:
    kept = "" if leaves is None else f" with {', '.join(sorted(leaves)) or 'nothing'}"
    return f"{group.class_name or 'an optimizer'}{kept}"
