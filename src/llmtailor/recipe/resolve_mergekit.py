"""mergekit's dialect, resolved: positions become names, and auxiliary layers get the one source they come from.

A block's place in the target is the sum of the lengths of the slices before it. An auxiliary layer (embedding, norm,
head) comes from where LLMTailor's additions say, weights and optimizer together. Where a recipe has none of them,
embeddings come from the first slice and all else from the last, as in mergekit.

Source: mergekit 0.1, plan.py (normalize_config, plan_slice, _plan), merge_methods/linear.py;
LLMTailor 0db721c, merge.py and plan.py (ranges of length 0, pre_weights, post_weights).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import IncompatibleError, IncompleteError, UnsupportedError
from ..layers import Layer, LayerKind
from .faults import Faults, Place
from .patterns import summarize_names
from .records import MergekitRecipe, Slice, SliceSource, WeightSource
from .resolution import Resolution, TargetLayer, make_target, method_of
from .settings import weight_at
from .sources import MAX_BLOCKS, SourceLayers, block_name, check_fit, find_main_stack, join_layers, newest_source
from .units import find_role, role_of_unit

__all__ = ["resolve_mergekit"]

_OWN_DIALECT = "name the layers instead: base: PATH, layers: {NAME: PATH} (docs/recipes.md)"


def resolve_mergekit(recipe: MergekitRecipe, sources: Mapping[str, SourceLayers], faults: Faults) -> Resolution:
    """Resolve a recipe of mergekit's dialect; raises what it finds, all at once."""
    if recipe.needs_mergekit is not None:
        faults.add(
            "needs-mergekit",
            f"only mergekit itself can do this: {recipe.needs_mergekit}",
            error=UnsupportedError,
            expected="merge_method passthrough or linear; of a tokenizer base or a path",
            hint=(
                "llmtailor merge has mergekit do it, the weights alone (pip install mergekit, if it is not there); "
                "what mergekit will do is not planned beforehand"
            ),
        )
        faults.raise_any()
    stacks = find_main_stack(sources.values())
    if recipe.models:
        stack = stacks[0] if len(stacks) == 1 else None
        check_fit(sources, base=recipe.base_model, stack=stack, may_change_depth=False, faults=faults)
        # What follows from different depths need not be said again, source by source.
        faults.raise_any()
        every = frozenset(stack for source in sources.values() for stack in source.stacks)
        return _Resolving(recipe=recipe, sources=sources, faults=faults, given=every).run_models(stack)
    stack = _only_stack(stacks, faults)
    check_fit(sources, base=recipe.base_model, stack=stack, may_change_depth=True, faults=faults)
    return _Resolving(recipe=recipe, sources=sources, faults=faults, given=frozenset({stack})).run_slices(stack)


def _only_stack(stacks: Sequence[str], faults: Faults) -> str:
    if len(stacks) != 1:
        faults.add(
            "ambiguous-stack",
            "it cannot be told which layers a layer_range means",
            error=IncompatibleError,
            expected="sources with one stack of layers that config.json counts, or that is longer than all others",
            found=" and ".join(stacks) or "no stack of layers",
            hint=_OWN_DIALECT,
        )
        faults.raise_any()
    return stacks[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pick:
    """A wish for one auxiliary layer."""

    model: str
    place: Place


@dataclass(slots=True, kw_only=True)
class _Resolving:
    """The pass over one recipe."""

    recipe: MergekitRecipe
    sources: Mapping[str, SourceLayers]
    faults: Faults
    given: frozenset[str]
    """The stacks whose blocks the recipe gives: of slices the main one, of models all."""
    picks: dict[str, _Pick] = field(default_factory=dict)
    """Auxiliary layer -> where it comes from."""
    missing: list[str] = field(default_factory=list)
    """Auxiliary layers without a source."""

    def run_slices(self, stack: str) -> Resolution:
        """Resolve ranges, which mean blocks of one stack."""
        slices = self.recipe.slices
        with_blocks = [each for each in slices if each.num_blocks]
        without = [each for each in slices if not each.num_blocks]
        num_blocks = sum(each.num_blocks for each in with_blocks)
        self._check_size(with_blocks, num_blocks, stack)
        known = self._known_layers()
        auxiliary = [layer for layer in known if layer.stack != stack]
        self._pick_weights()
        self._pick_optimizers(without, num_blocks, auxiliary, stack)
        blocks = list(self._blocks(with_blocks, stack))
        others = {layer.name: self._auxiliary(layer, with_blocks) for layer in auxiliary}
        self._check_coverage()
        self.faults.raise_any()
        layers = tuple(self._ordered(known, blocks, others))
        return replace(self._resolution(layers, stack, num_blocks), base_depth=self._base_depth(stack))

    def run_models(self, stack: str | None) -> Resolution:
        """Resolve whole models: every layer by its name, whichever stack it is of."""
        sources = tuple(
            SliceSource(model=each.model, start=0, end=0, rules=each.rules, place=each.place)
            for each in self.recipe.models
        )
        models = Slice(sources=sources, normalize=self.recipe.normalize, place=sources[0].place)
        known = self._known_layers()
        depths = {layer.stack: layer.index + 1 for layer in known if layer.stack and layer.index is not None}
        names = dict.fromkeys(layer.name for layer in known if layer.stack is not None)
        if stack is not None:
            # All that the configuration counts have to be there, also where every source is partial.
            depths[stack] = self._base_depth(stack)
            self._check_count(depths[stack])
            self.faults.raise_any()
            names |= dict.fromkeys(block_name(stack, index) for index in range(depths[stack]))
        for source in sources:
            self._check_blocks_exist(source, names)
        self._pick_weights()
        targets = {layer.name: self._whole(layer, models, depths) for layer in known}
        self._check_coverage()
        self.faults.raise_any()
        layers = tuple(target for target in targets.values() if target is not None)
        num_blocks = None if stack is None else sum(layer.stack == stack for layer in known)
        return self._resolution(layers, stack, num_blocks)

    @property
    def _base(self) -> str:
        return self.recipe.base_model or newest_source(self.sources)

    def _resolution(self, layers: tuple[TargetLayer, ...], stack: str | None, num_blocks: int | None) -> Resolution:
        return Resolution(
            layers=layers,
            base=self._base,
            state_from=self._base,
            method=method_of(layers),
            output=self.recipe.output,
            tokenizer_from=self._base if self.recipe.tokenizer == "base" else self.recipe.tokenizer,
            stack=stack,
            num_blocks=num_blocks,
        )

    def _depth(self, model: str, stack: str) -> int:
        """One past the highest block that a source can have."""
        source = self.sources[model]
        return source.depth(stack) or max(source.stacks.get(stack, ()), default=-1) + 1

    def _base_depth(self, stack: str) -> int:
        """Blocks of the base's model; a base that holds few of them, and does not say it, is like the others."""
        told = (self.sources[path].depth(stack) for path in (self._base, *self.sources))
        deepest = max(self._depth(path, stack) for path in self.sources)
        return next((depth for depth in told if depth is not None), deepest)

    def _check_size(self, slices: Sequence[Slice], num_blocks: int, stack: str) -> None:
        """That every range is within its source; raises, as nothing else can be said then."""
        for source in (source for each in slices for source in each.sources):
            if source.end > self._depth(source.model, stack):
                self.faults.add(
                    "layer-range-outside",
                    f"{source.model} does not have so many layers",
                    place=source.place,
                    error=IncompatibleError,
                    expected=f"a range within [0, {self._depth(source.model, stack)}]",
                    found=f"[{source.start}, {source.end}]",
                )
        self._check_count(num_blocks)
        self.faults.raise_any()

    def _check_count(self, num_blocks: int) -> None:
        if not num_blocks or num_blocks > MAX_BLOCKS:
            self.faults.add(
                "slice-coverage",
                "the slices give no layer" if not num_blocks else "the slices give too many layers",
                error=IncompatibleError,
                expected=f"1 to {MAX_BLOCKS:,} layers",
                found=f"{num_blocks:,}",
            )

    def _known_layers(self) -> tuple[Layer, ...]:
        """All layers of all sources in the base's order; of equals the fullest source comes first."""
        rest = sorted(
            (path for path in self.sources if path != self._base), key=lambda path: -len(self.sources[path].layers)
        )
        return join_layers([self.sources[path].layers for path in (self._base, *rest)])

    def _is_tied(self, model: str, auxiliary: Sequence[Layer]) -> bool:
        said = [self.sources[model].tied, *(source.tied for source in self.sources.values())]
        has_head = any(layer.kind is LayerKind.HEAD for layer in auxiliary)
        return next((tied for tied in said if tied is not None), not has_head)

    def _pick_weights(self) -> None:
        for wish in (*self.recipe.pre_weights, *self.recipe.post_weights):
            layer = self._layer_of(wish)
            if layer is not None:
                self._pick(layer, _Pick(model=wish.model, place=wish.place))

    def _layer_of(self, wish: WeightSource) -> str | None:
        source = self.sources[wish.model]
        layer = source.by_fqn.get(wish.name)
        if layer is None:
            tied = source.tied and "lm_head" in wish.name
            self.faults.add(
                "unknown-tensor",
                f"{wish.model} has no tensor {wish.name!r}",
                place=wish.place,
                error=IncompatibleError,
                hint="its head and embedding are tied: name the embedding"
                if tied
                else self.faults.near(wish.name, source.by_fqn),
            )
            return None
        if layer.stack in self.given:
            self.faults.add(
                "not-auxiliary",
                f"{wish.name!r} belongs to the layer {layer.name}",
                place=wish.place,
                expected="a tensor of an embedding, a norm or a head; slices say where other layers come from",
            )
            return None
        return layer.name

    def _pick_optimizers(
        self, slices: Sequence[Slice], num_blocks: int, auxiliary: Sequence[Layer], stack: str
    ) -> None:
        for source in (source for each in slices for source in each.sources):
            depth = self.sources[source.model].depth(stack) or num_blocks
            is_tied = self._is_tied(source.model, auxiliary)
            role = role_of_unit(source.start, depth, is_tied=is_tied)
            layer = None if role is None else find_role(role, auxiliary)
            if role is not None and layer is not None:
                self._pick(layer.name, _Pick(model=source.model, place=source.place))
            else:
                self._refuse_unit(source, depth, is_tied)
            if depth != num_blocks:
                self.faults.add(
                    "slice-coverage",
                    "the slices do not give as many layers as the source has, on which ranges of no layers count",
                    place=source.place,
                    error=IncompleteError,
                    expected=f"{depth} layers",
                    found=f"{num_blocks}",
                    hint="for a model of another depth use pre_weights and post_weights alone",
                )

    def _refuse_unit(self, source: SliceSource, depth: int, is_tied: bool) -> None:
        heads = [f"[{depth + 1}, {depth + 1}] ({'embedding' if is_tied else 'head'})"]
        heads += [] if is_tied else [f"[{depth + 2}, {depth + 2}] (embedding)"]
        self.faults.add(
            "zero-length-range",
            "a range of no layers that stands for no auxiliary layer",
            place=source.place,
            error=IncompatibleError,
            expected=f"[0, 0] (norm), {', '.join(heads)}: {source.model} has {depth} layers and is "
            f"{'tied' if is_tied else 'untied'}",
            found=f"[{source.start}, {source.end}]",
            hint=_OWN_DIALECT,
        )

    def _pick(self, layer: str, pick: _Pick) -> None:
        """Take a layer from a source; its weights and its optimizer state only together."""
        first = self.picks.setdefault(layer, pick)
        if first.model != pick.model:
            self.faults.add(
                "auxiliary-twice",
                f"{layer} is asked from two checkpoints; weights and optimizer state must be of the same one",
                place=pick.place,
                layer=layer,
                expected=f"{first.model}, as at {first.place}",
                found=pick.model,
            )

    def _blocks(self, slices: Sequence[Slice], stack: str) -> Iterator[TargetLayer]:
        position = 0
        for each in slices:
            for source in each.sources:
                self._check_blocks_exist(source, [block_name(stack, i) for i in range(source.start, source.end)])
            for offset in range(each.num_blocks):
                names = [block_name(stack, source.start + offset) for source in each.sources]
                target = self._average(block_name(stack, position), each, names, _share(offset, each.num_blocks))
                if target is not None:
                    yield target
                position += 1

    def _check_blocks_exist(self, source: SliceSource, names: Iterable[str]) -> None:
        absent = [name for name in names if name not in self.sources[source.model].by_name]
        if absent:
            self.faults.add(
                "layer-not-in-source",
                f"{source.model} does not have these layers",
                place=source.place,
                error=IncompleteError,
                layer=absent[0] if len(absent) == 1 else None,
                found=f"no {summarize_names(absent)}",
            )

    def _whole(self, layer: Layer, models: Slice, depths: Mapping[str, int]) -> TargetLayer | None:
        """A layer of whole models; None if it has no source, which is noted."""
        if layer.stack is None or layer.index is None:
            return self._auxiliary(layer, [models])
        at = _share(layer.index, depths[layer.stack])
        return self._average(layer.name, models, [layer.name] * len(models.sources), at)

    def _average(self, name: str, each: Slice, names: Sequence[str], at: float) -> TargetLayer | None:
        """A layer of the target out of one layer of each source; None if a fault was noted."""
        pairs = list(zip(each.sources, names, strict=True))
        if any(layer not in self.sources[source.model].by_name for source, layer in pairs):
            return None
        weights = [self._weight(source, layer, at) for source, layer in pairs]
        factors = [weight for weight in weights if weight is not None]
        if len(factors) < len(weights):
            return None
        total = sum(factors) if each.normalize else 1.0
        if abs(total) < 1e-8 or not any(factors):
            self.faults.add(
                "weights",
                f"the weights of {name} add up to 0",
                place=each.place,
                layer=name,
                expected="weights whose sum they can be divided by",
            )
            return None
        parts = [(source.model, layer, factor / total) for (source, layer), factor in zip(pairs, factors, strict=True)]
        return make_target(name, parts, self.sources)

    def _weight(self, source: SliceSource, name: str, at: float) -> float | None:
        """What a source counts for a layer; None if a fault was noted."""
        layer = self.sources[source.model].by_name[name]
        weights = {weight_at(source.rules, fqn, at) for fqn in layer.fqns}
        if len(weights) > 1:
            self.faults.add(
                "weights-within-layer",
                f"filters give the tensors of {name} different weights",
                place=source.place,
                error=UnsupportedError,
                layer=name,
                expected="one weight for all tensors of a layer",
                hint="pip install mergekit, which merges the weights alone, without optimizer state",
            )
            return None
        (weight,) = weights
        return 1.0 if weight is None else weight

    def _auxiliary(self, layer: Layer, slices: Sequence[Slice]) -> TargetLayer | None:
        """An auxiliary layer of the target; None if it has no source, which is noted."""
        pick = self.picks.get(layer.name)
        if pick is not None:
            return self._copy(layer.name, pick.model, pick.place)
        has_additions = bool(self.picks or self.recipe.pre_weights or self.recipe.post_weights)
        if has_additions or layer.kind is LayerKind.BLOCK:
            # Where a recipe chooses some of them, mergekit's rule for the others would be a guess.
            only = next(iter(self.sources)) if len(self.sources) == 1 else None
            rest = self.recipe.base_model or only
            if rest is not None:
                return self._copy(layer.name, rest, None)
            self.missing.append(layer.name)
            return None
        each, at = (slices[0], 0.0) if layer.kind is LayerKind.EMBEDDING else (slices[-1], 1.0)
        for source in each.sources:
            if layer.name not in self.sources[source.model].by_name:
                self._copy(layer.name, source.model, source.place)
        return self._average(layer.name, each, [layer.name] * len(each.sources), at)

    def _copy(self, name: str, model: str, place: Place | None) -> TargetLayer | None:
        if name in self.sources[model].by_name:
            return make_target(name, [(model, name, 1.0)], self.sources)
        self.faults.add(
            "layer-not-in-source",
            f"{model} does not have the layer {name}",
            place=place,
            error=IncompleteError,
            layer=name,
        )
        return None

    def _check_coverage(self) -> None:
        if self.missing:
            self.faults.add(
                "layers-missing",
                "layers have no source",
                error=IncompleteError,
                layer=self.missing[0] if len(self.missing) == 1 else None,
                expected="an entry of pre_weights or post_weights for each, or base_model: PATH for the rest",
                found=summarize_names(self.missing),
            )

    def _ordered(
        self, known: Sequence[Layer], blocks: Sequence[TargetLayer], others: Mapping[str, TargetLayer | None]
    ) -> Iterator[TargetLayer]:
        """Model order: the target's blocks stand where the sources' do."""
        is_first = True
        for layer in known:
            if layer.stack not in self.given:
                target = others[layer.name]
                assert target is not None, layer.name
                yield target
            elif is_first:
                yield from blocks
                is_first = False


def _share(index: int, depth: int) -> float:
    """How far down its stack a block is, from 0 to 1; as in mergekit a single one is at the end.

    What stands behind the counted blocks, which mergekit does not know, is there, too.
    """
    return min(index / (depth - 1), 1.0) if depth > 1 else 1.0
