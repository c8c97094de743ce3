"""What a DeepSpeed engine keeps where: its parameters by name, its flats, its optimizer. Never imports DeepSpeed.

Source:
    DeepSpeed 0.19.8, runtime/engine.py (zero_optimization_stage, module), runtime/zero/stage_1_and_2.py (__init__:
    round_robin_bit16_groups, round_robin_bit16_padding, parallel_partitioned_bit16_groups,
    single_partition_of_fp32_groups), runtime/bf16_optimizer.py (_setup_for_real_optimizer), runtime/zero/stage3.py
    (_create_fp16_partitions_with_defragmentation, _create_fp32_partitions, sub_group_to_group_id),
    runtime/zero/partition_parameters.py (_partition_param: ds_tensor, ds_shape, ds_numel).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnsupportedError
from ..formats.deepspeed.partitions import FlatLayout, cut_each, cut_evenly
from ..layers import named_tensors
from .flats import Flat

__all__ = [
    "World",
    "find_flats",
    "find_groups",
    "find_world",
    "inner_optimizer",
    "name_parameters",
    "whole_shape",
]

_OPTIMIZERS = frozenset({"DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer"})


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The ranks that an engine spreads its state over."""

    stage: int
    rank: int
    ranks: int


def find_world(engine: Any) -> World:
    """Which ranks there are.

    Raises:
        UnsupportedError: The engine does not run ZeRO, or spreads its state in a way that is not known here.
    """
    zero = engine.optimizer
    stage = int(engine.zero_optimization_stage())
    if type(zero).__name__ not in _OPTIMIZERS:
        raise _refuse(f"stage {stage}, {type(zero).__name__}")
    group = zero.dp_process_group
    world = World(stage=stage, rank=torch.distributed.get_rank(group), ranks=torch.distributed.get_world_size(group))
    if world.ranks != torch.distributed.get_world_size():
        raise _refuse(f"data parallel over {world.ranks} of {torch.distributed.get_world_size()} ranks")
    if getattr(engine, "has_moe_layers", False):
        raise _refuse("experts spread over ranks")
    if getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False):
        raise _refuse("state on an NVMe drive")
    if getattr(zero, "offloaded_states", None):
        raise _refuse("states that engine.offload_states() moved away")
    return world


def _refuse(found: str) -> UnsupportedError:
    return UnsupportedError(
        "the state of this DeepSpeed engine cannot be read",
        kind="deepspeed-engine",
        expected="ZeRO of stage 1, 2 or 3 over all ranks, in memory, without expert, tensor or pipeline parallelism",
        found=found,
    )


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that updates the partitions; its parameters are ``Flat.master``."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    return optimizer


def name_parameters(module: torch.nn.Module) -> dict[torch.Tensor, str]:
    """Parameters and buffers -> fqn, canonical, in model order; a tied one by its first name.

    Raises:
        IncompatibleError: Two different tensors have one canonical name.
    """
    names: dict[torch.Tensor, str] = {}
    for fqn, tensor in named_tensors(module).items():
        names.setdefault(tensor, fqn)
    return names


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of a parameter as the model wrote it; at stage 3 its own is [0] while it is not gathered."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def find_flats(engine: Any, names: Mapping[torch.Tensor, str], world: World) -> list[Flat]:
    """The flats of an engine, in the order of the optimizer's groups.

    Args:
        engine: The engine.
        names: As ``name_parameters``.
        world: As ``find_world``.

    Raises:
        UnsupportedError: The partitions are not of the sizes that follow from the parameters.
    """
    flats = [*(_flats_of_3(engine.optimizer, names, world) if world.stage == 3 else _flats(engine, names, world))]
    for flat in flats:
        if not flat.master.numel() == flat.weights.numel() == flat.layout.partition:
            raise _refuse(
                f"partitions of {flat.master.numel()} and {flat.weights.numel()} elements, expected "
                f"{flat.layout.partition}"
            )
    return flats


def find_groups(engine: Any, names: Mapping[torch.Tensor, str], world: World) -> list[tuple[str, ...]]:
    """The parameters of each of the optimizer's groups, in its order; without frozen ones, which have no state."""
    zero = engine.optimizer
    groups: list[tuple[str, ...]] = [() for _ in inner_optimizer(engine).param_groups]
    if world.stage == 3:
        parts = [(zero.sub_group_to_group_id[index], parameters) for index, parameters in enumerate(zero.fp16_groups)]
    else:
        parts = [*enumerate(zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups)]
    for index, parameters in parts:
        groups[index] += tuple(names[parameter] for parameter in parameters)
    return groups


def _flats(engine: Any, names: Mapping[torch.Tensor, str], world: World) -> Iterator[Flat]:
    zero = engine.optimizer
    if type(zero).__name__ == "BF16_Optimizer":
        orders, paddings = zero.bf16_groups, [[0] * len(group) for group in zero.bf16_groups]
        weights, masters = zero.bf16_partitioned_groups, zero.fp32_groups_flat_partition
    else:
        # Round-robin or not, this is the order in memory.
        orders, paddings = zero.round_robin_bit16_groups, zero.round_robin_bit16_padding
        weights, masters = zero.parallel_partitioned_bit16_groups, zero.single_partition_of_fp32_groups
    for group, parameters in enumerate(orders):
        shapes = {names[parameter]: whole_shape(parameter) for parameter in parameters}
        yield Flat(
            group=group,
            shapes=shapes,
            paddings=paddings[group],
            layout=_lay_evenly(_numels(shapes), tuple(paddings[group]), world.ranks),
            rank=world.rank,
            master=masters[group],
            weights=weights[group][world.rank],
        )


def _flats_of_3(zero: Any, names: Mapping[torch.Tensor, str], world: World) -> Iterator[Flat]:
    for index, parameters in enumerate(zero.fp16_groups):
        shapes = {names[parameter]: whole_shape(parameter) for parameter in parameters}
        yield Flat(
            group=zero.sub_group_to_group_id[index],
            shapes=shapes,
            paddings=(0,) * len(shapes),
            layout=_lay_each(_numels(shapes), world.ranks),
            rank=world.rank,
            master=zero.fp32_partitioned_groups_flat[index],
            weights=zero.fp16_partitioned_groups_flat[index],
        )


def _numels(shapes: Mapping[str, Sequence[int]]) -> tuple[tuple[str, int], ...]:
    return tuple((fqn, math.prod(shape)) for fqn, shape in shapes.items())


# An engine never changes how it lies, and a save asks each time.
@functools.lru_cache(maxsize=4096)
def _lay_evenly(parameters: tuple[tuple[str, int], ...], paddings: tuple[int, ...], ranks: int) -> FlatLayout:
    return cut_evenly(parameters, paddings, ranks)


@functools.lru_cache(maxsize=4096)
def _lay_each(parameters: tuple[tuple[str, int], ...], ranks: int) -> FlatLayout:
    return cut_each(parameters, ranks)
