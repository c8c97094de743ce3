"""The files of all ranks, opened: trees that agree on stage and number of ranks, and are of a kind we read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UnsupportedError
from ..torch_files import Instance, TorchTensor, Tree, open_torch_file
from .fields import refuse, require, require_list_of, require_tensors
from .places import RankFiles

__all__ = ["RankTrees", "open_model_states", "open_trees"]

# Settings under which a rank's partition is not what it is without them.
# Source: DeepSpeed 0.19.8, runtime/zero/config.py (zero_hpz_partition_size, mics_shard_size).
_PARTITION_SETTINGS = {"zero_hpz_partition_size": 1, "mics_shard_size": -1}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTrees:
    """The trees of all ranks' files."""

    stage: int
    optim: tuple[Mapping[str, Tree], ...]
    optim_paths: tuple[Path, ...]
    model: Mapping[str, Tree]
    """Of rank 0. Those of the others say nothing new, and at stage 3 take long; see ``open_model_states``."""
    model_paths: tuple[Path, ...]
    """One at stages 1 and 2."""

    @property
    def ranks(self) -> int:
        return len(self.optim)

    def zero(self, rank: int) -> Mapping[str, Tree]:
        """What the ZeRO optimizer of a rank saved."""
        return require(self.optim[rank], "optimizer_state_dict", dict, self.optim_paths[rank])

    def base(self, rank: int) -> Tree:
        """What the optimizer inside it saved; a list of states if the checkpoint is elastic."""
        key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        zero = self.zero(rank)
        if isinstance(zero.get(key), list):
            return require_list_of(zero, key, dict, self.optim_paths[rank])
        return require(zero, key, dict, self.optim_paths[rank])

    def state(self, rank: int, index: int) -> Mapping[str, Tree]:
        """What the optimizer of a rank holds of a flat tensor; empty if it never made a step."""
        base = self.base(rank)
        if isinstance(base, list):
            if index >= len(base):
                raise refuse("there are too few states", self.optim_paths[rank], expected=f"> {index}", found=len(base))
            return dict(base[index])
        states = require(base, "state", dict, self.optim_paths[rank])
        return require(states, index, dict, self.optim_paths[rank]) if index in states else {}

    def partitions(self, rank: int) -> Sequence[TorchTensor]:
        """A rank's partition of each flat tensor of masters."""
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        return require_tensors(self.zero(rank), key, self.optim_paths[rank])


def open_trees(files: RankFiles, tag_dir: Path) -> RankTrees:
    """Open the files of all ranks; what is missing is told before the first is opened in full."""
    first = next(iter(sorted(files.optim)))
    opened = {first: _open_mapping(files.optim[first])}
    stage = _read_stage(opened[first], files.optim[first])
    ranks = _read_ranks(opened[first], files.optim[first])
    files.require(ranks, stage, tag_dir)
    optim_paths = tuple(files.optim[rank] for rank in range(ranks))
    model_paths = (
        tuple(files.model_of_rank[rank] for rank in range(ranks)) if stage == 3 else tuple(filter(None, [files.model]))
    )
    optim = tuple(opened[rank] if rank in opened else _open_mapping(optim_paths[rank]) for rank in range(ranks))
    for tree, path in zip(optim, optim_paths, strict=True):
        found = (_read_stage(tree, path), _read_ranks(tree, path))
        if found != (stage, ranks):
            expected = f"stage {stage}, {ranks} ranks"
            raise refuse("the ranks differ", path, expected=expected, found=f"stage {found[0]}, {found[1]} ranks")
        _require_plain(tree, path)
    model = _open_mapping(model_paths[0])
    _require_plain_model(model, model_paths[0])
    return RankTrees(stage=stage, optim=optim, optim_paths=optim_paths, model=model, model_paths=model_paths)


def open_model_states(path: Path, first: Mapping[str, Tree]) -> Mapping[str, Tree]:
    """Open the model states of another rank than the first.

    Args:
        path: The file.
        first: Those of rank 0.

    Raises:
        FormatError: It is damaged, or of another model.
        UnsupportedError: Tensor or expert parallelism.
    """
    tree = _open_mapping(path)
    _require_plain_model(tree, path)
    if tree.get("param_shapes") != first["param_shapes"]:
        raise refuse("the ranks are of different models", path, expected="the shapes of rank 0", found="others")
    if not all(isinstance(value, TorchTensor) for value in require(tree, "module", dict, path).values()):
        raise refuse("the model states hold something else", path, expected="tensors", found="something else")
    return tree


def _open_mapping(path: Path) -> Mapping[str, Tree]:
    tree = open_torch_file(path)
    if not isinstance(tree, dict):
        raise refuse("it is no dict", path, expected="a dict", found=type(tree).__name__)
    return tree


def _read_stage(tree: Tree, path: Path) -> int:
    """1, 2 or 3.

    Source: DeepSpeed 0.19.8: runtime/zero/config.py (ZeroStageEnum, an int); runtime/bf16_optimizer.py (state_dict)
    writes none, and is used at stage 1 alone.
    """
    zero = require(tree, "optimizer_state_dict", dict, path)
    if "fp32_flat_groups" in zero:
        return 3
    require(zero, "single_partition_of_fp32_groups", list, path)
    found = zero.get("zero_stage", 1)
    if isinstance(found, Instance):
        found = found.arguments[0] if len(found.arguments) == 1 else None
    if found not in (1, 2):
        raise refuse("the stage is unknown", path, expected="1, 2 or 3", found=found)
    return int(found)


def _read_ranks(tree: Tree, path: Path) -> int:
    zero = require(tree, "optimizer_state_dict", dict, path)
    counts = zero.get("partition_count")
    if isinstance(counts, list) and counts and len(set(map(str, counts))) == 1:
        counts = counts[0]
    if isinstance(counts, list):
        raise UnsupportedError(
            "parameter groups are partitioned over different ranks, as with experts (MoE)",
            kind="model-parallel",
            path=path,
            expected="one partition_count for all groups",
            found=str(counts)[:200],
        )
    if type(counts) is not int:
        raise refuse("the number of ranks is unknown", path, expected="partition_count", found=type(counts).__name__)
    return counts


def _require_plain(tree: Tree, path: Path) -> None:
    config = tree.get("ds_config")
    zero_config = config.get("zero_optimization") if isinstance(config, dict) else None
    settings = zero_config if isinstance(zero_config, dict) else {}
    changed = [
        f"{key} {settings[key]}" for key, usual in _PARTITION_SETTINGS.items() if settings.get(key, usual) != usual
    ]
    if "ds_zero_partition_groups" in require(tree, "optimizer_state_dict", dict, path):
        changed.append("AutoEP")
    if changed:
        raise UnsupportedError(
            "checkpoints with partitions inside a group of ranks are not read",
            kind="partition-groups",
            path=path,
            expected="partitions over all ranks",
            found=", ".join(changed),
        )


def _require_plain_model(tree: Tree, path: Path) -> None:
    world = tree.get("mp_world_size", 1)
    experts = tree.get("num_experts")
    if world != 1 or experts:
        raise UnsupportedError(
            "checkpoints with parallel tensors or experts are not read",
            kind="model-parallel",
            path=path,
            expected="data parallelism with ZeRO alone",
            found=f"mp_world_size {world}" + (f", num_experts {experts}" if experts else ""),
            hint="gather the weights with the framework's own tools, and merge those",
        )
