"""A merge, decided: catalogs of the sources and a resolved recipe become the catalog of the new checkpoint.

Pure: reads names, types and shapes. A layer's weights, fp32 masters, optimizer state and update counts come from one
source, always; everything a checkpoint holds once (groups, scheduler, RNG, trainer state) from ``state_from``; the
model's own files from ``base``. Everything that does not fit is reported together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .averages import Share, average, refuse_codes
from .carried_files import choose_files, drop_training_state
from .catalog import Catalog, GroupRef, OptimizerRef, SmallFile, StateRef
from .errors import IncompatibleError, IncompleteError
from .layers import ROOT_STACK, Layer, LayerMap
from .masters import separate_masters
from .optimizer_fit import StateOrigin, check_optimizers
from .recipe import Contribution, Resolution, TargetLayer
from .tensor_refs import TensorRef
from .tensors import TensorMeta

__all__ = [
    "LayerRow",
    "drop_optimizer",
    "merge_catalogs",
    "tabulate_layers",
]

_MAX_FAULTS_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """Where one layer of the new checkpoint comes from."""

    layer: str
    source: str
    """Path as the recipe has it; several are joined with " + "."""
    source_layer: str
    step: int | None
    """At which it was saved."""
    staleness: int | None
    """Steps that ``state_from`` is ahead of it."""
    nbytes: int
    """Weights, masters and optimizer state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _MergedLayer:
    """One layer of the new checkpoint."""

    layer: Layer
    origin: Mapping[str, str]
    """fqn -> its name in the source."""
    weights: Mapping[str, TensorRef]
    masters: Mapping[str, TensorRef]
    master_leaves: Mapping[str, str]
    states: Mapping[str, StateRef]
    buffers: frozenset[str]
    step: int | None
    update_count: int | None


def merge_catalogs(
    resolution: Resolution,
    sources: Mapping[str, Catalog],
    *,
    weights_only: bool,
    tokenizer: Sequence[SmallFile] | None,
) -> Catalog:
    """Decide a merge.

    Args:
        resolution: Which layer comes from where.
        sources: By path as the recipe has it.
        weights_only: Optimizer state need not be there, nor fit.
        tokenizer: Its files; None for those of ``base``.

    Returns:
        The catalog of the new checkpoint, of the format of ``state_from``.

    Raises:
        IncompleteError: A source has no optimizer state, and others have.
        IncompatibleError: Layers do not fit together; lists every fault.
        UnsupportedError: Layers to be averaged hold what has no average.
    """
    # Weights alone are the model's own, without what the optimizer would set them to.
    sources = {
        name: replace(source, masters={}) if weights_only else separate_masters(source)
        for name, source in sources.items()
    }
    base, state_from = sources[resolution.base], sources[resolution.state_from]
    used = sorted({each.source for layer in resolution.layers for each in layer.contributions})
    if not weights_only:
        _require_state({name: sources[name] for name in (resolution.state_from, *used)})
    faults = [fault for layer in resolution.layers for fault in _layer_faults(layer, sources, base, weights_only)]
    if faults:
        raise _refuse(faults, resolution)
    shares = {layer.name: _shares(layer, sources) for layer in resolution.layers}
    refuse_codes(shares)
    merged = [_merge_layer(layer, shares[layer.name]) for layer in resolution.layers]
    if not weights_only:
        check_optimizers(state_from, resolution.state_from, _state_origins(resolution, sources, merged))
    weights = _in_order(base, {fqn: ref for each in merged for fqn, ref in each.weights.items()})
    cut = LayerMap(tuple(each.layer for each in merged), _kept_ties(base, weights))
    return Catalog(
        path=state_from.path,
        format=state_from.format,
        step=state_from.step,
        weights=weights,
        buffers=frozenset(fqn for each in merged for fqn in each.buffers),
        ties=cut.ties,
        masters={fqn: ref for each in merged for fqn, ref in each.masters.items()},
        master_leaves={fqn: leaf for each in merged for fqn, leaf in each.master_leaves.items()},
        states={fqn: state for each in merged for fqn, state in each.states.items()},
        optimizers=_merge_groups(state_from, merged),
        layer_steps={each.layer.name: each.step for each in merged if each.step is not None},
        update_counts={each.layer.name: each.update_count for each in merged if each.update_count is not None},
        published={path: record for name in used for path, record in sources[name].published.items()},
        cut=cut,
        files=choose_files(base, state_from, tokenizer, is_whole=_is_whole(resolution, sources)),
        native=state_from.native,
    )


def drop_optimizer(catalog: Catalog) -> Catalog:
    """The weights alone, with nothing that belongs to a moment of training."""
    return replace(
        catalog,
        masters={},
        master_leaves={},
        states={},
        optimizers=(),
        update_counts={},
        files=drop_training_state(catalog.files),
    )


def _require_state(sources: Mapping[str, Catalog]) -> None:
    without = [name for name, source in sources.items() if not source.has_optimizer]
    if without:
        raise IncompleteError(
            "a source has no optimizer state, so training could not be resumed from the result",
            kind="weights-only",
            path=without[0],
            expected="sources with optimizer state",
            found=f"weights alone in {', '.join(without)}",
            hint="merge the weights alone with --weights-only",
        )


def _refuse(faults: Sequence[str], resolution: Resolution) -> IncompatibleError:
    shown = [*faults[:_MAX_FAULTS_SHOWN]]
    if len(faults) > len(shown):
        shown.append(f"and {len(faults) - len(shown)} more")
    return IncompatibleError(
        f"the layers do not fit together: {len(faults)} {'fault' if len(faults) == 1 else 'faults'}",
        kind="layers-differ",
        path=resolution.base,
        expected="layers of the same names, types and shapes as in base, with the same optimizer state",
        found="\n            ".join(shown),
        hint="take these layers from another source, or bring the sources into one form first with llmtailor export",
    )


def _layer_faults(
    target: TargetLayer, sources: Mapping[str, Catalog], base: Catalog, weights_only: bool
) -> Iterator[str]:
    """What is wrong with the contributions to one layer.

    They are held against the same layer of ``base``; at a position that ``base`` does not have, against a block of it;
    of a layer that ``base`` does not have at all, against the first contribution.
    """
    first = target.contributions[0]
    model, like = base, _find_like(target, first, base)
    if like is None:
        model, like = sources[first.source], sources[first.source].layers[first.layer]
    expected = _names(like, target.name)
    for each in target.contributions:
        source = sources[each.source]
        found = _names(source.layers[each.layer], target.name)
        where = f"{each.source}: {each.layer}"
        for fqn in [*expected, *(name for name in found if name not in expected)]:
            ours = model.weights.get(expected.get(fqn, ""))
            theirs = source.weights.get(found.get(fqn, ""))
            if ours is None or theirs is None or ours.meta != theirs.meta:
                yield f"{where}: {fqn}: expected {_describe(ours)}, found {_describe(theirs)}"
            elif not weights_only:
                faults = _state_faults(model, expected[fqn], source, found[fqn])
                yield from (f"{where}: {fqn}: {fault}" for fault in faults)


def _find_like(target: TargetLayer, first: Contribution, base: Catalog) -> Layer | None:
    known = base.layers.names
    name = next((name for name in (target.name, first.layer) if name in known), None)
    if name is not None:
        return base.layers[name]
    blocks = base.layers.blocks
    return blocks[0] if blocks and target.name.rpartition(".")[0] == blocks[0].stack else None


def _state_faults(base: Catalog, ours: str, source: Catalog, theirs: str) -> Iterator[str]:
    are_updated = ours in base.states and theirs in source.states
    expected_master, found_master = _describe_master(base, ours), _describe_master(source, theirs)
    # What is a leaf of the state is there from the first update on; what lies beside the weights always is.
    if expected_master != found_master and (are_updated or _BESIDE in (expected_master, found_master)):
        yield f"it has {found_master}, and {expected_master} in base"
    if are_updated:
        expected, found = (_leaf_metas(each.states[fqn]) for each, fqn in ((base, ours), (source, theirs)))
        if expected != found:
            leaves = sorted(leaf for leaf in expected.keys() | found.keys() if expected.get(leaf) != found.get(leaf))
            ours, theirs = _metas(expected, leaves), _metas(found, leaves)
            yield f"optimizer state {', '.join(leaves)}: expected {ours}, found {theirs}"


_BESIDE = "an fp32 master beside its weight"


def _describe_master(catalog: Catalog, fqn: str) -> str:
    if fqn not in catalog.masters:
        return "no fp32 master"
    leaf = catalog.master_leaves.get(fqn)
    return _BESIDE if leaf is None else f"the fp32 master {leaf}"


def _leaf_metas(state: StateRef) -> dict[str, TensorMeta]:
    # The type of a count may differ (a Python int, an fp32 scalar); writers bring it into the form of the target.
    return {leaf: ref.meta for leaf, ref in state.tensors.items() if leaf != "step"}


def _metas(metas: Mapping[str, TensorMeta], leaves: Iterable[str]) -> str:
    return ", ".join(str(metas.get(leaf, "nothing")) for leaf in leaves)


def _describe(ref: TensorRef | None) -> str:
    return "no such tensor" if ref is None else str(ref.meta)


def _names(layer: Layer, name: str) -> dict[str, str]:
    """fqn under the name of another layer of the same stack -> fqn now."""
    if name == layer.name or layer.index is None:
        return {fqn: fqn for fqn in layer.fqns}
    stack = [] if layer.stack in (None, ROOT_STACK) else str(layer.stack).split(".")
    number = name.rpartition(".")[2]
    return {_renumber(fqn, stack, str(layer.index), number): fqn for fqn in layer.fqns}


def _renumber(fqn: str, stack: Sequence[str], old: str, new: str) -> str:
    """``model.layers.7.mlp.weight`` -> ``model.layers.9.mlp.weight``; the first place where stack and number stand."""
    parts = fqn.split(".")
    sought = [*stack, old]
    at = next(i for i in range(len(parts)) if parts[i : i + len(sought)] == sought) + len(sought) - 1
    return ".".join([*parts[:at], new, *parts[at + 1 :]])


def _shares(target: TargetLayer, sources: Mapping[str, Catalog]) -> tuple[Share, ...]:
    """What goes into a layer, in the order of its contributions."""
    return tuple(
        Share(
            source=sources[each.source],
            names=_names(sources[each.source].layers[each.layer], target.name),
            weight=each.weight,
        )
        for each in target.contributions
    )


def _merge_layer(target: TargetLayer, shares: Sequence[Share]) -> _MergedLayer:
    """Put one layer together; its parts are known to fit."""
    newest = shares[target.contributions.index(target.optimizer_from)]
    source, origin, name = newest.source, newest.names, target.optimizer_from.layer
    index = int(target.name.rpartition(".")[2]) if source.layers[name].index is not None else None
    tensors = {fqn: average(fqn, shares, newest) for fqn in origin}
    return _MergedLayer(
        layer=replace(source.layers[name], name=target.name, index=index, fqns=tuple(origin)),
        origin=origin,
        weights={fqn: weight for fqn, (weight, _) in tensors.items()},
        masters={fqn: master for fqn, (_, master) in tensors.items() if master is not None},
        master_leaves={fqn: leaf for fqn, theirs in origin.items() if (leaf := source.master_leaves.get(theirs))},
        states={fqn: source.states[theirs] for fqn, theirs in origin.items() if theirs in source.states},
        buffers=frozenset(fqn for fqn, theirs in origin.items() if theirs in source.buffers),
        step=source.step_of(name),
        update_count=source.update_counts.get(name),
    )


def _state_origins(
    resolution: Resolution, sources: Mapping[str, Catalog], merged: Sequence[_MergedLayer]
) -> Iterator[StateOrigin]:
    for target, each in zip(resolution.layers, merged, strict=True):
        name = target.optimizer_from.source
        yield StateOrigin(name=name, source=sources[name], fqns=each.origin)


def _is_whole(resolution: Resolution, sources: Mapping[str, Catalog]) -> bool:
    """Whether the new checkpoint is ``base``, layer by layer."""
    copied = [
        each.layer
        for target in resolution.layers
        for each in target.contributions
        if target.is_copy and (each.source, each.layer) == (resolution.base, target.name)
    ]
    return len(copied) == len(resolution.layers) and {*copied} == {*sources[resolution.base].layers.names}


def _in_order(base: Catalog, weights: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """In the order of ``base``, if it has the same names."""
    return {fqn: weights[fqn] for fqn in (base.weights if base.weights.keys() == weights.keys() else weights)}


def _kept_ties(base: Catalog, weights: Mapping[str, TensorRef]) -> dict[str, str]:
    return {name: first for name, first in base.ties.items() if first in weights}


def _merge_groups(state_from: Catalog, merged: Sequence[_MergedLayer]) -> tuple[OptimizerRef, ...]:
    """The groups of ``state_from``, with the parameters there are now.

    A parameter goes where ``state_from`` has it; a block at a new position goes where the one it came from is.
    """
    origin = {fqn: theirs for each in merged for fqn, theirs in each.origin.items()}
    layer_of = {fqn: each.layer for each in merged for fqn in each.layer.fqns}
    known = {fqn for each in state_from.optimizers for group in each.groups for fqn in group.parameters}
    members: dict[str, list[str]] = defaultdict(list)
    for fqn, theirs in origin.items():
        members[fqn if fqn in known else theirs].append(fqn)
    return tuple(
        replace(optimizer, groups=tuple(_regroup(group, members, layer_of) for group in optimizer.groups))
        for optimizer in state_from.optimizers
    )


def _regroup(group: GroupRef, members: Mapping[str, Sequence[str]], layer_of: Mapping[str, Layer]) -> GroupRef:
    kept = [fqn for theirs in group.parameters for fqn in members.get(theirs, ())]
    if kept != [*group.parameters]:
        kept = _in_model_order(kept, layer_of)
    return replace(group, parameters=tuple(kept))


def _in_model_order(fqns: Sequence[str], layer_of: Mapping[str, Layer]) -> list[str]:
    """What stands before the blocks, the blocks by number, what stands after them."""
    blocks = [i for i, fqn in enumerate(fqns) if layer_of[fqn].index is not None]
    first = blocks[0] if blocks else len(fqns)

    def key(item: tuple[int, str]) -> tuple[int, int, int]:
        position, fqn = item
        index = layer_of[fqn].index
        if index is None:
            return (0 if position < first else 2, 0, position)
        return (1, index, position)

    return [fqn for _, fqn in sorted(enumerate(fqns), key=key)]


def tabulate_layers(resolution: Resolution, catalog: Catalog) -> tuple[LayerRow, ...]:
    """The plan as rows, in the order of the new model."""
    rows = []
    for target in resolution.layers:
        step = catalog.layer_steps.get(target.name)
        refs = [ref for fqn in catalog.layers[target.name].fqns for ref in _refs_of(catalog, fqn)]
        rows.append(
            LayerRow(
                layer=target.name,
                source=" + ".join(dict.fromkeys(each.source for each in target.contributions)),
                source_layer=" + ".join(dict.fromkeys(each.layer for each in target.contributions)),
                step=step,
                staleness=None if step is None or catalog.step is None else catalog.step - step,
                nbytes=sum(ref.meta.nbytes for ref in refs),
            )
        )
    return tuple(rows)


def _refs_of(catalog: Catalog, fqn: str) -> Iterator[TensorRef]:
    yield catalog.weights[fqn]
    if fqn in catalog.masters:
        yield catalog.masters[fqn]
    if fqn in catalog.states:
        yield from catalog.states[fqn].tensors.values()
