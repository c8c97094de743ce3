"""State of any torch optimizer, by parameter name instead of position.

torch keys what an optimizer remembers by the position of a parameter in the groups, so that it is lost when groups
are built otherwise. Here everything is keyed by fully qualified name (fqn), in both directions:

    saving    read_state, read_groups
    loading   check_state            everything is checked, nothing is changed (in optimizer_check)
              load_groups            then the options, which decide where ``step`` belongs
              load_parameter_state   then each parameter; layers may come one by one, in any order
              new_state_tensor       its memory, for who would rather fill it than have it copied

Each function takes one optimizer (``unwrap_optimizer`` first). A run with two of them, Muon and AdamW, keeps two sets
of groups, and gives ``check_state`` for each the saved state of the parameters in its own groups.

What is not kept: attributes of the optimizer object itself, which torch's ``state_dict`` does not keep either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from .errors import IncompatibleError, UnsupportedError
from .local_parts import describe_cut, is_dtensor, local_part, make_like, memory_of
from .optimizer_values import decode_option, encode_option, flatten_state, restore_state
from .state_tree import Note
from .tensor_bytes import why_not_stored

__all__ = [
    "ParameterGroup",
    "ParameterNames",
    "ParameterState",
    "load_groups",
    "load_parameter_state",
    "named_groups",
    "new_state_tensor",
    "optimizer_class",
    "parameter_names",
    "read_groups",
    "read_state",
    "shared_parameter",
    "unwrap_optimizer",
    "update_count",
]

ParameterNames: TypeAlias = Mapping[torch.Tensor, str]
"""Parameter -> fqn. Tensors hash by identity, and so are looked up by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterState:
    """What an optimizer remembers of one parameter."""

    tensors: Mapping[str, torch.Tensor]
    """By leaf (``exp_avg``, ``quant/codes``); views of the optimizer's own, on their devices; may be a ``DTensor``."""
    notes: Mapping[str, Note]
    """By leaf, JSON: what tensors cannot say, see ``optimizer_values``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters of an optimizer that share options."""

    parameters: tuple[str, ...]
    """fqns, in the optimizer's order."""
    options: Mapping[str, object]
    """JSON, see ``optimizer_values.encode_option``."""


def parameter_names(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[torch.Tensor, str]:
    """Name every parameter once; of a tied one the first name counts.

    Args:
        named_parameters: As ``model.named_parameters()`` gives them.

    Raises:
        IncompatibleError: Two parameters have one name.
    """
    names: dict[torch.Tensor, str] = {}
    taken: set[str] = set()
    for fqn, parameter in named_parameters:
        if parameter in names:
            continue
        if fqn in taken:
            raise IncompatibleError("two parameters have one name", kind="duplicate-parameter-name", fqn=fqn)
        names[parameter] = fqn
        taken.add(fqn)
    return names


def unwrap_optimizer(optimizer: object) -> Optimizer:
    """The torch optimizer inside wrappers that keep it in ``.optimizer``.

    Raises:
        UnsupportedError: There is none, or a wrapper has state of its own, which would be lost.

    Source:
        accelerate 1.15.0, optimizer.py: AcceleratedOptimizer is an Optimizer whose ``state`` is its inner one's.
    """
    inner = getattr(optimizer, "optimizer", None)
    if inner is None or inner is optimizer:
        if not isinstance(optimizer, Optimizer):
            raise _unsupported_optimizer("not a torch optimizer", optimizer)
        _refuse_hidden_state(optimizer)
        return optimizer
    found = unwrap_optimizer(inner)
    if getattr(optimizer, "state", found.state) is not found.state:
        raise _unsupported_optimizer("a wrapper with state of its own", optimizer)
    return found


def _refuse_hidden_state(optimizer: Optimizer) -> None:
    """Refuse one that leaves the work to others, whose state nobody would see.

    Source: torch 2.13, distributed/optim/zero_redundancy_optimizer.py (``optim``, whose state is a rank's share).
    """
    for value in vars(optimizer).values():
        for other in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(other, Optimizer) and other is not optimizer and other.state is not optimizer.state:
                raise _unsupported_optimizer(f"a wrapper around {_class_path(other)}, with state of its own", optimizer)


def _unsupported_optimizer(what: str, found: object) -> UnsupportedError:
    return UnsupportedError(
        f"cannot save this optimizer: it is {what}",
        kind="optimizer-type",
        expected="a torch.optim.Optimizer, or one in .optimizer of a wrapper",
        found=_class_path(found),
    )


def shared_parameter(fqn: str) -> UnsupportedError:
    """The error for a parameter that two optimizers update: their states would have one name."""
    return UnsupportedError(
        "a parameter is in two optimizers",
        kind="shared-parameter",
        fqn=fqn,
        expected="optimizers that share no parameters",
        hint="give each optimizer parameters of its own; one that is done can be left out",
    )


def optimizer_class(optimizer: Optimizer) -> str:
    """Class of the optimizer, as it stands in the manifest: ``torch.optim.adamw.AdamW``."""
    return _class_path(unwrap_optimizer(optimizer))


def _class_path(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def read_state(optimizer: Optimizer, names: ParameterNames) -> dict[str, ParameterState]:
    """The state of every parameter the optimizer has.

    State that is left over from parameters which are in no group any more is not read: no step will use it.

    Args:
        optimizer: Not changed.
        names: At least the optimizer's parameters; see ``parameter_names``.

    Returns:
        fqn -> state, in the optimizer's order. Empty for a parameter that has none (frozen, or no gradient yet).

    Raises:
        IncompatibleError: A parameter has no name.
        UnsupportedError: A value that a file cannot hold.
    """
    _refuse_state_of_no_parameter(optimizer)
    # .get: the state is a defaultdict, and reading must not add to it.
    return {
        fqn: _flatten(optimizer.state.get(parameter, {}), fqn)
        for group in named_groups(optimizer, names)
        for fqn, parameter in group
    }


def _refuse_state_of_no_parameter(optimizer: Optimizer) -> None:
    for key in optimizer.state:
        if not isinstance(key, torch.Tensor):
            raise UnsupportedError(
                "cannot save optimizer state that belongs to no parameter",
                kind="optimizer-state-type",
                expected="state of parameters alone",
                found=f"state[{key!r}]",
            )


def _flatten(values: Mapping[str, object], fqn: str) -> ParameterState:
    tensors, notes = flatten_state(values, fqn)
    return ParameterState(tensors=tensors, notes=notes)


def read_groups(optimizer: Optimizer, names: ParameterNames) -> tuple[ParameterGroup, ...]:
    """The optimizer's groups: parameters by name, options as JSON.

    Raises:
        IncompatibleError: A parameter has no name.
        UnsupportedError: An option that JSON and our tags cannot say.
    """
    named = named_groups(optimizer, names)
    return tuple(
        ParameterGroup(
            parameters=tuple(fqn for fqn, _ in named[index]),
            options={name: _encode(value, name, index) for name, value in _options(group)},
        )
        for index, group in enumerate(optimizer.param_groups)
    )


def _encode(value: object, name: str, index: int) -> object:
    try:
        return encode_option(value)
    except UnsupportedError as err:
        raise UnsupportedError(
            f"cannot save option {name!r} of optimizer group {index}", kind="option-type", found=err.found
        ) from err


def _options(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    # torch writes param_names where the user gave names; ours are the model's.
    return ((name, value) for name, value in group.items() if name not in ("params", "param_names"))


def named_groups(optimizer: Optimizer, names: ParameterNames) -> list[list[tuple[str, torch.Tensor]]]:
    """(fqn, parameter) of each parameter of each group.

    One without a name is left out if no step will ever change it: of a model wrapped by PEFT the base has none, and
    ``AdamW(model.parameters())`` is given it all the same.

    Raises:
        IncompatibleError: Another parameter has no name.
    """
    named: list[list[tuple[str, torch.Tensor]]] = []
    for index, group in enumerate(optimizer.param_groups):
        named.append([])
        for parameter in group["params"]:
            if parameter in names:
                named[-1].append((names[parameter], parameter))
            elif parameter.requires_grad or optimizer.state.get(parameter):
                raise IncompatibleError(
                    f"optimizer group {index} has a parameter that the model does not name",
                    kind="unnamed-parameter",
                    expected="parameters of the model",
                    found=f"a parameter of shape {list(parameter.shape)}",
                    hint="build the optimizer from this model's own parameters, after the last change of the model; "
                    "what is taken out of the model, take out of its groups and its state, too",
                )
    return named


def update_count(state: ParameterState) -> int | None:
    """How many updates the parameter got, by its own ``step``; None if the optimizer does not count.

    Waits for the device where ``step`` is there (fused, capturable).
    """
    step = state.tensors.get("step")
    return int(memory_of(step).item()) if step is not None and step.numel() == 1 else None


def load_groups(optimizer: Optimizer, names: ParameterNames, groups: Sequence[ParameterGroup]) -> None:
    """Set each group's options to those its parameters were saved with.

    An option the saved group lacks keeps its value. A tensor (``lr`` of a compiled or captured step) is written in
    place where there is one of the same kind, so that what holds on to it sees the value; unless several groups
    share it, as they do after ``Adam(groups, lr=tensor)``: then each group gets its own.

    Args:
        optimizer: Its groups may be other than the saved ones. Call before ``load_parameter_state``.
        names: At least its parameters.
        groups: As saved; ``check_state`` has passed them.
    """
    saved_of = {fqn: group for group in groups for fqn in group.parameters}
    decoded = []
    for live, group in zip(named_groups(optimizer, names), optimizer.param_groups, strict=True):
        saved = saved_of[live[0][0]].options if live else {}
        decoded.append((group, {name: decode_option(value) for name, value in saved.items()}))
    for group, options in decoded:
        for name, value in options.items():
            target = group.get(name)
            if isinstance(target, torch.Tensor) and isinstance(value, torch.Tensor):
                value = _write_option(optimizer, name, target, value)
            group[name] = value


def _write_option(optimizer: Optimizer, name: str, target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The tensor to keep as the option: ``target`` with the new value, or a new one where that would be wrong."""
    shared = sum(group.get(name) is target for group in optimizer.param_groups) > 1
    if shared or (target.dtype, target.shape) != (value.dtype, value.shape):
        return value.to(target.device)
    with torch.no_grad():
        return target.copy_(value)


def load_parameter_state(
    optimizer: Optimizer,
    parameter: torch.Tensor,
    fqn: str,
    tensors: Mapping[str, torch.Tensor],
    notes: Mapping[str, Note],
    *,
    is_placed: bool = False,
) -> None:
    """Replace what an optimizer remembers of one parameter.

    Exactly: element types are never cast. torch's own ``load_state_dict`` casts floating state to the parameter's
    type, which cuts fp32 moments of bf16 parameters to bf16.

    Args:
        optimizer: ``load_groups`` has set its options, which decide where ``step`` belongs.
        parameter: One of its parameters.
        fqn: Its name.
        tensors: By leaf; any device; copied. No leaf and no note: the parameter has no state. Of a leaf that is cut as
            its parameter is: the whole, or a ``DTensor`` that is cut alike.
        notes: By leaf.
        is_placed: The tensors are of ``new_state_tensor`` and become the optimizer's own, without a copy.

    Raises:
        FormatError: Tensors and notes do not fit together; nothing was changed.
    """

    def place(leaf: str, tensor: torch.Tensor) -> torch.Tensor:
        if is_placed:
            return tensor
        target = new_state_tensor(optimizer, parameter, leaf, tensor.shape, tensor.dtype)
        _fill(target, tensor.detach())
        return target

    state = restore_state(tensors, notes, fqn, place)
    if state:
        optimizer.state[parameter] = state
    else:
        optimizer.state.pop(parameter, None)


def _fill(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a tensor into another of the same shape, or what of it is here; talks to no other rank."""
    part = local_part(target)
    if is_dtensor(source):
        assert describe_cut(source) == describe_cut(target), (describe_cut(source), describe_cut(target))
        memory_of(target).copy_(memory_of(source))
    elif part.shard.is_whole:
        memory_of(target).copy_(source)
    else:
        pairs = zip(part.shard.offsets, part.shard.sizes, strict=True)
        part.tensor.copy_(source[tuple(slice(start, start + size) for start, size in pairs)])


def new_state_tensor(
    optimizer: Optimizer, parameter: torch.Tensor, leaf: str, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Memory for a tensor of a parameter's state, where and as torch would keep it; its values are arbitrary.

    Any thread may call it. What has the shape of a ``DTensor`` parameter is one itself, and cut alike.

    Args:
        optimizer: ``load_groups`` has set its options.
        parameter: One of its parameters.
        leaf: Name in the state.
        shape: Of the whole tensor.
        dtype: Of the tensor.

    Source:
        torch 2.13, optim/optimizer.py (_process_value_according_to_param_policy): all on the parameter's device,
        but ``step`` where it is, unless the group is capturable or fused.
    """
    stays = leaf == "step" and not _steps_on_device(optimizer, parameter)
    device = torch.device("cpu") if stays else parameter.device
    # Laid out as torch makes it (zeros_like), for kernels are fastest and sums the same where strides are the same.
    if tuple(shape) == tuple(parameter.shape) and why_not_stored(parameter) is None:
        local = torch.empty_like(memory_of(parameter), dtype=dtype, device=device, requires_grad=False)
        return local if leaf == "step" else make_like(parameter, local)
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def _steps_on_device(optimizer: Optimizer, parameter: torch.Tensor) -> bool:
    if parameter.device.type == "cpu":
        return False
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    return bool(group.get("capturable") or group.get("fused"))
