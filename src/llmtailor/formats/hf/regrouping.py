"""An optimizer's groups and scheduler as the stock Trainer expects them when it resumes. Pure but for one small file.

The Trainer makes its two groups anew and loads the file's state into them: as many groups, of as many parameters. So
a checkpoint of another tool (one group of everything, one for each layer) is put into the two groups where each of
them then has one set of options; the options themselves stay what they were, as the Trainer takes them from the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...catalog import GroupRef, StateRef
from ...errors import FormatError, IncompatibleError
from ...tensor_refs import InlineTensor
from ...tensors import TensorMeta
from ..torch_files import open_torch_file
from .parameter_order import ParameterOrder

__all__ = ["Regrouping", "fit_groups", "fit_scheduler", "for_torch_adam", "new_scheduler"]

# Options that DeepSpeed's Adams have and torch's has not. Source: DeepSpeed 0.19.8, ops/adam/fused_adam.py,
# ops/adam/cpu_adam.py (param_groups); ``step`` is put into the groups by fused_adam.py (step).
_DEEPSPEED_OPTIONS = frozenset({"bias_correction", "step"})
_ADAM_LEAVES = frozenset({"step", "exp_avg", "exp_avg_sq"})
_SCHEDULER_LISTS = ("base_lrs", "_last_lr", "lr_lambdas")


@dataclass(frozen=True, slots=True, kw_only=True)
class Regrouping:
    """Groups for the Trainer, and where their options come from."""

    groups: tuple[GroupRef, ...]
    sources: tuple[tuple[int, ...], ...]
    """For each group the numbers of the groups before that it is made of; itself where nothing changed."""
    is_changed: bool


def fit_groups(groups: Sequence[GroupRef], order: ParameterOrder, path: Path) -> Regrouping:
    """Put parameters into the Trainer's two groups, in the model's order.

    Args:
        groups: Those of the source; together they say which parameters are trained.
        order: Of the model.
        path: For the error.

    Raises:
        IncompatibleError: Parameters of one of the two groups have different options.
    """
    number_of = {fqn: number for number, group in enumerate(groups) for fqn in group.parameters}
    wished = [tuple(fqn for fqn in part if fqn in number_of) for part in order.groups]
    unknown = set(number_of) - {fqn for part in wished for fqn in part}
    if unknown:
        raise _cannot(path, f"the parameters of {order.origin}", "others, too", fqn=min(unknown))
    if [group.parameters for group in groups] == wished:
        return Regrouping(groups=tuple(groups), sources=((0,), (1,)), is_changed=False)
    made = []
    sources = []
    for names in wished:
        # An empty group needs options, too.
        numbers = sorted({number_of[name] for name in names}) or [0]
        first = groups[numbers[0]].options
        for number in numbers[1:]:
            _compare_options(first, groups[number].options, path, groups[number].parameters[0])
        made.append(GroupRef(parameters=names, options=first))
        sources.append(tuple(numbers))
    return Regrouping(groups=tuple(made), sources=tuple(sources), is_changed=True)


def _compare_options(first: Mapping[str, object], other: Mapping[str, object], path: Path, fqn: str) -> None:
    different = sorted(key for key in {*first, *other} if first.get(key) != other.get(key))
    if different:
        key = different[0]
        raise _cannot(path, f"one {key} for all: {first.get(key)}", other.get(key), fqn=fqn)


def _cannot(path: Path, expected: str, found: object, *, fqn: str) -> IncompatibleError:
    return IncompatibleError(
        "the optimizer's groups cannot be made the Trainer's two (with weight decay, without)",
        kind="optimizer-groups",
        path=path,
        fqn=fqn,
        expected=expected,
        found=str(found)[:300],
        hint="write the weights alone (--weights-only), or another format (--to)",
    )


def for_torch_adam(
    groups: Sequence[GroupRef], states: Mapping[str, StateRef], path: Path
) -> tuple[tuple[GroupRef, ...], dict[str, StateRef]]:
    """What DeepSpeed's own Adams keep, as torch's AdamW keeps it; state of other optimizers stays as it is.

    Their step is a Python int; torch's is a 0-dim F32 tensor. Their options without a counterpart are dropped.

    Raises:
        IncompatibleError: They were told not to correct the bias, which torch always does.

    Source:
        DeepSpeed 0.19.8, ops/adam/fused_adam.py, ops/adam/cpu_adam.py; torch 2.13, optim/adam.py (_init_group).
    """
    for group in groups:
        if group.options.get("bias_correction") in (False, 0):
            raise _cannot(path, "bias_correction: on, as in torch", "off", fqn=group.parameters[0])
    kept = tuple(
        GroupRef(
            parameters=group.parameters,
            options={key: value for key, value in group.options.items() if key not in _DEEPSPEED_OPTIONS},
        )
        for group in groups
    )
    return kept, {fqn: _with_float_step(state) for fqn, state in states.items()}


def _with_float_step(state: StateRef) -> StateRef:
    step = state.tensors.get("step")
    if state.notes != {"step": "int"} or set(state.tensors) != _ADAM_LEAVES or not isinstance(step, InlineTensor):
        return state
    import numpy as np  # only here: few merges need it

    count = np.frombuffer(step.data, dtype="<i8").astype("<f4")
    as_tensor = InlineTensor(meta=TensorMeta(dtype="F32", shape=()), data=count.tobytes())
    return StateRef(tensors={**state.tensors, "step": as_tensor}, notes={})


def fit_scheduler(path: Path, regrouping: Regrouping) -> dict[Any, Any] | None:
    """The tree of a ``scheduler.pt`` for new groups.

    Args:
        path: The source's file.
        regrouping: What became of the groups.

    Returns:
        The new tree; None where the file can stay as it is.

    Raises:
        FormatError: Not the state of a scheduler.
        IncompatibleError: Groups that become one have different learning rates.

    Source:
        torch 2.13, optim/lr_scheduler.py (LambdaLR.state_dict): base_lrs, _last_lr and lr_lambdas have one entry for
        each group.
    """
    if not regrouping.is_changed:
        return None
    tree = open_torch_file(path)
    if not isinstance(tree, dict):
        raise FormatError("not the state of a scheduler", kind="bad-scheduler", path=path, found=type(tree).__name__)
    num_groups = 1 + max(number for numbers in regrouping.sources for number in numbers)
    fitted = dict(tree)
    for key in _SCHEDULER_LISTS:
        values = tree.get(key)
        if not isinstance(values, list) or len(values) < num_groups:
            continue
        for numbers in regrouping.sources:
            if any(not _is_same(values[number], values[numbers[0]]) for number in numbers):
                raise _cannot(path, f"one {key} for all parameters of a group", "several", fqn=key)
        fitted[key] = [values[numbers[0]] for numbers in regrouping.sources]
    return fitted


def _is_same(left: object, right: object) -> bool:
    # Numbers, None and dicts of numbers; never a comparison of nodes, which are the same only if they are one.
    return left is right or (type(left) is type(right) and left == right)


def new_scheduler(step: int, groups: Sequence[GroupRef]) -> dict[str, Any]:
    """The state of a schedule that stands at ``step``, without the rates it started from.

    The Trainer reads no optimizer state where there is no ``scheduler.pt``. What is not said here (``base_lrs``) stays
    what the Trainer's own arguments make it.

    Source:
        transformers 5.23, trainer.py (_load_optimizer_and_scheduler), optimization.py (every schedule is a LambdaLR);
        torch 2.13, optim/lr_scheduler.py (LambdaLR.load_state_dict).
    """
    rates = [group.options.get("lr") for group in groups]
    state: dict[str, Any] = {
        "last_epoch": step,
        "_step_count": step + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "lr_lambdas": [None] * len(groups),
    }
    if all(isinstance(rate, float) for rate in rates):
        state["_last_lr"] = rates
    return state
