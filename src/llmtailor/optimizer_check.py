"""Does saved optimizer state fit an optimizer? Asked before any of it is loaded; changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.optim import Optimizer

from .errors import IncompatibleError
from .optimizer_state import ParameterGroup, ParameterNames, named_groups, optimizer_class
from .optimizer_values import check_leaves, decode_option, flatten_state
from .state_tree import Note
from .tensor_bytes import meta_of
from .tensors import TensorMeta

__all__ = ["check_state"]

_NamedGroups: TypeAlias = list[list[tuple[str, torch.Tensor]]]

# State of torch's own optimizers that has the parameter's shape.
# Source: torch 2.13, optim/*.py (_init_group).
_ELEMENTWISE = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta"),
    *("sum", "variance", "ax", "prev", "step_size"),
}
# Options that come into a group after the optimizer was made, so that a fresh one does not have them yet.
# Source: torch 2.13, optim/lr_scheduler.py (LRScheduler, CyclicLR, OneCycleLR), optim/swa_utils.py (SWALR); the
# group-level step of DeepSpeed 0.19.8, ops/adam/fused_adam.py.
_LATE_OPTIONS = frozenset(
    ("initial_lr", "max_lr", "min_lr", "max_momentum", "min_momentum", "base_momentum", "swa_lr", "step")
)
_NO_NOTES: Mapping[str, Mapping[str, Note]] = {}


@dataclass(frozen=True, slots=True)
class _Fault:
    what: str
    fqn: str | None
    expected: object
    """Of the optimizer."""
    found: object
    """In the checkpoint."""

    def __str__(self) -> str:
        where = "" if self.fqn is None else f"{self.fqn}: "
        return f"{where}{self.what} (expected {self.expected}, found {self.found})"


def check_state(
    optimizer: Optimizer,
    names: ParameterNames,
    saved: Mapping[str, Mapping[str, TensorMeta]],
    groups: Sequence[ParameterGroup],
    saved_class: str,
    *,
    notes: Mapping[str, Mapping[str, Note]] = _NO_NOTES,
) -> None:
    """Check that saved state can be loaded into an optimizer, before any of it is.

    Shapes are compared with those of the state the optimizer has; where it has none yet, with the rules of torch's
    own optimizers. Of the shapes that another maker's fresh optimizer will want nothing is known (GaLore's
    ``exp_avg`` is of low rank), so none is refused.

    Args:
        optimizer: The one to load into; not changed.
        names: At least its parameters.
        saved: fqn -> leaf -> meta; every parameter of ``groups``, without a leaf if it had no state.
        groups: As saved.
        saved_class: As ``optimizer_class`` gave it.
        notes: fqn -> leaf -> note; none where absent.

    Raises:
        IncompatibleError: Something does not fit; tells everything that does not, but of another class only that.
        FormatError: A note or an option is not one of ours.
    """
    for fqn in {**saved, **notes}:
        check_leaves(saved.get(fqn, {}), notes.get(fqn, {}), fqn)
    for group in groups:
        decode_option(list(group.options.values()))
    if optimizer_class(optimizer) != saved_class:
        # Its options and states differ as well, which would only hide the cause.
        raise _mismatch([_Fault("its class is another", None, optimizer_class(optimizer), saved_class)])
    live = named_groups(optimizer, names)
    faults = [
        *_parameter_faults(live, saved, groups),
        *_option_faults(optimizer, live, groups),
    ]
    for fqn, parameter in (pair for group in live for pair in group):
        faults += _state_faults(optimizer, parameter, fqn, saved.get(fqn, {}), notes.get(fqn, {}))
    if faults:
        raise _mismatch(faults)


def _mismatch(faults: Sequence[_Fault]) -> IncompatibleError:
    if len(faults) > 1:
        return IncompatibleError(
            f"the checkpoint does not fit the optimizer, in {len(faults)} ways",
            kind="optimizer-mismatch",
            found="".join(f"\n    {fault}" for fault in faults),
            hint=_HINT,
        )
    (fault,) = faults
    return IncompatibleError(
        f"the checkpoint does not fit the optimizer: {fault.what}",
        kind="optimizer-mismatch",
        fqn=fault.fqn,
        expected=fault.expected,
        found=fault.found,
        hint=_HINT,
    )


_HINT = "make the optimizer as the saved run made it; grouping and order of the parameters are free"


def _parameter_faults(
    live: _NamedGroups, saved: Mapping[str, Mapping[str, TensorMeta]], groups: Sequence[ParameterGroup]
) -> Iterator[_Fault]:
    present = [fqn for group in live for fqn, _ in group]
    grouped = Counter(fqn for group in groups for fqn in group.parameters)
    surplus = {*saved, *grouped} - set(present)
    for fqn in {**saved, **grouped}:
        if fqn in surplus:
            yield _Fault("the optimizer does not have this parameter", fqn, "no state", "saved state")
        elif grouped[fqn] != 1:
            yield _Fault("the parameter must be in one saved group", fqn, "1 group", f"{grouped[fqn]} groups")
        elif fqn not in saved:
            yield _Fault("the state of the parameter is missing", fqn, "saved state, be it empty", "nothing")
    for fqn in present:
        if fqn not in saved and fqn not in grouped:
            yield _Fault("the checkpoint does not know this parameter", fqn, "saved state", "nothing")


def _state_faults(
    optimizer: Optimizer,
    parameter: torch.Tensor,
    fqn: str,
    metas: Mapping[str, TensorMeta],
    notes: Mapping[str, Note],
) -> Iterator[_Fault]:
    if not metas and not notes:
        return  # the state will be removed, whatever it is
    tensors, live_notes = flatten_state(optimizer.state.get(parameter, {}), fqn)
    if not tensors:
        shapes = {leaf: _torch_shape(optimizer, leaf, tuple(parameter.shape)) for leaf in metas}
        expected = {leaf: shape for leaf, shape in shapes.items() if shape is not None}
    else:
        expected = {leaf: meta_of(tensor).shape for leaf, tensor in tensors.items() if not _in_list(leaf, live_notes)}
        for leaf in metas:
            if leaf not in expected and leaf not in live_notes and not _in_list(leaf, notes):
                yield _Fault(f"state {leaf!r} is not known", fqn, ", ".join(expected), str(metas[leaf]))
    for leaf, shape in expected.items():
        if leaf in metas and metas[leaf].shape != shape:
            yield _Fault(f"state {leaf!r} has another shape", fqn, list(shape), list(metas[leaf].shape))
        elif leaf not in metas and leaf not in notes:
            yield _Fault(f"state {leaf!r} was not saved", fqn, list(shape), "nothing")


def _in_list(leaf: str, notes: Mapping[str, Note]) -> bool:
    """True below a list, whose length is a matter of history (LBFGS)."""
    parts = leaf.split("/")
    above = (notes.get("/".join(parts[:depth])) for depth in range(1, len(parts)))
    return any(isinstance(note, dict) and "list" in note for note in above)


def _torch_shape(optimizer: Optimizer, leaf: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape that a leaf must have for a parameter of some shape; None if there is no rule.

    Source:
        torch 2.13, optim/_adafactor.py for ``row_var`` and ``col_var``.
    """
    if not _is_of_torch(optimizer):
        return None
    if leaf in _ELEMENTWISE:
        return shape
    if leaf in ("row_var", "col_var") and len(shape) > 1:
        return (*shape[:-1], 1) if leaf == "row_var" else (*shape[:-2], 1, shape[-1])
    return None


def _is_of_torch(optimizer: Optimizer) -> bool:
    # Adafactor and Muon say "torch.optim", the others name their file.
    return type(optimizer).__module__.split(".")[:2] == ["torch", "optim"]


def _option_faults(optimizer: Optimizer, live: _NamedGroups, groups: Sequence[ParameterGroup]) -> Iterator[_Fault]:
    group_of = {fqn: index for index, group in enumerate(groups) for fqn in group.parameters}
    # Another maker's may add options in its first step, as Prodigy does.
    may_be_late = not _is_of_torch(optimizer) and not optimizer.state
    for number, (group, members) in enumerate(zip(optimizer.param_groups, live, strict=True)):
        # Saved group -> its first parameter here, for the message.
        sources: dict[int, str] = {}
        for fqn, _ in members:
            if fqn in group_of:
                sources.setdefault(group_of[fqn], fqn)
        for index, fqn in sources.items():
            first_index, first_fqn = next(iter(sources.items()))
            together = f"group {number} puts it together with {first_fqn}"
            yield from _disagreements(together, fqn, groups[first_index].options, groups[index].options)
            for name, value in groups[index].options.items():
                if name not in group and name not in _LATE_OPTIONS and not may_be_late:
                    yield _Fault(f"group {number} does not know the option {name!r}", fqn, "no such option", value)


def _disagreements(
    together: str, fqn: str, first: Mapping[str, object], other: Mapping[str, object]
) -> Iterator[_Fault]:
    for name in {**first, **other}:
        expected, found = first.get(name, "nothing"), other.get(name, "nothing")
        if expected != found:
            yield _Fault(f"{together}, saved with another {name!r}", fqn, expected, found)
