"""Which parameter stands at which position of an optimizer. Pure; nothing is believed that the shapes deny.

``optimizer.pt`` keeps state by position: 0, 1, 2 through the groups. The Trainer fills the groups in the order of
``named_parameters()``, with weight decay first, frozen parameters left out. So the names of a group are a subsequence
of a known list, and the shapes of the state say which. Two readings that both fit are one too many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...catalog import StateRef
from ...errors import IncompatibleError
from .parameter_order import ParameterOrder, is_spared_decay

__all__ = ["name_positions"]

Shape = tuple[int, ...]

# Leaves that have their parameter's shape in every optimizer that has them. Source: torch 2.13, optim/*.py;
# lion-pytorch 0.2 (exp_avg); bitsandbytes 0.50, optim/optimizer.py (state1, state2).
_LIKE_PARAMETER = frozenset({
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "prev", "square_avg", "state1", "state2", "sum",
    "variance", "z",
})  # fmt: skip
# Adafactor's factors of a matrix. Source: torch 2.13, optim/_adafactor.py; transformers 5.23, optimization.py.
_FACTORS: Mapping[str, Callable[[Shape], Shape]] = {
    "col_var": lambda shape: (*shape[:-2], 1, shape[-1]),
    "exp_avg_sq_col": lambda shape: (*shape[:-2], shape[-1]),
    "exp_avg_sq_row": lambda shape: shape[:-1],
    "row_var": lambda shape: (*shape[:-1], 1),
}


@dataclass(frozen=True, slots=True)
class _Reading:
    """Names for every position, or why there are none."""

    names: tuple[tuple[str, ...], ...] | None
    problem: IncompatibleError | None = None


def name_positions(
    groups: Sequence[Sequence[StateRef | None]],
    shapes: Mapping[str, Shape],
    *,
    find_order: Callable[[], ParameterOrder],
    given: Sequence[str] | None,
    path: Path,
) -> tuple[tuple[str, ...], ...]:
    """Name the parameters of each group.

    Args:
        groups: The state at each position of each group; None where the parameter was never updated.
        shapes: The model's tensors by name, each once.
        find_order: Gives the model's order; called only where it is needed.
        given: The user's list: the parameters as the optimizer has them, group after group; or as
            ``named_parameters()`` has them, frozen ones included or not.
        path: Of ``optimizer.pt``, for the error.

    Returns:
        The names of each group, in order.

    Raises:
        IncompatibleError: No assignment fits (kind ``optimizer-order``), or several do (``ambiguous-names``).
    """
    if given is None:
        readings = [_read_in_order(groups, find_order(), shapes, path)]
    else:
        _check_given(given, shapes, path)
        undecayed = frozenset(filter(is_spared_decay, given))
        order = ParameterOrder(names=tuple(given), undecayed=undecayed, origin="the list of names")
        readings = [_read_in_order(groups, order, shapes, path), _read_as_listed(groups, given, shapes, path)]
    fitting = [reading for reading in readings if reading.names is not None]
    if not fitting:
        problem = readings[0].problem
        assert problem is not None
        raise problem
    found = {reading.names for reading in fitting}
    if len(found) > 1:
        raise _ambiguous("the list fits both as the order of the optimizer and as that of the model", path)
    names = fitting[0].names
    assert names is not None
    return names


def _read_in_order(
    groups: Sequence[Sequence[StateRef | None]], order: ParameterOrder, shapes: Mapping[str, Shape], path: Path
) -> _Reading:
    """The Trainer's two groups, or one of everything."""
    if len(groups) == 1:
        candidates: tuple[tuple[str, ...], ...] = (order.names,)
    elif len(groups) == 2:
        candidates = order.groups
    else:
        return _Reading(None, _too_many_groups(groups, path))
    named = []
    for number, (states, names) in enumerate(zip(groups, candidates, strict=True)):
        fits, example = _subsequences(states, names, shapes)
        if len(fits) != 1:
            problem = _ambiguous(example, path) if fits else _misfit(groups, candidates, number, shapes, order, path)
            return _Reading(None, problem)
        named.append(fits[0])
    return _Reading(tuple(named))


def _read_as_listed(
    groups: Sequence[Sequence[StateRef | None]], given: Sequence[str], shapes: Mapping[str, Shape], path: Path
) -> _Reading:
    """Group after group."""
    sizes = [len(states) for states in groups]
    if sum(sizes) != len(given):
        return _Reading(None, _wrong_length(sizes, len(given), path))
    rest = list(given)
    named = []
    for states in groups:
        names, rest = rest[: len(states)], rest[len(states) :]
        if not all(_fits(state, shapes[name]) for state, name in zip(states, names, strict=True)):
            return _Reading(None, _wrong_length(sizes, len(given), path))
        named.append(tuple(names))
    return _Reading(tuple(named))


def _subsequences(
    states: Sequence[StateRef | None], names: Sequence[str], shapes: Mapping[str, Shape]
) -> tuple[list[tuple[str, ...]], str]:
    """Up to two ways to give each state one of the names, in order; and where the two differ."""
    if len(states) > len(names):
        return [], ""
    earliest = _match(states, names, shapes)
    if earliest is None or len(states) == len(names):
        return ([] if earliest is None else [tuple(names[index] for index in earliest)]), ""
    backwards = _match(states[::-1], names[::-1], shapes)
    assert backwards is not None
    latest = [len(names) - 1 - index for index in reversed(backwards)]
    # Greedy from the front and from the back: they agree exactly if there is one way only.
    for first, last in zip(earliest, latest, strict=True):
        if first != last:
            return (
                [tuple(names[index] for index in ways) for ways in (earliest, latest)],
                f"both {names[first]} and {names[last]} fit one position, as some parameters are not in the optimizer",
            )
    return [tuple(names[index] for index in earliest)], ""


def _match(states: Sequence[StateRef | None], names: Sequence[str], shapes: Mapping[str, Shape]) -> list[int] | None:
    found: list[int] = []
    position = 0
    for state in states:
        while position < len(names) and not _fits(state, shapes[names[position]]):
            position += 1
        if position == len(names):
            return None
        found.append(position)
        position += 1
    return found


def _fits(state: StateRef | None, shape: Shape) -> bool:
    """Whether the state can be of a parameter of this shape; of other leaves nothing is known."""
    for leaf, tensor in (state.tensors if state is not None else {}).items():
        if leaf in _LIKE_PARAMETER and tensor.meta.shape != shape:
            return False
        factor = _FACTORS.get(leaf)
        if factor is not None and (len(shape) < 2 or tensor.meta.shape != factor(shape)):
            return False
    return True


def _check_given(given: Sequence[str], shapes: Mapping[str, Shape], path: Path) -> None:
    seen: set[str] = set()
    for name in given:
        if name in seen or name not in shapes:
            raise IncompatibleError(
                "the list of parameter names has a name twice" if name in seen else "the model has no such parameter",
                kind="bad-name-list",
                path=path,
                fqn=name,
                expected=f"names of the {len(shapes)} tensors in the weights files, each once",
                hint="one name per line, as model.named_parameters() says them; tied parameters by their first name",
            )
        seen.add(name)


def _misfit(
    groups: Sequence[Sequence[StateRef | None]],
    candidates: Sequence[Sequence[str]],
    number: int,
    shapes: Mapping[str, Shape],
    order: ParameterOrder,
    path: Path,
) -> IncompatibleError:
    states, names = groups[number], candidates[number]
    fqn = None
    expected = " + ".join(str(len(part)) for part in candidates) + f" parameters, by {order.origin}"
    found = " + ".join(str(len(part)) for part in groups)
    if len(states) == len(names):
        place, fqn = next(
            (i, name)
            for i, (state, name) in enumerate(zip(states, names, strict=True))
            if not _fits(state, shapes[name])
        )
        state = states[place]
        leaves = {} if state is None else state.tensors
        expected = f"state of a parameter of shape {list(shapes[fqn])}, by {order.origin}"
        found = f"position {place} of group {number}: " + ", ".join(f"{leaf} {leaves[leaf].meta}" for leaf in leaves)
    return IncompatibleError(
        "the optimizer's state does not fit the model's parameters",
        kind="optimizer-order",
        path=path,
        fqn=fqn,
        expected=expected,
        found=found[:500],
        hint=_HINT,
    )


def _wrong_length(sizes: Sequence[int], num_given: int, path: Path) -> IncompatibleError:
    return IncompatibleError(
        "the list of parameter names does not fit the optimizer's state",
        kind="optimizer-order",
        path=path,
        expected=f"{' + '.join(map(str, sizes))} names that fit the shapes of the state, group after group",
        found=f"{num_given} names",
        hint=_HINT,
    )


def _too_many_groups(groups: Sequence[Sequence[StateRef | None]], path: Path) -> IncompatibleError:
    return IncompatibleError(
        "the optimizer's groups are not the Trainer's, so that their parameters are not known by name",
        kind="optimizer-order",
        path=path,
        expected="two groups (with weight decay and without), or one",
        found=f"{len(groups)} groups of {', '.join(str(len(states)) for states in groups[:8])} parameters",
        hint=_HINT,
    )


def _ambiguous(found: str, path: Path) -> IncompatibleError:
    return IncompatibleError(
        "the optimizer's state can be given to the model's parameters in more than one way",
        kind="ambiguous-names",
        path=path,
        expected="exactly one parameter for each position",
        found=found,
        hint=_HINT,
    )


_HINT = (
    "list the optimizer's parameters, one name per line, group after group, in a file: --parameter-names FILE; in the "
    "training program: [n for g in optimizer.param_groups for p in g['params'] for n, q in model.named_parameters() "
    "if p is q]"
)
