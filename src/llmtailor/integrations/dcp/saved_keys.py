"""What a checkpoint of ours is called in a state dict: every key that ``dcp.load`` may ask for, and where it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote

from ...checkpoint import Checkpoint
from ...load import SavedState, read_saved_states
from ...optimizer_values import decode_option
from ...state_keys import state_key
from ...state_tree import Note
from ...tensors import TensorMeta
from .small_files import RestValue, SavedName, decode_names, read_rest
from .state_names import Names, Path, join_key

__all__ = ["SavedKey", "read_keys"]

_LISTS = frozenset({"list", "tuple"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedKey:
    """A key of a state dict."""

    path: Path
    kind: Literal["tensor", "state-value", "rest-tensor", "value"]
    """``state-value``: a number or the like in an optimizer file; ``rest-tensor``: in a file of no layer."""
    meta: TensorMeta | None = None
    """Of the whole tensor, if it is one."""
    name: str = ""
    """Of the tensor in its file."""
    fqn: str = ""
    leaf: str = ""
    value: Any = None
    rest: RestValue | None = None


def read_keys(checkpoint: Checkpoint, names: Names | None) -> dict[str, SavedKey]:
    """Every key, with what it stands for. Opens headers of optimizer files and the small files.

    Args:
        checkpoint: Where from.
        names: What the model and its optimizer are called in the state dict that is loaded; None: as when it was saved,
            or, if no state dict was saved, as ``get_state_dict`` gives them: ``model`` and ``optim``.

    Raises:
        FormatError, IntegrityError, NotFoundError: A file is not what was published, or cannot be understood.
    """
    states = read_saved_states(checkpoint)
    told = decode_names(checkpoint) if names is None else None
    found = _keys_told(checkpoint, states, told) if told is not None else _keys_made(checkpoint, states, names)
    keys = {join_key(key.path): key for key in found}
    for key, rest in read_rest(checkpoint).items():
        if rest.files:
            first = rest.files[0]
            meta = TensorMeta(dtype=first.header.tensors[key].meta.dtype, shape=first.shards[key].shape)
            keys[key] = SavedKey(path=rest.path, kind="rest-tensor", meta=meta, name=key, rest=rest)
        else:
            keys[key] = SavedKey(path=rest.path, kind="value", value=rest.value)
    return keys


def _keys_told(
    checkpoint: Checkpoint, states: Mapping[str, SavedState], told: tuple[SavedName, ...]
) -> Iterator[SavedKey]:
    metas = {tensor.fqn: tensor.meta for tensor in checkpoint.manifest.tensors}
    for each in told:
        if each.leaf is None:
            yield SavedKey(path=each.path, kind="tensor", meta=metas[each.fqn], name=each.fqn)
        elif each.fqn in states and _has(states[each.fqn], each.leaf):
            # A layer that was linked may have been saved before its optimizer had that.
            yield _state_key(each.path, each.fqn, each.leaf, states[each.fqn])


def _has(state: SavedState, leaf: str) -> bool:
    return leaf in state.metas or leaf in state.notes


def _state_key(path: Path, fqn: str, leaf: str, state: SavedState) -> SavedKey:
    if leaf in state.notes:
        return SavedKey(path=path, kind="state-value", fqn=fqn, leaf=leaf)
    return SavedKey(path=path, kind="tensor", meta=state.metas[leaf], name=state_key(fqn, leaf))


def _keys_made(checkpoint: Checkpoint, states: Mapping[str, SavedState], names: Names | None) -> Iterator[SavedKey]:
    """As ``get_state_dict`` names them, nested or flattened; the keys of tensors are the same."""
    manifest = checkpoint.manifest
    model = _split("model" if names is None or names.model is None else names.model)
    optimizer = _split("optim" if names is None or names.optimizer is None else names.optimizer)
    for tensor in manifest.tensors:
        yield SavedKey(path=(*model, tensor.fqn), kind="tensor", meta=tensor.meta, name=tensor.tied_to or tensor.fqn)
    for fqn, state in states.items():
        for leaf in _leaves(state.metas, state.notes):
            parts = tuple(unquote(part) for part in leaf.split("/"))
            yield _state_key((*optimizer, "state", fqn, *parts), fqn, leaf, state)
    groups = [group for record in manifest.optimizers for group in record.groups]
    for index, group in enumerate(groups):
        options = {name: decode_option(value) for name, value in group.options.items()}
        place = (*optimizer, "param_groups", index)
        yield SavedKey(path=(*place, "params"), kind="value", value=list(group.parameters))
        for name, value in options.items():
            yield SavedKey(path=(*place, name), kind="value", value=value)
            for fqn in group.parameters:
                yield SavedKey(path=(*optimizer, f"param_groups.{fqn}.{name}"), kind="value", value=value)


def _split(dotted: str) -> Path:
    return tuple(dotted.split(".")) if dotted else ()


def _leaves(metas: Mapping[str, TensorMeta], notes: Mapping[str, Note]) -> Iterator[str]:
    """What a state dict has as one value each: dicts are taken apart, lists and tuples are not."""
    lists = [path for path, note in notes.items() if isinstance(note, dict) and not note.keys().isdisjoint(_LISTS)]
    for path in dict.fromkeys((*metas, *notes)):
        note = notes.get(path)
        is_dict = isinstance(note, dict) and "dict" in note
        if not is_dict and not any(path.startswith(f"{above}/") for above in lists):
            yield path
