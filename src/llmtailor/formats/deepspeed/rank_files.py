"""The trees of the ranks' files: those of a template with new tensors, or new ones from nothing.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py and stage3.py (state_dict, _load_legacy_checkpoint,
_rigid_load_state_dict), runtime/bf16_optimizer.py (state_dict), runtime/engine.py (_common_checkpoint_state,
_save_zero_checkpoint, _load_checkpoint).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from ...catalog import Catalog
from ...file_plan import FilePlan
from ...tensor_refs import FileTensor
from ...tensors import TensorMeta
from ..torch_files import Global, Instance, Size, TorchTensor, Tree, metadata_of, write_option
from .engine_state import read_engine_state
from .flat_contents import FlatContent
from .flat_files import FlatFile
from .partitions import FlatLayout, cut_each, keep_whole
from .places import model_name, optim_name
from .rank_trees import open_model_states
from .target import Target, bring_to

__all__ = ["plan_model_file", "plan_optim_file"]

# The version whose files are written where there is no template.
_VERSION = "0.19.8"
_FRAGMENT = Global("deepspeed.utils.tensor_fragment", "fragment_address")
_STAGE = Global("deepspeed.runtime.zero.config", "ZeroStageEnum")
_LOSS_SCALER = Global("deepspeed.runtime.fp16.loss_scaler", "LossScaler")
# Of what a ZeRO optimizer saves: what means the same at every stage.
_STAGELESS = ("loss_scaler", "dynamic_loss_scale", "overflow")


def plan_optim_file(rank: int, target: Target, contents: Sequence[FlatContent]) -> FilePlan:
    """A rank's file of optimizer states.

    Raises:
        UnsupportedError: The template holds objects that nobody vouches for.
    """
    file = FlatFile()
    template, donor = target.template, target.donor
    # A rank that the template does not have is like the first.
    like = rank if donor is not None and rank < donor.ranks else 0
    content: dict[str, Tree] = {"optimizer_state_dict": None, "ds_config": _config(target), "ds_version": _VERSION}
    if donor is not None:
        content.update({key: value for key, value in donor.optim[like].items() if key != "optimizer_state_dict"})
        content["ds_config"] = _config(target)
    old = {} if donor is None else donor.optim[like]["optimizer_state_dict"]
    if template is not None:
        zero = dict(old)
    elif target.stage == 3:
        zero = _new_partitioned(old)
    else:
        zero = _new_flat(old, target)
    if target.stage == 3:
        _fill_partitioned(zero, rank, target, contents, file)
    else:
        _fill_flat(zero, rank, target, contents, file)
    content["optimizer_state_dict"] = zero
    name = f"{target.tag}/{optim_name(rank, has_bf16_name=target.has_bf16_name)}"
    return file.plan(name, content)


def _config(target: Target) -> Tree:
    donor = target.donor
    if donor is not None and (target.template is not None or not isinstance(donor.optim[0].get("ds_config"), dict)):
        return donor.optim[0].get("ds_config")
    config = {} if donor is None else dict(donor.optim[0]["ds_config"])
    zero = config.get("zero_optimization")
    config["zero_optimization"] = {**(zero if isinstance(zero, dict) else {}), "stage": target.stage}
    if donor is None:
        config["bf16"] = {"enabled": target.has_bf16_name}
    return config


def _new_flat(old: Mapping[str, Tree], target: Target) -> dict[str, Tree]:
    """Stages 1 and 2. What is left out the engine keeps as it is configured: loss scale, clipping, alignment."""
    zero = {key: old[key] for key in (*_STAGELESS, "clip_grad") if key in old}
    zero |= {"base_optimizer_state": None, "single_partition_of_fp32_groups": None}
    zero |= {"zero_stage": Instance(_STAGE, (target.stage,), is_call=True), "group_paddings": None}
    if any(any(flat.paddings) for flat in target.flats):
        zero["param_alignment_paddings"] = None
    return zero | {"partition_count": None, "ds_version": _VERSION, "param_slice_mappings": None}


def _new_partitioned(old: Mapping[str, Tree]) -> dict[str, Tree]:
    """Stage 3, whose engine wants to be told a loss scale: none."""
    scaler = Instance(_LOSS_SCALER, state={"cur_scale": 1.0, "dynamic": False})
    stageless = {"loss_scaler": scaler, "dynamic_loss_scale": False, "overflow": False}
    stageless |= {key: old[key] for key in _STAGELESS if key in old}
    return {"zero_stage": Instance(_STAGE, (3,), is_call=True), **stageless}


def _fill_flat(
    zero: dict[str, Tree], rank: int, target: Target, contents: Sequence[FlatContent], file: FlatFile
) -> None:
    base = zero["base_optimizer_state"]
    # Of DeepSpeed's two optimizers one cuts the padding off; the other tells it of the last rank alone.
    is_cut = "zero_stage" in zero
    is_elastic = isinstance(base, list)
    states = [_state(content, rank, file, is_cut=is_elastic) for content in contents]
    zero["base_optimizer_state"] = states if is_elastic else _optimizer(base, target, states)
    zero["single_partition_of_fp32_groups"] = [_master(content, rank, file, is_cut=is_cut) for content in contents]
    zero["group_paddings"] = [_padding(content, rank, is_cut=is_cut) for content in contents]
    if "param_alignment_paddings" in zero:
        zero["param_alignment_paddings"] = [list(content.flat.paddings) for content in contents]
    zero["partition_count"] = [target.ranks] * len(contents)
    zero["param_slice_mappings"] = [_slice_mapping(content, rank, target) for content in contents]


def _fill_partitioned(
    zero: dict[str, Tree], rank: int, target: Target, contents: Sequence[FlatContent], file: FlatFile
) -> None:
    states = [_state(content, rank, file, is_cut=False) for content in contents]
    zero["partition_count"] = target.ranks
    zero["optimizer_state_dict"] = _optimizer(zero.get("optimizer_state_dict"), target, states)
    zero["fp32_flat_groups"] = [_master(content, rank, file, is_cut=False) for content in contents]


def _optimizer(base: Tree, target: Target, states: Sequence[Mapping[str, Tree]]) -> Tree:
    """What torch's optimizer saves: the states by number, and the groups with the numbers of their flat tensors."""
    old = base if isinstance(base, dict) else {}
    groups = []
    for index, group in enumerate(target.groups):
        options = {key: write_option(value) for key, value in group.options.items()}
        if "param_groups" in old:
            options = {key: value for key, value in old["param_groups"][index].items() if key != "params"}
        groups.append({**options, "params": [i for i, flat in enumerate(target.flats) if flat.group == index]})
    return {**old, "state": {index: state for index, state in enumerate(states) if state}, "param_groups": groups}


def _master(content: FlatContent, rank: int, file: FlatFile, *, is_cut: bool) -> TorchTensor:
    layout = content.layout
    numel = layout.filled[rank] if is_cut else layout.partition
    return file.join(content.masters, layout.pieces[rank], numel=numel, dtype=content.dtype, requires_grad=True)


def _state(content: FlatContent, rank: int, file: FlatFile, *, is_cut: bool) -> dict[str, Tree]:
    state: dict[str, Tree] = {}
    whole = keep_whole(content.flat.parameters, content.layout) if content.whole else None
    for name in content.names:
        if name in content.numbers:
            state[name] = content.numbers[name]
            continue
        tensors = content.states[name]
        layout: FlatLayout = whole if whole is not None and name in content.whole else content.layout
        numel = layout.filled[rank] if is_cut or name in content.whole else layout.partition
        dtype = next(iter(tensors.values())).meta.dtype
        state[name] = file.join(tensors, layout.pieces[rank], numel=numel, dtype=dtype)
    return state


def _padding(content: FlatContent, rank: int, *, is_cut: bool) -> int:
    layout = content.layout
    if is_cut:
        return layout.padding(rank)
    total = sum(numel for _, numel in content.flat.parameters)
    return layout.partition * layout.ranks - total if rank == layout.ranks - 1 else 0


def _slice_mapping(content: FlatContent, rank: int, target: Target) -> OrderedDict[str, Tree]:
    """Name -> place in the rank's partition, in the group's order."""
    pieces = {piece.fqn: piece for piece in content.layout.pieces[rank]}
    return OrderedDict(
        (target.raw(fqn), Instance(_FRAGMENT, state={"numel": pieces[fqn].numel, "start": pieces[fqn].at}))
        for fqn in target.groups[content.flat.group].parameters
        if fqn in pieces
    )


def plan_model_file(rank: int, target: Target, catalog: Catalog) -> FilePlan:
    """A file of model states: the only one at stages 1 and 2, a rank's at stage 3.

    Raises:
        FormatError: That rank's file of the template is damaged.
        UnsupportedError: The template holds objects that nobody vouches for.
    """
    file = FlatFile()
    donor = target.donor
    old: Mapping[str, Tree] = {}
    if donor is not None:
        has_own = 0 < rank < len(donor.model_paths)
        old = open_model_states(donor.model_paths[rank], donor.model) if has_own else donor.model
    content: dict[str, Tree] = dict(old) if old else _new_model_states(catalog)
    shapes = [
        OrderedDict((target.raw(fqn), Size(target.weights[fqn].meta.shape)) for fqn, _ in flat.parameters)
        for flat in target.flats
    ]
    content["module"] = _module(old.get("module"), target, catalog)
    content["param_shapes"] = shapes
    # DeepSpeed looks for shared parameters on rank 0 alone.
    ties = catalog.ties if rank == 0 else {}
    content["shared_params"] = {target.raw(name): target.raw(first) for name, first in ties.items()}
    content["dp_world_size"] = target.ranks
    content["ds_config"] = _config(target)
    if target.template is None or content.get("frozen_param_shapes") is not None:
        _fill_frozen(content, rank, target, file)
    return file.plan(f"{target.tag}/{model_name(rank, target.stage)}", content)


def _new_model_states(catalog: Catalog) -> dict[str, Tree]:
    """What the engine asks for; without global_samples it counts them from the steps."""
    return {
        "module": None,
        "buffer_names": sorted(catalog.buffers),
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": None,
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": catalog.step or 0,
        "dp_world_size": None,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": None,
        "ds_version": _VERSION,
        **read_engine_state(catalog),
    }


def _module(old: Tree, target: Target, catalog: Catalog) -> OrderedDict[str, Tree]:
    """The model's tensors in its order; at stage 3 empty ones in the place of parameters."""
    held = {target.raw(fqn): fqn for fqn in target.weights} | {
        target.raw(name): first for name, first in catalog.ties.items() if first in target.weights
    }
    is_same = isinstance(old, dict) and old.keys() == held.keys()
    module: OrderedDict[str, Tree] = OrderedDict()
    tensors: dict[str, TorchTensor] = {}
    for name in old if is_same else held:
        fqn = held[name]
        if fqn not in tensors:
            # Where it was kept in another type, the next step would bring it there anyway.
            dtype = old[name].ref.meta.dtype if is_same else target.weights[fqn].meta.dtype
            tensors[fqn] = _module_tensor(fqn, dtype, target, catalog)
        module[name] = tensors[fqn]
    if isinstance(old, OrderedDict) and is_same and metadata_of(old) is not None:
        vars(module)["_metadata"] = metadata_of(old)
    return module


def _module_tensor(fqn: str, dtype: str, target: Target, catalog: Catalog) -> TorchTensor:
    if target.stage == 3 and fqn not in target.buffers:
        return TorchTensor(ref=FileTensor(meta=TensorMeta(dtype=dtype, shape=(0,)), extents=()))
    return TorchTensor(ref=bring_to(target.weights[fqn], dtype, fqn=fqn, path=catalog.path))


def _fill_frozen(content: dict[str, Tree], rank: int, target: Target, file: FlatFile) -> None:
    """Parameters without an optimizer: whole at stage 2, a fragment for each rank at stage 3."""
    if target.stage == 1:
        content["frozen_param_shapes"] = content["frozen_param_fragments"] = None
        return
    shapes: OrderedDict[str, Tree] = OrderedDict()
    fragments: OrderedDict[str, Tree] = OrderedDict()
    for fqn in target.frozen:
        tensor = target.weights[fqn]
        shapes[target.raw(fqn)] = Size(tensor.meta.shape)
        if target.stage == 3:
            layout = cut_each([(fqn, tensor.meta.numel)], target.ranks)
            fragment = file.join({fqn: tensor}, layout.pieces[rank], numel=layout.partition, dtype=tensor.meta.dtype)
        else:
            fragment = TorchTensor(ref=tensor)
        fragments[target.raw(fqn)] = fragment
    content["frozen_param_shapes"], content["frozen_param_fragments"] = shapes, fragments
