"""Masters that a checkpoint keeps among the optimizer state: here they stand beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...catalog import Catalog, StateRef
from ...codecs import Component, component_of
from ...state_keys import state_key
from ...tensor_refs import TensorRef
from ...tensors import TensorMeta

__all__ = ["separate_masters"]

_HALVES = frozenset({"BF16", "F16"})


def separate_masters(catalog: Catalog) -> Catalog:
    """The same catalog with the masters taken out of the state: F32, one, of a 16-bit weight and of its shape.

    The rule is that of our own checkpoints (the specification, section 7).
    """
    masters: dict[str, TensorRef] = {}
    states: dict[str, StateRef] = {}
    for fqn, state in catalog.states.items():
        weight = catalog.weights.get(fqn)
        leaf = None if weight is None or fqn in catalog.masters else _find_master(fqn, state.tensors, weight.meta)
        if leaf is None:
            states[fqn] = state
            continue
        masters[fqn] = state.tensors[leaf]
        states[fqn] = replace(state, tensors={name: ref for name, ref in state.tensors.items() if name != leaf})
    return replace(catalog, masters={**catalog.masters, **masters}, states=states) if masters else catalog


def _find_master(fqn: str, tensors: Mapping[str, TensorRef], weight: TensorMeta) -> str | None:
    leaves = [leaf for leaf in tensors if component_of(state_key(fqn, leaf)) is Component.MASTER]
    expected = TensorMeta(dtype="F32", shape=weight.shape)
    if len(leaves) != 1 or weight.dtype not in _HALVES or tensors[leaves[0]].meta != expected:
        return None
    return leaves[0]
