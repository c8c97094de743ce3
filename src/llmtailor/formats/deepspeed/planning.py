"""A new DeepSpeed checkpoint, planned from any catalog."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...catalog import Catalog, SmallFile
from ...file_plan import CheckpointPlan, FilePlan, FileRange
from ...tensors import ByteRange
from .common_steps import CommonSteps
from .engine_state import ENGINE_STATE_NAME
from .flat_contents import fill_flats
from .places import LATEST_NAME
from .rank_files import plan_model_file, plan_optim_file
from .target import Target, decide_target
from .weights_beside import is_weights_file, plan_weights

__all__ = ["plan_deepspeed"]

# Source: transformers 5.23, trainer.py (_save_rng_state).
_RNG_OF_RANK = re.compile(r"rng_state_(\d+)\.pth")


def plan_deepspeed(
    catalog: Catalog,
    *,
    ranks: int | None = None,
    stage: int | None = None,
    own_steps: bool = False,
    dtype: str = "BF16",
) -> CheckpointPlan:
    """Plan a checkpoint that DeepSpeed's engine, and the HF Trainer with it, resumes from.

    What is no tensor of a parameter is taken over from the checkpoint of ``catalog.native``, if that is of DeepSpeed:
    loss scale, options of the groups, learning rate schedule, configuration. Module weights, masters and safetensors
    all come from the catalog.

    A flat tensor has one step count: that of the native checkpoint, else the largest. Parameters that were saved at
    another one go on with it, their Adam moments rescaled (see ``common_steps``).

    Args:
        catalog: Of any format, with optimizer state.
        ranks: Number of processes that will train; None for that of the native checkpoint.
        stage: 1, 2 or 3; None for that of the native checkpoint, else 2.
        own_steps: Refuse rather than rescale.
        dtype: Element type of the model's weights where there is no native checkpoint, ``BF16`` or ``F32``.

    Raises:
        InvalidInputError: The number of ranks or the stage makes no sense, or nothing says it.
        IncompleteError: Optimizer state or weights are missing.
        IncompatibleError: Something has no place in a flat tensor: other types, or step counts to be kept.
        UnsupportedError: Optimizer state that is not of the parameters' shapes, several optimizers, fp16 from another
            format.
    """
    target = decide_target(catalog, ranks=ranks, stage=stage, dtype=dtype)
    steps = CommonSteps(catalog.path, own_steps=own_steps)
    contents = fill_flats(catalog, target, steps)
    files = [plan_optim_file(rank, target, contents) for rank in range(target.ranks)]
    files += [plan_model_file(rank, target, catalog) for rank in range(target.ranks if target.stage == 3 else 1)]
    files.append(FilePlan(name=LATEST_NAME, parts=(target.tag.encode(),)))
    if target.has_weights_files:
        files += plan_weights(target.weights)
    kept = [file for file in catalog.files if _is_kept(file, target)]
    files += [_copy(file) for file in kept]
    return CheckpointPlan(files=tuple(files), notes=(*steps.notes(), *_notes(catalog, target, kept)))


def _is_kept(file: SmallFile, target: Target) -> bool:
    found = _RNG_OF_RANK.fullmatch(file.name)
    if found is not None:
        return int(found[1]) < target.ranks
    return file.name not in (LATEST_NAME, ENGINE_STATE_NAME) and not is_weights_file(file.name)


def _copy(file: SmallFile) -> FilePlan:
    return FilePlan(name=file.name, parts=(FileRange(path=file.path, byte_range=ByteRange(start=0, end=file.nbytes)),))


def _notes(catalog: Catalog, target: Target, kept: list[SmallFile]) -> Iterator[str]:
    donor = target.donor
    with_rng = {int(found[1]) for file in kept if (found := _RNG_OF_RANK.fullmatch(file.name))}
    without = [rank for rank in range(target.ranks) if rank not in with_rng]
    if with_rng and without:
        one = len(without) == 1
        yield (
            f"{'rank' if one else 'ranks'} {', '.join(map(str, without))} {'has' if one else 'have'} no random state, "
            f"and {'starts' if one else 'start'} with {'its' if one else 'their'} seed"
        )
    if donor is not None and donor.ranks != target.ranks:
        yield f"cut for {target.ranks} {'rank' if target.ranks == 1 else 'ranks'} instead of {donor.ranks}"
    if donor is not None and donor.stage != target.stage:
        yield f"written for ZeRO stage {target.stage} instead of {donor.stage}"
    made = sum(fqn not in catalog.masters for group in target.groups for fqn in group.parameters)
    if made:
        yield f"the fp32 masters of {made} parameters are their weights"
