"""A DeepSpeed checkpoint, opened: what it holds by name, and the rest of it for the planner."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...catalog import Catalog, GroupRef, OptimizerRef, StateRef
from ...errors import UnsupportedError
from ...layers import canonical_name
from ...tensor_refs import FileTensor, TensorRef
from ..small_files import list_small_files
from ..small_names import is_tokenizer, is_weights
from ..torch_files import TorchTensor, Tree, read_option, read_state
from .fields import refuse, require, require_list_of, require_shape
from .flat_states import gather, gather_states
from .module_weights import gather_frozen, module_shapes, partitioned_weights, whole_weights
from .native import Flat, Native
from .partitions import FlatLayout, cut_each, cut_evenly, undeal
from .places import find_place, find_rank_files
from .rank_trees import RankTrees, open_model_states, open_trees
from .weights_beside import check_same_tensors, read_weights

__all__ = ["open_deepspeed"]

# Of a parameter group: what no option is.
_GROUP_PARAMS, _GROUP_STEP = "params", "step"
# Others' weights lie beside some checkpoints (zero_to_fp32.py makes them), and are not those of one made from it.
_CARRIED = re.compile(
    r".*\.(?:pt|pth|pkl)|(?:training_args|scheduler|sampler|dl_state_dict)[^/]*\.bin|.*\.(?:json|jsonl|txt|md|yaml|yml)"
)


def open_deepspeed(path: Path, *, with_optimizer: bool = True) -> Catalog:
    """Open a checkpoint of DeepSpeed; reads the pickles of all ranks, and of tensors only the step counts.

    Args:
        path: ``checkpoint-N`` of the HF Trainer, what ``engine.save_checkpoint`` was given, or the directory of a tag.
        with_optimizer: Whether its state is read; for weights alone it need not be understood. The masters, which are
            weights, are read all the same.

    Returns:
        ``weights``: at stages 1 and 2 those of the model states; at stage 3 the safetensors beside, or where there are
        none the masters, rounded. ``masters``: the fp32 partitions.

    Raises:
        NotFoundError: There is none.
        FormatError: A file is damaged, hostile, or its ranks differ.
        IncompleteError: A rank's file is missing.
        IncompatibleError: The safetensors beside are of another model.
        UnsupportedError: Tensor or expert parallelism, hpZ, MiCS, NVMe offload, a universal checkpoint, or optimizer
            state that mixes parameters.
    """
    place = find_place(path)
    files = find_rank_files(place.tag_dir)
    source = open_trees(files, place.tag_dir)
    names = _read_names(source)
    flats = _read_flats(source, names)
    layouts = [_lay_out(flat, source) for flat in flats]
    shapes = {fqn: shape for held in names.shapes for fqn, shape in held.items()}
    masters: dict[str, TensorRef] = {}
    states: dict[str, StateRef] = {}
    for index, (flat, layout) in enumerate(zip(flats, layouts, strict=True)):
        own = {fqn: shapes[fqn] for fqn, _ in flat.parameters}
        masters.update(_gather_masters(source, index, layout, own))
        if with_optimizer:
            states.update(_gather_states(source, index, flat.group, layout, own))
    order = [fqn for fqn in names.module if fqn in shapes]
    beside = None if place.root == place.tag_dir else read_weights(place.root)
    weights = _read_module(source, names, masters, beside, place.root)
    return Catalog(
        path=path,
        format="deepspeed",
        step=require(source.model, "global_steps", int, source.model_paths[0]),
        weights=weights,
        buffers=names.buffers,
        ties=names.ties,
        masters={fqn: masters[fqn] for fqn in order},
        states={fqn: states[fqn] for fqn in order if fqn in states},
        optimizers=(OptimizerRef(name=None, groups=tuple(_read_groups(source, flats))),) if with_optimizer else (),
        files=() if place.root == place.tag_dir else list_small_files(place.root, _is_small_file),
        native=Native(
            tag=place.tag,
            stage=source.stage,
            optim=source.optim,
            model=source.model,
            model_paths=source.model_paths,
            flats=tuple(flats),
            raw_names=names.raw,
            has_bf16_name=files.has_bf16_name,
            has_weights_files=beside is not None,
        ),
    )


def _read_module(
    source: RankTrees,
    names: _Names,
    masters: Mapping[str, TensorRef],
    beside: Mapping[str, FileTensor] | None,
    root: Path,
) -> dict[str, TensorRef]:
    """The weights, in the model's order."""
    trained = {fqn: shape for held in names.shapes for fqn, shape in held.items()}
    path = source.model_paths[0]
    same: dict[str, TensorRef] = {}
    if beside is not None:
        shapes = module_shapes(names.module, trained, names.frozen)
        same = {fqn: beside[name] for fqn, name in check_same_tensors(beside, shapes, names.ties, root).items()}
    if source.stage != 3:
        return whole_weights(names.module, trained, path)
    needed = {fqn: shape for fqn, shape in names.frozen.items() if fqn not in same}
    others = [open_model_states(each, source.model) for each in source.model_paths[1:]] if needed else []
    frozen = gather_frozen([source.model, *others], source.model_paths, needed, names.raw) if needed else {}
    return partitioned_weights(names.module, same, masters, frozen, path)


def _is_small_file(name: str) -> bool:
    return not is_weights(name) and (is_tokenizer(name) or _CARRIED.fullmatch(name) is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """The tensors of the model, by canonical name."""

    raw: Mapping[str, str]
    """Canonical name -> name in the files, where they differ."""
    module: Mapping[str, TorchTensor]
    """The model states of rank 0, in the model's order; at stage 3 empty but for buffers. Tied ones once."""
    shapes: Sequence[Mapping[str, tuple[int, ...]]]
    """Of the trained parameters, by flat tensor and in its order."""
    frozen: Mapping[str, tuple[int, ...]]
    """Of parameters that no optimizer has, where the file says which."""
    buffers: frozenset[str]
    ties: Mapping[str, str]


def _read_names(source: RankTrees) -> _Names:
    model, path = source.model, source.model_paths[0]
    raw: dict[str, str] = {}

    def canonical(name: str) -> str:
        short = canonical_name(name)
        if raw.setdefault(short, name) != name:
            raise refuse("two parameters have one name", path, expected=raw[short], found=name, fqn=short)
        return short

    module = {}
    for name, tensor in require(model, "module", dict, path).items():
        require_shape(name, (), path)
        if not isinstance(tensor, TorchTensor):
            raise UnsupportedError(
                "the model states hold something that is not a plain tensor",
                kind="module-entry",
                path=path,
                fqn=name,
                expected="a tensor",
                found=type(tensor).__name__,
            )
        module[canonical(name)] = tensor
    shapes = []
    for held in require_list_of(model, "param_shapes", dict, path):
        pairs = (require_shape(name, shape, path) for name, shape in held.items())
        shapes.append({canonical(name): shape for name, shape in pairs})
    _require_once(shapes, path)
    frozen = {}
    for name, shape in _optional_mapping(model, "frozen_param_shapes", path).items():
        require_shape(name, shape, path)
        frozen[canonical(name)] = tuple(shape)
    shared = _optional_mapping(model, "shared_params", path)
    ties = {canonical(str(name)): canonical(str(first)) for name, first in shared.items()}
    ties = _direct_ties(ties, module)
    buffers = {canonical(name) for name in require_list_of(model, "buffer_names", str, path)}
    return _Names(
        raw={short: name for short, name in raw.items() if short != name},
        module={name: tensor for name, tensor in module.items() if name not in ties},
        shapes=shapes,
        frozen={name: shape for name, shape in frozen.items() if name not in ties},
        buffers=frozenset(buffers & module.keys()),
        ties=ties,
    )


def _optional_mapping(tree: Tree, key: str, path: Path) -> Mapping[Any, Tree]:
    """The dict at a key; an empty one where there is none, or None."""
    return {} if tree.get(key) is None else require(tree, key, dict, path)


def _require_once(shapes: Sequence[Mapping[str, object]], path: Path) -> None:
    seen: set[str] = set()
    for held in shapes:
        if twice := seen & held.keys():
            raise refuse("a parameter is in two groups", path, expected="one group", found="two", fqn=min(twice))
        seen |= held.keys()


def _direct_ties(ties: Mapping[str, str], module: Mapping[str, TorchTensor]) -> dict[str, str]:
    """The ties that are some: DeepSpeed takes empty parameters, which have no address, for one and the same."""
    return {
        name: first
        for name, first in ties.items()
        if name != first
        and first not in ties
        and name in module
        and first in module
        and module[name].ref.meta == module[first].ref.meta
    }


def _read_flats(source: RankTrees, names: _Names) -> list[Flat]:
    """The flat tensors, and the optimizer's group of each."""
    zero, path = source.zero(0), source.optim_paths[0]
    counts = {len(source.partitions(rank)) for rank in range(source.ranks)}
    if counts != {len(names.shapes)}:
        raise refuse(
            "the number of partitions is not that of the groups", path, expected=len(names.shapes), found=counts
        )
    paddings: Sequence[Tree] = [[0] * len(held) for held in names.shapes]
    if source.stage != 3 and "param_alignment_paddings" in zero:
        paddings = require_list_of(zero, "param_alignment_paddings", list, path)
    if [len(each) for each in paddings] != [len(held) for held in names.shapes] or not all(
        type(padding) is int and 0 <= padding < 64 for each in paddings for padding in each
    ):
        raise refuse("the alignment is malformed", path, expected="a small number for each parameter", found=paddings)
    groups = _groups_of_flats(source, len(names.shapes), 0)
    for rank in range(1, source.ranks):
        if (found := _groups_of_flats(source, len(names.shapes), rank)) != groups:
            raise refuse("the groups of the ranks differ", source.optim_paths[rank], expected=groups, found=found)
    return [
        Flat(
            parameters=tuple((fqn, math.prod(shape)) for fqn, shape in held.items()),
            paddings=tuple(padding),
            group=group,
        )
        for held, padding, group in zip(names.shapes, paddings, groups, strict=True)
    ]


def _groups_of_flats(source: RankTrees, count: int, rank: int) -> list[int]:
    """The group of each flat tensor: the optimizer's parameters are the flat tensors, group by group."""
    base, path = source.base(rank), source.optim_paths[rank]
    if isinstance(base, list):
        return list(range(count))
    found = []
    members: list[object] = []
    for index, group in enumerate(require_list_of(base, "param_groups", dict, path)):
        params = require_list_of(group, _GROUP_PARAMS, int, path)
        members.extend(params)
        found.extend([index] * len(params))
    if members != list(range(count)):
        raise refuse("the groups do not fit the partitions", path, expected=f"0 to {count - 1}", found=members[:20])
    return found


def _lay_out(flat: Flat, source: RankTrees) -> FlatLayout:
    if source.stage == 3:
        return cut_each(flat.parameters, source.ranks)
    return cut_evenly(flat.parameters, flat.paddings, source.ranks)


def _gather_masters(
    source: RankTrees, index: int, layout: FlatLayout, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, FileTensor]:
    tensors = [source.partitions(rank)[index] for rank in range(source.ranks)]
    if layout.partition and not any(tensor.ref.meta.numel for tensor in tensors):
        raise UnsupportedError(
            "the optimizer's state was offloaded, and is not in the checkpoint",
            kind="offloaded",
            path=source.optim_paths[0],
            expected=f"{layout.partition} elements on each rank",
            found="none",
            hint="DeepSpeed keeps what it swapped to NVMe out of these files",
        )
    return gather(tensors, layout, shapes, source.optim_paths)


def _gather_states(
    source: RankTrees, index: int, group: int, layout: FlatLayout, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, StateRef]]:
    states = [source.state(rank, index) for rank in range(source.ranks)]
    for fqn, state in gather_states(states, layout, shapes, source.optim_paths).items():
        # DeepSpeed's FusedAdam of old counts in the group alone.
        step = None if "step" in state else _group_step(source, group)
        yield fqn, read_state(state if step is None else {**state, "step": step}, fqn)


def _group_step(source: RankTrees, group: int) -> Tree:
    base = source.base(0)
    if isinstance(base, list):
        return source.zero(0).get("base_optimizer_state_step")
    found = base["param_groups"][group].get(_GROUP_STEP)
    return found if type(found) is int else None


def _read_groups(source: RankTrees, flats: Sequence[Flat]) -> Iterator[GroupRef]:
    """The optimizer's groups, with the parameters in the order in which it was given them."""
    base = source.base(0)
    options: Sequence[Mapping[str, Tree]] = [{} for _ in flats] if isinstance(base, list) else base["param_groups"]
    is_dealt = source.stage != 3 and _setting(source, "round_robin_gradients") is True
    for index, option in enumerate(options):
        parameters: list[str] = []
        for flat in flats:
            if flat.group == index:
                fqns = [fqn for fqn, _ in flat.parameters]
                parameters += undeal(fqns, source.ranks) if is_dealt else fqns
        kept = {str(key): value for key, value in option.items() if key not in (_GROUP_PARAMS, _GROUP_STEP)}
        path = source.optim_paths[0]
        yield GroupRef(
            parameters=tuple(parameters),
            options={key: _read_option(key, value, path) for key, value in kept.items()},
        )


def _read_option(name: str, value: Tree, path: Path) -> object:
    try:
        return read_option(value)
    except UnsupportedError as err:
        raise UnsupportedError(
            f"the option {name[:80]!r} of a parameter group is of a type that has no form elsewhere",
            kind=err.kind,
            path=path,
            expected="a number, text, or a list, tuple or dict of these",
            found=err.found,
        ) from err


def _setting(source: RankTrees, key: str) -> Tree:
    config = source.optim[0].get("ds_config")
    zero_config = config.get("zero_optimization") if isinstance(config, dict) else None
    return zero_config.get(key) if isinstance(zero_config, dict) else None
