"""Files of others' making, one module or package each; none imports another. And ours, which is one of them.

Each format opens a directory as a ``Catalog`` and plans a new one from any ``Catalog``; both read no tensor.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FormatError, NotFoundError
from ..manifest import MANIFEST_NAME

if TYPE_CHECKING:  # whoever lists runs opens no catalog
    from ..catalog import Catalog

__all__ = ["FORMATS", "detect_format", "open_catalog"]

FORMATS = ("tailored", "hf", "deepspeed", "dcp")

_EXPECTED = (
    "a checkpoint of LLMTailor (tailor.json), of the HF Trainer or a model (config.json, model.safetensors or "
    "pytorch_model.bin), of DeepSpeed (latest, global_step*) or of PyTorch DCP and FSDP (.metadata)"
)
_DEEPSPEED_SUFFIX = "_optim_states.pt"
# Source: accelerate 1.15, utils/fsdp_utils.py (FSDP_MODEL_NAME, OPTIMIZER_NAME with "_0").
_FSDP_NAMES = frozenset({"pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"})
_HF_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def detect_format(path: Path) -> str:
    """Which of ``FORMATS`` a directory is in, by the names in it.

    Raises:
        NotFoundError: There is no such directory.
        FormatError: It is none of them.
    """
    try:
        names = {entry.name for entry in os.scandir(path)}
    except (FileNotFoundError, NotADirectoryError) as err:
        raise NotFoundError(
            "no such checkpoint",
            kind="missing-checkpoint",
            path=path,
            expected="a directory",
            found="a file" if path.exists() else "nothing",
            hint="check the path; relative ones start at the current directory",
        ) from err
    if MANIFEST_NAME in names:
        return "tailored"
    if ".metadata" in names or names & _FSDP_NAMES:
        return "dcp"
    if any(name.endswith(_DEEPSPEED_SUFFIX) or name.startswith("global_step") for name in names) or (
        "latest" in names and not any(name.endswith(".safetensors") for name in names)
    ):
        return "deepspeed"
    if any(name.endswith(_HF_SUFFIXES) for name in names):
        return "hf"
    raise FormatError(
        "not a checkpoint of a format that is known here",
        kind="unknown-format",
        path=path,
        expected=_EXPECTED,
        found=", ".join(sorted(names)[:8]) or "an empty directory",
        hint="of a run, give one of its checkpoint-<step> directories",
    )


def open_catalog(
    path: Path,
    *,
    parameter_names: Sequence[str] | None = None,
    with_optimizer: bool = True,
    allow_partial: bool = False,
) -> Catalog:
    """Open a checkpoint of any format; reads names and places, no tensor.

    Args:
        path: The directory.
        parameter_names: Of ``optimizer.pt``, which has positions only, where they cannot be recovered.
        with_optimizer: Whether optimizer state has to be understood; without, formats may leave it out.
        allow_partial: Let whole layers be missing, as in a save of some of them.

    Raises:
        NotFoundError: There is none.
        FormatError, IncompleteError, UnsupportedError: It is damaged, hostile, has a hole, or is of a kind that cannot
            be read yet.
        IncompatibleError: Parts of it do not fit together, or the names of its optimizer state are ambiguous.
    """
    match detect_format(path):
        case "tailored":
            from .tailored import open_tailored

            return open_tailored(path)
        case "deepspeed":
            from .deepspeed import open_deepspeed

            return open_deepspeed(path, with_optimizer=with_optimizer)
        case "dcp":
            from .dcp import open_dcp

            return open_dcp(path, with_optimizer=with_optimizer)
        case _:
            from .hf import open_hf

            return open_hf(
                path,
                parameter_names=parameter_names,
                with_optimizer=with_optimizer,
                allow_partial=allow_partial,
            )
