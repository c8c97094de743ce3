"""What a checkpoint of any format holds, by name, and where its bytes lie. No bytes, no torch.

    source directory --open--> Catalog      (formats: one opener each)
    recipe + Catalogs --merge--> Catalog    (plan: a merge is a catalog whose tensors lie in several checkpoints)
    Catalog --plan--> CheckpointPlan        (formats: one planner each)

So every source can be written as every target, and exporting is merging one source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from .layers import LayerMap, map_names
from .manifest import FileRecord
from .state_tree import Note
from .tensor_refs import CastTensor, TensorRef
from .tensors import TensorMeta

__all__ = ["Catalog", "GroupRef", "OptimizerRef", "SmallFile", "StateRef", "join_masters", "weights_to_train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateRef:
    """What an optimizer remembers of one parameter; an fp32 master weight is part of it as a format opens it, and not
    in a merge (``masters.separate_masters``)."""

    tensors: Mapping[str, TensorRef]
    """By leaf as in the specification, section 3: ``step``, ``exp_avg``, ``quant/codes``. Python numbers are inline
    0-dim tensors (I64, F64, BOOL) with a note."""
    notes: Mapping[str, Note] = field(default_factory=dict)
    """By leaf; ``{"step": "int"}`` says that step is a Python int."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRef:
    """Parameters of an optimizer that share options."""

    parameters: tuple[str, ...]
    """fqns, in the optimizer's order."""
    options: Mapping[str, object]
    """``lr``, ``betas``, ...: JSON with tags as in the specification, section 4 (``{"tuple": [0.9, 0.95]}``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerRef:
    """One optimizer."""

    name: str | None
    """Class path (``torch.optim.adamw.AdamW``); None where the format does not say."""
    groups: tuple[GroupRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallFile:
    """A file that goes into the new checkpoint as it is: scheduler, RNG, trainer state, config, tokenizer."""

    name: str
    """In the checkpoint, with forward slashes."""
    path: Path
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """A checkpoint, by name. A parameter's weights, master and state always come from the same source."""

    path: Path
    format: str
    """``tailored``, ``hf``, ``deepspeed`` or ``dcp``."""
    step: int | None
    """Optimizer steps done; None where the format does not say (a bare model directory)."""
    weights: Mapping[str, TensorRef]
    """The model's tensors as a model would load them: parameters and persistent buffers under canonical names, in
    the file's or the model's order, tied ones once, by the name that holds the bytes."""
    buffers: frozenset[str] = frozenset()
    """Those of ``weights`` that are known to be buffers."""
    ties: Mapping[str, str] = field(default_factory=dict)
    """Further name -> name in ``weights``."""
    masters: Mapping[str, TensorRef] = field(default_factory=dict)
    """fp32 copies that the optimizer updates, where they are kept beside ``weights``; by fqn."""
    master_leaves: Mapping[str, str] = field(default_factory=dict)
    """Those of ``masters`` that were taken out of the state -> the leaf that they were."""
    states: Mapping[str, StateRef] = field(default_factory=dict)
    """By fqn; a parameter that the optimizer never updated is absent."""
    optimizers: tuple[OptimizerRef, ...] = ()
    """Empty for weights alone."""
    layer_steps: Mapping[str, int] = field(default_factory=dict)
    """Layer -> step at which it was saved, where it differs from ``step`` (a composite)."""
    update_counts: Mapping[str, int | None] = field(default_factory=dict)
    """Layer -> how many updates its parameters got, where the format has it at hand."""
    published: Mapping[Path, FileRecord] = field(default_factory=dict)
    """Files that never change, and what their own checkpoint recorded of them: they may be taken over by a link."""
    cut: LayerMap | None = None
    """The layers, where the checkpoint itself says how it is cut."""
    files: tuple[SmallFile, ...] = ()
    native: object = None
    """What only this format's own planner understands: the rest of DeepSpeed's tree, a manifest."""

    @property
    def has_optimizer(self) -> bool:
        return bool(self.optimizers)

    @cached_property
    def layers(self) -> LayerMap:
        """The weights, cut into layers."""
        if self.cut is not None:
            return self.cut
        cut = map_names({fqn: tensor.meta.shape for fqn, tensor in self.weights.items()})
        return LayerMap(cut.layers, self.ties)

    def step_of(self, layer: str) -> int | None:
        """The step at which a layer was saved."""
        return self.layer_steps.get(layer, self.step)


def join_masters(catalog: Catalog) -> Catalog:
    """The same catalog with the masters that were leaves of the state among it again: as their optimizer keeps them."""
    leaves = catalog.master_leaves
    states = dict(catalog.states)
    for fqn, leaf in leaves.items():
        states[fqn] = replace(states[fqn], tensors={**states[fqn].tensors, leaf: catalog.masters[fqn]})
    masters = {fqn: master for fqn, master in catalog.masters.items() if fqn not in leaves}
    return replace(catalog, masters=masters, master_leaves={}, states=states)


def weights_to_train(
    catalog: Catalog, dtype: str | None, *, keeps_leaves: bool = False
) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    """The weights for a framework that keeps no masters beside them.

    The masters become the weights: they are what the optimizer updates, so training goes on from them.

    Args:
        catalog: Of any format.
        dtype: Element type of floating-point weights, safetensors spelling; None keeps each as it is.
        keeps_leaves: The target has the masters that were leaves of the state there again (``join_masters``).

    Returns:
        The weights in the catalog's order, and sentences about what was changed.
    """
    # A narrow type is asked for by those who want the model as it computes; then its own weights are the right ones.
    masters = catalog.masters if dtype in (None, "F32", "F64") else {}
    if keeps_leaves and dtype is None:
        masters = {fqn: master for fqn, master in masters.items() if fqn not in catalog.master_leaves}
    chosen = {fqn: masters.get(fqn, tensor) for fqn, tensor in catalog.weights.items()}
    widened = sum(chosen[fqn].meta != tensor.meta for fqn, tensor in catalog.weights.items())
    notes = [f"the weights of {widened} parameters are their fp32 masters"] if widened else []
    cast = {fqn: _cast(tensor, dtype) for fqn, tensor in chosen.items()}
    rounded = sum(cast[fqn] is not tensor for fqn, tensor in chosen.items())
    if rounded:
        notes.append(f"{rounded} weights were brought to {dtype}")
    return cast, tuple(notes)


def _cast(tensor: TensorRef, dtype: str | None) -> TensorRef:
    if dtype is None or tensor.meta.dtype == dtype or tensor.meta.dtype not in _CASTABLE:
        return tensor
    return CastTensor(meta=TensorMeta(dtype=dtype, shape=tensor.meta.shape), source=tensor)


_CASTABLE = frozenset({"F64", "F32", "F16", "BF16"})
