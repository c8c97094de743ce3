"""Masters that a checkpoint keeps among the optimizer state: a merge has them beside the weights, as DeepSpeed does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from .catalog import Catalog, StateRef
from .codecs import Component, component_of
from .state_keys import state_key
from .tensor_refs import TensorRef
from .tensors import TensorMeta

__all__ = ["separate_masters"]

_Value = TypeVar("_Value")

# An optimizer may keep one of an fp32 weight as well (a norm in a 16-bit model): it is what the weight is set to.
_HAVE_MASTERS = frozenset({"BF16", "F16", "F32"})


def separate_masters(catalog: Catalog) -> Catalog:
    """The same catalog with the masters taken out of the state; looks at a parameter when it is asked for.

    A master is known by the specification, section 7: F32, the only one of its parameter, of its weight's shape.

    Args:
        catalog: As a format opens it.

    Returns:
        The catalog; its ``master_leaves`` say where they were. One that has masters beside the weights stays as it is.
    """
    if catalog.masters:
        return catalog
    states = catalog.states

    def leaf_of(fqn: str) -> str | None:
        state, weight = states.get(fqn), catalog.weights.get(fqn)
        return None if state is None or weight is None else _find_master(fqn, state.tensors, weight.meta)

    def master_of(fqn: str) -> TensorRef | None:
        leaf = leaves.get(fqn)
        return None if leaf is None else states[fqn].tensors[leaf]

    def rest_of(fqn: str) -> StateRef | None:
        state, leaf = states.get(fqn), leaves.get(fqn)
        if state is None or leaf is None:
            return state
        return replace(state, tensors={name: ref for name, ref in state.tensors.items() if name != leaf})

    leaves = _Picked(states, leaf_of)
    return replace(catalog, masters=_Picked(states, master_of), states=_Picked(states, rest_of), master_leaves=leaves)


def _find_master(fqn: str, tensors: Mapping[str, TensorRef], weight: TensorMeta) -> str | None:
    leaves = [leaf for leaf in tensors if component_of(state_key(fqn, leaf)) is Component.MASTER]
    expected = TensorMeta(dtype="F32", shape=weight.shape)
    if len(leaves) != 1 or weight.dtype not in _HAVE_MASTERS or tensors[leaves[0]].meta != expected:
        return None
    return leaves[0]


class _Picked(Mapping[str, _Value]):
    """Something of parameters, found out when it is asked for: the layers' files are opened as late.

    Args:
        fqns: All that may have it, in order.
        pick: Gives it; None where there is none.
    """

    def __init__(self, fqns: Mapping[str, object], pick: Callable[[str], _Value | None]) -> None:
        self._fqns = fqns
        self._pick = pick
        self._picked: dict[str, _Value | None] = {}

    def __getitem__(self, fqn: str) -> _Value:
        if fqn not in self._picked:
            self._picked[fqn] = self._pick(fqn)
        value = self._picked[fqn]
        if value is None:
            raise KeyError(fqn)
        return value

    def __iter__(self) -> Iterator[str]:
        return (fqn for fqn in self._fqns if fqn in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
