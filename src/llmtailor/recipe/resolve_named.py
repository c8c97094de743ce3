"""Our own dialect, resolved: every layer of the target to the one entry that names it, or to the base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from ..errors import IncompatibleError, IncompleteError
from .faults import Faults
from .patterns import LayerNames, find_range, summarize_names
from .records import LayerChoice, NamedRecipe
from .resolution import Resolution, TargetLayer, make_target, method_of
from .sources import MAX_BLOCKS, SourceLayers, block_name, check_fit, find_main_stack, join_layers, newest_source

__all__ = ["resolve_named"]


def resolve_named(recipe: NamedRecipe, sources: Mapping[str, SourceLayers], faults: Faults) -> Resolution:
    """Resolve a recipe of our own dialect; raises what it finds, all at once."""
    stacks = find_main_stack(sources.values())
    stack = stacks[0] if len(stacks) == 1 else None
    check_fit(sources, base=recipe.base, stack=stack, may_change_depth=False, faults=faults)
    names = _target_names(recipe, sources)
    taken = _find_taken(recipe, LayerNames(names), faults)
    takers = _find_takers(recipe.choices, taken)
    _check_taken_once(takers, faults)
    for choice, layers_taken in zip(recipe.choices, taken, strict=True):
        _check_sources_have(choice, layers_taken, sources, faults)
    missing = [name for name in _whole_model(names, stack, sources) if name not in takers]
    if recipe.base is None and missing:
        faults.add(
            "layers-missing",
            "layers have no source",
            error=IncompleteError,
            layer=missing[0] if len(missing) == 1 else None,
            expected="an entry of layers: for each, or base: PATH for the rest",
            found=summarize_names(missing),
        )
    faults.raise_any()
    layers = tuple(_target(name, takers.get(name), recipe.base, sources) for name in names)
    newest = newest_source(sources)
    return Resolution(
        layers=layers,
        base=recipe.base or newest,
        state_from=recipe.state_from or recipe.base or newest,
        method=method_of(layers),
        output=recipe.output,
        stack=stack,
        num_blocks=None if stack is None else sum(1 for name in names if _is_block(name, stack, sources)),
    )


def _target_names(recipe: NamedRecipe, sources: Mapping[str, SourceLayers]) -> tuple[str, ...]:
    if recipe.base is not None:
        return sources[recipe.base].layers.names
    # The fullest first, as its order is the model's.
    ordered = sorted(sources.values(), key=lambda source: -len(source.layers))
    return tuple(layer.name for layer in join_layers([source.layers for source in ordered]))


def _whole_model(names: Sequence[str], stack: str | None, sources: Mapping[str, SourceLayers]) -> tuple[str, ...]:
    """The layers of the sources, and the blocks that none of them has although one says how many there are."""
    if stack is None:
        return tuple(names)
    depths = (source.depth(stack) for source in sources.values())
    depth = next((depth for depth in depths if depth is not None), 0)
    # One that is missing is enough to refuse; a configuration may say any number.
    counted = (block_name(stack, index) for index in range(min(depth, MAX_BLOCKS)))
    return tuple(dict.fromkeys([*names, *counted]))


def _find_taken(recipe: NamedRecipe, names: LayerNames, faults: Faults) -> list[tuple[str, ...]]:
    """For each entry the layers that it names."""
    taken: list[tuple[str, ...]] = []
    there = summarize_names(names.names)
    for choice in recipe.choices:
        own: dict[str, None] = {}
        for pattern in choice.patterns:
            found = names.match(pattern)
            own.update(dict.fromkeys(found))
            if not found:
                _refuse_pattern(pattern, names.names, there, choice, faults)
            else:
                _check_range(pattern, found, choice, faults)
        taken.append(tuple(own))
    return taken


def _find_takers(choices: Sequence[LayerChoice], taken: Sequence[Sequence[str]]) -> dict[str, list[LayerChoice]]:
    """Layer -> the entries that name it."""
    takers: dict[str, list[LayerChoice]] = defaultdict(list)
    for choice, names in zip(choices, taken, strict=True):
        for name in names:
            takers[name].append(choice)
    return takers


def _refuse_pattern(pattern: str, names: Sequence[str], there: str, choice: LayerChoice, faults: Faults) -> None:
    wanted = find_range(pattern)
    faults.add(
        "unknown-layer",
        f"there is no layer {pattern!r}",
        place=choice.place,
        error=IncompatibleError,
        layer=pattern,
        expected=there,
        hint=faults.near(pattern if wanted is None else f"{wanted.prefix}{wanted.first}", names),
    )


def _check_range(pattern: str, found: Sequence[str], choice: LayerChoice, faults: Faults) -> None:
    wanted = find_range(pattern)
    if wanted is not None and len(found) != wanted.last - wanted.first + 1:
        faults.add(
            "unknown-layer",
            f"not all layers of {pattern} are there",
            place=choice.place,
            error=IncompatibleError,
            expected="a range of layers that all exist",
            found=summarize_names(found),
        )


def _check_taken_once(takers: Mapping[str, Sequence[LayerChoice]], faults: Faults) -> None:
    meeting: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, choices in takers.items():
        if len(choices) > 1:
            meeting[tuple(id(choice) for choice in choices)].append(name)
    for names in meeting.values():
        first, *others = takers[names[0]]
        written = " and ".join(repr(", ".join(choice.patterns)) for choice in (first, *others))
        faults.add(
            "layer-twice",
            f"{written} take the same layers",
            place=others[0].place,
            expected="each layer under one entry",
            found=f"{summarize_names(names)} here and at {first.place}",
        )


def _check_sources_have(
    choice: LayerChoice, taken: Sequence[str], sources: Mapping[str, SourceLayers], faults: Faults
) -> None:
    for path in choice.sources:
        absent = [name for name in taken if name not in sources[path].by_name]
        if absent:
            faults.add(
                "layer-not-in-source",
                f"{path} does not have these layers",
                place=choice.place,
                error=IncompleteError,
                layer=absent[0] if len(absent) == 1 else None,
                expected=", ".join(choice.patterns),
                found=f"no {summarize_names(absent)}",
            )


def _target(
    name: str, choices: Sequence[LayerChoice] | None, base: str | None, sources: Mapping[str, SourceLayers]
) -> TargetLayer:
    return make_target(name, tuple(_parts(name, choices, base)), sources)


def _parts(name: str, choices: Sequence[LayerChoice] | None, base: str | None) -> Iterator[tuple[str, str, float]]:
    if choices is None:
        assert base is not None, name
        yield base, name, 1.0
        return
    # As weights are divided by their sum, a single one is 1.
    (choice,) = choices
    total = sum(choice.weights)
    yield from ((path, name, weight / total) for path, weight in zip(choice.sources, choice.weights, strict=True))


def _is_block(name: str, stack: str, sources: Mapping[str, SourceLayers]) -> bool:
    return any(
        (layer := source.by_name.get(name)) is not None
        and layer.index is not None
        and name == block_name(stack, layer.index)
        for source in sources.values()
    )
