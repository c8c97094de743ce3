"""The processes of one training, and the few kilobytes they send each other about a save.

Messages go through the store that ``torch.distributed`` came up with, over a connection of our own: no collective, no
process group, so a background thread may send them, and a rank that is dead breaks nothing. Whoever waits gives a
deadline, and it holds: a client of that store waits without end for a server that was stopped, in C++ where nothing
interrupts it, so each wait runs in a helper thread that is left behind if need be.

Source: torch 2.13, distributed/distributed_c10d.py (_get_default_store), include/torch/csrc/distributed/c10d/Store.hpp
(clone: another connection, so that a wait holds nobody else's up).
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .errors import WriteError
from .manifest import digest_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LateError", "Messages", "Ranks", "join_ranks", "open_channel"]

_FIRST_PAUSE_SECS = 0.002
_LONGEST_PAUSE_SECS = 0.2
# Whoever is done with loading a model waits for whoever is not.
_JOIN_SECS = 1800.0
# Of those that wait for a store which never answers; another call waits for one of them to end.
_MAX_HELPERS = 4

_ResultT = TypeVar("_ResultT")
# By members: processes that are not in a group do not know how often it met.
_channels: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)


class LateError(WriteError):
    """What was waited for did not come before the deadline."""


class Messages(Protocol):
    """Where ranks leave messages for each other; any thread, several at a time."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str) -> bytes: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...

    def check(self, keys: list[str]) -> bool: ...

    def add(self, key: str, amount: int) -> int: ...

    def delete_key(self, key: str) -> bool: ...


class Ranks:
    """This process among those of the training.

    Args:
        rank: Its number.
        size: How many there are; more than one.
        connect: Makes a connection to where messages are left.
    """

    def __init__(self, rank: int, size: int, connect: Callable[[], Messages]) -> None:
        self.rank = rank
        self.size = size
        self._connect = connect
        self._messages: Messages | None = None
        self._mutex = threading.Lock()
        self._helpers = threading.BoundedSemaphore(_MAX_HELPERS)
        self.sent_nbytes = 0
        """Payload of messages that were sent, so far."""
        self.received_nbytes = 0

    @property
    def is_coordinator(self) -> bool:
        """Rank 0 counts the votes and publishes."""
        return self.rank == 0

    def post(
        self,
        key: str,
        data: bytes,
        *,
        counter: str | None = None,
        status: bytes | None = None,
        timeout_secs: float = 30.0,
    ) -> None:
        """Leave a message.

        Args:
            key: Its name; posted once.
            data: A few kilobytes.
            counter: Raised by one after that.
            status: What this rank is at, for whoever misses it; takes the place of what it said before.
            timeout_secs: How long it may take.

        Raises:
            LateError: Where messages are left does not answer.
        """

        def work(messages: Messages, is_given_up: Callable[[], bool]) -> None:
            if status is not None:
                messages.set(_status_key(self.rank), status)
            messages.set(key, data)
            if counter is not None:
                messages.add(counter, 1)

        self._run(work, timeout_secs, f"post {key}")
        self.sent_nbytes += len(data)

    def raise_counter(self, counter: str, *, timeout_secs: float) -> None:
        """Raise a counter by one.

        Raises:
            LateError: Where messages are left does not answer.
        """
        self._run(lambda messages, is_given_up: messages.add(counter, 1), timeout_secs, f"raise {counter}")

    def take(self, key: str, *, timeout_secs: float) -> bytes:
        """Wait for a message; it stays there for others.

        Raises:
            LateError: It did not come.
        """

        def work(messages: Messages, is_given_up: Callable[[], bool]) -> bytes:
            _poll(lambda: messages.check([key]), is_given_up)
            return bytes(messages.get(key))

        data = self._run(work, timeout_secs, f"wait for {key}")
        self.received_nbytes += len(data)
        return data

    def wait_for_count(
        self, counters: Sequence[str], is_enough: Callable[[list[int]], bool], timeout_secs: float
    ) -> None:
        """Wait until counters have reached something.

        Raises:
            LateError: They have not.
        """

        def work(messages: Messages, is_given_up: Callable[[], bool]) -> None:
            _poll(lambda: is_enough([messages.add(counter, 0) for counter in counters]), is_given_up)

        self._run(work, timeout_secs, f"wait for {counters[0]}")

    def take_those_there(self, keys: Iterable[str], *, timeout_secs: float = 60.0) -> dict[str, bytes]:
        """Of several messages those that have come; waits for none."""
        wanted = list(keys)

        def work(messages: Messages, is_given_up: Callable[[], bool]) -> dict[str, bytes]:
            if messages.check(wanted):
                return dict(zip(wanted, map(bytes, messages.multi_get(wanted)), strict=True))
            return {key: bytes(messages.get(key)) for key in wanted if messages.check([key])}

        found = self._run(work, timeout_secs, "read messages")
        self.received_nbytes += sum(map(len, found.values()))
        return found

    def statuses(self, ranks: Iterable[int], *, timeout_secs: float) -> dict[int, bytes]:
        """What ranks last said they are at; those that said nothing are left out."""
        keys = {_status_key(rank): rank for rank in ranks}
        found = self.take_those_there(keys, timeout_secs=timeout_secs)
        return {keys[key]: data for key, data in found.items()}

    def drop(self, keys: Iterable[str], *, timeout_secs: float = 60.0) -> None:
        """Remove messages that nobody needs any more."""
        doomed = list(keys)

        def work(messages: Messages, is_given_up: Callable[[], bool]) -> None:
            for key in doomed:
                messages.delete_key(key)

        self._run(work, timeout_secs, "remove messages")

    def _run(
        self, work: Callable[[Messages, Callable[[], bool]], _ResultT], timeout_secs: float, what: str
    ) -> _ResultT:
        """Do something with a connection that nobody else uses meanwhile, up to a deadline."""
        deadline = time.monotonic() + timeout_secs
        outcome: list[_ResultT] = []
        errors: list[BaseException] = []
        given_up = threading.Event()
        if not self._helpers.acquire(timeout=timeout_secs):
            raise self._late(what, timeout_secs, "no answer to this, nor to what was asked before")
        with self._mutex:
            messages, self._messages = self._messages, None

        def run() -> None:
            try:
                connection = messages or self._connect()
                outcome.append(work(connection, given_up.is_set))
                with self._mutex:
                    self._messages = connection
            except BaseException as err:
                errors.append(err)
            finally:
                self._helpers.release()

        thread = threading.Thread(target=run, name="llmtailor-messages", daemon=True)
        try:
            thread.start()
        except RuntimeError as err:  # threading says so of a limit on processes
            self._helpers.release()
            raise self._late(what, timeout_secs, str(err)) from err
        thread.join(max(0.0, deadline - time.monotonic()))
        if outcome:
            return outcome[0]
        given_up.set()
        if not errors:
            raise self._late(what, timeout_secs, "no answer")
        text = next(iter(str(errors[0]).splitlines()), "")[:200]
        raise self._late(what, timeout_secs, f"{type(errors[0]).__name__}: {text}") from errors[0]

    def _late(self, what: str, timeout_secs: float, found: str) -> LateError:
        return LateError(
            f"rank {self.rank} could not {what}",
            kind="rank-late",
            expected=f"an answer within {timeout_secs:.0f} s",
            found=found,
            hint="is the process that keeps the store of torch.distributed (rank 0, or torchrun's agent) alive?",
        )


def _status_key(rank: int) -> str:
    return f"status/{rank}"


class _GivenUp(Exception):  # noqa: N818
    """Nobody waits any more."""


def _poll(is_there: Callable[[], bool], is_given_up: Callable[[], bool]) -> None:
    pause = _FIRST_PAUSE_SECS
    while not is_there():
        if is_given_up():
            raise _GivenUp
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_SECS)


def join_ranks(group: ProcessGroup | None = None) -> Ranks | None:
    """The processes that ``torch.distributed`` was initialised for; None if there is one alone.

    Every rank calls it the same number of times, in the same order: each call is a channel of its own. It waits for all
    of them.

    Args:
        group: A process group of which this process is; those in it alone, counted as it counts them.

    Raises:
        LateError: Not all ranks came.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    members = "-".join(map(str, dist.get_process_group_ranks(group)))
    name = f"llmtailor/{digest_of(members.encode())}/{next(_channels[members])}"
    return open_channel(dist.get_rank(group), dist.get_world_size(group), lambda prefix: _connect(store, prefix), name)


def open_channel(
    rank: int,
    size: int,
    connect: Callable[[str], Messages],
    name: str,
    *,
    timeout_secs: float = _JOIN_SECS,
) -> Ranks:
    """Meet the other ranks where nothing lies that anybody said before.

    The store may outlive a start of the job, and all that was said in it: the agent of ``torchrun --max-restarts``
    keeps it. So a channel has a part in its name that is new each time. Rank 0 draws it, and as its word of the start
    before may still be there, a rank believes only the word that repeats what the rank itself has just drawn. (The
    number of restarts would not do: ranks that come or go do not raise it.)

    Args:
        rank: Of this process.
        size: How many ranks there are.
        connect: Makes a connection whose keys have a prefix.
        name: Of the channel, the same on all ranks.
        timeout_secs: How long to wait for all of them.

    Raises:
        LateError: Not all ranks came.

    Source:
        torch 2.13, distributed/rendezvous.py (_create_c10d_store adds no prefix for an attempt) and
        distributed/elastic/rendezvous/dynamic_rendezvous.py (next_rendezvous makes one store for all of them).
    """
    lobby = Ranks(rank, size, lambda: connect(name))
    own = secrets.token_hex(8)
    greet = _greet_all if lobby.is_coordinator else _greet_coordinator
    try:
        start = lobby._run(partial(greet, lobby, own), timeout_secs, f"meet the other {size - 1} ranks")
    except LateError as err:
        raise _name_absent(lobby, own, err) from err
    return Ranks(rank, size, lambda: connect(f"{name}/{start}"))


def _greet_all(lobby: Ranks, own: str, messages: Messages, is_given_up: Callable[[], bool]) -> str:
    arrived = [f"arrived/{rank}" for rank in range(1, lobby.size)]
    heard = [_heard_key(own, rank) for rank in range(1, lobby.size)]
    told = ""

    def is_heard() -> bool:
        nonlocal told
        if messages.check(arrived):
            text = " ".join([own, *(bytes(each).decode() for each in messages.multi_get(arrived))])
            if text != told:
                messages.set("start", text.encode())
                told = text
        return messages.check(heard)

    _poll(is_heard, is_given_up)
    for key in heard:
        messages.delete_key(key)
    return own


def _greet_coordinator(lobby: Ranks, own: str, messages: Messages, is_given_up: Callable[[], bool]) -> str:
    messages.set(f"arrived/{lobby.rank}", own.encode())
    told: list[str] = []

    def is_repeated() -> bool:
        nonlocal told
        told = bytes(messages.get("start")).decode().split() if messages.check(["start"]) else []
        return len(told) == lobby.size and told[lobby.rank] == own

    _poll(is_repeated, is_given_up)
    messages.set(_heard_key(told[0], lobby.rank), b"")
    return told[0]


def _heard_key(start: str, rank: int) -> str:
    return f"heard/{start}/{rank}"


def _name_absent(lobby: Ranks, own: str, error: LateError) -> LateError:
    absent = [0]
    if lobby.is_coordinator:
        keys = {_heard_key(own, rank): rank for rank in range(1, lobby.size)}
        try:
            found = lobby.take_those_there(keys, timeout_secs=5.0)
        except LateError:
            return error
        absent = [rank for key, rank in keys.items() if key not in found]
    names = ", ".join(map(str, absent[:8])) + (f", and {len(absent) - 8} more" if len(absent) > 8 else "")
    return LateError(
        error.what,
        kind=error.kind,
        expected=error.expected,
        found=f"no word of rank {names}",
        hint="is that process alive, and does it open the run as the others do?",
    )


def _connect(store: Any, prefix: str) -> Any:
    from torch._C._distributed_c10d import PrefixStore

    connection = store.clone()
    connection.set_timeout(timedelta(seconds=60))
    return PrefixStore(prefix, connection)
