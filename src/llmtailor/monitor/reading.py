"""Reads the picked entries of a training, all layers at once, and sums over them what is said of each layer.

Many small gathers on the device, one copy per device to the host, and the rest in numpy: some milliseconds, whatever
the size of the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ..drift import LayerSums
from ..local_parts import memory_of
from ..manifest import OptimizerRecord
from ..optimizer_values import decode_option
from .picks import Factors, ParameterPicks

__all__ = ["Entries", "Floats", "Hyper", "hyper_parameters", "read_entries", "sum_up"]

Floats: TypeAlias = npt.NDArray[np.float32]
_Doubles: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyper:
    """What an optimizer multiplies a parameter's state with."""

    lr: float
    eps: float
    betas: tuple[float, float] | None
    """Of Adam's kind; None where moments are not corrected for their start."""
    is_sgd: bool
    """The update is ``lr`` times the first moment."""
    step: float | None
    """Where the optimizer counts updates for all of a group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Values of picked entries, parameter by parameter, laid end to end."""

    weights: Floats
    first: Floats
    """0 where there is none."""
    second: Floats
    steps: Floats
    """Updates so far, one per parameter; NaN if not counted."""

    def part(self, entries: slice, parameters: slice) -> Entries:
        """Those of some parameters."""
        return Entries(
            weights=self.weights[entries],
            first=self.first[entries],
            second=self.second[entries],
            steps=self.steps[parameters],
        )


def hyper_parameters(optimizers: Sequence[OptimizerRecord]) -> dict[str, Hyper]:
    """fqn -> what its optimizer says of it."""
    found: dict[str, Hyper] = {}
    for optimizer in optimizers:
        for group in optimizer.groups:
            options = {name: decode_option(value) for name, value in group.options.items() if name in _OPTIONS}
            found |= dict.fromkeys(group.parameters, _read_hyper(optimizer.name, options))
    return found


_OPTIONS = frozenset({"lr", "eps", "betas", "step"})


def _read_hyper(name: str, options: Mapping[str, object]) -> Hyper:
    betas = options.get("betas")
    pair = tuple(map(_number, betas)) if isinstance(betas, tuple | list) and len(betas) == 2 else None
    step = options.get("step")
    return Hyper(
        lr=_number(options.get("lr", 0.0)),
        eps=_number(options.get("eps", 0.0)),
        betas=None if pair is None else (pair[0], pair[1]),
        is_sgd=name.rpartition(".")[2].lower() == "sgd",
        step=None if step is None else _number(step),
    )


def _number(value: object) -> float:
    if isinstance(value, torch.Tensor):
        return float(value.item())
    return float(value) if isinstance(value, int | float) else 0.0


def read_entries(picked: Sequence[ParameterPicks]) -> Entries:
    """The values of all picked entries, laid end to end in the order of the parameters."""
    sizes = [each.indices.numel() for each in picked]
    starts = np.cumsum([0, *sizes])
    entries = Entries(
        weights=np.zeros(starts[-1], np.float32),
        first=np.zeros(starts[-1], np.float32),
        second=np.zeros(starts[-1], np.float32),
        steps=np.full(len(picked), np.nan, np.float32),
    )
    indices = [each.indices.long() for each in picked]
    _scatter(entries.weights, starts, ((n, _take(each.weights, indices[n])) for n, each in enumerate(picked)))
    _scatter(
        entries.first,
        starts,
        ((n, _take(each.first, indices[n])) for n, each in enumerate(picked) if each.first is not None),
    )
    _scatter(
        entries.second,
        starts,
        ((n, _take_second(each.second, indices[n])) for n, each in enumerate(picked) if each.second is not None),
    )
    counts = ((n, memory_of(each.step).reshape(1)) for n, each in enumerate(picked) if each.step is not None)
    _scatter(entries.steps, np.arange(len(picked) + 1), counts)
    return entries


def _take(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    # torch 2.13 takes no elements of an 8-bit float; of its bytes it does.
    if tensor.element_size() == 1:
        return torch.take(tensor.view(torch.uint8), indices).view(tensor.dtype)
    return torch.take(tensor, indices)


def _take_second(second: torch.Tensor | Factors, indices: torch.Tensor) -> torch.Tensor:
    if isinstance(second, torch.Tensor):
        return _take(second, indices)
    num_rows, num_columns = second.rows.shape[1], second.columns.shape[1]
    row = indices // num_columns
    batch = row // num_rows
    of_row, of_column = (
        torch.take(second.rows, row),
        torch.take(second.columns, batch * num_columns + indices % num_columns),
    )
    return of_row * of_column / second.rows.mean(dim=1)[batch].clamp_min(1e-38)


def _scatter(target: Floats, starts: npt.NDArray[np.int64], taken: Iterable[tuple[int, torch.Tensor]]) -> None:
    """Copy values of some parameters to their places, with one copy from each device."""
    by_device: dict[torch.device, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for number, values in taken:
        by_device[values.device].append((number, values))
    for each in by_device.values():
        together = torch.cat([tensor.float() for _, tensor in each]).cpu().numpy()
        at = 0
        for number, tensor in each:
            target[starts[number] : starts[number + 1]] = together[at : at + tensor.numel()]
            at += tensor.numel()


def sum_up(
    picked: Sequence[ParameterPicks],
    entries: Entries,
    saved: Floats,
    hyper: Mapping[str, Hyper],
    gradients: Mapping[str, float],
) -> LayerSums:
    """The sums over some parameters of a layer.

    Args:
        picked: The parameters.
        entries: Their values now.
        saved: Their weights at the last save of the layer, entry by entry.
        hyper: By fqn; a parameter that no optimizer has is left out.
        gradients: By fqn: sum of squares of the gradient that is here.
    """
    if not picked:
        return LayerSums()
    scale = np.array([each.scale for each in picked])
    sizes = np.array([each.indices.numel() for each in picked])
    starts = np.cumsum(sizes) - sizes
    num_entries = sizes * scale

    def add_up(values: _Doubles) -> float:
        return float((np.add.reduceat(values, starts) * scale).sum())

    has_first, has_second = (np.array([getattr(each, name) is not None for each in picked]) for name in _MOMENTS)
    has_state = has_first | has_second | np.array([each.step is not None for each in picked])
    # What a diverged run or one of huge numbers brings is for the caller to judge.
    with np.errstate(all="ignore"):
        weights, first, second, before = (
            each.astype(np.float64) for each in (entries.weights, entries.first, entries.second, saved)
        )
        update, is_known = _updates(picked, first, second, entries.steps, sizes, hyper)
        moved = np.square(weights - before)
        root = np.sqrt(second)
        trains = np.repeat(np.array([float(each.is_trainable) for each in picked]), sizes)
        is_untouched = ~has_state & (np.add.reduceat(moved, starts) == 0)
        trainable = num_entries * (np.array([each.is_trainable for each in picked]) & ~is_untouched)
        return LayerSums(
            trainable=float(trainable.sum()),
            with_second=float((trainable * has_second).sum()),
            with_first=float((trainable * has_first).sum()),
            with_update=float((trainable * is_known).sum()),
            with_gradient=float(sum(each.fqn in gradients for each in picked)),
            weights=add_up(np.square(weights)),
            saved=add_up(np.square(before)),
            moved=add_up(moved),
            moved_trainable=add_up(moved * trains),
            first=add_up(np.square(first)),
            update=add_up(np.square(update)),
            gradient=sum(gradients.get(each.fqn, 0.0) for each in picked),
            importance=add_up(root * moved),
            rate=add_up(root * np.square(update)),
        )


_MOMENTS = ("first", "second")


def _updates(
    picked: Sequence[ParameterPicks],
    first: _Doubles,
    second: _Doubles,
    counts: Floats,
    sizes: npt.NDArray[np.int64],
    hyper: Mapping[str, Hyper],
) -> tuple[_Doubles, _Doubles]:
    """The next update of each entry as far as the state tells it, and for each parameter whether it does.

    Source: torch 2.13, optim/adam.py and adamw.py (_single_tensor_adam), optim/sgd.py (_single_tensor_sgd).
    """
    unknown = Hyper(lr=0.0, eps=0.0, betas=None, is_sgd=False, step=None)
    of = [hyper.get(each.fqn, unknown) for each in picked]
    steps = np.where(np.isnan(counts), [np.nan if each.step is None else each.step for each in of], counts)
    betas = np.array([(np.nan, np.nan) if each.betas is None else each.betas for each in of])
    corrections = 1 - betas ** steps[:, None]
    corrections = np.where(np.isfinite(corrections) & (corrections > 0), corrections, 1.0)
    lr, eps = (np.repeat([getattr(each, name) for each in of], sizes) for name in ("lr", "eps"))
    mean = first / np.repeat(corrections[:, 0], sizes)
    divisor = np.sqrt(second / np.repeat(corrections[:, 1], sizes)) + eps
    is_sgd = np.array([each.is_sgd and pick.first is not None for each, pick in zip(of, picked, strict=True)])
    is_adam = np.array([pick.first is not None and pick.second is not None for pick in picked])
    of_adam = np.divide(mean, divisor, out=np.zeros_like(mean), where=divisor != 0)
    update = lr * np.where(np.repeat(is_sgd, sizes), first, of_adam)
    is_known = (is_sgd | is_adam).astype(float)
    return update * np.repeat(is_known, sizes), is_known
