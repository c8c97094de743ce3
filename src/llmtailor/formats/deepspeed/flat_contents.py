"""What goes into each flat tensor: masters and optimizer state of its parameters, in one type and at one count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from ...catalog import Catalog, StateRef
from ...errors import IncompatibleError, IncompleteError, UnsupportedError
from ...tensor_refs import TensorRef
from ...tensors import TensorMeta
from ..numbers import inline_number, read_number
from ..torch_files import TorchTensor, Tree, write_state
from .common_steps import STEP, CommonSteps, step_of
from .flat_states import is_kept_whole, is_number
from .native import Flat, Native
from .partitions import FlatLayout, cut_evenly
from .target import Target, bring_to

__all__ = ["FlatContent", "fill_flats"]

_MASTER_DTYPE = "F32"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatContent:
    """A flat tensor's tensors."""

    flat: Flat
    layout: FlatLayout
    dtype: str
    """Of the masters."""
    masters: Mapping[str, TensorRef]
    """By fqn."""
    states: Mapping[str, Mapping[str, TensorRef]]
    """State name -> fqn -> tensor; of one type each."""
    whole: frozenset[str]
    """States that a rank has of whole parameters."""
    numbers: Mapping[str, Tree]
    """State name -> number for all of them."""
    names: tuple[str, ...]
    """All state names in the optimizer's order; empty if it never made a step."""


def fill_flats(catalog: Catalog, target: Target, steps: CommonSteps) -> list[FlatContent]:
    """Decide the content of each flat tensor.

    Raises:
        IncompleteError: Some parameters of a flat tensor have optimizer state, others have not or have less.
        IncompatibleError: Numbers or types of one flat tensor differ, or counts that are to be kept.
        UnsupportedError: State that is neither a number nor of the parameter's shape.
    """
    return [
        _fill(catalog, flat, layout, target, steps) for flat, layout in zip(target.flats, target.layouts, strict=True)
    ]


def _fill(catalog: Catalog, flat: Flat, layout: FlatLayout, target: Target, steps: CommonSteps) -> FlatContent:
    sample = _sample(target.template, flat)
    masters = {
        fqn: bring_to(catalog.masters.get(fqn, catalog.weights[fqn]), sample.dtype, fqn=fqn, path=catalog.path)
        for fqn, _ in flat.parameters
    }
    held = {fqn: catalog.states[fqn] for fqn, _ in flat.parameters if fqn in catalog.states}
    _check_complete(catalog.path, flat, held)
    common = _common_step(held.values(), sample)
    options = target.groups[flat.group].options
    adjusted = {fqn: steps.adjust(fqn, state, common, options) for fqn, state in held.items()}
    numbers: dict[str, Tree] = {}
    states: dict[str, dict[str, TensorRef]] = {}
    for leaf in next(iter(held.values()), StateRef(tensors={})).tensors:
        name = unquote(leaf)
        tensors = {fqn: leaves[leaf] for fqn, leaves in adjusted.items()}
        metas = {fqn: tensor.meta for fqn, tensor in tensors.items()}
        if leaf != STEP and all(meta.shape == masters[fqn].meta.shape for fqn, meta in metas.items()):
            dtype = sample.dtype_of(name) or next(iter(metas.values())).dtype
            states[name] = {fqn: bring_to(each, dtype, fqn=fqn, path=catalog.path) for fqn, each in tensors.items()}
        elif "/" not in leaf and all(meta.shape == () for meta in metas.values()):
            numbers[name] = sample.state[name] if name in sample.state else _number(leaf, held, common, catalog.path)
        else:
            raise _not_flat(leaf, metas, catalog.path)
    if sample.state and STEP not in sample.state:
        numbers.pop(STEP, None)  # it counts in the group alone
    found = {**numbers, **states}
    return FlatContent(
        flat=flat,
        layout=layout,
        dtype=sample.dtype,
        masters=masters,
        states=states,
        whole=sample.whole & states.keys(),
        numbers=numbers,
        names=tuple(sorted(found, key=[*sample.state, *found].index)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """How the template keeps a flat tensor of the same group."""

    dtype: str = _MASTER_DTYPE
    """Of the masters."""
    state: Mapping[str, Tree] = field(default_factory=dict)
    """Of rank 0; empty if there is none."""
    whole: frozenset[str] = frozenset()
    """States that a rank has of whole parameters."""

    def dtype_of(self, name: str) -> str | None:
        """Of a state."""
        found = self.state.get(name)
        return found.ref.meta.dtype if isinstance(found, TorchTensor) else None


def _sample(template: Native | None, flat: Flat) -> _Sample:
    if template is None:
        return _Sample()
    index = next((i for i, each in enumerate(template.flats) if each.group == flat.group), None)
    if index is None:
        return _Sample()
    # The same sub-group, where there is one; its siblings are alike.
    index = next((i for i, each in enumerate(template.flats) if each.parameters == flat.parameters), index)
    zero = [tree["optimizer_state_dict"] for tree in template.optim]
    partitions = zero[0]["fp32_flat_groups" if template.stage == 3 else "single_partition_of_fp32_groups"]
    states = [_state_of(each, template.stage, index) for each in zero]
    return _Sample(
        dtype=partitions[index].ref.meta.dtype,
        state=states[0],
        whole=frozenset(_kept_whole(template, index, states)),
    )


def _state_of(zero: Mapping[str, Tree], stage: int, index: int) -> Mapping[str, Tree]:
    base = zero["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    found = base[index] if isinstance(base, list) else base["state"].get(index, {})
    return dict(found)


def _kept_whole(template: Native, index: int, states: Sequence[Mapping[str, Tree]]) -> Iterator[str]:
    if template.stage == 3:
        return
    flat = template.flats[index]
    layout = cut_evenly(flat.parameters, flat.paddings, template.ranks)
    for name, value in states[0].items():
        if not is_number(value) and is_kept_whole([state[name] for state in states], layout, flat.parameters):
            yield name


def _check_complete(path: Path, flat: Flat, held: Mapping[str, StateRef]) -> None:
    leaves = {leaf for state in held.values() for leaf in state.tensors}
    lacking = {
        fqn: missing
        for fqn, _ in flat.parameters
        if (missing := sorted(leaves - (held[fqn].tensors.keys() if fqn in held else set())))
    }
    if lacking:
        fqn, missing = next(iter(lacking.items()))
        raise IncompleteError(
            f"{len(lacking)} parameters lack optimizer state that others of their group have",
            kind="missing-state",
            path=path,
            fqn=fqn,
            expected=", ".join(sorted(leaves)),
            found=f"no {', '.join(missing)} of {', '.join(list(lacking)[:8])}",
            hint="take these layers from a source that has trained them",
        )


def _common_step(states: Iterable[StateRef], sample: _Sample) -> float | None:
    if STEP in sample.state:
        value = sample.state[STEP]
        return float(read_number(value.ref) if isinstance(value, TorchTensor) else value)
    return max((count for count in map(step_of, states) if count is not None), default=None)


def _number(leaf: str, held: Mapping[str, StateRef], common: float | None, path: Path) -> Tree:
    """A number for all parameters of a flat tensor, in the form it was saved in."""
    numbers = {fqn: read_number(state.tensors[leaf]) for fqn, state in held.items()}
    fqn, number = next(iter(numbers.items()))
    if leaf == STEP and common is not None:
        fqn, number = next((fqn, each) for fqn, each in numbers.items() if each == common)
    elif differing := [other for other, each in numbers.items() if each != number]:
        raise IncompatibleError(
            f"DeepSpeed has one {leaf!r} for all parameters of a group, and they have several",
            kind="common-number",
            path=path,
            fqn=differing[0],
            expected=f"{number}, as {fqn} has",
            found=numbers[differing[0]],
            hint="take layers of one step only, or write another format",
        )
    state = held[fqn]
    notes = {leaf: state.notes[leaf]} if leaf in state.notes else {}
    inline = inline_number(number, state.tensors[leaf].meta.dtype)
    return write_state(StateRef(tensors={leaf: inline}, notes=notes))[unquote(leaf)]


def _not_flat(leaf: str, metas: Mapping[str, TensorMeta], path: Path) -> UnsupportedError:
    fqn, meta = next(iter(metas.items()))
    return UnsupportedError(
        f"DeepSpeed cannot hold the optimizer state {leaf!r}",
        kind="flat-state",
        path=path,
        fqn=fqn,
        expected="a number, or a tensor of the parameter's shape",
        found=str(meta),
        hint="write the format of the source instead",
    )
