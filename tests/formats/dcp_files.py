"""Real DCP checkpoints, read with torch's own reader, and copies of them that were tampered with."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from llmtailor.formats.torch_files import Instance, Tree, encode_pickle, read_pickle

DATA = Path(__file__).parent.parent / "compat" / "data" / "torch-2.13.0-dcp"
LOOP = DATA / "loop"
TIED = DATA / "tied"
TITAN = DATA / "titan" / "step-3"
APP = DATA / "app"
OLD = DATA / "old"
WEIGHTS = DATA / "weights"
TRAINER = DATA / "trainer" / "checkpoint-2"
TIED_FULL = DATA / "tied-trainer-full" / "checkpoint-2"


def load(directory: Path) -> dict[str, Any]:
    """What torch loads from a directory with ``.metadata``: everything, nested as it was saved."""
    state: dict[str, Any] = {}
    reader = dcp.FileSystemReader(directory)
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state


def save(directory: Path, state: dict[str, Any]) -> Path:
    """Save a nested state with torch, in this process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=directory)
    return directory


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two nested values differ, in values or types; a NaN is equal to itself."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{place}.{key}: only in one" for key in one.keys() ^ other.keys()]
        return found + [
            line for key in one.keys() & other.keys() for line in differences(one[key], other[key], f"{place}.{key}")
        ]
    if isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        return [
            line for i, pair in enumerate(zip(one, other, strict=True)) for line in differences(*pair, f"{place}.{i}")
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        is_same = one.dtype == other.dtype and one.shape == other.shape and one.equal(other)
    else:
        is_same = type(one) is type(other) and one == other
    return [] if is_same else [f"{place}: {one!r} and {other!r}"[:300]]


def tampered(source: Path, directory: Path, change: Callable[[dict[str, Tree]], Tree | None]) -> Path:
    """A copy of a checkpoint with a changed ``.metadata``.

    Args:
        source: A directory with ``.metadata``.
        directory: Where the copy goes.
        change: Gets the fields of ``Metadata`` and changes them, or gives another tree.
    """
    copy = directory / "checkpoint"
    shutil.copytree(source, copy)
    tree = read_pickle(copy / ".metadata")
    other = change(tree.state)
    (copy / ".metadata").write_bytes(encode_pickle(tree if other is None else other))
    return copy


def place_of(fields: dict[str, Tree], key: str, number: int = 0) -> Instance:
    """The ``_StorageInfo`` of a chunk."""
    return [info for index, info in fields["storage_data"].items() if index.state["fqn"] == key][number]


def index_of(fields: dict[str, Tree], key: str, number: int = 0) -> Instance:
    """The ``MetadataIndex`` of a chunk."""
    return [index for index in fields["storage_data"] if index.state["fqn"] == key][number]
