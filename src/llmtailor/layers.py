"""Which layer a tensor name belongs to.

A layer is a named set of parameters and buffers that is saved as one: a block of a stack (``layers.7``) or an auxiliary
layer (``embed_tokens``, ``norm``, ``lm_head``). Every parameter and persistent buffer is in exactly one. All is decided
from dotted names (and shapes), so a file gives the same layers as the model it was written from. Not for saying where
a tensor's bytes are (the catalog) or which layers are written (the strategies).

The rules, with ``X`` a path of modules and ``<i>`` a plain decimal number:

* ``X`` is a *stack* if some name is ``X.<i>.<module>...<leaf>``: its children hold modules of their own. One such name
  suffices, so a stack is found by any one of its blocks, and shallow blocks are blocks all the same. The outermost
  stack on a name's path wins: an expert stays with its block unless ``split_experts``.
* Children that are single modules (``X.0.weight``) make a stack only if there are at least 3, numbered without gaps,
  alike in names and shapes, and ``X`` is not called like an embedding or a head. That is a list of equal Linears;
  a projector of a few Linears and activations has gaps or unequal shapes. This is the one rule that counts children.
* Any other name belongs to the auxiliary layer at the shortest prefix of its path that does not lead to a stack.
  Without any stack each module that holds tensors is a layer.
* A layer is called by its path, less the leading modules it shares with those above all stacks
  (``model.layers.7`` is ``layers.7``); layers that would share a name keep their whole path.

What adapters put between a module and its tensor (``q_proj.lora_A.default.weight``) makes a module no deeper.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import quote

from .errors import IncompatibleError, InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "ROOT_STACK",
    "Layer",
    "LayerKind",
    "LayerMap",
    "canonical_name",
    "file_stem",
    "find_ties",
    "map_module",
    "map_names",
    "named_tensors",
    "part_suffix",
]

_Path: TypeAlias = tuple[str, ...]
_Order: TypeAlias = tuple[int, int, _Path, int]

ROOT_STACK = "."
"""Name of the stack whose blocks are children of the model itself (``0.attn.q.weight``)."""

_INDEX = re.compile(r"0|[1-9][0-9]*")
_PADDED = re.compile(r"0[0-9]{2}")
_MIN_PLAIN_BLOCKS = 3

# Source: torch 2.13, torch/_dynamo/eval_frame.py (OptimizedModule), torch/distributed/fsdp/_common_utils.py
# (FSDP_WRAPPED_MODULE), torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py (_CHECKPOINT_WRAPPED_MODULE).
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

# What PEFT inserts between a module and its tensors; of the second kind the adapter's name follows.
# Source: peft 0.21.2, tuners/*/layer.py (adapter_layer_names), utils/other.py (original_module, modules_to_save),
# tuners/tuners_utils.py (base_layer).
_ADAPTER_WRAPPERS = frozenset({"base_layer", "original_module"})
_ADAPTERS = frozenset({
    "boft_R", "boft_s", "fourierft_spectrum", "hada_t1", "hada_t2", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
    "hira_A", "hira_B", "hra_u", "ia3_l", "ln_tuning_layers", "lora_A", "lora_B", "lora_E", "lora_embedding_A",
    "lora_embedding_B", "lora_magnitude_vector", "modules_to_save", "oft_R", "randlora_gamma", "randlora_lambda",
    "trainable_tokens_delta", "vera_lambda_b", "vera_lambda_d",
})  # fmt: skip

# Source: modeling files of transformers 5.23; deepspeed_experts: DeepSpeed 0.19.6, moe/experts.py.
_EXPERT_LISTS = frozenset({"experts", "local_experts", "deepspeed_experts"})

# Last component of an auxiliary layer's path. Source: modeling files of transformers 5.23, timm (patch_embed,
# pos_embed), Llama's original checkpoints (tok_embeddings, output), nanoGPT, TRL (v_head).
_EMBEDDINGS = frozenset({
    "embed", "embed_in", "embed_positions", "embed_tokens", "embed_tokens_per_layer", "embedding", "embeddings",
    "patch_embed", "patch_embedder", "patch_embedding", "patch_embeddings", "pos_emb", "pos_embed",
    "position_embedding", "position_embeddings", "positions_embed", "shared", "tok_emb", "tok_embeddings",
    "token_embedding", "token_embeddings", "token_type_embeddings", "tokens_embed", "word_embeddings", "wpe", "wte",
})  # fmt: skip
_HEADS = frozenset({
    "classification_head", "classifier", "cls", "discriminator_predictions", "embed_out", "generator_lm_head", "head",
    "heads", "lm_head", "lm_heads", "output", "output_projection", "proj_out", "qa_outputs", "score", "v_head",
    "vocab_projector",
})  # fmt: skip


class LayerKind(StrEnum):
    """What a layer is to a strategy."""

    BLOCK = "block"
    EMBEDDING = "embedding"
    HEAD = "head"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A named set of parameters and persistent buffers that is saved as one."""

    name: str
    """As users say it: ``layers.7``, ``embed_tokens``."""
    kind: LayerKind
    stack: str | None
    """Short name of the stack (``layers``); None unless a block."""
    index: int | None
    """The block's number in its stack as the model numbers it; None unless a block."""
    fqns: tuple[str, ...]
    """Its tensors in model order; never empty; a tied tensor by its first name only."""


@dataclass(frozen=True)
class LayerMap:
    """A model cut into layers: every tensor in exactly one."""

    layers: tuple[Layer, ...]
    """In model order; the blocks of a stack in order of their index."""
    ties: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Later name -> first name of each tied tensor; as a file seldom holds later names, no part of equality."""

    def layer_of(self, fqn: str) -> Layer:
        """The layer that holds a tensor; of a tied tensor any of its names will do.

        Raises:
            NotFoundError: No layer holds such a tensor.
        """
        try:
            return self._by_fqn[self.ties.get(fqn, fqn)]
        except KeyError:
            raise NotFoundError(
                "no layer holds this tensor", kind="unknown-tensor", fqn=fqn, hint=_hint_near(fqn, self._by_fqn)
            ) from None

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> Layer:
        try:
            return self._by_name[name]
        except KeyError:
            raise NotFoundError(
                "there is no such layer", kind="unknown-layer", layer=name, hint=_hint_near(name, self._by_name)
            ) from None

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names, in model order."""
        return tuple(layer.name for layer in self.layers)

    @property
    def blocks(self) -> tuple[Layer, ...]:
        """The layers that are blocks, of all stacks."""
        return tuple(layer for layer in self.layers if layer.kind is LayerKind.BLOCK)

    @cached_property
    def _by_fqn(self) -> dict[str, Layer]:
        return {fqn: layer for layer in self.layers for fqn in layer.fqns}

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}


def canonical_name(fqn: str) -> str:
    """The name without the components that torch.compile, FSDP and activation checkpointing insert."""
    # A name of nothing but wrappers is somebody's own: it must not become empty.
    return ".".join(part for part in fqn.split(".") if part not in _WRAPPERS) or fqn


def find_ties(module: nn.Module) -> dict[str, str]:
    """Later name -> first name of each parameter or persistent buffer registered under several names.

    Names are canonical; the order is that of ``named_parameters(remove_duplicate=False)``.

    Raises:
        IncompatibleError: Two different tensors have one canonical name.
    """
    return _ties_among(named_tensors(module))


def _ties_among(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    firsts: dict[int, str] = {}
    return {name: firsts[id(tensor)] for name, tensor in tensors.items() if firsts.setdefault(id(tensor), name) != name}


def map_module(
    module: nn.Module, *, split_experts: bool = False, overrides: Mapping[str, Sequence[str]] | None = None
) -> LayerMap:
    """Cut a model into layers: all parameters, frozen ones included, and all persistent buffers.

    Names are canonical. A tied tensor is in the layer of its first name. The map equals that of ``map_names`` for the
    same names without the tied ones. Unwrap DistributedDataParallel first: its ``module.`` is a name like any other.

    Raises:
        InvalidInputError: As ``map_names``.
        IncompatibleError: Two different tensors have one canonical name.
    """
    tensors = named_tensors(module)
    ties = _ties_among(tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in ties}
    return LayerMap(map_names(shapes, split_experts=split_experts, overrides=overrides).layers, ties)


def map_names(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    split_experts: bool = False,
    overrides: Mapping[str, Sequence[str]] | None = None,
) -> LayerMap:
    """Cut a set of tensor names into layers.

    Args:
        shapes: fqn -> shape, in model order (shapes tell a list of equal modules from a projector).
        split_experts: Make each ``experts.<i>`` inside a block a block of its own, of stack ``layers.3.mlp.experts``.
        overrides: Layer name -> globs on canonical names; the first that matches takes the tensor. Other layers keep
            the names they have without overrides; one that would share an override's name takes its whole path.

    Raises:
        InvalidInputError: A glob matches nothing, a layer of ``overrides`` gets nothing, or its name is taken.
    """
    paths = {fqn: tuple(canonical_name(fqn).split(".")) for fqn in shapes}
    containers, trunk = _find_stacks(shapes, paths)
    taken = _take_overrides({fqn: ".".join(path) for fqn, path in paths.items()}, overrides or {})

    members: dict[_Place, list[str]] = defaultdict(list)
    for fqn, path in paths.items():
        if fqn not in taken:
            members[_place(path, containers, split_experts=split_experts)].append(fqn)
    names = _name_places(members, trunk, reserved=set(taken.values()))
    order = _order_places(members, containers, list(paths))
    layers = {order[place]: _describe(place, names[place], fqns) for place, fqns in members.items()}
    for name in dict.fromkeys(taken.values()):
        fqns = [fqn for fqn in paths if taken.get(fqn) == name]
        key: _Order = (list(paths).index(fqns[0]), -1, (), -1)
        layers[key] = Layer(name=name, kind=_kind_of(name), stack=None, index=None, fqns=tuple(fqns))
    return LayerMap(tuple(layers[key] for key in sorted(layers)))


def file_stem(layer: Layer) -> str:
    """File-name stem of a layer: its name, safe on any file system, sorting in model order within a stack.

    A block's index is padded to 3 digits; every UTF-8 byte outside ``A-Z a-z 0-9 _ . -`` is ``%XX``, and so is a
    leading dot. Different layers of a map have different stems; case is kept.
    """
    head, dot, last = layer.name.rpartition(".")
    if layer.kind is LayerKind.BLOCK:
        last = last.zfill(3)
    # quote() leaves "~" as it is.
    stem = quote(head + dot + last, safe="", errors="surrogatepass").replace("~", "%7E")
    if layer.kind is not LayerKind.BLOCK and _PADDED.fullmatch(last):
        # An auxiliary layer named "layers.007" must not meet block 7.
        stem = f"{stem[:-3]}%30{stem[-2:]}"
    if stem.startswith("."):
        stem = "%2E" + stem[1:]
    return stem or "%"


def part_suffix(rank: int) -> str:
    """What follows the stem in the name of a file that holds a rank's part of a layer."""
    return f".rank-{rank:05d}"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a layer sits in the model."""

    path: _Path
    """Of the stack, or of the auxiliary layer itself."""
    index: int | None
    """Of the block; None for an auxiliary layer."""


def _find_stacks(shapes: Mapping[str, tuple[int, ...]], paths: Mapping[str, _Path]) -> tuple[set[_Path], _Path]:
    """The outermost stacks, and the longest path above all of them."""
    deep: set[_Path] = set()
    plain: dict[_Path, dict[int, set[tuple[_Path, tuple[int, ...]]]]] = defaultdict(lambda: defaultdict(set))
    for fqn, path in paths.items():
        modules = _module_path(path)
        for i, part in enumerate(modules):
            if not _INDEX.fullmatch(part):
                continue
            if i + 1 < len(modules):
                deep.add(modules[:i])
            else:
                plain[modules[:i]][int(part)].add((path[i + 1 :], tuple(shapes[fqn])))
    lists = {path for path, children in plain.items() if _are_alike(path, children)}
    found = {stack for path in paths.values() if (stack := _outermost(path, deep | lists)) is not None}
    # Plain lists are found by counting, and names must not depend on a count: they only name themselves if they can.
    return found, _common_prefix([stack[:-1] for stack in (found & deep) or found])


def _module_path(path: _Path) -> _Path:
    """Path of the module that holds the tensor, less what adapters inserted."""
    modules: list[str] = []
    after_adapter = False
    for part in path[:-1]:
        if not after_adapter and part not in _ADAPTERS and part not in _ADAPTER_WRAPPERS:
            modules.append(part)
        after_adapter = part in _ADAPTERS
    return tuple(modules)


def _are_alike(path: _Path, children: Mapping[int, set[tuple[_Path, tuple[int, ...]]]]) -> bool:
    if len(children) < _MIN_PLAIN_BLOCKS or (path and _kind_of(path[-1]) is not LayerKind.OTHER):
        return False
    without_gaps = max(children) - min(children) + 1 == len(children)
    first, *rest = children.values()
    return without_gaps and all(child == first for child in rest)


def _outermost(path: _Path, stacks: set[_Path]) -> _Path | None:
    return next((path[:i] for i, part in enumerate(path) if _INDEX.fullmatch(part) and path[:i] in stacks), None)


def _place(path: _Path, stacks: set[_Path], *, split_experts: bool) -> _Place:
    stack = _outermost(path, stacks)
    if stack is None:
        return _Place(_auxiliary_path(path, stacks), None)
    at = len(stack)
    if split_experts:
        inner = range(at + 2, len(path) - 1)
        at = next((i for i in inner if _INDEX.fullmatch(path[i]) and path[i - 1] in _EXPERT_LISTS), at)
    return _Place(path[:at], int(path[at]))


def _auxiliary_path(path: _Path, stacks: set[_Path]) -> _Path:
    """Shortest prefix that does not lead to a stack; a tensor held right above a stack is a layer by its own name."""
    if not stacks:
        return _module_path(path) or path
    prefixes = (path[:i] for i in range(1, len(path)))
    return next((prefix for prefix in prefixes if not any(stack[: len(prefix)] == prefix for stack in stacks)), path)


def _common_prefix(paths: Iterable[_Path]) -> _Path:
    first, *rest = list(paths) or [()]
    shared = [sum(1 for _ in _shared(first, path)) for path in rest]
    return first[: min(shared, default=len(first))]


def _shared(left: _Path, right: _Path) -> Iterator[str]:
    for ours, theirs in zip(left, right, strict=False):
        if ours != theirs:
            return
        yield ours


def _name_places(places: Iterable[_Place], trunk: _Path, reserved: set[str]) -> dict[_Place, str]:
    """A unique name for each place: short, or its whole path where short ones would meet.

    Raises:
        InvalidInputError: A whole path is one of the ``reserved`` names.
    """
    places = list(places)
    whole: set[_Path] = set()
    while True:
        names = {
            place: _join(place, 0 if place.path in whole else _num_stripped(place.path, trunk)) for place in places
        }
        counts = Counter([*names.values(), *reserved])
        # All blocks of a stack change together, or the stack would have two names.
        meeting = {place.path for place, name in names.items() if counts[name] > 1}
        if not meeting:
            return names
        if meeting <= whole:
            name = next(name for name in names.values() if counts[name] > 1)
            raise InvalidInputError(
                "an override is named like another layer of the model",
                kind="layer-name-taken",
                layer=name,
                hint="choose another name, or globs that take all of that layer",
            )
        whole |= meeting


def _num_stripped(path: _Path, trunk: _Path) -> int:
    return min(sum(1 for _ in _shared(path, trunk)), max(len(path) - 1, 0))


def _join(place: _Place, num_stripped: int) -> str:
    return ".".join([*place.path[num_stripped:], *([] if place.index is None else [str(place.index)])])


def _describe(place: _Place, name: str, fqns: Sequence[str]) -> Layer:
    if place.index is None:
        return Layer(name=name, kind=_kind_of(name), stack=None, index=None, fqns=tuple(fqns))
    stack = name.rpartition(".")[0] or ROOT_STACK
    return Layer(name=name, kind=LayerKind.BLOCK, stack=stack, index=place.index, fqns=tuple(fqns))


def _kind_of(name: str) -> LayerKind:
    last = name.rpartition(".")[2]
    if last in _EMBEDDINGS:
        return LayerKind.EMBEDDING
    return LayerKind.HEAD if last in _HEADS else LayerKind.OTHER


def _order_places(
    members: Mapping[_Place, Sequence[str]], stacks: set[_Path], fqns: Sequence[str]
) -> dict[_Place, _Order]:
    """Sort keys: by first tensor, but the blocks of a stack by index, since a file lists block 10 before block 2."""
    position = {fqn: i for i, fqn in enumerate(fqns)}
    first: dict[_Path, int] = {}
    outer: dict[_Place, tuple[_Path, int]] = {}
    for place, own in members.items():
        whole = place.path if place.index is None else (*place.path, str(place.index))
        stack = _outermost(whole, stacks)
        outer[place] = (place.path, -1) if stack is None else (stack, int(whole[len(stack)]))
        unit = outer[place][0]
        first[unit] = min(first.get(unit, len(fqns)), position[own[0]])
    # The stack's path sorts before that of the experts inside it.
    return {
        place: (first[unit], index, place.path, -1 if place.index is None else place.index)
        for place, (unit, index) in outer.items()
    }


def _take_overrides(names: Mapping[str, str], overrides: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """fqn -> the layer that an override puts it in; ``names`` maps fqn -> canonical name."""
    taken: dict[str, str] = {}
    for layer, glob in _rules(overrides):
        matching = [fqn for fqn, name in names.items() if fnmatchcase(name, glob)]
        if not matching:
            raise InvalidInputError(
                f"the glob {glob!r} matches no tensor",
                kind="glob-matches-nothing",
                layer=layer,
                found=glob,
                hint="globs match whole canonical names, and tied tensors by their first name only",
            )
        for fqn in matching:
            taken.setdefault(fqn, layer)
    for layer in overrides:
        if layer not in taken.values():
            raise InvalidInputError(
                "an override gets no tensor, since earlier globs take all that its own match",
                kind="override-empty",
                layer=layer,
                hint="put the narrower override first",
            )
    return taken


def _rules(overrides: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    for layer, globs in overrides.items():
        if isinstance(globs, str) or not layer:
            raise InvalidInputError(
                "an override must map a layer name to a list of globs",
                kind="override-form",
                layer=layer,
                found=repr(globs),
                expected="a name that is not empty, and a list of globs",
            )
        for glob in globs:
            yield layer, glob


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Canonical name -> parameter or persistent buffer, in the order of ``state_dict``, later names of ties included.

    Not ``state_dict()`` itself: its hooks may gather a sharded model, and it forgets which tensors are one object.

    Raises:
        IncompatibleError: Two different tensors have one canonical name.
    """
    tensors: dict[str, Tensor] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        # Source: torch 2.13, nn/modules/module.py (_save_to_state_dict): what state_dict leaves out.
        transient: set[str] = getattr(owner, "_non_persistent_buffers_set", set())
        own: list[tuple[str, Tensor]] = [*owner.named_parameters(recurse=False, remove_duplicate=False)]
        buffers = owner.named_buffers(recurse=False, remove_duplicate=False)
        own += [(name, buffer) for name, buffer in buffers if name not in transient]
        for leaf, tensor in own:
            name = canonical_name(f"{path}.{leaf}" if path else leaf)
            if tensors.setdefault(name, tensor) is not tensor:
                raise IncompatibleError("two tensors have one canonical name", kind="name-collision", fqn=name)
    return tensors


def _hint_near(name: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {', '.join(near)}?" if near else None
