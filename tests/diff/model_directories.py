"""The smallest checkpoint there is: a directory with one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmtailor.diff import Difference, Distance, compare, plan_diff
from llmtailor.diff.records import WEIGHTS

FQN = "head.weight"


def write_model(directory: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True)
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def diff_models(
    directory: Path, a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], chunk_nbytes: int = 2**22
) -> Difference:
    """How a model of some tensors differs from one of others."""
    plan = plan_diff(write_model(directory / "a", a), write_model(directory / "b", b))
    return compare(plan, chunk_nbytes=chunk_nbytes)


def diff_tensors(directory: Path, a: torch.Tensor, b: torch.Tensor, chunk_nbytes: int = 2**22) -> Distance:
    return diff_models(directory, {FQN: a}, {FQN: b}, chunk_nbytes).totals[WEIGHTS]
