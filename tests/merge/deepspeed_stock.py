"""What DeepSpeed itself reads from a checkpoint: its own consolidation, for the masters and for any optimizer state."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def read_consolidated(tag_dir: Path, leaf: str | None = None) -> dict[str, torch.Tensor]:
    """Full tensors by name, put together by DeepSpeed's ``zero_to_fp32``.

    Args:
        tag_dir: Directory with the files of the ranks.
        leaf: A state of the optimizer, which takes the place of the fp32 partitions; None for those.
    """
    from deepspeed.utils import zero_to_fp32  # seconds, and most test runs have no use for it

    optim_files = zero_to_fp32.get_optim_files(str(tag_dir))
    model_files = zero_to_fp32.get_model_state_files(str(tag_dir))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        stage, ranks, flats, paddings = zero_to_fp32.parse_optim_states(optim_files, str(tag_dir))
        models = zero_to_fp32.parse_model_states(model_files)
        if leaf is not None:
            flats = [list(_states(Path(file), leaf, of)) for file, of in zip(optim_files, flats, strict=True)]
        if stage <= 2:
            found = zero_to_fp32._get_fp32_state_dict_from_zero2_checkpoint(ranks, flats, models, True, paddings)
        else:
            found = zero_to_fp32._get_fp32_state_dict_from_zero3_checkpoint(ranks, flats, models, True)
        # clone: some are views of mapped files, some lazy.
        return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def _states(file: Path, leaf: str, flats: Any) -> Iterator[torch.Tensor]:
    content = torch.load(file, weights_only=False)["optimizer_state_dict"]
    base = content.get("base_optimizer_state", content.get("optimizer_state_dict"))
    for index, flat in enumerate(flats):
        state = base[index] if isinstance(base, list) else base["state"][index]
        yield state[leaf][: flat.numel()]
