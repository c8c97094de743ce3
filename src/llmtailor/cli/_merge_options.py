"""Options that ``merge``, ``export``, ``plan`` and, in part, ``diff`` share."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..merging import MergeOptions

__all__ = [
    "OPTION_NAMES",
    "CopyTokenizer",
    "DType",
    "DTypeName",
    "Format",
    "OwnSteps",
    "ParameterNames",
    "Ranks",
    "ShardSize",
    "To",
    "WeightsOnly",
    "ZeroStage",
    "build_options",
    "check_recipe_path",
    "given_options",
    "read_parameter_names",
]


class Format(StrEnum):
    """Formats that can be written."""

    TAILORED = "tailored"
    HF = "hf"
    DEEPSPEED = "deepspeed"
    DCP = "dcp"


class DTypeName(StrEnum):
    """Element types of weights, as torch calls them."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def stored(self) -> str:
        """As safetensors spells it."""
        return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[self.value]


To = Annotated[
    Format | None, typer.Option("--to", help="Format of the result; as a rule that of state_from.", show_default=False)
]
WeightsOnly = Annotated[
    bool | None, typer.Option("--weights-only", help="Leave out optimizer and training state.", show_default=False)
]
DType = Annotated[DTypeName | None, typer.Option("--dtype", help="Element type of the weights.", show_default=False)]
ShardSize = Annotated[
    str | None,
    typer.Option(
        "--out-shard-size",
        metavar="SIZE",
        help="Largest weights file of --to hf: 5GB, 500MB; a bare B, M or K counts parameters, as in mergekit.",
        show_default="5GB",
    ),
]
CopyTokenizer = Annotated[bool, typer.Option(help="Take the tokenizer's files along.")]
Ranks = Annotated[
    int | None,
    typer.Option(min=1, help="Ranks of a deepspeed or dcp result; as a rule those of state_from.", show_default=False),
]
ZeroStage = Annotated[
    int | None,
    typer.Option(min=1, max=3, help="ZeRO stage of a deepspeed result made from another format.", show_default=False),
]
OwnSteps = Annotated[
    bool,
    typer.Option(
        "--own-steps",
        help="Refuse where layers would have to share one step count, rather than rescale their moments.",
    ),
]
ParameterNames = Annotated[
    Path | None,
    typer.Option(
        "--parameter-names",
        metavar="FILE",
        help="Names of the parameters in an optimizer.pt, one a line, in its order, where they cannot be told.",
        show_default=False,
    ),
]

# Field of MergeOptions -> what changes it here.
OPTION_NAMES = {
    "to": "--to",
    "weights_only": "--weights-only",
    "dtype": "--dtype",
    "shard_nbytes": "--out-shard-size",
    "copy_tokenizer": "--no-copy-tokenizer",
    "ranks": "--ranks",
    "zero_stage": "--zero-stage",
    "own_steps": "--own-steps",
    "parameter_names": "--parameter-names",
}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(K|M|B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)")
_BYTES = {
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_PARAMETERS = {"K": 10**3, "M": 10**6, "B": 10**9}
# What most weights are: a size in parameters is one in bytes of 16-bit weights.
_PARAMETER_NBYTES = 2


def _parse_shard_size(text: str | None) -> int | None:
    """Bytes of a size as users write it.

    Raises:
        InvalidInputError: It is none.
    """
    from ..errors import InvalidInputError

    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    nbytes = 0
    if match is not None:
        number, unit = float(match[1]), match[2]
        nbytes = int(number * (_BYTES[unit] if unit in _BYTES else _PARAMETERS[unit] * _PARAMETER_NBYTES))
    if nbytes <= 0:
        raise InvalidInputError(
            "not a size of a weights file",
            kind="shard-size",
            expected="5GB, 500MB, 2GiB, or 5B parameters",
            found=text,
            hint="give --out-shard-size a number and a unit",
        )
    return nbytes


def given_options(options: MergeOptions) -> list[str]:
    """Those that are not as they are without being given, by the names they have here."""
    default = type(options)()
    return [name for field, name in OPTION_NAMES.items() if getattr(options, field) != getattr(default, field)]


def check_recipe_path(path: Path) -> None:
    """See to it that a recipe can be there.

    Raises:
        InvalidInputError: A directory is, or nothing.
    """
    from ..errors import InvalidInputError

    if path.is_dir():
        raise InvalidInputError(
            "a directory is no recipe",
            kind="recipe-file",
            path=path,
            expected="a YAML file",
            found="a directory",
            hint=f"llmtailor plan {path} -o recipe.yaml writes one for a run; llmtailor export takes one checkpoint",
        )
    if not os.path.lexists(path):
        raise InvalidInputError(
            "cannot read the recipe: there is none",
            kind="recipe-file",
            path=path,
            expected="a YAML file",
            found="nothing",
            hint="check the path; llmtailor plan <run> -o recipe.yaml writes one",
        )


def read_parameter_names(path: Path | None) -> tuple[str, ...] | None:
    """The lines of a file.

    Raises:
        InvalidInputError: It cannot be read.
    """
    from ..errors import InvalidInputError

    if path is None:
        return None
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as err:
        raise InvalidInputError(
            "cannot read the list of parameter names",
            kind="names-file",
            path=path,
            expected="a text file, one name a line",
            found=err.strerror if isinstance(err, OSError) else str(err),
            hint="check the path given with --parameter-names",
        ) from err


def build_options(
    *,
    to: Format | None,
    weights_only: bool | None,
    dtype: DTypeName | None,
    out_shard_size: str | None,
    copy_tokenizer: bool,
    ranks: int | None,
    zero_stage: int | None,
    own_steps: bool,
    parameter_names: Path | None,
) -> MergeOptions:
    """The options as the Python function takes them.

    Raises:
        InvalidInputError: A size is none, or the list of names cannot be read.
    """
    from ..merging import MergeOptions

    return MergeOptions(
        to=to,
        weights_only=weights_only,
        dtype=None if dtype is None else dtype.stored,
        shard_nbytes=_parse_shard_size(out_shard_size),
        copy_tokenizer=copy_tokenizer,
        ranks=ranks,
        zero_stage=zero_stage,
        own_steps=own_steps,
        parameter_names=read_parameter_names(parameter_names),
    )
