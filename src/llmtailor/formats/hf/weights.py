"""The weights of a model directory: one file or shards, safetensors or torch files.

Only headers and pickles are read. An index is believed in nothing: each shard must hold exactly the tensors that the
index says it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import FormatError, IncompleteError, NotFoundError, UnsupportedError
from ...layers import canonical_name
from ...tensor_refs import Extent, FileTensor, TensorRef, file_tensor
from ...tensors import TensorMeta
from ..safetensors import open_file
from ..source_files import resolve_source
from ..torch_files import TorchTensor, open_torch_file
from .json_files import read_json_object

__all__ = ["Weights", "read_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The tensors of a model directory."""

    tensors: Mapping[str, TensorRef]
    """By canonical name, in file order."""
    ties: Mapping[str, str]
    """Further name -> name in ``tensors``, where a torch file holds one tensor under several names."""


def read_weights(root: Path) -> Weights:
    """Find the weights of a model directory, in the order in which transformers looks for them.

    Args:
        root: The directory.

    Raises:
        NotFoundError: There are no weights.
        IncompleteError: A shard, or a tensor that the index names, is missing.
        FormatError: A file is not what it claims to be, or leads out of the directory.
        UnsupportedError: An adapter without its model, or tensors that are not plain.

    Source:
        transformers 5.23, trainer.py (_load_from_checkpoint) and utils/__init__.py (SAFE_WEIGHTS_NAME, ...).
    """
    for name, read in _READERS.items():
        if (root / name).exists() or (root / name).is_symlink():
            return _make_canonical(root, read(root, name))
    if any((root / name).exists() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise UnsupportedError(
            "this is an adapter without its model",
            kind="adapter",
            path=root,
            expected=", ".join(_READERS),
            found="adapter_model",
            hint="merge the adapter into its model with peft (merge_and_unload), and take that",
        )
    raise NotFoundError("there are no weights here", kind="no-weights", path=root, expected=" or ".join(_READERS))


def _read_safetensors(root: Path, name: str) -> dict[str, FileTensor]:
    path = resolve_source(root / name, root)
    return {
        stored.name: file_tensor(
            stored.meta,
            [Extent(path=path, offset=stored.byte_range.start, start=0, numel=stored.meta.numel)],
            name=stored.name,
            path=path,
        )
        for stored in open_file(path).header.tensors.values()
    }


def _read_torch_file(root: Path, name: str) -> dict[str, FileTensor]:
    path = resolve_source(root / name, root)
    tree = open_torch_file(path)
    if not isinstance(tree, dict):
        raise FormatError(
            "not a state dict", kind="not-state-dict", path=path, expected="names and tensors", found=_kind(tree)
        )
    tensors = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not isinstance(value, TorchTensor) or not isinstance(value.ref, FileTensor):
            raise UnsupportedError(
                "a state dict holds something that is not a plain tensor",
                kind="state-dict-entry",
                path=path,
                fqn=str(key)[:200],
                expected="a name and a tensor",
                found=_kind(value),
                hint="save the model again with save_pretrained, as safetensors",
            )
        tensors[key] = value.ref
    return tensors


def _kind(value: object) -> str:
    return str(getattr(value, "cls", type(value).__name__))[:200]


def _read_indexed(root: Path, name: str, suffix: str) -> dict[str, FileTensor]:
    read = _read_safetensors if suffix == ".safetensors" else _read_torch_file
    index = resolve_source(root / name, root)
    weight_map = _check_weight_map(read_json_object(index, what="index").get("weight_map"), suffix, index)
    files = dict.fromkeys(weight_map.values())
    missing = [file for file in files if not (root / file).exists()]
    if missing:
        raise IncompleteError(
            f"{len(missing)} of {len(files)} shards are missing",
            kind="missing-shard",
            path=root / missing[0],
            expected=f"all files that {name} names",
            found="no " + ", ".join(missing[:8]),
            hint="copy the missing files from the source again",
        )
    held = {file: read(root, file) for file in files}
    for file, tensors in held.items():
        _compare_names({key for key, where in weight_map.items() if where == file}, set(tensors), root / file, name)
    return {key: held[file][key] for key, file in weight_map.items()}


def _compare_names(named: set[str], held: set[str], path: Path, index: str) -> None:
    if named - held:
        raise IncompleteError(
            f"a shard lacks {len(named - held)} tensors that the index says it has",
            kind="missing-tensor",
            path=path,
            fqn=min(named - held),
            expected=f"the tensors of {index}",
            hint="the shard is of another model; copy both from the source again",
        )
    if held - named:
        raise FormatError(
            f"a shard has {len(held - named)} tensors that the index does not say it has",
            kind="index-mismatch",
            path=path,
            fqn=min(held - named),
            expected=f"the tensors of {index}",
            hint="the index is of another model; copy both from the source again",
        )


def _check_weight_map(value: object, suffix: str, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise _refuse_index(path, "weight_map: names and files", repr(value)[:200])
    for key, file in value.items():
        if not isinstance(file, str) or not _is_plain(file) or not file.endswith(suffix):
            # A name with a slash could lead out of the checkpoint; transformers writes none.
            raise _refuse_index(path, f"the name of a {suffix} file beside the index", repr(file)[:200], key)
    return value


def _is_plain(name: str) -> bool:
    return (
        name.isascii()
        and name.isprintable()
        and name[:1] not in ("", ".")
        and not set("/\\") & set(name)
        and len(name) < 256
    )


def _refuse_index(path: Path, expected: str, found: str, key: str | None = None) -> FormatError:
    return FormatError("not an index of weights", kind="bad-index", path=path, fqn=key, expected=expected, found=found)


def _make_canonical(root: Path, tensors: Mapping[str, FileTensor]) -> Weights:
    """Under canonical names, each tensor once."""
    kept: dict[str, TensorRef] = {}
    ties: dict[str, str] = {}
    first_at: dict[tuple[TensorMeta, tuple[Extent, ...]], str] = {}
    for key, tensor in tensors.items():
        name = canonical_name(key)
        if name in kept or name in ties:
            raise FormatError("two tensors have one canonical name", kind="name-collision", path=root, fqn=name)
        # Extents of an empty tensor say nothing about where it is.
        first = first_at.setdefault((tensor.meta, tensor.extents), name) if tensor.extents else name
        if first == name:
            kept[name] = tensor
        else:
            ties[name] = first
    if not kept:
        raise IncompleteError("the weights files hold no tensor", kind="no-weights", path=root)
    return Weights(tensors=kept, ties=ties)


_READERS: dict[str, Callable[[Path, str], dict[str, FileTensor]]] = {
    "model.safetensors": _read_safetensors,
    "model.safetensors.index.json": lambda root, name: _read_indexed(root, name, ".safetensors"),
    "pytorch_model.bin": _read_torch_file,
    "pytorch_model.bin.index.json": lambda root, name: _read_indexed(root, name, ".bin"),
}
