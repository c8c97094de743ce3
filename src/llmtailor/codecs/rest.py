"""What becomes of the layers that a strategy does not choose: ``rest="skip"``, ``"q8"``, ``"q4"``, ``"compact"``, ...

    skip       left as they were last saved: stale, and free
    q8, q4     8- or 4-bit codes beside their last exact files: weights as differences to those, moments on their own
    compact    weights anew as BF16, which stock tools read, and what is missing from them as 8-bit codes, as moments
    compact4   the same with 4 bits
    codes(weights=delta4, first=int8, second=log8, weights_limit=0.001, ...)

Pure text and records; the text is parsed, never evaluated.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum

from ..errors import InvalidInputError
from ..state_keys import split_state_key
from ..tensors import TensorMeta
from .stored import StoredCodes

__all__ = ["MAX_SHARE", "MIN_NUMEL", "SKIP", "Component", "Rest", "component_of", "parse_rest"]


class Component(StrEnum):
    """What a tensor of a layer is to a codec."""

    WEIGHTS = "weights"
    FIRST = "first"
    """First moments: of either sign, about as large as a gradient."""
    SECOND = "second"
    """Second moments: never negative, over many orders of magnitude."""
    MASTER = "master"
    """What a 16-bit weight is the rounding of."""
    OTHER = "other"
    """Counters, whatever we do not know: always exact."""


# Source: torch 2.13, optim/{adam,adamw,sgd,rmsprop,adagrad,adadelta,adamax,_muon}.py (names in ``state``).
_FIRST = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
_SECOND = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf"})
# Source: TransformerEngine 2.9, pytorch/optimizers/fused_adam.py (master_param); the others are in use elsewhere.
_MASTER = frozenset({"master_param", "master_weight", "master"})

# Below this codes save less than a page, and such tensors (norms, biases) count for much.
MIN_NUMEL = 4096
# Codes that are hardly smaller than the layer are not worth being inexact.
MAX_SHARE = 0.9


def component_of(key: str) -> Component:
    """What a tensor is, by its name in a file: an fqn, or ``state.<fqn>.<leaf>``."""
    if not key.startswith("state."):
        return Component.WEIGHTS
    leaf = split_state_key(key)[1]
    if leaf in _FIRST:
        return Component.FIRST
    if leaf in _MASTER:
        return Component.MASTER
    return Component.SECOND if leaf in _SECOND else Component.OTHER


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "weights": ("delta8", "delta4", "tail8", "tail4", "exact"),
    "first": ("int8", "int4", "exact"),
    "second": ("log8", "log4", "exact"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """How layers that a strategy does not choose are written."""

    weights: str
    """``delta8``, ``delta4``: the layer's exact files stay, and the codes lie beside them. ``tail8``, ``tail4``,
    ``exact``: its weights file is written anew, and its optimizer state is in the codes alone."""
    first: str
    second: str
    weights_limit: float = 0.05
    """Relative L2 error above which the layer is written exactly instead."""
    first_limit: float = 0.25
    second_limit: float = 0.5

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _refuse(
                    f"{name} of codes makes no sense", "rest-codec", " or ".join(choices), getattr(self, name)
                )
            limit = getattr(self, f"{name}_limit")
            if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < float("inf"):
                raise _refuse(f"{name}_limit of codes makes no sense", "rest-limit", "a number >= 0", limit)

    @property
    def is_relative(self) -> bool:
        """True if the codes need the layer's exact files beside them."""
        return self.weights in ("delta8", "delta4")

    @property
    def text(self) -> str:
        """Canonical text, which ``parse_rest`` reads back."""
        for name, preset in _PRESETS.items():
            if preset == self:
                return name
        default = _PRESETS["q8"]
        told = [f"{name}={getattr(self, name)}" for name in _CHOICES]
        limits = [f"{name}_limit" for name in _CHOICES]
        told += [f"{name}={getattr(self, name)}" for name in limits if getattr(self, name) != getattr(default, name)]
        return f"codes({', '.join(told)})"

    def limit(self, component: Component) -> float:
        """Relative L2 error above which a layer is written exactly."""
        return {
            Component.WEIGHTS: self.weights_limit,
            Component.FIRST: self.first_limit,
            Component.SECOND: self.second_limit,
            Component.MASTER: self.weights_limit,
            Component.OTHER: 0.0,
        }[component]

    def codes_for(self, key: str, meta: TensorMeta, *, weight: TensorMeta | None = None) -> StoredCodes:
        """How a tensor is to be written, if its values allow.

        Args:
            key: Its fqn, or ``state.<fqn>.<leaf>``.
            meta: Its type and shape.
            weight: Of a master: type and shape of its weight, where it is the master of that; else it is kept.
        """
        return StoredCodes(codec=self._codec_for(component_of(key), meta, weight), meta=meta)

    def _codec_for(self, component: Component, meta: TensorMeta, weight: TensorMeta | None) -> str:
        if meta.numel < MIN_NUMEL or meta.dtype not in ("F32", "BF16", "F16") or component is Component.OTHER:
            return "exact"
        if component is Component.FIRST:
            return self.first
        if component is Component.SECOND:
            return self.second
        if component is Component.MASTER:
            is_coded = weight is not None and (self.is_relative or weight.dtype == "BF16")
            return self.weights if is_coded else "exact"
        if meta.dtype == "F32":
            return self.weights
        # 16-bit weights are small already; against earlier ones they can be packed without loss.
        return "xor" if self.is_relative else "exact"


_PRESETS = {
    "q8": Rest(weights="delta8", first="int8", second="log8"),
    "q4": Rest(weights="delta4", first="int4", second="log4"),
    "compact": Rest(weights="tail8", first="int8", second="log8"),
    "compact4": Rest(weights="tail4", first="int4", second="log4"),
}
SKIP = "skip"
# Longer than any rest, and far less than what exhausts Python's parser.
_MAX_LENGTH = 200
_HINT = 'write for example rest="q8"'
_EXPECTED = f"{SKIP}, {', '.join(_PRESETS)}, or codes(weights=..., first=..., second=...)"


def parse_rest(value: str | Rest | None) -> Rest | None:
    """``rest`` as users write it; None means that layers which are not chosen are left as they are.

    Raises:
        InvalidInputError: Kind ``rest`` (no such text), ``rest-codec`` or ``rest-limit``.
    """
    if value is None or value == SKIP:
        return None
    if isinstance(value, Rest):
        return value
    if not isinstance(value, str):
        raise _refuse("rest makes no sense", "rest", _EXPECTED, value)
    if value in _PRESETS:
        return _PRESETS[value]
    return _parse_call(value)


def _parse_call(text: str) -> Rest:
    text = text.strip()
    try:
        if len(text) > _MAX_LENGTH:
            raise SyntaxError("too long")
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        call = None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "codes" or call.args:
        shown = text if len(text) <= _MAX_LENGTH else f"{text[:40]}... ({len(text)} characters)"
        near = difflib.get_close_matches(shown.lower(), [SKIP, *_PRESETS], n=1)
        raise _refuse("rest makes no sense", "rest", _EXPECTED, shown, f"did you mean {near[0]}?" if near else _HINT)
    names = {field.name for field in fields(Rest)}
    values = {keyword.arg: _read_value(keyword.value, text) for keyword in call.keywords}
    if len(values) != len(call.keywords) or not values.keys() <= names or not _CHOICES.keys() <= values.keys():
        expected = f"each of {', '.join(_CHOICES)} once, and limits: {', '.join(sorted(names - _CHOICES.keys()))}"
        raise _refuse("the arguments of codes make no sense", "rest", expected, text)
    return Rest(**values)  # type: ignore[arg-type]


def _read_value(node: ast.expr, text: str) -> object:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Constant(value=str() | int() | float() as value):
            return value
    return ast.get_source_segment(text, node)


def _refuse(what: str, kind: str, expected: str, found: object, hint: str = _HINT) -> InvalidInputError:
    return InvalidInputError(what, kind=kind, expected=expected, found=repr(found), hint=hint)
