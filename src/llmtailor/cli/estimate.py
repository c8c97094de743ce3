"""``llmtailor estimate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._output import AsJson, Output

if TYPE_CHECKING:
    from ..estimate import Training

__all__ = ["estimate"]

_NUM_SAVES = 16

_Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A config.json, a directory with one, a checkpoint, or a model of the local hub cache.",
        show_default=False,
    ),
]
_Strategy = Annotated[
    list[str] | None,
    typer.Option(help="Which layers are saved, as in training; may be repeated. Without it: all that are built in."),
]
_Optimizer = Annotated[
    str | None,
    typer.Option(
        help="adamw, adam, sgd, sgd-momentum, lion, adafactor, muon, adamw8bit, or none; without it what the "
        "checkpoint has, else adamw.",
        show_default=False,
    ),
]
_Precision = Annotated[
    str | None,
    typer.Option(
        help="bf16-mixed, fp16-mixed, bf16, fp32; without it what the checkpoint has, else bf16-mixed.",
        show_default=False,
    ),
]
_Trainable = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="Only parameters of such a name are trained; may be repeated.", show_default=False
    ),
]
_Steps = Annotated[
    int | None, typer.Option(min=1, help="Steps of the run; without it enough for 16 saves.", show_default=False)
]
_Every = Annotated[int, typer.Option(min=1, help="Steps between two saves.")]
_IsResumed = Annotated[
    bool, typer.Option("--resumed", help="Count the saves after a full checkpoint, not that checkpoint.")
]
_Keep = Annotated[
    str | None,
    typer.Option(help="How many checkpoints stay, or rules such as last=3,every=1000.", show_default="all"),
]
_Rest = Annotated[str, typer.Option(help="Layers that are not chosen: skip, q8, q4, compact, compact4.")]
_Ranks = Annotated[int, typer.Option(min=1, help="Ranks that share weights and state (ZeRO-3, FSDP).")]
_PackedMasters = Annotated[
    bool,
    typer.Option(
        "--packed-masters", help="Masters of BF16 weights in 2 bytes, as in whole files that LLMTailor writes."
    ),
]
_DriftPerStep = Annotated[
    float, typer.Option(help="How far every layer is assumed to move at a step, relative to its size.")
]
_Bandwidth = Annotated[str, typer.Option(help="At which bytes are written.")]
_Price = Annotated[float, typer.Option(help="USD for a GB of disk and month.")]
_Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw the bytes into a .png or .svg file.", show_default=False)
]
_IsQuiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print the bytes that a run writes alone, one strategy a line.")
]


def estimate(
    model: _Model,
    strategy: _Strategy = None,
    optimizer: _Optimizer = None,
    precision: _Precision = None,
    trainable: _Trainable = None,
    steps: _Steps = None,
    every: _Every = 100,
    is_resumed: _IsResumed = False,
    keep: _Keep = None,
    rest: _Rest = "skip",
    ranks: _Ranks = 1,
    has_packed_masters: _PackedMasters = False,
    drift_per_step: _DriftPerStep = 1e-4,
    bandwidth: _Bandwidth = "2GB/s",
    price: _Price = 0.023,
    plot: _Plot = None,
    as_json: AsJson = False,
    is_quiet: _IsQuiet = False,
) -> None:
    """Tell what the checkpoints of a run will take, before it is run: bytes, disk, time, money, age of layers."""
    from ..codecs import parse_rest
    from ..estimate import Schedule, estimate_runs, read_model_tensors
    from ..reports.estimation import EstimatePage, draw_bars
    from ..reports.heat_map import check_picture
    from ..retention import parse_keep
    from ..strategies import parse_strategy

    out = Output(as_json=as_json, is_quiet=is_quiet)
    if plot is not None:
        check_picture(plot)
    rate = _parse_bandwidth(bandwidth)
    _check_number("drift-per-step", drift_per_step, most=1.0)
    _check_number("price", price, most=sys.float_info.max)
    training = _training(optimizer, precision, trainable)
    schedule = Schedule(steps=steps or _NUM_SAVES * every, every=every, is_resumed=is_resumed, keep=parse_keep(keep))
    # What is wrong with a text is told before a model is built.
    for text in strategy or ():
        parse_strategy(text)
    parsed_rest = parse_rest(rest)
    found = estimate_runs(
        read_model_tensors(
            model, on_build=lambda what: out.note(f"transformers builds {what}, without its weights ...")
        ),
        schedule,
        training=training,
        strategies=strategy or None,
        rest=parsed_rest,
        ranks=ranks,
        packs_masters=has_packed_masters,
        drift_per_step=drift_per_step,
    )
    if plot is not None:
        draw_bars(found, plot)
        out.note(f"drew {plot}")
    out.show(EstimatePage(estimate=found, bandwidth=rate, price=price))


def _training(optimizer: str | None, precision: str | None, trainable: list[str] | None) -> Training | None:
    """None if nothing is said of it."""
    from ..estimate import Training

    default = Training()
    if optimizer is None and precision is None and not trainable:
        return None
    return Training(
        optimizer=optimizer or default.optimizer,
        precision=precision or default.precision,
        trainable=tuple(trainable or ()),
    )


def _parse_bandwidth(text: str) -> int:
    from ..errors import InvalidInputError
    from ..recipe.named import parse_size

    nbytes = parse_size(text.strip().removesuffix("/s"))
    if not nbytes:
        raise InvalidInputError(
            "the bandwidth makes no sense",
            kind="bandwidth",
            expected="bytes a second, as in 2GB/s or 500MB/s",
            found=repr(text),
            hint="give --bandwidth a number and a unit",
        )
    return nbytes


def _check_number(option: str, value: float, *, most: float) -> None:
    from ..errors import InvalidInputError

    if not 0 <= value <= most:
        raise InvalidInputError(
            f"--{option} makes no sense",
            kind=option,
            expected=f"a number of at least 0 and at most {most:g}",
            found=value,
        )
