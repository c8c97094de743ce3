"""A catalog of any format as a Hugging Face directory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...catalog import Catalog, GroupRef, SmallFile, StateRef, join_masters, weights_to_train
from ...errors import IncompatibleError, InvalidInputError, UnsupportedError
from ...file_plan import CheckpointPlan, FilePlan, FileRange
from ...tensor_refs import TensorRef, whole
from ...tensors import ByteRange
from ..safetensors import plan_layout
from ..small_names import is_tokenizer, is_training_state
from ..torch_files import plan_torch_file
from .asking import find_order
from .config import DTYPE_NAMES, ModelConfig, find_ties, parse_config, read_dtype, rewrite_config
from .json_files import read_text
from .optimizer import plan_optimizer
from .parameter_order import check_blocks
from .regrouping import Regrouping, fit_groups, fit_scheduler, for_torch_adam, new_scheduler
from .small_names import is_carried

__all__ = ["DEFAULT_SHARD_NBYTES", "plan_hf"]

DEFAULT_SHARD_NBYTES = 5_000_000_000
_RANK_FILE = re.compile(r"rng_state_\d+\.pth")
_OPTIMIZER, _SCHEDULER, _CONFIG = "optimizer.pt", "scheduler.pt", "config.json"


def plan_hf(
    catalog: Catalog,
    *,
    weights_only: bool = False,
    shard_nbytes: int = DEFAULT_SHARD_NBYTES,
    dtype: str | None = None,
    copy_tokenizer: bool = True,
    num_blocks: int | None = None,
) -> CheckpointPlan:
    """Describe a checkpoint that the stock Trainer resumes from, or a model directory.

    Small files alone are read (``config.json``; ``scheduler.pt`` inertly where its groups change). Where a source of
    another format kept fp32 master weights, these are written: the Trainer in one process trains fp32 weights.

    Args:
        catalog: What to write.
        weights_only: Leave out the optimizer and what only a training that resumes reads.
        shard_nbytes: Most bytes of tensors in one file, unless one tensor alone is larger.
        dtype: Element type of all parameters (``BF16`` or ``bfloat16``); None: as they are. Optimizer state stays
            what it is.
        copy_tokenizer: Whether the tokenizer's files are taken along.
        num_blocks: Of a model that was given another depth than ``config.json`` says; None: what that says holds. It is
            not counted in the weights, as blocks that the configuration does not count may stand beside the others.

    Returns:
        The plan, with notes on all that is not simply copied.

    Raises:
        InvalidInputError: No such element type, or shards of no size.
        IncompatibleError: Several optimizers, or groups that cannot be made the Trainer's, or nobody knows in which
            order the Trainer has this model's parameters.
        UnsupportedError: The number of blocks changed in a model whose blocks are of several kinds.
        IncompleteError: A model of a known family would lack a part of its blocks.
        FormatError: ``config.json`` or ``scheduler.pt`` is not what it claims to be.

    Source:
        transformers 5.23.0, trainer.py (_save_checkpoint), modeling_utils.py (save_pretrained).
    """
    if shard_nbytes <= 0:
        raise InvalidInputError("shards must have a size", kind="shard-size", expected="> 0", found=shard_nbytes)
    target = None if dtype is None else read_dtype(dtype)
    keeps_leaves = not weights_only and _keeps_leaves(catalog, target)
    weights, notes = _choose_weights(catalog, to_train=not weights_only, dtype=target, keeps_leaves=keeps_leaves)
    catalog = join_masters(catalog) if keeps_leaves else catalog
    small = [file for file in catalog.files if _is_wanted(file.name, weights_only, copy_tokenizer)]
    config = _read_config(small)
    _check_whole(config, num_blocks, weights, catalog)
    if not weights_only and target is None and notes:
        # Said in config.json as well, by which many programs build the model.
        target = _dtype_of(weights)
        notes.append("the Trainer in one process trains fp32 weights (with bf16=True under autocast), so build them so")
    notes += _depth_notes(config, num_blocks, catalog)
    files = [*_plan_small(small, config, num_blocks, target), *_plan_weights(weights, catalog, shard_nbytes)]
    if catalog.has_optimizer and not weights_only:
        planned = _plan_training(catalog, config, small)
        files = [*(file for file in files if file.name not in planned.replaced), *planned.files]
        notes += planned.notes
    return CheckpointPlan(files=tuple(files), notes=tuple(notes))


def _is_wanted(name: str, weights_only: bool, copy_tokenizer: bool) -> bool:
    if not is_carried(name):
        return False
    return not (weights_only and is_training_state(name)) and (copy_tokenizer or not is_tokenizer(name))


def _keeps_leaves(catalog: Catalog, dtype: str | None) -> bool:
    """Whether masters that were leaves of the optimizer's state are such in ``optimizer.pt``.

    They are where the source is of the same kind, and where they do not become the weights, so that nothing is lost.
    torch's AdamW, which goes on where DeepSpeed's did, has none.
    """
    is_of_deepspeed = any("deepspeed" in (optimizer.name or "") for optimizer in catalog.optimizers)
    return catalog.format == "hf" or (dtype in ("BF16", "F16") and not is_of_deepspeed)


def _choose_weights(
    catalog: Catalog, *, to_train: bool, dtype: str | None, keeps_leaves: bool
) -> tuple[dict[str, TensorRef], list[str]]:
    """Layer by layer in the model's order, so that a layer's tensors come to lie together."""
    source = catalog if to_train else replace(catalog, masters={})
    weights, notes = weights_to_train(source, dtype, keeps_leaves=keeps_leaves)
    kept = {fqn: catalog.weights[fqn] if fqn in catalog.buffers else tensor for fqn, tensor in weights.items()}
    ordered = dict.fromkeys([fqn for layer in catalog.layers for fqn in layer.fqns if fqn in kept])
    return {fqn: kept[fqn] for fqn in [*ordered, *kept]}, list(notes)


def _dtype_of(weights: Mapping[str, TensorRef]) -> str | None:
    """The one element type of all weights, if it is one that ``config.json`` can say."""
    dtypes = {tensor.meta.dtype for tensor in weights.values()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(DTYPE_NAMES) else None


def _depth_notes(config: ModelConfig | None, num_blocks: int | None, catalog: Catalog) -> list[str]:
    """Where ``config.json`` does not say how many blocks there are.

    Blocks that predict further tokens are numbered on after the others, and not counted; shared ones count each time.

    Source: transformers 5.23, models/glm4_moe (num_nextn_predict_layers), models/albert (num_hidden_groups).
    """
    if config is None:
        return []
    if num_blocks is not None:
        is_said = config.num_blocks is not None
        return [] if is_said else [f"config.json says nowhere how many blocks there are: write there {num_blocks}"]
    blocks = catalog.layers.blocks
    if config.num_blocks in (None, len(blocks)) or len({layer.stack for layer in blocks}) != 1:
        return []
    return [f"config.json says {config.num_blocks} blocks, and {len(blocks)} are here: both stay as they are"]


def _check_whole(
    config: ModelConfig | None, num_blocks: int | None, weights: Mapping[str, TensorRef], catalog: Catalog
) -> None:
    """Stock readers only warn of a missing tensor, and start a new one in its place."""
    if config is None or config.num_blocks is None:
        return
    ties = catalog.ties or find_ties(config, weights, is_tied_by_default=None)
    check_blocks(replace(config, num_blocks=num_blocks or config.num_blocks), {*weights, *ties}, catalog.path)


def _read_config(small: Sequence[SmallFile]) -> ModelConfig | None:
    for file in small:
        if file.name == _CONFIG:
            return parse_config(read_text(file.path), file.path)
    return None


def _plan_small(
    small: Sequence[SmallFile], config: ModelConfig | None, num_blocks: int | None, dtype: str | None
) -> list[FilePlan]:
    plans = []
    for file in small:
        if file.name == _CONFIG and config is not None:
            depth = None if config.num_blocks is None else num_blocks
            text = rewrite_config(config.text, num_hidden_layers=depth, dtype=dtype, path=file.path)
            plans.append(FilePlan(name=file.name, parts=(text,)))
        else:
            whole_file = FileRange(path=file.path, byte_range=ByteRange(start=0, end=file.nbytes))
            plans.append(FilePlan(name=file.name, parts=(whole_file,)))
    return plans


def _plan_weights(weights: Mapping[str, TensorRef], catalog: Catalog, shard_nbytes: int) -> list[FilePlan]:
    shards = _cut_shards(weights, shard_nbytes)
    if len(shards) == 1:
        return [_plan_shard("model.safetensors", shards[0], weights)]
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    total = sum(tensor.meta.nbytes for tensor in weights.values())
    parameters = sum(tensor.meta.numel for fqn, tensor in weights.items() if fqn not in catalog.buffers)
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": dict(sorted((fqn, name) for name, shard in zip(names, shards, strict=True) for fqn in shard)),
    }
    text = (json.dumps(index, indent=2) + "\n").encode()
    plans = [_plan_shard(name, shard, weights) for name, shard in zip(names, shards, strict=True)]
    return [*plans, FilePlan(name="model.safetensors.index.json", parts=(text,))]


def _cut_shards(weights: Mapping[str, TensorRef], shard_nbytes: int) -> list[list[str]]:
    """Fill one shard after the other, in order."""
    shards: list[list[str]] = [[]]
    room = shard_nbytes
    for fqn, tensor in weights.items():
        if tensor.meta.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_nbytes
        shards[-1].append(fqn)
        room -= tensor.meta.nbytes
    return shards


def _plan_shard(name: str, fqns: Sequence[str], weights: Mapping[str, TensorRef]) -> FilePlan:
    # Stock readers want to be told the framework. Source: transformers 5.23, modeling_utils.py (load_state_dict).
    layout = plan_layout([(fqn, weights[fqn].meta) for fqn in fqns], {"format": "pt"})
    return FilePlan(name=name, parts=(layout.prefix, *(whole(weights[stored.name]) for stored in layout.tensors)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _TrainingFiles:
    files: tuple[FilePlan, ...]
    notes: tuple[str, ...]

    @property
    def replaced(self) -> frozenset[str]:
        return frozenset(file.name for file in self.files)


def _plan_training(catalog: Catalog, config: ModelConfig | None, small: Sequence[SmallFile]) -> _TrainingFiles:
    """The optimizer, and the scheduler where it cannot stay as it is."""
    groups, states, notes = _fit_optimizer(catalog)
    regrouping = _regroup(catalog, groups, config)
    if regrouping is None:
        regrouping = _as_they_are(groups)
        notes.append(
            "the optimizer's groups stay as they are, as it cannot be known which the Trainer makes of this model: it "
            "resumes only if it makes the same"
        )
    if regrouping.is_changed:
        notes.append(
            f"the optimizer's {len(groups)} parameter groups became the Trainer's two (with weight decay, without); "
            "every option is what it was"
        )
    files = [plan_optimizer(_OPTIMIZER, regrouping.groups, states)]
    scheduler = next((file.path for file in small if file.name == _SCHEDULER), None)
    if scheduler is not None:
        fitted = fit_scheduler(scheduler, regrouping)
        if fitted is not None:
            files.append(plan_torch_file(_SCHEDULER, fitted))
    elif catalog.format != "hf" and catalog.step is not None:
        files.append(plan_torch_file(_SCHEDULER, new_scheduler(catalog.step, regrouping.groups)))
        notes.append(
            f"the source has no scheduler.pt, without which the Trainer would not load the optimizer: a new one stands "
            f"at step {catalog.step}, and the schedule's shape and base rate come from the Trainer's arguments"
        )
    else:
        notes.append("there is no scheduler.pt: the Trainer will not load the optimizer's state either")
    num_ranks = sum(_RANK_FILE.fullmatch(file.name) is not None for file in small)
    if num_ranks and catalog.format != "hf":
        notes.append(
            f"the states of the random generators are those of {num_ranks} processes, and only as many read them"
        )
    if not any(file.name == "trainer_state.json" for file in small):
        notes.append("there is no trainer_state.json: the Trainer will count its steps from 0")
    return _TrainingFiles(files=tuple(files), notes=tuple(notes))


def _fit_optimizer(catalog: Catalog) -> tuple[tuple[GroupRef, ...], Mapping[str, StateRef], list[str]]:
    if len(catalog.optimizers) != 1:
        raise IncompatibleError(
            "the Trainer has one optimizer",
            kind="several-optimizers",
            path=catalog.path,
            expected="one optimizer",
            found=", ".join(str(each.name) for each in catalog.optimizers),
            hint="write the weights alone (--weights-only), or another format (--to)",
        )
    optimizer = catalog.optimizers[0]
    if catalog.format != "deepspeed" and "deepspeed" not in (optimizer.name or ""):
        return optimizer.groups, catalog.states, []
    groups, states = for_torch_adam(optimizer.groups, catalog.states, catalog.path)
    is_changed = any(states[fqn] is not state for fqn, state in catalog.states.items())
    notes = ["the step of DeepSpeed's Adam, a Python int, became a tensor as torch's AdamW keeps it"]
    return groups, states, notes if is_changed else []


def _regroup(catalog: Catalog, groups: Sequence[GroupRef], config: ModelConfig | None) -> Regrouping | None:
    """The Trainer's groups; None where its order of parameters cannot be known."""
    if catalog.format == "hf":
        # As the Trainer, or a trainer derived from it, made them.
        return _as_they_are(groups)
    shapes = {fqn: tensor.meta.shape for fqn, tensor in catalog.weights.items()}
    try:
        order = find_order(config, shapes)
    except (IncompatibleError, UnsupportedError) as err:
        if err.kind not in ("unknown-order", "converted-weights"):
            raise
        if catalog.format == "tailored":
            # A manifest has the optimizer's own order; whoever made that optimizer can make it again.
            return None
        raise IncompatibleError(
            "it cannot be known at which position the Trainer has which parameter",
            kind=err.kind,
            path=catalog.path,
            fqn=err.fqn,
            expected=err.expected,
            found=err.found,
            hint="copy the model's config.json beside the source, or write the weights alone (--weights-only)",
        ) from err
    return fit_groups(groups, order, catalog.path)


def _as_they_are(groups: Sequence[GroupRef]) -> Regrouping:
    own = tuple((number,) for number in range(len(groups)))
    return Regrouping(groups=tuple(groups), sources=own, is_changed=False)
