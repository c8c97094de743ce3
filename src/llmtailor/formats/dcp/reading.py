"""DCP and FSDP checkpoints, opened: ``.metadata`` and the values that are no tensors; no tensor is read.

The exception are the first bytes of embeddings and heads, which tell whether they are tied (``ties``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from ...catalog import Catalog
from ...errors import FormatError, IncompleteError, NotFoundError, UnsupportedError
from ...layers import canonical_name
from ...tensor_refs import FileTensor
from ..small_files import list_small_files
from ..small_names import is_tokenizer
from ..source_files import open_source, resolve_source
from ..torch_files import read_pickle
from .contents import Contents, find_optimizer, split_items
from .full import FULL_MODEL_NAME, read_full_model, read_full_optimizer
from .layout import FULL, METADATA_NAME, MODEL_DIRECTORY, OPTIMIZER_DIRECTORY, DcpLayout
from .metadata import Item, ShardFile, parse_metadata
from .optimizer import Optimizer, parameters_of, parameters_of_tree, read_flat, read_nested, read_tree
from .stored import StoredTensor
from .ties import find_ties

__all__ = ["open_dcp"]

_TRAINER_STATE = "trainer_state.json"
_MAX_JSON_NBYTES = 256 * 2**20
_STEP_IN_NAME = re.compile(r"(?:checkpoint|step|global_step|iter)[-_]?0*([0-9]{1,18})")
# Others' weights and optimizer state lie beside some checkpoints, and are not those of one that is made from it.
_CARRIED = re.compile(
    r"trainer_state\.json|training_args\.bin|(?:scheduler|scaler)\.pt|(?:rng_state|random_states).*\.(?:pth|pkl|pt)"
    r"|(?!.*\.index\.json$).*\.(?:json|jinja|jsonl|txt|model|tiktoken|spm|yaml|yml)"
)


def open_dcp(path: Path, *, with_optimizer: bool = True) -> Catalog:
    """Open a checkpoint of ``torch.distributed.checkpoint``, or of FSDP as the HF Trainer and accelerate save it.

    Args:
        path: A directory with ``.metadata``; or one with ``pytorch_model_fsdp_0`` and, to resume, ``optimizer_0``;
            or with ``pytorch_model_fsdp.bin`` and ``optimizer.bin`` (FULL_STATE_DICT).
        with_optimizer: Whether its state is read; for weights alone it need not be understood. The names of its
            parameters are looked at, if it has them: they tell the model from an average of it, and tied weights.

    Raises:
        NotFoundError: It is none of these.
        FormatError: It is not what it claims to be, or a path in it leads out.
        IncompleteError: A shard file, a chunk or a parameter is missing.
        UnsupportedError: Several models or optimizers, one state per rank, transformed items.

    Source:
        torch 2.13, distributed/checkpoint; accelerate 1.15, utils/fsdp_utils.py; transformers 5.23, trainer.py
        (_save_optimizer_and_scheduler).
    """
    names = _list_names(path)
    if METADATA_NAME in names:
        return _open_directories(path, [""], with_optimizer)
    if MODEL_DIRECTORY in names:
        return _open_directories(path, [MODEL_DIRECTORY, *({OPTIMIZER_DIRECTORY} & names)], with_optimizer)
    if FULL_MODEL_NAME in names:
        return _open_full(path, with_optimizer)
    raise _refuse_layout(path, names)


def _list_names(path: Path) -> set[str]:
    try:
        names = {entry.name for entry in os.scandir(path)}
    except (FileNotFoundError, NotADirectoryError) as err:
        raise NotFoundError("no such checkpoint", kind="missing-checkpoint", path=path) from err
    others = sorted(name for name in names if re.fullmatch(r"(pytorch_model_fsdp|optimizer)_[1-9][0-9]*", name))
    if others:
        raise UnsupportedError(
            "checkpoints of several models or optimizers cannot be read",
            kind="dcp-optimizers",
            path=path,
            expected=f"{MODEL_DIRECTORY} and {OPTIMIZER_DIRECTORY}",
            found=", ".join(others),
        )
    return names


def _refuse_layout(path: Path, names: set[str]) -> NotFoundError | UnsupportedError:
    of_ranks = sorted(name for name in names if re.fullmatch(r"__[0-9]+\.metadata|.*_rank[0-9]+\.bin", name))
    if of_ranks:
        return UnsupportedError(
            "a checkpoint in which each rank has its own state cannot be read",
            kind="dcp-rank-files",
            path=path,
            expected=f"one {METADATA_NAME} for all ranks",
            found=", ".join(of_ranks[:8]),
            hint="save it with DCP's collectives (SHARDED_STATE_DICT, use_dcp=True)",
        )
    return NotFoundError(
        "this is no DCP or FSDP checkpoint",
        kind="missing-metadata",
        path=path,
        expected=f"{METADATA_NAME}, {MODEL_DIRECTORY} or {FULL_MODEL_NAME}",
        found=", ".join(sorted(names)[:8]) or "an empty directory",
        hint="give the directory of one step",
    )


def _open_directories(path: Path, directories: Collection[str], with_optimizer: bool) -> Catalog:
    items = tuple(item for directory in directories for item in _read_items(path, directory))
    found = find_optimizer(items, path)
    optimizer, trained = None, None
    if found is not None and with_optimizer:
        optimizer = read_flat(found, path) if found.is_flat else read_nested(found, path)
        trained = optimizer.parameters
    elif found is not None:
        trained = parameters_of(found, path)
    contents = split_items(items, found, trained or (), path)
    names = _canonical_names(contents.weights, path)
    weights = {names[own]: StoredTensor(item) for own, item in contents.weights.items()}
    if optimizer is not None:
        optimizer = optimizer.renamed(names)
    layout = DcpLayout(
        model=contents.model,
        optimizer=None if found is None else found.root,
        is_flat=found is not None and found.is_flat,
        rest=contents.rest,
        spellings={name: own for own, name in names.items() if own != name},
        num_ranks=_count_ranks(contents),
    )
    ties = find_ties(weights, None if trained is None else [names[name] for name in trained])
    return _build_catalog(path, weights, ties, optimizer, layout)


def _open_full(path: Path, with_optimizer: bool) -> Catalog:
    own_weights = read_full_model(path)
    names = _canonical_names(own_weights, path)
    optimizer, trained = None, None
    if (found := read_full_optimizer(path)) is not None:
        optimizer = read_tree(*found) if with_optimizer else None
        trained = optimizer.parameters if optimizer else parameters_of_tree(found[0])
    lacking = [name for name in trained or () if name not in names]
    if lacking:
        raise IncompleteError(
            "parameters of the optimizer are not among the weights", kind="dcp-weights", path=path, fqn=lacking[0]
        )
    if optimizer is not None:
        optimizer = optimizer.renamed(names)
    weights = {names[own]: ref for own, ref in own_weights.items()}
    ties = find_ties(weights, None if trained is None else [names[name] for name in trained])
    return _build_catalog(path, weights, ties, optimizer, FULL)


def _build_catalog(
    path: Path,
    weights: Mapping[str, FileTensor],
    ties: Mapping[str, str],
    optimizer: Optimizer | None,
    layout: DcpLayout,
) -> Catalog:
    return Catalog(
        path=path,
        format="dcp",
        step=_find_step(path),
        weights={name: ref for name, ref in weights.items() if name not in ties},
        ties=ties,
        states=optimizer.states if optimizer else {},
        optimizers=optimizer.as_refs() if optimizer else (),
        files=list_small_files(path, _is_carried),
        native=layout,
    )


def _is_carried(name: str) -> bool:
    return is_tokenizer(name) or _CARRIED.fullmatch(name) is not None


def _read_items(path: Path, directory: str) -> tuple[Item, ...]:
    place = path / directory / METADATA_NAME

    @cache
    def locate(name: str) -> ShardFile:
        try:
            real = resolve_source(path / directory / name, path)
        except NotFoundError as err:
            raise IncompleteError(
                "a shard file is missing",
                kind="missing-shard",
                path=path / directory / name,
                expected=f"all files that {METADATA_NAME} names",
                hint="copy the missing files from the source again; each rank may have written to its own disk",
            ) from err
        descriptor = open_source(real)
        try:
            return ShardFile(path=real, nbytes=os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)

    tree = read_pickle(resolve_source(place, path))
    return parse_metadata(tree, path=place, directory=directory, locate=locate)


def _canonical_names(names: Collection[str], path: Path) -> dict[str, str]:
    canonical = {own: canonical_name(own) for own in names}
    if len({*canonical.values()}) != len(canonical):
        twice = next(name for name in canonical.values() if [*canonical.values()].count(name) > 1)
        raise FormatError("two tensors have one canonical name", kind="name-collision", path=path, fqn=twice)
    return canonical


def _count_ranks(contents: Contents) -> int:
    return max(1, len({chunk.blob.path for item in contents.weights.values() for chunk in item.chunks}))


def _find_step(path: Path) -> int | None:
    """Optimizer steps done: as the Trainer says, else as the directory is called."""
    if (path / _TRAINER_STATE).exists():
        state = _read_json(resolve_source(path / _TRAINER_STATE, path))
        step = state.get("global_step") if isinstance(state, dict) else None
        if type(step) is not int or step < 0:
            raise FormatError(
                "the trainer's state does not say at which step it was saved",
                kind="trainer-state",
                path=path / _TRAINER_STATE,
                expected="global_step: a number",
                found=repr(step)[:200],
            )
        return step
    match = _STEP_IN_NAME.fullmatch(path.resolve().name)
    return int(match[1]) if match else None


def _read_json(path: Path) -> object:
    """Not strictly: a loss that was NaN once stands in the Trainer's log ever after."""
    with open(open_source(path), "rb") as file:
        text = file.read(_MAX_JSON_NBYTES)
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise FormatError("not JSON", kind="bad-json", path=path, found=str(err)[:200]) from err
    return value
