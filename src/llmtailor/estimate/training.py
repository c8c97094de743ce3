"""What an optimizer keeps of each parameter, by name, type and shape, before it has made a step. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import InvalidInputError
from ..layers import LayerKind
from ..tensors import TensorMeta

__all__ = ["MASTER", "OPTIMIZERS", "PRECISIONS", "Precision", "Training"]

MASTER = "master"
"""Leaf of the fp32 copy that the optimizer updates. Source: zero/reading.py (MASTER)."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_Leaves = Mapping[str, TensorMeta]
_STEP = {"step": TensorMeta(dtype="F32", shape=())}
# Source: bitsandbytes 0.44 and later, optim/optimizer.py (min_8bit_size, blocks of 256, qmap1 and qmap2 of 256 values).
_MIN_8BIT_NUMEL = 4096
_8BIT_BLOCK_NUMEL = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """In which types a training holds its numbers."""

    weights: str
    """safetensors spelling, as all here."""
    state: str
    has_masters: bool
    """The optimizer updates F32 copies of the weights, which are saved too."""


PRECISIONS: Mapping[str, Precision] = {
    "bf16-mixed": Precision(weights="BF16", state="F32", has_masters=True),
    "fp16-mixed": Precision(weights="F16", state="F32", has_masters=True),
    "bf16": Precision(weights="BF16", state="BF16", has_masters=False),
    "fp32": Precision(weights="F32", state="F32", has_masters=False),
}


def _adam(meta: TensorMeta, kind: LayerKind) -> _Leaves:
    return {**_STEP, "exp_avg": meta, "exp_avg_sq": meta}


def _momentum(meta: TensorMeta, kind: LayerKind) -> _Leaves:
    return {"momentum_buffer": meta}


def _lion(meta: TensorMeta, kind: LayerKind) -> _Leaves:
    return {"exp_avg": meta}


def _nothing(meta: TensorMeta, kind: LayerKind) -> _Leaves:
    return {}


def _adafactor(meta: TensorMeta, kind: LayerKind) -> _Leaves:
    """A row and a column of second moments for a matrix.

    Source: torch 2.13, optim/_adafactor.py (_init_group).
    """
    if len(meta.shape) < 2:
        return {**_STEP, "variance": meta}
    *outer, rows, columns = meta.shape
    row = TensorMeta(dtype=meta.dtype, shape=(*outer, rows, 1))
    column = TensorMeta(dtype=meta.dtype, shape=(*outer, 1, columns))
    return {**_STEP, "row_var": row, "col_var": column}


def _muon(meta: TensorMeta, kind: LayerKind) -> _Leaves:
    """Momentum for the matrices of blocks; AdamW for all else.

    Source: torch 2.13, optim/_muon.py: it takes parameters of two dimensions alone; others, embeddings and heads are
        for AdamW.
    """
    is_matrix = len(meta.shape) == 2 and kind is LayerKind.BLOCK
    return _momentum(meta, kind) if is_matrix else _adam(meta, kind)


def _adamw_8bit(meta: TensorMeta, kind: LayerKind) -> _Leaves:
    step = {"step": TensorMeta(dtype="I64", shape=())}
    if meta.numel < _MIN_8BIT_NUMEL:
        exact = TensorMeta(dtype="F32", shape=meta.shape)
        return {**step, "state1": exact, "state2": exact}
    codes = TensorMeta(dtype="U8", shape=meta.shape)
    scales = TensorMeta(dtype="F32", shape=(-(-meta.numel // _8BIT_BLOCK_NUMEL),))
    values = TensorMeta(dtype="F32", shape=(256,))
    named = {"state": codes, "absmax": scales, "qmap": values}
    return {**step, **{f"{name}{number}": each for name, each in named.items() for number in (1, 2)}}


OPTIMIZERS: Mapping[str, Callable[[TensorMeta, LayerKind], _Leaves]] = {
    "adamw": _adam,
    "adam": _adam,
    "sgd": _nothing,
    "sgd-momentum": _momentum,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
    "adamw8bit": _adamw_8bit,
    "none": _nothing,
}
"""By name: what is kept of a parameter of a type and shape, in a layer of a kind. ``none``: weights alone are saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is trained, and how."""

    optimizer: str = "adamw"
    """One of ``OPTIMIZERS``."""
    precision: str = "bf16-mixed"
    """One of ``PRECISIONS``."""
    trainable: tuple[str, ...] = ()
    """Globs over parameter names; nothing is kept of the others but weights. Empty: all are trained."""

    def __post_init__(self) -> None:
        _check_word("optimizer", self.optimizer, OPTIMIZERS)
        _check_word("precision", self.precision, PRECISIONS)

    def weight(self, meta: TensorMeta) -> TensorMeta:
        """A parameter as it is saved."""
        if meta.dtype not in _FLOATS:
            return meta
        return TensorMeta(dtype=PRECISIONS[self.precision].weights, shape=meta.shape)

    def state(self, meta: TensorMeta, kind: LayerKind) -> _Leaves:
        """What is kept of a parameter that is trained, by leaf; its master is one.

        Args:
            meta: The parameter.
            kind: Of its layer.
        """
        precision = PRECISIONS[self.precision]
        if meta.dtype not in _FLOATS or self.optimizer == "none":
            return {}
        masters = {MASTER: TensorMeta(dtype="F32", shape=meta.shape)} if precision.has_masters else {}
        return {**masters, **OPTIMIZERS[self.optimizer](TensorMeta(dtype=precision.state, shape=meta.shape), kind)}

    def is_trained(self, fqn: str) -> bool:
        return not self.trainable or any(fnmatchcase(fqn, glob) for glob in self.trainable)

    def check_globs(self, names: Sequence[str]) -> None:
        """Raises if a glob of ``trainable`` is of no parameter.

        Raises:
            InvalidInputError: Kind ``trainable``.
        """
        for glob in self.trainable:
            if not any(fnmatchcase(name, glob) for name in names):
                raise InvalidInputError(
                    "no parameter is called so",
                    kind="trainable",
                    expected=f"a glob over the names of {len(names)} parameters, such as {names[0]}" if names else None,
                    found=repr(glob),
                    hint=_hint_near(glob, names),
                )

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.optimizer}, {self.precision}"


def _check_word(argument: str, value: str, known: Iterable[str]) -> None:
    words = list(known)
    if value not in words:
        raise InvalidInputError(
            f"there is no such {argument}",
            kind=f"unknown-{argument}",
            expected=", ".join(words),
            found=repr(value),
            hint=_hint_near(str(value), words),
        )


def _hint_near(word: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"did you mean {near[0]}?" if near else None
