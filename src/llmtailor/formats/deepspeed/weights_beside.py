"""The safetensors beside a DeepSpeed checkpoint, as the HF Trainer writes them, and new ones.

Source: transformers 5.23, trainer.py (_save_checkpoint, save_model), utils/__init__.py (SAFE_WEIGHTS_NAME,
SAFE_WEIGHTS_INDEX_NAME), modeling_utils.py (save_pretrained).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ...errors import FormatError, IncompatibleError, IncompleteError
from ...file_plan import FilePlan, Part
from ...layers import canonical_name
from ...strict_json import parse_object
from ...tensor_refs import Extent, FileTensor, TensorRef, file_tensor, whole
from ...tensors import TensorMeta
from ..safetensors import open_file, plan_layout
from ..source_files import open_source, resolve_source

__all__ = ["check_same_tensors", "is_weights_file", "plan_weights", "read_weights"]

_WEIGHTS_NAME = "model.safetensors"
_INDEX_NAME = "model.safetensors.index.json"
_MAX_INDEX_NBYTES = 64 * 2**20
_MAX_SHARD_NBYTES = 5 * 10**9


def is_weights_file(name: str) -> bool:
    """Whether a file beside the checkpoint holds weights of the model, or their index."""
    return name == _INDEX_NAME or (name.startswith("model") and name.endswith(".safetensors"))


def read_weights(root: Path) -> dict[str, FileTensor] | None:
    """The tensors of the safetensors in a directory, by canonical name; None if there are no such files.

    Raises:
        IncompleteError: A file that the index names is missing, or lacks a tensor.
        FormatError: A file is not what it claims to be, or leads out of the directory.
    """
    # lexists: a link to nothing is damage, not absence.
    if os.path.lexists(root / _WEIGHTS_NAME):
        found = _read_file(root / _WEIGHTS_NAME, root)
    elif os.path.lexists(root / _INDEX_NAME):
        found = _read_indexed(root)
    else:
        return None
    canonical = {canonical_name(name): tensor for name, tensor in found.items()}
    if len(canonical) != len(found):
        raise FormatError("two tensors have one name", kind="tensor-twice", path=root, hint="take another checkpoint")
    return canonical


def _read_file(path: Path, root: Path) -> dict[str, FileTensor]:
    real = resolve_source(path, root)
    return {
        name: file_tensor(
            stored.meta,
            [Extent(path=real, offset=stored.byte_range.start, start=0, numel=stored.meta.numel)],
            name=name,
            path=real,
        )
        for name, stored in open_file(real).header.tensors.items()
    }


def _read_indexed(root: Path) -> dict[str, FileTensor]:
    path = resolve_source(root / _INDEX_NAME, root)
    with os.fdopen(open_source(path), "rb", buffering=0) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > _MAX_INDEX_NBYTES:
            raise FormatError("the index is too large", kind="index-size", path=path, found=f"{nbytes} bytes")
        weight_map = parse_object(file.read(), what="index of weights", path=path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_shard_name(name) for name in weight_map.values()):
        raise FormatError(
            "the index of the weights is malformed", kind="index", path=path, expected="weight_map: tensor -> file"
        )
    missing = sorted({name for name in weight_map.values() if not os.path.lexists(root / name)})
    if missing:
        raise IncompleteError(
            f"{len(missing)} files of weights are missing",
            kind="missing-shard",
            path=root / missing[0],
            expected=f"the files that {_INDEX_NAME} names",
            found=f"no {', '.join(missing[:8])}",
            hint="copy the checkpoint again",
        )
    found: dict[str, FileTensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        held = _read_file(root / name, root)
        named = {tensor for tensor, file in weight_map.items() if file == name}
        if named != held.keys():
            raise FormatError(
                "a file does not hold the tensors that the index says it holds",
                kind="index-mismatch",
                path=root / name,
                fqn=min(named ^ held.keys()),
                expected=f"{len(named)} tensors of {_INDEX_NAME}",
                found=f"{len(held)} tensors",
            )
        found.update(held)
    return found


def _is_shard_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and name.isprintable() and "/" not in name


def check_same_tensors(
    beside: Mapping[str, TensorRef], expected: Mapping[str, tuple[int, ...]], ties: Mapping[str, str], root: Path
) -> dict[str, str]:
    """Check that the safetensors are of the same model as the checkpoint.

    Args:
        beside: The tensors of the safetensors.
        expected: Name -> shape of each tensor of the checkpoint; a tied one by the name that holds it.
        ties: Further names.
        root: For the error.

    Returns:
        Name in the checkpoint -> name in ``beside``, of all tensors.

    Raises:
        IncompatibleError: Names or shapes differ; lists them.
    """
    names = {ties.get(name, name): name for name in beside}
    differing = [
        f"{name}: {_shape(expected.get(name))} in the checkpoint, "
        f"{_shape(beside[names[name]].meta.shape if name in names else None)} beside"
        for name in sorted(expected.keys() | names.keys())
        if name not in expected or name not in names or beside[names[name]].meta.shape != expected[name]
    ]
    if differing:
        raise IncompatibleError(
            "the safetensors are of another model than the DeepSpeed checkpoint beside them",
            kind="weights-beside",
            path=root,
            fqn=differing[0].partition(":")[0],
            expected="the same names and shapes",
            found="; ".join(differing[:8]) + (f"; and {len(differing) - 8} more" if len(differing) > 8 else ""),
            hint="one of the two was replaced; move the safetensors away to go by the checkpoint alone",
        )
    return names


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def plan_weights(tensors: Mapping[str, TensorRef]) -> list[FilePlan]:
    """The weights as transformers reads them: one file, or shards of up to 5 GB and an index.

    Args:
        tensors: In the model's order, by name.
    """
    shards: list[dict[str, TensorRef]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.meta.nbytes > _MAX_SHARD_NBYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.meta.nbytes
    if len(shards) == 1:
        return [_plan_file(_WEIGHTS_NAME, shards[0])]
    names = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.meta.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    files = [_plan_file(name, shard) for name, shard in zip(names, shards, strict=True)]
    return [*files, FilePlan(name=_INDEX_NAME, parts=((json.dumps(index, indent=2) + "\n").encode(),))]


def _plan_file(name: str, tensors: Mapping[str, TensorRef]) -> FilePlan:
    metas: list[tuple[str, TensorMeta]] = [(key, tensor.meta) for key, tensor in tensors.items()]
    layout = plan_layout(metas, {"format": "pt"})
    parts: tuple[Part, ...] = (layout.prefix, *(whole(tensors[stored.name]) for stored in layout.tensors))
    return FilePlan(name=name, parts=parts)
