"""The weights of the model, of which DeepSpeed keeps different things at different stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import IncompleteError
from ...tensor_refs import CastTensor, FileTensor, TensorRef
from ...tensors import TensorMeta
from ..torch_files import TorchTensor, Tree
from .fields import refuse, require
from .flat_states import gather
from .partitions import cut_each

__all__ = ["gather_frozen", "module_shapes", "partitioned_weights", "whole_weights"]


def whole_weights(
    module: Mapping[str, TorchTensor], trained: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, TensorRef]:
    """Stages 1 and 2: the model states have them all.

    Raises:
        FormatError: A trained parameter is not among them, or has another shape.
    """
    for fqn, shape in trained.items():
        found = module[fqn].ref.meta.shape if fqn in module else None
        if found != shape:
            raise refuse("a parameter has another shape than in its group", path, expected=shape, found=found, fqn=fqn)
    return {fqn: tensor.ref for fqn, tensor in module.items()}


def partitioned_weights(
    module: Mapping[str, TorchTensor],
    beside: Mapping[str, TensorRef],
    masters: Mapping[str, TensorRef],
    frozen: Mapping[str, TensorRef],
    path: Path,
) -> dict[str, TensorRef]:
    """Stage 3: the model states have the buffers; of all else there are the safetensors beside, or the masters.

    Args:
        module: The model states of rank 0; of parameters they tell the type alone.
        beside: Weights of the safetensors; empty if there are none.
        masters: Of trained parameters.
        frozen: Of the others.
        path: The file of the model states, for errors.

    Raises:
        IncompleteError: A parameter is nowhere.
    """
    weights: dict[str, TensorRef] = {}
    for fqn, tensor in module.items():
        if fqn in beside:
            weights[fqn] = beside[fqn]
        elif fqn in frozen:
            weights[fqn] = frozen[fqn]
        elif fqn in masters:
            master = masters[fqn]
            meta = TensorMeta(dtype=tensor.ref.meta.dtype, shape=master.meta.shape)
            weights[fqn] = master if master.meta == meta else CastTensor(meta=meta, source=master)
        elif tensor.ref.meta.numel:
            weights[fqn] = tensor.ref
        else:
            raise IncompleteError(
                "the weights of a parameter are nowhere",
                kind="missing-weights",
                path=path,
                fqn=fqn,
                expected="a trained parameter, a fragment on each rank, or safetensors beside",
                found="its name alone",
                hint="frozen parameters were left out of the checkpoint; put the model's safetensors beside it",
            )
    return weights


def gather_frozen(
    models: Sequence[Mapping[str, Tree]],
    paths: Sequence[Path],
    shapes: Mapping[str, tuple[int, ...]],
    raw_names: Mapping[str, str],
) -> dict[str, TensorRef]:
    """Stage 3: parameters without an optimizer, from the fragments of all ranks.

    Raises:
        FormatError: A rank lacks a fragment, or it has another size.

    Source: DeepSpeed 0.19.8, runtime/engine.py (_get_param_fragment_func), utils/zero_to_fp32.py.
    """
    found: dict[str, TensorRef] = {}
    for fqn, shape in shapes.items():
        tensors = []
        for model, path in zip(models, paths, strict=True):
            fragments = require(model, "frozen_param_fragments", dict, path)
            tensors.append(require(fragments, raw_names.get(fqn, fqn), TorchTensor, path))
        numel = math.prod(shape)
        if numel:
            found.update(gather(tensors, cut_each([(fqn, numel)], len(models)), {fqn: shape}, paths))
        else:
            found[fqn] = FileTensor(meta=TensorMeta(dtype=tensors[0].ref.meta.dtype, shape=shape), extents=())
    return found


def module_shapes(
    module: Mapping[str, TorchTensor],
    trained: Mapping[str, tuple[int, ...]],
    frozen: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the model, whatever the stage."""
    return {fqn: trained.get(fqn, frozen.get(fqn, tensor.ref.meta.shape)) for fqn, tensor in module.items()}
