"""What a resolution has to know of a checkpoint: its layers, how deep the model is, whether its head is tied.

A source may be partial (a selective save of some layers), so the absence of a layer says nothing by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import IncompatibleError
from ..layers import ROOT_STACK, Layer, LayerKind, LayerMap
from .faults import Faults
from .patterns import summarize_names

__all__ = ["MAX_BLOCKS", "SourceLayers", "block_name", "check_fit", "find_main_stack", "join_layers", "newest_source"]

MAX_BLOCKS = 10_000
"""Most blocks of a stack that are looked at one by one; no model has so many."""


@dataclass(frozen=True, kw_only=True)
class SourceLayers:
    """A checkpoint as a recipe sees it."""

    layers: LayerMap
    num_blocks: int | None = None
    """Of the model's main stack, as its configuration says; None if there is none to ask."""
    is_tied: bool | None = None
    """Head and embedding share their weights, as the configuration says; None if there is none to ask."""
    step: int | None = None
    layer_steps: Mapping[str, int] = field(default_factory=dict)
    """Layer -> step at which it was saved, where it is another one."""

    @cached_property
    def by_name(self) -> Mapping[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def by_fqn(self) -> Mapping[str, Layer]:
        """Tensor -> its layer, under all names of a tied one."""
        layers = {fqn: layer for layer in self.layers for fqn in layer.fqns}
        return layers | {name: layers[first] for name, first in self.layers.ties.items() if first in layers}

    @cached_property
    def stacks(self) -> Mapping[str, frozenset[int]]:
        """Stack -> the numbers of its blocks."""
        stacks: dict[str, set[int]] = defaultdict(set)
        for layer in self.layers:
            if layer.stack is not None and layer.index is not None:
                stacks[layer.stack].add(layer.index)
        return {stack: frozenset(numbers) for stack, numbers in stacks.items()}

    @cached_property
    def tied(self) -> bool | None:
        """As the configuration says, else as the layers do; None if neither tells."""
        if self.is_tied is not None:
            return self.is_tied
        kinds = {layer.kind for layer in self.layers}
        if LayerKind.HEAD in kinds:
            return False
        if self.layers.ties:
            return True
        is_whole = any(self.depth(stack) == len(numbers) for stack, numbers in self.stacks.items())
        return True if is_whole and LayerKind.EMBEDDING in kinds else None

    def depth(self, stack: str) -> int | None:
        """Number of blocks that the model has in its main stack, if that can be told.

        Without a configuration a source that has an embedding and no gap from block 0 on is taken to be whole.
        """
        if self.num_blocks is not None:
            return self.num_blocks
        numbers = self.stacks.get(stack, frozenset())
        has_embedding = any(layer.kind is LayerKind.EMBEDDING for layer in self.layers)
        return len(numbers) if numbers and has_embedding and max(numbers) + 1 == len(numbers) else None

    def step_of(self, layer: str) -> int:
        """The step at which a layer was saved; -1 if nobody knows."""
        step = self.layer_steps.get(layer, self.step)
        return -1 if step is None else step


def block_name(stack: str, index: int) -> str:
    """Name of a block, as ``map_names`` gives it."""
    return str(index) if stack == ROOT_STACK else f"{stack}.{index}"


def find_main_stack(sources: Iterable[SourceLayers]) -> tuple[str, ...]:
    """The stack whose blocks the configurations count; else the one with most blocks, if it may be that.

    Returns:
        Several where it cannot be told which, none where there is no block.

    Source:
        transformers 5.23, models/glm4_moe (num_nextn_predict_layers: 1; hub models number that block after the others).
    """
    sources = tuple(sources)
    blocks = _join_stacks(sources)
    for num_uncounted in (0, 1):
        counted = _find_counted(sources, num_uncounted)
        if counted:
            return tuple(stack for stack in blocks if stack in counted)
    most = max(map(len, blocks.values()), default=0)
    if most > max((source.num_blocks for source in sources if source.num_blocks is not None), default=most):
        # A long vision tower beside a part of what is counted, say.
        return tuple(blocks)
    return tuple(stack for stack, numbers in blocks.items() if len(numbers) == most)


def _find_counted(sources: Sequence[SourceLayers], num_uncounted: int) -> set[str]:
    """The stacks that have as many blocks as each configuration says, and some that none counts."""
    found = []
    for count in {source.num_blocks for source in sources if source.num_blocks is not None}:
        # Partial sources of one model hold its blocks together.
        alike = _join_stacks(source for source in sources if source.num_blocks == count)
        found.append({stack for stack, numbers in alike.items() if len(numbers) == count + num_uncounted})
    return set.intersection(*found) if found else set()


def _join_stacks(sources: Iterable[SourceLayers]) -> dict[str, set[int]]:
    """Stack -> the numbers of its blocks in any of the sources."""
    blocks: dict[str, set[int]] = defaultdict(set)
    for source in sources:
        for stack, numbers in source.stacks.items():
            blocks[stack] |= numbers
    return blocks


def newest_source(sources: Mapping[str, SourceLayers]) -> str:
    """The source of the highest step; of equal ones, or where nobody knows, the first."""
    return max(sources, key=lambda path: -1 if (step := sources[path].step) is None else step)


def join_layers(maps: Sequence[LayerMap]) -> tuple[Layer, ...]:
    """All layers of some checkpoints in model order: as in the first, then what others have besides."""
    found: dict[str, Layer] = {}
    for each in maps:
        for layer in each:
            found.setdefault(layer.name, layer)
    place: dict[str, int] = {}
    for layer in found.values():
        place.setdefault(layer.stack or f"layer {layer.name}", len(place))

    def order(layer: Layer) -> tuple[int, int]:
        return place[layer.stack or f"layer {layer.name}"], -1 if layer.index is None else layer.index

    return tuple(sorted(found.values(), key=order))


def check_fit(
    sources: Mapping[str, SourceLayers], *, base: str | None, stack: str | None, may_change_depth: bool, faults: Faults
) -> None:
    """Note where sources are not of one model.

    Args:
        sources: Those of the recipe.
        base: The one that has all layers of the target, if there is one.
        stack: The main one.
        may_change_depth: Sources may have different numbers of blocks in it.
        faults: Where to note it.
    """
    depths = {} if stack is None else _group({path: source.depth(stack) for path, source in sources.items()})
    ties = _group({path: source.tied for path, source in sources.items()})
    if len(ties) > 1:
        faults.add(
            "tied-untied",
            "head and embedding are tied in some sources and not in others",
            error=IncompatibleError,
            expected="all tied, or all untied",
            found="; ".join(f"{'tied' if key else 'untied'}: {_list(paths)}" for key, paths in ties.items()),
        )
    if len(depths) > 1 and not may_change_depth:
        faults.add(
            "number-of-layers",
            "sources have different numbers of layers",
            error=IncompatibleError,
            expected="the same number in all",
            found="; ".join(f"{number} in {_list(paths)}" for number, paths in depths.items()),
            hint="slices: with layer_range makes a model of another depth",
        )
    if base is not None:
        ignored = {stack} if may_change_depth or len(depths) > 1 else set()
        _check_extra_layers(sources, base, ignored, ignore_heads=len(ties) > 1, faults=faults)


def _check_extra_layers(
    sources: Mapping[str, SourceLayers], base: str, ignored: set[str | None], *, ignore_heads: bool, faults: Faults
) -> None:
    for path, source in sources.items():
        extra = [
            layer.name
            for layer in source.layers
            if layer.name not in sources[base].by_name
            and (layer.stack is None or layer.stack not in ignored)
            and not (ignore_heads and layer.kind is LayerKind.HEAD)
        ]
        if extra:
            faults.add(
                "other-layers",
                f"{path} has layers that {base} does not have",
                error=IncompatibleError,
                found=summarize_names(extra),
                expected="checkpoints of one model",
            )


def _group(values: Mapping[str, object]) -> dict[object, list[str]]:
    """Value -> the paths that have it; None is nobody's."""
    groups: dict[object, list[str]] = defaultdict(list)
    for path, value in values.items():
        if value is not None:
            groups[value].append(path)
    return groups


def _list(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
