"""Which checkpoints may go, and which may go without their optimizer state. Pure; deleting is somebody else's.

A checkpoint stays if any rule wants it. Whatever the rules say, the newest stays, with all its files, and so does the
newest that training can be resumed from.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from .errors import InvalidInputError
from .manifest import LayerRecord, Manifest

__all__ = ["METRICS_NAME", "Choice", "Keep", "Kept", "choose_removals", "encode_metrics", "parse_keep", "thin_manifest"]

METRICS_NAME = "metrics.json"
"""In a checkpoint: what was measured at its step, name -> number."""

_COUNTS = ("limit", "last", "every", "best", "optimizer")
_FORM = "a number, or rules as in last=3, every=1000, best=2, metric=eval_loss, optimizer=2"
_ANSWERS = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints of a run stay: those that any rule wants. Without ``limit``, ``last``, ``every`` and ``best``
    all stay."""

    limit: int | None = None
    """This many in all, the newest first; those that must stay count. What a plain number means."""
    last: int | None = None
    """The newest so many."""
    every: int | None = None
    """For good: those whose step it divides."""
    best: int | None = None
    """The best so many by ``metric``; while none has a value of it, all stay."""
    metric: str = "eval_loss"
    """A name in ``metrics.json`` of a checkpoint, or in the log of its ``trainer_state.json``."""
    greater_is_better: bool | None = None
    """None: unless the metric's name ends with "loss", as in transformers."""
    optimizer: int | None = None
    """So many of the newest keep optimizer state, older ones weights alone; None: all that stay."""
    pinned: tuple[int, ...] = ()
    """Steps that stay, with all their files."""
    consistent: bool = True
    """The newest checkpoint whose layers are all of one step, exactly, stays, with all its files."""

    def __post_init__(self) -> None:
        given: Mapping[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        for name in _COUNTS:
            if given[name] is not None and (type(given[name]) is not int or given[name] < 1):
                raise _refuse(name, "a whole number, at least 1", given[name])
        if not isinstance(given["metric"], str) or not self.metric or set(self.metric) & set(",= \t\n"):
            raise _refuse("metric", "a name, without space, comma and =", self.metric)
        for name, values in (("greater_is_better", (None, True, False)), ("consistent", (True, False))):
            if not any(given[name] is value for value in values):
                raise _refuse(name, " or ".join(map(str, values)), given[name])
        if not isinstance(given["pinned"], tuple) or any(type(step) is not int or step < 0 for step in self.pinned):
            raise _refuse("pinned", "a tuple of steps", self.pinned)
        if self.limit is not None and (self.last, self.every, self.best) != (None, None, None):
            raise _refuse("limit", "last, beside every and best: a limit is for all checkpoints together", self.limit)

    @property
    def removes_nothing(self) -> bool:
        return self.limit is self.last is self.every is self.best is None

    @property
    def is_idle(self) -> bool:
        """All that there is stays as it is."""
        return self.removes_nothing and self.optimizer is None

    @property
    def is_ascending(self) -> bool:
        """More of the metric is better.

        Source: transformers 5.23, training_args.py (greater_is_better).
        """
        return not self.metric.endswith("loss") if self.greater_is_better is None else self.greater_is_better

    @property
    def text(self) -> str:
        """As ``parse_keep`` takes it."""
        default = Keep()
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return ", ".join(f"{name}={_write(value)}" for name, value in given.items() if value != getattr(default, name))


def _write(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refuse(name: str, expected: str, found: object) -> InvalidInputError:
    return InvalidInputError(
        f"{name} makes no sense as a rule of what to keep", kind="keep", expected=expected, found=repr(found)
    )


def parse_keep(value: Keep | int | str | None, *, consistent: bool = True, optimizer: int | None = None) -> Keep:
    """The rules that a number, a text or a ``Keep`` stands for.

    Args:
        value: None, or a number <= 0, keeps all (transformers' meaning of ``save_total_limit``).
        consistent: False takes that rule away.
        optimizer: ``Keep.optimizer``, if the value says nothing of it.

    Raises:
        InvalidInputError: Kind ``keep``.
    """
    if isinstance(value, Keep):
        keep = value
    elif isinstance(value, str):
        keep = Keep(**_parse_text(value))
    elif value is None or type(value) is int:
        keep = Keep(limit=value if value is not None and value > 0 else None)
    else:
        raise _refuse("keep", f"{_FORM}; or llmtailor.Keep(...)", value)
    return replace(
        keep,
        consistent=keep.consistent and consistent,
        optimizer=optimizer if keep.optimizer is None else keep.optimizer,
    )


def _parse_text(text: str) -> dict[str, Any]:
    known = [each.name for each in fields(Keep)]
    found: dict[str, Any] = {}
    for word in text.split(",") if text.strip() else ():
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals and not found:
            name, value = "limit", name
        if name not in known or name in found:
            raise _refuse("keep", f"{_FORM}; each once, of {', '.join(known)}", text)
        found[name] = _read(name, value)
    if not found.get("limit", 1):
        del found["limit"]  # as a number, 0 keeps all
    return found


def _read(name: str, value: str) -> object:
    if name == "metric":
        return value
    if name in ("greater_is_better", "consistent"):
        if value.lower() not in _ANSWERS:
            raise _refuse(name, "true or false", value)
        return _ANSWERS[value.lower()]
    words = value.split("/") if name == "pinned" else [value]
    if not all(word.isascii() and word.isdecimal() and len(word) < 19 for word in words):
        raise _refuse(name, "steps, as in 400/800" if name == "pinned" else "a whole number", value)
    return tuple(map(int, words)) if name == "pinned" else int(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A checkpoint as retention sees it."""

    step: int
    is_consistent: bool
    """All layers were saved at this step."""
    has_optimizer: bool = True
    """Training can be resumed from it."""
    can_thin: bool = True
    """It would be whole without its optimizer state."""
    metric: float | None = None
    """Of its step; None if not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What becomes of checkpoints."""

    removed: tuple[int, ...]
    """Steps, oldest first."""
    thinned: tuple[int, ...]
    """Those of which the optimizer state goes and the weights stay, oldest first."""
    bound: tuple[int, ...]
    """Those of which it would go if the weights could be read without it, oldest first."""
    reasons: Mapping[int, tuple[str, ...]]
    """Why those that stay do, oldest first."""


def choose_removals(checkpoints: Iterable[Kept], keep: Keep, *, pinned: Collection[int] = ()) -> Choice:
    """What may go of a run.

    Whatever the rules say, these stay, with all their files: the newest checkpoint, the newest with optimizer state,
    pinned ones, and, with ``keep.consistent``, the newest with optimizer state whose layers are all of one step (if
    none has, the newest such of weights alone). Towards a limit they count; where they alone exceed it they stay, as
    transformers does with the best model.

    Args:
        checkpoints: All published checkpoints of the run, in any order.
        keep: The rules.
        pinned: Steps that must stay, beside those of the rules.

    Source: transformers 5.23, trainer_utils.py (rotate_checkpoints).
    """
    ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    musts = _find_musts(ordered, keep, {*pinned, *keep.pinned})
    reasons: dict[int, list[str]] = defaultdict(list)
    for wanted in (musts, _want(ordered, keep, musts)):
        for step, words in wanted.items():
            reasons[step].extend(words)
    staying = [checkpoint for checkpoint in ordered if checkpoint.step in reasons]
    old = _find_old(staying, keep, musts)
    return Choice(
        removed=tuple(checkpoint.step for checkpoint in ordered if checkpoint.step not in reasons),
        thinned=tuple(checkpoint.step for checkpoint in old if checkpoint.can_thin),
        bound=tuple(checkpoint.step for checkpoint in old if not checkpoint.can_thin),
        reasons={checkpoint.step: tuple(reasons[checkpoint.step]) for checkpoint in staying},
    )


def _find_musts(ordered: Sequence[Kept], keep: Keep, pinned: Collection[int]) -> dict[int, list[str]]:
    """Steps that stay with all their files, and why."""
    musts: dict[int, list[str]] = defaultdict(list)
    full = [checkpoint for checkpoint in ordered if checkpoint.has_optimizer]
    consistent = [checkpoint for checkpoint in ordered if checkpoint.is_consistent] if keep.consistent else []
    for found, word in (
        (ordered[-1:], "newest"),
        (full[-1:], "newest to resume from"),
        ([checkpoint for checkpoint in ordered if checkpoint.step in pinned], "pinned"),
        (([each for each in consistent if each.has_optimizer] or consistent)[-1:], "newest consistent"),
    ):
        for checkpoint in found:
            if not (word == "newest to resume from" and checkpoint is ordered[-1]):
                musts[checkpoint.step].append(word)
    return musts


def _want(ordered: Sequence[Kept], keep: Keep, musts: Collection[int]) -> dict[int, list[str]]:
    """Steps that a rule wants, and which."""
    wanted: dict[int, list[str]] = defaultdict(list)
    steps = [checkpoint.step for checkpoint in ordered]
    if keep.removes_nothing:
        return {step: ["no rule removes it"] for step in steps if step not in musts}
    if keep.limit is not None:
        others = [step for step in steps if step not in musts]
        room = max(0, keep.limit - len(musts))
        for step in others[max(0, len(others) - room) :]:
            wanted[step].append(f"limit {keep.limit}")
    if keep.last is not None:
        for step in steps[-keep.last :]:
            wanted[step].append(f"last {keep.last}")
    if keep.every is not None:
        for step in steps:
            if step % keep.every == 0:
                wanted[step].append(f"every {keep.every}")
    if keep.best is not None:
        for step, word in _want_best(ordered, keep, keep.best):
            wanted[step].append(word)
    return wanted


def _want_best(ordered: Sequence[Kept], keep: Keep, number: int) -> list[tuple[int, str]]:
    values = [(checkpoint.metric, checkpoint.step) for checkpoint in ordered if checkpoint.metric is not None]
    if not values:
        return [(checkpoint.step, f"no {keep.metric} yet") for checkpoint in ordered]
    # Of equals the newer.
    ranked = sorted(values, key=lambda value: (-value[0] if keep.is_ascending else value[0], -value[1]))
    return [(step, f"best {number}, {keep.metric} {value:.6g}") for value, step in ranked[:number]]


def _find_old(staying: Sequence[Kept], keep: Keep, musts: Collection[int]) -> list[Kept]:
    """Checkpoints with optimizer state that is not wanted any more."""
    if keep.optimizer is None:
        return []
    full = [checkpoint for checkpoint in staying if checkpoint.has_optimizer]
    return [checkpoint for checkpoint in full[: -keep.optimizer] if checkpoint.step not in musts]


def thin_manifest(manifest: Manifest) -> Manifest | None:
    """What a checkpoint says about itself once its optimizer state is gone: its weights, as stock tools read them.

    Returns:
        None if it has no optimizer state, or codes without which its weights are not those of its step.
    """
    if manifest.contents != "full" or not all(
        layer.encoding is None or layer.encoding.base == "none" for layer in manifest.layers
    ):
        return None
    changes = {"contents": "weights", "optimizers": (), "layers": tuple(map(_thin_layer, manifest.layers))}
    return Manifest(**{**dict(manifest), **changes})


def _thin_layer(layer: LayerRecord) -> LayerRecord:
    parts = tuple(part.model_copy(update={"optimizer": None}) for part in layer.parts if part.weights is not None)
    return layer.model_copy(update={"optimizer": None, "update_count": None, "encoding": None, "parts": parts})


def encode_metrics(metrics: Mapping[str, float]) -> str:
    """The text of ``metrics.json``; numbers that are not finite are left out, for nothing is better or worse."""
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    return json.dumps(finite, allow_nan=False, sort_keys=True) + "\n"
