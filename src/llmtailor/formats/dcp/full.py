"""FULL_STATE_DICT of accelerate: the whole model in one torch file and the whole optimizer in another, by name.

Source: accelerate 1.15, utils/fsdp_utils.py (save_fsdp_model, save_fsdp_optimizer), utils/constants.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import FormatError, UnsupportedError
from ...file_plan import FilePlan
from ...tensor_refs import FileTensor, TensorRef
from ..source_files import resolve_source
from ..torch_files import TorchTensor, Tree, open_torch_file, plan_torch_file
from .optimizer import Optimizer, plan_nested

__all__ = ["FULL_MODEL_NAME", "FULL_OPTIMIZER_NAME", "plan_full", "read_full_model", "read_full_optimizer"]

FULL_MODEL_NAME = "pytorch_model_fsdp.bin"
FULL_OPTIMIZER_NAME = "optimizer.bin"


def read_full_model(path: Path) -> dict[str, FileTensor]:
    """The weights by name.

    Raises:
        FormatError: A file is not what it claims to be.
        UnsupportedError: Something in a file has no form of ours.
    """
    tree = open_torch_file(resolve_source(path / FULL_MODEL_NAME, path))
    if not isinstance(tree, dict) or not tree:
        raise FormatError(
            "not a state dict",
            kind="not-state-dict",
            path=path / FULL_MODEL_NAME,
            expected="names and tensors",
            found=type(tree).__name__,
        )
    weights: dict[str, FileTensor] = {}
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, TorchTensor) or not isinstance(value.ref, FileTensor):
            raise UnsupportedError(
                "a state dict holds something that is not a plain tensor",
                kind="state-dict-entry",
                path=path / FULL_MODEL_NAME,
                fqn=str(name)[:200],
                expected="a name and a tensor",
                found=type(value).__name__,
            )
        weights[name] = value.ref
    return weights


def read_full_optimizer(path: Path) -> tuple[Tree, Path] | None:
    """The optimizer's state dict, as it is, and its file; None if there is none.

    Raises:
        FormatError: The file is not what it claims to be.
        UnsupportedError: Something in it has no form of ours.
    """
    if not (path / FULL_OPTIMIZER_NAME).exists():
        return None
    place = resolve_source(path / FULL_OPTIMIZER_NAME, path)
    return open_torch_file(place), place


def plan_full(weights: Mapping[str, TensorRef], optimizer: Optimizer | None) -> list[FilePlan]:
    """The two files. Equal ``TensorRef`` objects are written once."""
    files = [plan_torch_file(FULL_MODEL_NAME, {name: TorchTensor(ref=ref) for name, ref in weights.items()})]
    if optimizer is not None:
        files.append(plan_torch_file(FULL_OPTIMIZER_NAME, plan_nested(optimizer)))
    return files
