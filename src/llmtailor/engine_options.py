"""How a run's checkpoints are written: the options that are the same for every integration."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from .codecs import Rest
from .errors import InvalidInputError, UnsupportedError
from .interval import Interval, parse_interval
from .retention import Keep, parse_keep
from .writer import Durability, WhenBusy

__all__ = [
    "DEFAULT_COMMIT_TIMEOUT_SECS",
    "EngineOptions",
    "check_options",
    "engine_options",
    "refuse_interval",
    "refuse_unknown",
]

DEFAULT_COMMIT_TIMEOUT_SECS = 600.0


class EngineOptions(TypedDict, total=False):
    """How a run's checkpoints are written; the same for every integration."""

    capture: Literal["lazy", "blocking"]
    """"lazy" (default) copies the state while training goes on, up to the next optimizer step; "blocking" before
    ``save`` returns."""
    pool_nbytes: int | None
    """Host memory for state on its way to the disk. None (default) takes what one save needs, up to a quarter of the
    free memory. A smaller pool works, and makes optimizer steps wait for the disk."""
    max_in_flight: int
    """How many saves may be under way; 1 by default."""
    when_busy: WhenBusy
    """At that limit, a save waits ("wait", default) or is left out and counted ("skip")."""
    mirror: Path | str | None
    """A second directory, on another file system, that every checkpoint is copied to in the background."""
    keep_optimizer: int | None
    """How many of the newest checkpoints keep their optimizer state; older ones keep weights alone, and training cannot
    be resumed from them. None (default): all. What the run's ``keep`` says of it counts first."""
    mirror_keep: Keep | int | str | None
    """How many checkpoints to keep in the mirror, or which; None (default) keeps all."""
    rest: str | Rest | None
    """What becomes of layers that the strategy does not choose: "skip" (default) leaves them as they were last saved;
    "q8", "q4", "compact", "compact4" or "codes(...)" write them small instead, so that nothing is stale."""
    spread_layers: bool
    """On several ranks that all hold the whole state (DDP): deal the layers out to them, so that all write. False by
    default: rank 0 writes. Shards are always written by the rank that holds them."""
    commit_timeout_secs: float
    """On several ranks: how long one that is done with a save waits for the others; 600 by default. Then the save is
    given up, on all of them."""
    durable: Durability
    """What ``SaveHandle.result`` waits for: "local" (default), or "mirror", too. A copy that fails then counts as a
    failed save."""
    monitor: bool | Literal["gradients"]
    """Measure at every save how each layer moves, also where the strategy does not ask for it; "gradients": the norms
    of gradients, too, which takes a pass over them at every step. False by default. On several ranks a save that
    measures waits for all of them."""
    interval: str | Interval | None
    """"auto", or an ``Interval``: how often to save is chosen from what saves cost; of ``Run`` and the Trainer. None
    (default): the strategy says it (``budget_per_step``), or the caller."""


def engine_options(options: Mapping[str, Any]) -> EngineOptions:
    """Those of an integration's options that are the engine's."""
    return cast(EngineOptions, {key: options[key] for key in EngineOptions.__annotations__ if key in options})


def refuse_unknown(options: Mapping[str, object], known: Collection[str], *, others: Collection[str] = ()) -> None:
    """Refuse options that nobody reads: a misspelt one would be left out silently.

    Args:
        options: As given.
        known: Those that may be among them.
        others: What else the caller takes by name, for the hint.

    Raises:
        InvalidInputError: Says which.
    """
    if unknown := sorted(options.keys() - set(known)):
        near = difflib.get_close_matches(unknown[0], [*known, *others], n=1)
        raise InvalidInputError(
            "unknown option",
            kind="option",
            expected=", ".join(sorted({*known, *others})),
            found=", ".join(unknown),
            hint=f"did you mean {near[0]}?" if near else None,
        )


def check_options(options: EngineOptions, *, has_peers: bool = False) -> None:
    """Refuse options that make no sense, before anything is opened.

    Args:
        options: As given.
        has_peers: They are for one of several ranks.

    Raises:
        InvalidInputError: Says which.
        UnsupportedError: Several ranks cannot agree on one.
    """
    refuse_unknown(options, EngineOptions.__annotations__)
    choices = {"capture": ("lazy", "blocking"), "when_busy": ("wait", "skip"), "durable": ("local", "mirror")}
    given: Mapping[str, object] = {**options}
    for name, values in choices.items():
        if given.get(name, values[0]) not in values:
            raise _refuse(name, " or ".join(map(repr, values)), given[name])
    timeout = given.get("commit_timeout_secs", DEFAULT_COMMIT_TIMEOUT_SECS)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
        raise _refuse("commit_timeout_secs", "seconds, more than 0", timeout)
    in_flight = given.get("max_in_flight", 1)
    if not isinstance(in_flight, int) or in_flight < 1:
        raise _refuse("max_in_flight", "a number >= 1", in_flight)
    if given.get("mirror") is None and (given.get("durable") == "mirror" or given.get("mirror_keep") is not None):
        raise _refuse("mirror", "a directory, for durable='mirror' and mirror_keep are about it", None)
    parse_keep(options.get("mirror_keep"))
    parse_keep(None, optimizer=options.get("keep_optimizer"))
    if (monitor := options.get("monitor", False)) not in (False, True, "gradients"):
        raise _refuse("monitor", "True, False or 'gradients'", monitor)
    parse_interval(options.get("interval"))
    if has_peers:
        _refuse_moments(options)


def refuse_interval(options: Mapping[str, object]) -> None:
    """Refuse ``interval`` where the caller says when to save.

    Raises:
        InvalidInputError: It is given.
    """
    if (interval := options.get("interval")) is not None:
        raise InvalidInputError(
            "interval has no say here: it is you who calls for each save",
            kind="option",
            expected="no interval",
            found=repr(interval),
            hint="llmtailor.Run and the Trainer save by themselves, and take it",
        )


def _refuse_moments(options: EngineOptions) -> None:
    """Each rank plans by itself, so what it plans with must not depend on when it looks."""
    for name, value, only in (
        ("max_in_flight", options.get("max_in_flight", 1), 1),
        ("when_busy", options.get("when_busy", "wait"), "wait"),
    ):
        if value != only:
            raise UnsupportedError(
                f"{name}={value!r} is not supported on several ranks",
                kind="ranks-option",
                expected=repr(only),
                found=repr(value),
                hint="leave it out: the ranks would have to agree on what is in flight before each save",
            )


def _refuse(name: str, expected: str, found: object) -> InvalidInputError:
    return InvalidInputError(f"{name} makes no sense", kind="option", expected=expected, found=repr(found))
