"""A merge, decided: catalogs of the sources and a resolved recipe become the catalog of the new checkpoint.

Pure: reads names, types and shapes. A layer's weights, fp32 masters, optimizer state and update counts come from one
source, always; everything a checkpoint holds once (groups, scheduler, RNG, trainer state) from ``state_from``; the
model's own files from ``base``. Everything that does not fit is reported together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .catalog import Catalog, GroupRef, OptimizerRef, SmallFile, StateRef
from .errors import IncompatibleError, IncompleteError
from .layers import ROOT_STACK, Layer, LayerMap
from .recipe import Contribution, Resolution, TargetLayer
from .tensor_refs import AveragedTensor, TensorRef
from .tensors import TensorMeta

__all__ = [
    "PROVENANCE_NAME",
    "LayerRow",
    "drop_optimizer",
    "fit_small_files",
    "is_state_file",
    "is_tokenizer_file",
    "merge_catalogs",
    "tabulate_layers",
]

PROVENANCE_NAME = "llmtailor_merge.json"
"""Says what a checkpoint was merged from, for people; of the last merge only."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_MAX_FAULTS_SHOWN = 20

# What belongs to a moment of training rather than to the model, and so comes from ``state_from``.
# Source: transformers 5.23, trainer.py (names ending in _NAME); accelerate 1.15, utils/constants.py; our run_state.
_STATE_NAMES = frozenset({
    "trainer_state.json", "scheduler.pt", "scaler.pt", "training_args.bin", "optimizer.pt", "run_state.json", "latest",
})  # fmt: skip
_STATE_PREFIXES = ("rng_state", "random_states", "scheduler", "sampler", "dl_state_dict", "data", "custom_checkpoint")
# Source: transformers 5.23, tokenization_utils_base.py and processing_utils.py (names of saved files).
_TOKENIZER_NAMES = frozenset({
    "added_tokens.json", "special_tokens_map.json", "merges.txt", "preprocessor_config.json", "processor_config.json",
    "spiece.model", "sentencepiece.bpe.model", "chat_template.json", "chat_template.jinja",
})  # fmt: skip
_TOKENIZER_PREFIXES = ("tokenizer", "vocab")


def is_state_file(name: str) -> bool:
    """Whether a small file belongs to a moment of training."""
    return name in _STATE_NAMES or name.startswith(_STATE_PREFIXES)


def is_tokenizer_file(name: str) -> bool:
    """Whether a small file belongs to the tokenizer or another processor of inputs."""
    return name in _TOKENIZER_NAMES or name.startswith(_TOKENIZER_PREFIXES)


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
    """
    base, state_from = sources[resolution.base], sources[resolution.state_from]
    used = sorted({each.source for layer in resolution.layers for each in layer.contributions})
    if not weights_only:
        _require_state({name: sources[name] for name in (resolution.state_from, *used)})
    faults = [fault for layer in resolution.layers for fault in _layer_faults(layer, sources, base, weights_only)]
    if faults:
        raise _refuse(faults, resolution)
    merged = [_merge_layer(layer, sources) for layer in resolution.layers]
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
        states={fqn: state for each in merged for fqn, state in each.states.items()},
        optimizers=_merge_groups(state_from, merged),
        layer_steps={each.layer.name: each.step for each in merged if each.step is not None},
        update_counts={each.layer.name: each.update_count for each in merged if each.update_count is not None},
        published={path: record for name in used for path, record in sources[name].published.items()},
        cut=cut,
        files=_small_files(base, state_from, base.files if tokenizer is None else tokenizer),
        native=state_from.native,
    )


def drop_optimizer(catalog: Catalog) -> Catalog:
    """The weights alone, with nothing that belongs to a moment of training."""
    return replace(
        catalog,
        masters={},
        states={},
        optimizers=(),
        update_counts={},
        files=tuple(file for file in catalog.files if not is_state_file(file.name)),
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
    if (ours in base.masters) != (theirs in source.masters):
        has = "no fp32 master" if ours in base.masters else "an fp32 master"
        yield f"it has {has}, unlike in base"
    if ours in base.states and theirs in source.states:
        expected, found = (_leaf_metas(each.states[fqn]) for each, fqn in ((base, ours), (source, theirs)))
        if expected != found:
            leaves = sorted(leaf for leaf in expected.keys() | found.keys() if expected.get(leaf) != found.get(leaf))
            ours, theirs = _metas(expected, leaves), _metas(found, leaves)
            yield f"optimizer state {', '.join(leaves)}: expected {ours}, found {theirs}"


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


def _merge_layer(target: TargetLayer, sources: Mapping[str, Catalog]) -> _MergedLayer:
    """Put one layer together; its parts are known to fit."""
    newest = target.optimizer_from
    source = sources[newest.source]
    origin = _names(source.layers[newest.layer], target.name)
    parts = [
        (sources[each.source], _names(sources[each.source].layers[each.layer], target.name))
        for each in target.contributions
    ]

    def combine(kind: Literal["weights", "masters"], fqn: str) -> TensorRef:
        refs = [getattr(catalog, kind)[names[fqn]] for catalog, names in parts]
        return _average(refs, [each.weight for each in target.contributions], getattr(source, kind)[origin[fqn]])

    index = int(target.name.rpartition(".")[2]) if source.layers[newest.layer].index is not None else None
    return _MergedLayer(
        layer=replace(source.layers[newest.layer], name=target.name, index=index, fqns=tuple(origin)),
        origin=origin,
        weights={fqn: combine("weights", fqn) for fqn in origin},
        masters={fqn: combine("masters", fqn) for fqn, theirs in origin.items() if theirs in source.masters},
        states={fqn: source.states[theirs] for fqn, theirs in origin.items() if theirs in source.states},
        buffers=frozenset(fqn for fqn, theirs in origin.items() if theirs in source.buffers),
        step=source.step_of(newest.layer),
        update_count=source.update_counts.get(newest.layer),
    )


def _average(refs: Sequence[TensorRef], weights: Sequence[float], newest: TensorRef) -> TensorRef:
    # Counters and masks have no average.
    if len(refs) == 1 or newest.meta.dtype not in _FLOATS:
        return newest
    return AveragedTensor(meta=newest.meta, sources=tuple(refs), weights=tuple(weights))


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


def _small_files(base: Catalog, state_from: Catalog, tokenizer: Sequence[SmallFile]) -> tuple[SmallFile, ...]:
    chosen = [
        *(file for file in state_from.files if is_state_file(file.name)),
        *(file for file in base.files if not is_state_file(file.name) and not is_tokenizer_file(file.name)),
        *(file for file in tokenizer if is_tokenizer_file(file.name)),
    ]
    files = {file.name: file for file in chosen if file.name != PROVENANCE_NAME}
    return tuple(files[name] for name in sorted(files))


_ONE_PROCESS = frozenset({"tailored", "hf"})
_RNG_OF_RANK = re.compile(r"rng_state_(\d+)\.pth")


def fit_small_files(catalog: Catalog, to: str) -> tuple[Catalog, tuple[str, ...]]:
    """Name the random number generators' files as the target looks for them, if that is of another format.

    Source: transformers 5.23, trainer.py (_load_rng_state): ``rng_state.pth`` of a single process, else
    ``rng_state_<rank>.pth``.
    """
    if catalog.format == to or (catalog.format in _ONE_PROCESS) == (to in _ONE_PROCESS):
        return catalog, ()
    old, new = ("rng_state_0.pth", "rng_state.pth") if to in _ONE_PROCESS else ("rng_state.pth", "rng_state_0.pth")
    ranks = sorted(file.name for file in catalog.files if _RNG_OF_RANK.fullmatch(file.name))
    kept = [
        replace(file, name=new) if file.name == old else file
        for file in catalog.files
        if file.name == old or (file.name != "latest" and not _RNG_OF_RANK.fullmatch(file.name))
    ]
    notes = []
    if to in _ONE_PROCESS and len(ranks) > 1:
        notes.append(f"the random state is that of rank 0 of {len(ranks)}")
    elif to not in _ONE_PROCESS and len(kept) and any(file.name == new for file in kept):
        notes.append("the random state of the single process goes to rank 0; other ranks start with their seed")
    return replace(catalog, files=tuple(kept)), tuple(notes)


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
