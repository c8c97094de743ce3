"""What a new DeepSpeed checkpoint will look like, before its tensors are put in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...catalog import Catalog, GroupRef
from ...errors import IncompatibleError, IncompleteError, InvalidInputError, UnsupportedError
from ...tensor_refs import CastTensor, TensorRef
from ...tensors import DTYPE_BITS, TensorMeta
from ..torch_files import Tree
from .native import Flat, Native
from .partitions import FlatLayout, align_parameters, cut_each, cut_evenly, deal, split_sub_groups

__all__ = ["Target", "bring_to", "decide_target"]

DEFAULT_STAGE = 2
# Source: DeepSpeed 0.19.8, runtime/zero/config.py (sub_group_size).
_SUB_GROUP_SIZE = 10**9
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A new checkpoint, but for its tensors."""

    stage: int
    ranks: int
    tag: str
    template: Native | None
    """A checkpoint of the same stage, of which everything is taken over that is no tensor of a parameter."""
    donor: Native | None
    """A checkpoint of any stage, for what does not depend on the stage."""
    groups: tuple[GroupRef, ...]
    flats: tuple[Flat, ...]
    layouts: tuple[FlatLayout, ...]
    """Of the flat tensors."""
    weights: Mapping[str, TensorRef]
    """In the element types they get."""
    frozen: tuple[str, ...]
    """Parameters without an optimizer."""
    buffers: frozenset[str]
    has_bf16_name: bool
    has_weights_files: bool

    def raw(self, fqn: str) -> str:
        """The name of a parameter in the files."""
        return fqn if self.donor is None else self.donor.raw_names.get(fqn, fqn)


def decide_target(catalog: Catalog, *, ranks: int | None, stage: int | None, dtype: str) -> Target:
    """Decide stage, ranks and the order of all parameters.

    Raises:
        InvalidInputError: The number of ranks or the stage makes no sense, or nothing says it.
        IncompleteError: There is no optimizer state, or a parameter without weights.
        IncompatibleError: A group without parameters.
        UnsupportedError: Several optimizers, or an element type that is not done.
    """
    donor = catalog.native if isinstance(catalog.native, Native) else None
    stage = stage if stage is not None else donor.stage if donor is not None else DEFAULT_STAGE
    ranks = ranks if ranks is not None else donor.ranks if donor is not None else None
    if stage not in (1, 2, 3):
        raise InvalidInputError("there is no such ZeRO stage", kind="stage", expected="1, 2 or 3", found=stage)
    if ranks is None or ranks < 1:
        raise InvalidInputError(
            "a DeepSpeed checkpoint is for a number of ranks",
            kind="ranks",
            expected="a number of 1 or more",
            found=ranks,
            hint="say how many processes will train with --ranks",
        )
    template = donor if donor is not None and donor.stage == stage else None
    groups = _check_groups(catalog)
    _require_options(catalog, groups, template)
    weights = _cast_weights(catalog, donor, dtype)
    trained = {fqn for group in groups for fqn in group.parameters}
    flats = tuple(_flats(groups, weights, donor, template, ranks=ranks, stage=stage))
    return Target(
        stage=stage,
        ranks=ranks,
        tag=f"global_step{catalog.step or 0}" if donor is None else donor.tag,
        template=template,
        donor=donor,
        groups=groups,
        flats=flats,
        layouts=tuple(
            cut_each(flat.parameters, ranks) if stage == 3 else cut_evenly(flat.parameters, flat.paddings, ranks)
            for flat in flats
        ),
        weights=weights,
        frozen=tuple(fqn for fqn in weights if fqn not in trained and fqn not in catalog.buffers),
        buffers=catalog.buffers,
        has_bf16_name=dtype == "BF16" if donor is None else donor.has_bf16_name,
        has_weights_files=donor is None or donor.has_weights_files,
    )


def _check_groups(catalog: Catalog) -> tuple[GroupRef, ...]:
    if len(catalog.optimizers) != 1:
        many = len(catalog.optimizers)
        error = UnsupportedError if many else IncompleteError
        raise error(
            "DeepSpeed trains with one optimizer",
            kind="optimizers",
            path=catalog.path,
            expected="the state of one optimizer",
            found=f"{many} optimizers" if many else "weights alone",
            hint="--to hf writes weights alone" if not many else None,
        )
    groups = catalog.optimizers[0].groups
    empty = [index for index, group in enumerate(groups) if not group.parameters]
    if empty:
        raise IncompatibleError(
            "DeepSpeed cannot load a parameter group without parameters",
            kind="empty-group",
            path=catalog.path,
            expected="a parameter in each group",
            found=f"none in group {', '.join(map(str, empty))}",
            hint="train with groups that hold parameters, or write the format of the source",
        )
    missing = [fqn for group in groups for fqn in group.parameters if fqn not in catalog.weights]
    if missing:
        raise IncompleteError(
            f"{len(missing)} parameters of the optimizer have no weights",
            kind="missing-weights",
            path=catalog.path,
            fqn=missing[0],
            expected="weights of each parameter",
            found=f"none of {', '.join(missing[:8])}",
        )
    return groups


def _require_options(catalog: Catalog, groups: Sequence[GroupRef], template: Native | None) -> None:
    is_elastic = template is not None and isinstance(
        template.optim[0]["optimizer_state_dict"].get("base_optimizer_state"), list
    )
    if not is_elastic and not all(group.options for group in groups):
        raise UnsupportedError(
            "the source does not say the options of its parameter groups",
            kind="no-options",
            path=catalog.path,
            expected="learning rate, betas and so on of each group",
            found="none, as in DeepSpeed's elastic checkpoints",
            hint="write it for the same stage, or save without elastic_checkpoint",
        )


def bring_to(tensor: TensorRef, dtype: str, *, fqn: str, path: object) -> TensorRef:
    """A tensor in an element type.

    Raises:
        IncompatibleError: One of the two types is none of floating point.
    """
    if tensor.meta.dtype == dtype:
        return tensor
    if tensor.meta.dtype not in _FLOATS or dtype not in _FLOATS:
        raise IncompatibleError(
            "a tensor cannot be brought to the type of the others in its flat tensor",
            kind="dtype",
            path=str(path),
            fqn=fqn,
            expected=dtype,
            found=str(tensor.meta),
        )
    if isinstance(tensor, CastTensor) and tensor.source.meta.dtype == dtype:
        return tensor.source
    return CastTensor(meta=TensorMeta(dtype=dtype, shape=tensor.meta.shape), source=tensor)


def _cast_weights(catalog: Catalog, donor: Native | None, dtype: str) -> dict[str, TensorRef]:
    """The weights as the model computes with them."""
    if donor is not None:
        return dict(catalog.weights)
    if dtype not in ("BF16", "F32"):
        raise UnsupportedError(
            "DeepSpeed checkpoints of this type are not made from other formats",
            kind="deepspeed-dtype",
            expected="BF16 or F32",
            found=dtype,
            hint="fp16 has a loss scale that no other checkpoint knows",
        )
    return {
        fqn: tensor
        if fqn in catalog.buffers or tensor.meta.dtype not in _FLOATS
        else bring_to(tensor, dtype, fqn=fqn, path=catalog.path)
        for fqn, tensor in catalog.weights.items()
    }


def _flats(
    groups: Sequence[GroupRef],
    weights: Mapping[str, TensorRef],
    donor: Native | None,
    template: Native | None,
    *,
    ranks: int,
    stage: int,
) -> Iterator[Flat]:
    """The flat tensors of each group, with the parameters in the order they lie in."""
    settings = _zero_settings(donor)
    for index, group in enumerate(groups):
        parameters = [(fqn, weights[fqn].meta.numel) for fqn in group.parameters]
        if stage == 3:
            yield from _sub_groups(parameters, index, template, settings, ranks)
            continue
        if settings.get("round_robin_gradients") is True:
            parameters = deal(parameters, ranks)
        paddings = [0] * len(parameters)
        if settings.get("parameter_alignment") is True:
            itemsize = DTYPE_BITS[weights[parameters[0][0]].meta.dtype] // 8
            paddings = align_parameters([numel for _, numel in parameters], itemsize)
        yield Flat(parameters=tuple(parameters), paddings=tuple(paddings), group=index)


def _sub_groups(
    parameters: Sequence[tuple[str, int]],
    group: int,
    template: Native | None,
    settings: Mapping[str, Tree],
    ranks: int,
) -> Iterator[Flat]:
    held = template.groups() if template is not None and template.ranks == ranks else []
    known = held[group] if group < len(held) else []
    if [each for flat in known for each in flat.parameters] == list(parameters):
        yield from known
        return
    size = settings.get("sub_group_size", _SUB_GROUP_SIZE)
    size = int(size) if isinstance(size, int | float) and size > 0 else _SUB_GROUP_SIZE
    for cut in split_sub_groups(parameters, ranks, size):
        yield Flat(parameters=tuple(cut), paddings=(0,) * len(cut), group=group)


def _zero_settings(donor: Native | None) -> Mapping[str, Tree]:
    config = None if donor is None else donor.optim[0].get("ds_config")
    settings = config.get("zero_optimization") if isinstance(config, dict) else None
    return settings if isinstance(settings, dict) else {}
