"""Which tensor of A is compared with which of B, and which need not be read. Reads names and places, no tensor.

Tensors are paired by name; of a tied tensor any of its names will do. A master that one checkpoint keeps beside a
weight is compared with the other's weight, where that is what the optimizer updates: training goes on from both. Files
that both manifests give one digest are not opened at all, and tensors that lie at the same place of one file (hard
links, one digest) are not read.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..catalog import Catalog
from ..codecs import Component, component_of
from ..errors import IncompleteError, InvalidInputError, NotFoundError
from ..manifest import FileRecord, LayerRecord, Manifest
from ..merge_sources import open_sources
from ..recipe.patterns import LayerNames, split_patterns, summarize_names
from ..state_keys import state_key
from ..tensor_refs import FileTensor, TensorRef
from ..tensors import TensorMeta
from .records import MASTER, OPTIMIZER, WEIGHTS, Side, Unmatched

__all__ = ["DiffPlan", "Kind", "LayerPlan", "Pair", "pair_catalogs", "plan_diff"]

Kind = Literal["weights", "optimizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A tensor that both have, in one shape."""

    layer: str
    component: str
    fqn: str
    a: TensorRef
    b: TensorRef
    is_same: bool
    """Both are the same bytes of one file."""

    @property
    def nbytes(self) -> int:
        """What there is to read."""
        return 0 if self.is_same else self.a.meta.nbytes + self.b.meta.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """A layer; see ``LayerDifference``."""

    name: str
    step_a: int | None
    step_b: int | None
    same_files: tuple[Kind, ...]
    same_numel: int
    pairs: tuple[Pair, ...]
    unmatched: tuple[Unmatched, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffPlan:
    """A comparison, decided; no tensor was read yet."""

    a: Side
    b: Side
    layers: tuple[LayerPlan, ...]

    @property
    def nbytes(self) -> int:
        """What there is to read, as the tensors are when decoded."""
        return sum(pair.nbytes for layer in self.layers for pair in layer.pairs)


def plan_diff(
    a: Path | str,
    b: Path | str,
    *,
    only: Kind | None = None,
    layers: Sequence[str] = (),
    parameter_names: Sequence[str] | None = None,
) -> DiffPlan:
    """Decide a comparison.

    Args:
        a: A checkpoint of any format.
        b: Another one.
        only: What to compare; both if left out.
        layers: Patterns of layer names as in a recipe (``layers.0-3``, ``layers.*``); all if empty.
        parameter_names: Of ``optimizer.pt``, where they cannot be told.

    Raises:
        TailorError: What is wrong with the checkpoints.
        InvalidInputError: There is no such thing as ``only``.
        NotFoundError: A pattern matches no layer.
        IncompleteError: Optimizer state alone was asked for, and neither has any.
    """
    if only not in (None, WEIGHTS, OPTIMIZER):
        raise InvalidInputError(
            "there is no such thing to compare",
            kind="diff-only",
            expected=f"{WEIGHTS}, {OPTIMIZER} or None",
            found=only,
        )
    sources = open_sources([str(a), str(b)], parameter_names=parameter_names, with_optimizer=only != WEIGHTS)
    catalog_a, catalog_b = sources[str(a)], sources[str(b)]
    if only == OPTIMIZER and not (catalog_a.has_optimizer or catalog_b.has_optimizer):
        raise IncompleteError(
            "there is no optimizer state to compare",
            kind="no-optimizer-state",
            path=catalog_a.path,
            expected="optimizer state in one checkpoint at least",
            found="weights alone in both",
            hint="compare the weights",
        )
    return pair_catalogs(catalog_a, catalog_b, kinds=(WEIGHTS, OPTIMIZER) if only is None else (only,), layers=layers)


def pair_catalogs(a: Catalog, b: Catalog, *, kinds: Sequence[Kind], layers: Sequence[str] = ()) -> DiffPlan:
    """Pair what two catalogs hold; see ``plan_diff``."""
    names = tuple(dict.fromkeys([*a.layers.names, *b.layers.names]))
    chosen = _choose(names, layers)
    pairing = _Pairing(a, b, chosen, kinds)
    pairing.pair_all()
    return DiffPlan(
        a=_side(a),
        b=_side(b),
        layers=tuple(pairing.plan_of(name) for name in names if name in chosen),
    )


def _side(catalog: Catalog) -> Side:
    return Side(path=catalog.path, format=catalog.format, step=catalog.step, has_optimizer=catalog.has_optimizer)


def _choose(names: Sequence[str], patterns: Sequence[str]) -> frozenset[str]:
    if not patterns:
        return frozenset(names)
    known = LayerNames(names)
    chosen: set[str] = set()
    for pattern in (each for text in patterns for each in split_patterns(text)):
        matched = known.match(pattern)
        if not matched:
            raise NotFoundError(
                "neither checkpoint has such a layer",
                kind="unknown-layer",
                layer=pattern,
                expected=summarize_names(names),
                hint="llmtailor show lists the layers of a checkpoint",
            )
        chosen.update(matched)
    return frozenset(chosen)


@dataclass(slots=True)
class _Found:
    """What was found out of a layer."""

    same_files: tuple[Kind, ...] = ()
    pairs: list[Pair] = field(default_factory=list)
    unmatched: list[Unmatched] = field(default_factory=list)


class _Pairing:
    """Pairs the tensors of two checkpoints.

    Args:
        a: One of them.
        b: The other one.
        chosen: Layers to look at.
        kinds: What to compare.
    """

    def __init__(self, a: Catalog, b: Catalog, chosen: frozenset[str], kinds: Sequence[Kind]) -> None:
        self._a = a
        self._b = b
        self._chosen = chosen
        self._kinds = kinds
        self._names_a = _layer_of_each(a)
        self._names_b = _layer_of_each(b)
        self._places = _Places(a, b)
        self._records_a, self._records_b = _records_of(a), _records_of(b)
        self._found: dict[str, _Found] = defaultdict(_Found)

    def pair_all(self) -> None:
        """Fill in what ``plan_of`` tells."""
        taken = set()
        for fqn, layer in self._names_a.items():
            if (name := _find_name(fqn, self._b, self._names_b)) is not None:
                taken.add(name)
            if layer in self._chosen:
                self._pair(fqn, layer, fqn, name)
        for fqn, layer in self._names_b.items():
            if fqn not in taken and layer in self._chosen:
                self._pair(fqn, layer, _find_name(fqn, self._a, self._names_a), fqn)

    def plan_of(self, name: str) -> LayerPlan:
        """A layer, once all are paired."""
        found = self._found[name]
        is_same = WEIGHTS in found.same_files
        return LayerPlan(
            name=name,
            step_a=self._a.step_of(name) if name in self._a.layers.names else None,
            step_b=self._b.step_of(name) if name in self._b.layers.names else None,
            same_files=found.same_files,
            same_numel=_numel_of(self._a, name) if is_same else 0,
            pairs=tuple(found.pairs),
            unmatched=tuple(found.unmatched),
        )

    def _pair(self, fqn: str, layer: str, name_a: str | None, name_b: str | None) -> None:
        """Pair all that there is of a parameter or buffer."""
        if layer not in self._found:
            self._found[layer].same_files = self._find_same_files(layer)
        for kind in self._kinds:
            if kind in self._found[layer].same_files:
                continue
            of_a = _tensors_of(self._a, name_a, kind, other=self._b, other_fqn=name_b)
            of_b = _tensors_of(self._b, name_b, kind, other=self._a, other_fqn=name_a)
            for component in dict.fromkeys([*of_a, *of_b]):
                self._add(layer, component, fqn, of_a.get(component), of_b.get(component))

    def _add(self, layer: str, component: str, fqn: str, a: TensorRef | None, b: TensorRef | None) -> None:
        found = self._found[layer]
        if a is None or b is None or not _can_be_compared(a.meta, b.meta):
            meta_a, meta_b = None if a is None else a.meta, None if b is None else b.meta
            found.unmatched.append(Unmatched(layer=layer, component=component, fqn=fqn, a=meta_a, b=meta_b))
            return
        is_same = self._places.are_same(a, b)
        found.pairs.append(Pair(layer=layer, component=component, fqn=fqn, a=a, b=b, is_same=is_same))

    def _find_same_files(self, layer: str) -> tuple[Kind, ...]:
        """What of a layer lies in the same files, by both manifests."""
        a, b = self._records_a.get(layer), self._records_b.get(layer)
        if a is None or b is None or {*self._a.layers[layer].fqns} != {*self._b.layers[layer].fqns}:
            return ()
        return tuple(kind for kind in _same_kinds(a, b) if kind in self._kinds)


def _layer_of_each(catalog: Catalog) -> dict[str, str]:
    """fqn -> layer, in model order. Not of ``weights``: asking that for all its names opens every file."""
    return {fqn: layer.name for layer in catalog.layers for fqn in layer.fqns}


def _records_of(catalog: Catalog) -> dict[str, LayerRecord]:
    return {each.name: each for each in catalog.native.layers} if isinstance(catalog.native, Manifest) else {}


def _numel_of(catalog: Catalog, layer: str) -> int:
    """Elements of a layer's weights, by the manifest."""
    assert isinstance(catalog.native, Manifest)
    held = (each for each in catalog.native.tensors if each.layer == layer and each.tied_to is None)
    return sum(each.meta.numel for each in held)


def _same_kinds(a: LayerRecord, b: LayerRecord) -> tuple[Kind, ...]:
    if a.encoding is not None and b.encoding is not None:
        is_same = a.encoding.base == b.encoding.base and _are_same(a.files, b.files)
        return (WEIGHTS, OPTIMIZER) if is_same else ()
    # Optimizer files may hold what their weights lack, so the same one beside other weights does not say the same.
    if a.encoding is not None or b.encoding is not None or not _are_same(a.weights_files, b.weights_files):
        return ()
    has_same_state = a.optimizer_files and _are_same(a.optimizer_files, b.optimizer_files)
    return (WEIGHTS, OPTIMIZER) if has_same_state else (WEIGHTS,)


def _are_same(a: Iterable[FileRecord], b: Iterable[FileRecord]) -> bool:
    return [(file.digest, file.bytes) for file in a] == [(file.digest, file.bytes) for file in b]


def _find_name(fqn: str, catalog: Catalog, names: Mapping[str, str]) -> str | None:
    """What a checkpoint calls a tensor, by any of its names."""
    name = fqn if fqn in names else catalog.ties.get(fqn)
    return name if name in names else None


def _tensors_of(
    catalog: Catalog, fqn: str | None, kind: Kind, *, other: Catalog, other_fqn: str | None
) -> dict[str, TensorRef]:
    """What a checkpoint holds of a parameter, by component, for a comparison with what another one has of it."""
    if fqn is None:
        return {}
    master = catalog.masters.get(fqn)
    is_master_weight = master is not None and _has_master_as_weight(other, other_fqn)
    if kind == WEIGHTS:
        weight = master if is_master_weight else catalog.weights.get(fqn)
        return {} if weight is None else {WEIGHTS: weight}
    state = catalog.states.get(fqn)
    found = {} if master is None or is_master_weight else {MASTER: master}
    for leaf, tensor in ({} if state is None else state.tensors).items():
        is_master = component_of(state_key(fqn, leaf)) is Component.MASTER
        found[MASTER if is_master else leaf] = tensor
    return found


def _has_master_as_weight(catalog: Catalog, fqn: str | None) -> bool:
    """Whether a checkpoint keeps what the optimizer updates as the weight itself, and not as a master beside it."""
    if fqn is None or fqn in catalog.masters:
        return False
    weight = catalog.weights.get(fqn)
    return weight is not None and weight.meta.dtype in ("F32", "F64")


def _can_be_compared(a: TensorMeta, b: TensorMeta) -> bool:
    return a.shape == b.shape and (a.dtype == "C64") == (b.dtype == "C64")


class _Places:
    """Tells whether two tensors are the same bytes of one file."""

    def __init__(self, a: Catalog, b: Catalog) -> None:
        self._digests = {path: file.digest for each in (a, b) for path, file in each.published.items()}
        self._inodes: dict[Path, tuple[int, int] | Path] = {}

    def are_same(self, a: TensorRef, b: TensorRef) -> bool:
        """Whether they are; False where they are not in files as they are."""
        if a.meta != b.meta or not isinstance(a, FileTensor) or not isinstance(b, FileTensor):
            return False
        places = [[(extent.offset, extent.start, extent.numel) for extent in each.extents] for each in (a, b)]
        files = dict.fromkeys((x.path, y.path) for x, y in zip(a.extents, b.extents, strict=False))
        return places[0] == places[1] and all(self._is_same_file(x, y) for x, y in files)

    def _is_same_file(self, a: Path, b: Path) -> bool:
        digest = self._digests.get(a)
        return (digest is not None and digest == self._digests.get(b)) or self._inode(a) == self._inode(b)

    def _inode(self, path: Path) -> tuple[int, int] | Path:
        """What tells a file from another one."""
        if path not in self._inodes:
            try:
                status = os.stat(path, follow_symlinks=False)
                self._inodes[path] = status.st_dev, status.st_ino
            except OSError:
                self._inodes[path] = path  # whoever reads it will say what is wrong
        return self._inodes[path]
