"""Which items of a DCP checkpoint are the model's, which the optimizer's, and which neither.

A DCP checkpoint is a nested dict of anything; nothing says what is what. The optimizer is found by its
``param_groups``, the model by holding every parameter that the groups name.

    model.<fqn>, optim.state.<fqn>.<leaf>, optim.param_groups.<i>.<option>        torch's examples, accelerate
    app.model.<fqn>, app.optim.state.<fqn>.<leaf>, ...                            a Stateful around both
    <fqn>, optimizer.state.<fqn>.<leaf>, optimizer.param_groups.<fqn>.<option>    torchtitan (flat)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import FormatError, IncompleteError, UnsupportedError
from .metadata import Item, ItemPath, TensorItem

__all__ = ["Contents", "OptimizerItems", "Root", "find_optimizer", "split_items"]

# Names under which programs keep a model's state dict, in the order in which they are believed.
_MODEL_NAMES = ("model", "state_dict", "model_state_dict", "module")
_OPTIMIZER_NAMES = frozenset({"optim", "optimizer", "optimizers"})
_FLAT = re.compile(r"(?:(?P<before>.+?)\.)?(?P<kind>param_groups|state)\.(?P<rest>.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A dict inside the nested dict that a checkpoint is."""

    directory: str
    """In the checkpoint; empty for the checkpoint itself."""
    path: tuple[str, ...]

    @property
    def prefix(self) -> str:
        """What the keys of its items start with."""
        return "".join(f"{part}." for part in self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerItems:
    """An optimizer's items, by their place under its root: ``state``, fqn, leaf; ``param_groups``, index, option."""

    root: Root
    is_flat: bool
    """Places are joined to one text after ``state`` and ``param_groups``, and options stand under each parameter."""
    by_place: Mapping[ItemPath, Item]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A checkpoint's items, told apart."""

    model: Root
    weights: Mapping[str, TensorItem]
    """By name in the model's state dict."""
    rest: tuple[Item, ...]
    """Scheduler, data loader, counters: whatever is neither the model's nor the optimizer's."""


def find_optimizer(items: Sequence[Item], path: Path) -> OptimizerItems | None:
    """The optimizer's items; None if there is no optimizer.

    Args:
        items: Of the whole checkpoint.
        path: The checkpoint, for errors.

    Raises:
        UnsupportedError: There are several optimizers.
        IncompleteError: There is state, and no groups that say whose.
        FormatError: It is in two forms at once.
    """
    placed = [(item, place) for item in items if (place := _place(item)) is not None]
    grouped = [(item, place) for item, place in placed if place.inner[0] == "param_groups"]
    roots = dict.fromkeys(place.root for _, place in grouped)
    if not roots:
        orphans = [item.key for item, place in placed if place.root.path and place.root.path[-1] in _OPTIMIZER_NAMES]
        if orphans:
            raise IncompleteError(
                "there is optimizer state without parameter groups",
                kind="dcp-groups",
                path=path,
                fqn=orphans[0],
                expected="keys with param_groups",
                found=f"{len(orphans)} items of state",
                hint="save what get_optimizer_state_dict gives, as it is",
            )
        return None
    if len(roots) > 1:
        raise UnsupportedError(
            "checkpoints with several optimizers cannot be read",
            kind="dcp-optimizers",
            path=path,
            expected="one optimizer",
            found=", ".join(root.prefix or "the top" for root in roots),
            hint="save one get_optimizer_state_dict of all of them",
        )
    (root,) = roots
    if len({place.is_flat for _, place in grouped}) > 1:
        raise FormatError("the optimizer is both flat and nested", kind="dcp-groups", path=path, fqn=root.prefix)
    by_place = {place.inner: item for item, place in placed if place.root == root}
    return OptimizerItems(root=root, is_flat=grouped[0][1].is_flat, by_place=by_place)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    root: Root
    inner: ItemPath
    is_flat: bool


def _place(item: Item) -> _Place | None:
    """Where an item would be in an optimizer; None if it cannot be in any."""
    for number, part in enumerate(item.path):
        if not isinstance(part, str):
            return None
        above = tuple(str(each) for each in item.path[:number])
        if part in ("state", "param_groups"):
            root = Root(directory=item.directory, path=above)
            return _Place(root=root, inner=item.path[number:], is_flat=False)
        if number == len(item.path) - 1 and (match := _FLAT.fullmatch(part)):
            root = Root(directory=item.directory, path=(*above, *filter(None, [match["before"]])))
            return _Place(root=root, inner=(match["kind"], match["rest"]), is_flat=True)
    return None


def split_items(
    items: Sequence[Item], optimizer: OptimizerItems | None, parameters: Iterable[str], path: Path
) -> Contents:
    """Tell the model's items from the rest.

    Args:
        items: Of the whole checkpoint.
        optimizer: What is known to be the optimizer's.
        parameters: Names that the optimizer's groups have; empty without an optimizer.
        path: The checkpoint, for errors.

    Raises:
        IncompleteError: There are no weights, or a parameter is not among them.
        UnsupportedError: Several parts of the checkpoint could be the model.
    """
    taken = {id(item) for item in optimizer.by_place.values()} if optimizer else set()
    others = [item for item in items if id(item) not in taken]
    tensors = [item for item in others if isinstance(item, TensorItem)]
    names = [*parameters]
    model = _choose(_roots_with(names, tensors, path) if names else _roots_of(tensors), path)
    weights = {
        item.key[len(model.prefix) :]: item
        for item in tensors
        if item.directory == model.directory and item.key.startswith(model.prefix) and _is_directly_in(model, item)
    }
    held = {id(item) for item in weights.values()}
    return Contents(model=model, weights=weights, rest=tuple(item for item in others if id(item) not in held))


def _is_directly_in(root: Root, item: Item) -> bool:
    # A key without a path is only known by its text.
    return len(item.path) == 1 or item.path[-1] == item.key[len(root.prefix) :]


def _roots_with(names: Sequence[str], tensors: Sequence[TensorItem], path: Path) -> list[Root]:
    """Everything that holds all these names."""
    keys = {(item.directory, item.key) for item in tensors}
    first = names[0]
    roots = []
    for item in tensors:
        if item.key == first or item.key.endswith(f".{first}"):
            before = item.key[: -len(first)]
            if all((item.directory, before + name) in keys for name in names):
                above = item.path[:-1] if item.path[-1] == first else filter(None, [before.removesuffix(".")])
                roots.append(Root(directory=item.directory, path=tuple(map(str, above))))
    if not roots:
        lacking = [name for name in names if not any(key == name or key.endswith(f".{name}") for _, key in keys)]
        raise IncompleteError(
            "parameters of the optimizer are not among the tensors of the checkpoint",
            kind="dcp-weights",
            path=path,
            fqn=(lacking or names)[0],
            expected=f"a state dict with {len(names)} parameters",
            found=f"none that has all; {len(lacking)} are nowhere",
            hint="save model and optimizer together, or give the directory that holds both",
        )
    return roots


def _roots_of(tensors: Sequence[TensorItem]) -> list[Root]:
    """Everything that holds tensors under names."""
    paths = ((item.directory, item.path[:-1]) for item in tensors if isinstance(item.path[-1], str))
    return [Root(directory=directory, path=tuple(map(str, above))) for directory, above in dict.fromkeys(paths)]


def _choose(roots: Sequence[Root], path: Path) -> Root:
    if len(roots) == 1:
        return roots[0]
    for name in _MODEL_NAMES:
        named = [root for root in roots if root.path and root.path[-1] == name]
        if len(named) == 1:
            return named[0]
    top = [root for root in roots if not root.path]
    if len(top) == 1:
        return top[0]
    if not roots:
        raise IncompleteError("the checkpoint holds no tensor", kind="dcp-weights", path=path)
    raise UnsupportedError(
        "it is not clear which part of the checkpoint is the model",
        kind="dcp-model",
        path=path,
        expected=f"one part, or one that is called {' or '.join(_MODEL_NAMES)}",
        found=", ".join(root.prefix for root in roots[:8]),
        hint='save {"model": ..., "optim": ...}',
    )
