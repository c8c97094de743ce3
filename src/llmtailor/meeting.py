"""Steps that all ranks take together: opening a run, choosing a checkpoint, loading it.

Nobody trains meanwhile, so these wait for each other; a rank that fails makes all fail, with its error. In a single
process each is what that process says. ``add_up``, and ``tell`` with a deadline, are for saves that need it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from . import errors
from .errors import InvalidInputError, TailorError, WriteError
from .ranks import LateError, Ranks
from .storage import STAGING_NAME, StagingSeat

__all__ = ["Meeting", "Outcome", "open_together"]

# Loading is as long as it takes; ranks that load as much wait for each other no longer than the slowest disk differs.
_TIMEOUT_SECS = 1800.0
_VISIBLE_SECS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a step on one rank."""

    error: BaseException | None = None
    """What stopped it."""
    damage: str | None = None
    """What is wrong with the checkpoint it looked at."""


class _Closable(Protocol):
    def close(self) -> None: ...


_OpenT = TypeVar("_OpenT", bound=_Closable)


class Meeting:
    """The ranks of a training, in step. Every rank calls the same methods in the same order.

    Args:
        ranks: They; None for a process alone.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self.ranks = ranks
        self._numbers = itertools.count()
        self._sums = itertools.count()

    @property
    def is_coordinator(self) -> bool:
        return self.ranks is None or self.ranks.is_coordinator

    def tell(self, message: Mapping[str, Any], timeout_secs: float | None = None) -> Mapping[str, Any]:
        """What the coordinator says; of the others, what they pass does not matter.

        Args:
            message: JSON.
            timeout_secs: How long to wait for it; None is as long as loading may take.

        Raises:
            WriteError: Kind ``rank-late``: it said nothing.
        """
        if self.ranks is None:
            return message
        key = f"meeting/{next(self._numbers)}"
        if self.ranks.is_coordinator:
            self.ranks.post(key, json.dumps(message).encode())
            return message
        found: Mapping[str, Any] = json.loads(self.ranks.take(key, timeout_secs=timeout_secs or _TIMEOUT_SECS))
        return found

    def agree(self, outcome: Outcome) -> str | None:
        """Compare how a step went.

        Returns:
            What is damaged, if a rank found something to be and none failed otherwise.

        Raises:
            BaseException: This rank's own error, or one of the same class for that of another.
        """
        if self.ranks is None:
            if outcome.error is not None:
                raise outcome.error
            return outcome.damage
        told = self._share(_encode(self.ranks.rank, outcome))
        if outcome.error is not None:
            raise outcome.error
        failed = [each for each in told if each["class"] is not None]
        if failed:
            raise _decode(failed[0], len(failed))
        return "; ".join(each["damage"] for each in told if each["damage"]) or None

    def add_up(self, own: bytes | None, error: BaseException | None, timeout_secs: float) -> bytes:
        """Sum of what each rank has to say in numbers, at a save; or why one of them cannot say it.

        Args:
            own: float32 values in memory order, as many on every rank; a few kilobytes.
            error: Why this rank has none.
            timeout_secs: How long to wait for the others.

        Returns:
            The sums, the same bits on every rank.

        Raises:
            BaseException: This rank's own error, or one of the same class for that of another.
            WriteError: Kind ``rank-late``; ``ranks-disagree`` if a rank says more numbers than another.
        """
        if self.ranks is None:
            if error is not None:
                raise error
            assert own is not None
            return own
        outcome = _encode(self.ranks.rank, Outcome(error=error))
        message = b"+" + own if own is not None else b"-" + json.dumps(outcome).encode()
        number = next(self._sums)
        total = self._sum(f"sum/{number}", f"sum/{number - 1}", message, timeout_secs)
        if error is not None:
            raise error
        if total[:1] == b"-":
            raise _decode(json.loads(total[1:]), 1)
        return total[1:]

    def _sum(self, key: str, before: str, message: bytes, timeout_secs: float) -> bytes:
        import numpy as np

        assert self.ranks is not None
        ranks = self.ranks
        if not ranks.is_coordinator:
            ranks.post(f"{key}/{ranks.rank}", message, counter=f"{key}/count")
            return ranks.take(key, timeout_secs=2 * timeout_secs)
        others = [f"{key}/{rank}" for rank in range(1, ranks.size)]
        with contextlib.suppress(LateError):
            ranks.wait_for_count([f"{key}/count"], lambda counts: counts[0] >= len(others), timeout_secs)
        found = ranks.take_those_there(others)
        absent = [rank for rank in range(1, ranks.size) if f"{key}/{rank}" not in found]
        messages = [message, *(found[each] for each in others if each in found)]
        messages += [b"-" + json.dumps(_late(rank, timeout_secs)).encode() for rank in absent[:1]]
        messages += [
            b"-" + json.dumps(_disagrees(rank, len(found[each]) // 4, len(message) // 4)).encode()
            for rank, each in enumerate(others, 1)
            if message[:1] == found.get(each, b"")[:1] == b"+" and len(found[each]) != len(message)
        ][:1]
        total = next((each for each in messages if each[:1] == b"-"), None)
        if total is None:
            tables = [np.frombuffer(each[1:], dtype=np.float32).astype(np.float64) for each in messages]
            total = b"+" + np.sum(tables, axis=0).astype(np.float32).tobytes()
        ranks.post(key, total)
        # All have come here, so none is still reading the sums before.
        ranks.drop([before, f"{before}/count", *(each.replace(key, before, 1) for each in others)])
        return total

    def _share(self, own: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The outcomes that are not good, on every rank; at most a few."""
        assert self.ranks is not None
        key = f"meeting/{next(self._numbers)}"
        if not self.ranks.is_coordinator:
            self.ranks.post(f"{key}/{own['rank']}", json.dumps(own).encode(), counter=f"{key}/count")
            found: list[Mapping[str, Any]] = json.loads(self.ranks.take(key, timeout_secs=2 * _TIMEOUT_SECS))
            return found
        try:
            size = self.ranks.size
            self.ranks.wait_for_count([f"{key}/count"], lambda counts: counts[0] >= size - 1, _TIMEOUT_SECS)
        except LateError:
            pass
        others = self.ranks.take_those_there(f"{key}/{rank}" for rank in range(1, self.ranks.size))
        outcomes = [own, *(json.loads(data) for data in others.values())]
        absent = sorted({*range(self.ranks.size)} - {each["rank"] for each in outcomes})
        outcomes += [_late(rank, _TIMEOUT_SECS) for rank in absent[:1]]
        told = [each for each in outcomes if each["class"] is not None or each["damage"]][:4]
        self.ranks.post(key, json.dumps(told).encode())
        return told


def _encode(rank: int, outcome: Outcome) -> Mapping[str, Any]:
    error, told = outcome.error, None
    if isinstance(error, TailorError):
        told = {name: getattr(error, name) for name in ("what", "kind", "path", "layer", "fqn", "hint")}
        told |= {
            name: None if (value := getattr(error, name)) is None else str(value) for name in ("expected", "found")
        }
    elif error is not None:
        told = {"what": str(error)[:1000], "kind": "rank-failed"}
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "class": None if error is None else type(error).__name__,
        "error": told,
        "damage": None if outcome.damage is None else f"rank {rank}: {outcome.damage}"[:1000],
    }


def _late(rank: int, timeout_secs: float) -> Mapping[str, Any]:
    told = {"what": f"no word within {timeout_secs:.0f} s", "kind": "rank-late", "hint": "is it alive?"}
    return {"rank": rank, "host": "host unknown", "class": "WriteError", "error": told, "damage": None}


def _disagrees(rank: int, found: int, expected: int) -> Mapping[str, Any]:
    told = {
        "what": "it measures other layers than rank 0",
        "kind": "ranks-disagree",
        "expected": f"{expected} numbers, as rank 0 has",
        "found": f"{found} numbers",
        "hint": "all ranks must train the same model, cut into layers in the same way",
    }
    return {"rank": rank, "host": "host unknown", "class": "WriteError", "error": told, "damage": None}


def _decode(told: Mapping[str, Any], count: int) -> TailorError:
    kind = getattr(errors, told["class"], WriteError)
    kind = kind if isinstance(kind, type) and issubclass(kind, TailorError) else WriteError
    fields = {**told["error"]}
    more = f", and {count - 1} more" if count > 1 else ""
    what = f"rank {told['rank']} ({told['host']}){more}: {fields.pop('what')}"
    error: TailorError = kind(what, **fields)
    return error


def open_together(
    meeting: Meeting, directory: Path, open_run: Callable[[StagingSeat | None], _OpenT]
) -> tuple[_OpenT, str]:
    """Open a run on every rank: the coordinator first, for it makes the directory and holds the lock.

    Args:
        meeting: The ranks.
        directory: The run, as this rank knows it.
        open_run: Opens it.

    Returns:
        What ``open_run`` returned, and the session: text that is the same on every rank, and new each time.

    Raises:
        TailorError: A rank could not open it, or sees another directory by that name.
    """
    ranks = meeting.ranks
    if ranks is None:
        return open_run(None), secrets.token_hex(8)
    if not ranks.is_coordinator:
        return _join(meeting, ranks, directory, open_run)
    session = secrets.token_hex(8)
    token = directory / STAGING_NAME / f"open-{session}"
    opened: _OpenT | None = None
    error: BaseException | None = None
    try:
        opened = open_run(StagingSeat(rank=0, session=session))
        token.touch()
    except BaseException as err:
        error = err
    try:
        meeting.tell({"session": session, "directory": str(directory.resolve()), "is_open": error is None})
        meeting.agree(Outcome(error=error))
    except BaseException:
        if opened is not None:
            opened.close()
        raise
    finally:
        token.unlink(missing_ok=True)
    assert opened is not None  # else its error was raised
    return opened, session


def _join(
    meeting: Meeting, ranks: Ranks, directory: Path, open_run: Callable[[StagingSeat | None], _OpenT]
) -> tuple[_OpenT, str]:
    told = meeting.tell({})
    session = str(told["session"])
    opened: _OpenT | None = None
    error: BaseException | None = None
    try:
        if told["is_open"]:
            _check_same(directory, f"open-{session}", str(told["directory"]))
            opened = open_run(StagingSeat(rank=ranks.rank, session=session))
    except BaseException as err:
        error = err
    try:
        meeting.agree(Outcome(error=error))
    except BaseException:
        if opened is not None:
            opened.close()
        raise
    assert opened is not None
    return opened, session


def _check_same(directory: Path, name: str, expected: str) -> None:
    """Refuse a directory in which what the coordinator left cannot be seen."""
    deadline = time.monotonic() + _VISIBLE_SECS
    # By another name it may be the same directory, but votes compare names.
    while (is_other := str(directory.resolve()) != expected) or not os.path.lexists(directory / STAGING_NAME / name):
        if is_other or time.monotonic() > deadline:
            raise InvalidInputError(
                "this rank would write to another directory than rank 0",
                kind="other-store",
                path=directory,
                expected=f"{expected}, shared by all ranks",
                found=f"{directory.resolve()} on {socket.gethostname()}",
                hint="give every rank the same path, on a file system that all of them share",
            )
        time.sleep(0.05)
