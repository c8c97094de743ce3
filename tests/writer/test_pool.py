"""The ring of host memory: pieces never overlap, the limit holds, and whoever waits is woken."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import InvalidInputError
from llmtailor.storage import ALIGNMENT, pad
from llmtailor.writer import pool as pool_module
from llmtailor.writer.pool import MIN_POOL_NBYTES, HostPool, Piece, default_pool_nbytes

PAGE = ALIGNMENT


def never() -> bool:
    return False


def always() -> bool:
    return True


def new_pool(num_pages: int) -> HostPool:
    pool = HostPool(num_pages * PAGE)
    pool.reserve(num_pages * PAGE, is_pinned=False)
    return pool


def take(pool: HostPool, nbytes: int) -> Piece:
    piece = pool.take(nbytes, never)
    assert piece is not None
    return piece


def try_take(pool: HostPool, nbytes: int) -> Piece | None:
    """A piece, or None where ``take`` would wait."""
    is_waiting = threading.Event()
    wait, pool._condition.wait = pool._condition.wait, is_waiting.set  # type: ignore[assignment, method-assign]
    try:
        return pool.take(nbytes, is_waiting.is_set)
    finally:
        pool._condition.wait = wait  # type: ignore[method-assign]


class Waiter(threading.Thread):
    """A thread that takes a piece, and may have to wait for it."""

    def __init__(self, pool: HostPool, nbytes: int, is_cancelled: Callable[[], bool] = never) -> None:
        super().__init__(daemon=True)
        self.pool, self.nbytes, self.is_cancelled = pool, nbytes, is_cancelled
        self.piece: Piece | None = None
        self.start()

    def run(self) -> None:
        self.piece = self.pool.take(self.nbytes, self.is_cancelled)

    def is_waiting(self) -> bool:
        self.join(0.05)
        return self.is_alive()

    def has_ended(self) -> bool:
        self.join(30)
        return not self.is_alive()


# One thread's view


@given(
    st.integers(4, 40), st.lists(st.tuples(st.integers(1, 12 * PAGE), st.randoms(use_true_random=False)), max_size=60)
)
def test_pieces_never_overlap_and_never_exceed_the_pool(
    num_pages: int, wishes: list[tuple[int, random.Random]]
) -> None:
    """Takes and gives back in any order, as a writer of several files does; what is in use stays as it was written."""
    pool = new_pool(num_pages)
    in_use: list[tuple[Piece, int]] = []
    high_water = 0
    for number, (nbytes, chance) in enumerate(wishes):
        while (piece := try_take(pool, nbytes)) is None:
            assert in_use, "an empty ring has room for everything"
            give_back_one(pool, in_use, chance)
        piece.bytes[:] = number % 251
        in_use.append((piece, number % 251))
        assert piece.nbytes % PAGE == 0
        assert piece.start % PAGE == 0
        assert 0 < piece.nbytes <= pad(nbytes)
        assert piece.start + piece.nbytes <= num_pages * PAGE
        spans = sorted((each.start, each.start + each.nbytes) for each, _ in in_use)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        used = sum(each.nbytes for each, _ in in_use)
        assert used <= pool.nbytes == num_pages * PAGE
        high_water = max(high_water, used)
        assert pool.high_water_nbytes == high_water
        while in_use and chance.random() < 0.4:
            give_back_one(pool, in_use, chance)
    for piece, mark in in_use:
        assert (piece.bytes == mark).all()


def give_back_one(pool: HostPool, in_use: list[tuple[Piece, int]], chance: random.Random) -> None:
    piece, mark = in_use.pop(chance.randrange(len(in_use)))
    assert (piece.bytes == mark).all(), "somebody else wrote into a piece in use"
    pool.give_back(piece)


@given(st.permutations(range(4)))
def test_pieces_may_be_given_back_in_any_order(order: list[int]) -> None:
    pool = new_pool(4)
    for _ in range(3):
        pieces = [take(pool, PAGE) for _ in range(4)]
        assert [piece.start for piece in pieces] == [0, PAGE, 2 * PAGE, 3 * PAGE]
        for index in order:
            pool.give_back(pieces[index])


def test_room_is_won_when_the_oldest_piece_is_given_back() -> None:
    pool = new_pool(4)
    pieces = [take(pool, PAGE) for _ in range(4)]
    pool.give_back(pieces[2])
    assert try_take(pool, PAGE) is None
    pool.give_back(pieces[0])
    assert take(pool, PAGE).start == 0
    assert try_take(pool, PAGE) is None
    pool.give_back(pieces[1])  # and the third with it
    assert [take(pool, PAGE).start, take(pool, PAGE).start] == [PAGE, 2 * PAGE]


def test_a_piece_does_not_go_round_the_end_of_the_ring() -> None:
    pool = new_pool(9)
    pieces = [take(pool, 2 * PAGE) for _ in range(4)]
    assert [piece.start for piece in pieces] == [0, 2 * PAGE, 4 * PAGE, 6 * PAGE]
    pool.give_back(pieces[0])
    last = take(pool, 2 * PAGE)
    assert (last.start, last.nbytes) == (8 * PAGE, PAGE), "the rest of the ring is a smaller piece"
    again = take(pool, 2 * PAGE)
    assert (again.start, again.nbytes) == (0, 2 * PAGE)
    assert try_take(pool, PAGE) is None, "the head has reached the oldest piece: full, not empty"


def test_an_empty_ring_starts_over_at_its_first_page() -> None:
    pool = new_pool(16)
    for _ in range(5):
        piece = take(pool, 3 * PAGE)
        assert piece.start == 0
        pool.give_back(piece)


def test_a_tensor_larger_than_the_pool_comes_in_pieces_of_a_quarter_of_it() -> None:
    pool = new_pool(16)
    left, spans = 100 * PAGE + 17, []
    while left > 0:
        piece = take(pool, left)
        spans.append(piece.nbytes)
        left -= piece.nbytes
        pool.give_back(piece)
    assert sum(spans) == 101 * PAGE
    assert set(spans[:-1]) == {4 * PAGE}


def test_pieces_are_no_larger_than_what_one_write_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_MAX_PIECE_NBYTES", 2 * PAGE)
    assert take(new_pool(100), 50 * PAGE).nbytes == 2 * PAGE


def test_a_piece_is_one_memory_seen_in_three_ways() -> None:
    pool = new_pool(8)
    take(pool, PAGE)
    piece = take(pool, PAGE)
    piece.tensor.fill_(7)
    assert bytes(piece.buffer) == b"\7" * PAGE
    assert piece.bytes.tobytes() == b"\7" * PAGE
    assert piece.bytes.ctypes.data % PAGE == 0
    assert piece.tensor.data_ptr() == piece.bytes.ctypes.data == np.frombuffer(piece.buffer, np.uint8).ctypes.data


# Size


def test_too_small_a_pool_is_refused() -> None:
    with pytest.raises(InvalidInputError) as caught:
        HostPool(MIN_POOL_NBYTES - 1)
    assert caught.value.kind == "pool-size"
    assert HostPool(MIN_POOL_NBYTES).limit_nbytes == MIN_POOL_NBYTES


def test_memory_is_taken_when_a_save_needs_it_and_no_more_than_it_needs() -> None:
    pool = HostPool(100 * PAGE + 5)
    assert pool.nbytes == 0
    assert pool.limit_nbytes == 100 * PAGE
    pool.reserve(1, is_pinned=False)
    assert pool.nbytes == MIN_POOL_NBYTES
    pool.reserve(20 * PAGE - 1, is_pinned=False)
    assert pool.nbytes == 20 * PAGE
    pool.reserve(10 * PAGE, is_pinned=False)
    assert pool.nbytes == 20 * PAGE, "memory that is there is kept"
    pool.reserve(1000 * PAGE, is_pinned=False)
    assert pool.nbytes == 100 * PAGE
    pool.touch()
    pool.close()
    assert pool.nbytes == 0


def test_memory_in_use_is_not_replaced() -> None:
    pool = HostPool(100 * PAGE)
    pool.reserve(8 * PAGE, is_pinned=False)
    piece = take(pool, 2 * PAGE)
    piece.bytes[:] = 9
    pool.reserve(50 * PAGE, is_pinned=False)
    pool.touch()
    assert pool.nbytes == 8 * PAGE
    assert (piece.bytes == 9).all()
    pool.give_back(piece)
    pool.reserve(50 * PAGE, is_pinned=False)
    assert pool.nbytes == 50 * PAGE


def test_what_is_set_aside_is_no_part_of_the_ring() -> None:
    pool = new_pool(12)
    with pool.set_aside(3 * PAGE - 1) as memory:
        assert memory.nbytes == 3 * PAGE
        assert np.frombuffer(memory, np.uint8).ctypes.data % PAGE == 0
        memory[:] = bytes([7]) * memory.nbytes
        for _ in range(3):
            pieces = [take(pool, 2 * PAGE) for _ in range(4)]
            assert sum(piece.nbytes for piece in pieces) == 8 * PAGE
            last = take(pool, 2 * PAGE)
            assert (last.start, last.nbytes) == (8 * PAGE, PAGE)
            for piece in [*pieces, last]:
                piece.bytes[:] = 1
                pool.give_back(piece)
        assert bytes(memory) == bytes([7]) * memory.nbytes
        assert pool.nbytes == 12 * PAGE
    assert pool.high_water_nbytes == 12 * PAGE, "both were in use"
    assert [take(pool, 3 * PAGE).start for _ in range(4)] == [0, 3 * PAGE, 6 * PAGE, 9 * PAGE]


def test_ring_becomes_longer_under_pieces_in_use() -> None:
    """Writers are not done when the thread that captures is."""
    pool = new_pool(12)
    with pool.set_aside(4 * PAGE):
        pieces = [take(pool, 2 * PAGE) for _ in range(4)]
        pool.give_back(pieces[0])
        pieces.append(take(pool, PAGE))
        assert pieces[-1].start == 0
    for number, piece in enumerate(pieces[1:]):
        piece.bytes[:] = number
    assert take(pool, PAGE).start == PAGE
    assert try_take(pool, PAGE) is None
    assert [int(piece.bytes.max()) for piece in pieces[1:]] == [0, 1, 2, 3]
    assert all((piece.bytes == piece.bytes[0]).all() for piece in pieces[1:])


def test_waiting_for_room_ends_when_what_was_set_aside_is_back() -> None:
    pool = new_pool(8)
    with pool.set_aside(4 * PAGE):
        for start in range(4):
            assert take(pool, PAGE).start == start * PAGE
        waiter = Waiter(pool, PAGE)
        assert waiter.is_waiting()
    # The ring was full: its head is at the oldest piece, and stays there until that is given back.
    assert waiter.is_waiting()
    pool.give_back(pool._pieces[0])
    assert waiter.has_ended()
    assert waiter.piece is not None
    assert waiter.piece.start == 0


def test_at_most_a_half_is_set_aside() -> None:
    pool = new_pool(4)
    with pool.set_aside(100 * PAGE) as memory:
        assert memory.nbytes == 2 * PAGE
        pieces = [take(pool, 5 * PAGE), take(pool, 5 * PAGE)]
        assert [piece.nbytes for piece in pieces] == [PAGE, PAGE]
        for piece in pieces:
            pool.give_back(piece)


def test_what_is_set_aside_comes_back_whatever_happens() -> None:
    pool = new_pool(8)
    with pytest.raises(KeyError), pool.set_aside(4 * PAGE):
        raise KeyError
    assert pool._ring_nbytes == 8 * PAGE


def test_what_is_needed_beside_the_ring_comes_out_of_the_limit() -> None:
    assert HostPool(64 * PAGE, beside_nbytes=10 * PAGE).limit_nbytes == 54 * PAGE
    assert HostPool(64 * PAGE, beside_nbytes=60 * PAGE).limit_nbytes == 48 * PAGE
    with pytest.raises(InvalidInputError) as caught:
        HostPool(MIN_POOL_NBYTES - 1, beside_nbytes=PAGE)
    assert caught.value.found == f"{MIN_POOL_NBYTES - 1} bytes"


def test_high_water_is_that_of_one_save() -> None:
    pool = new_pool(8)
    pieces = [take(pool, 2 * PAGE) for _ in range(3)]
    for piece in pieces:
        pool.give_back(piece)
    assert pool.high_water_nbytes == 6 * PAGE
    held = take(pool, PAGE)
    pool.reserve(PAGE, is_pinned=False)
    assert pool.high_water_nbytes == PAGE, "what a save before still holds counts"
    pool.give_back(held)


def test_by_default_a_quarter_of_the_free_memory_may_be_used() -> None:
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    assert default_pool_nbytes() == pytest.approx(available / 4, rel=0.1)


# Threads


def test_a_take_waits_until_something_is_given_back() -> None:
    pool = new_pool(4)
    pieces = [take(pool, PAGE) for _ in range(4)]
    waiter = Waiter(pool, PAGE)
    assert waiter.is_waiting()
    pool.give_back(pieces[1])
    assert waiter.is_waiting(), "not the oldest"
    pool.give_back(pieces[0])
    assert waiter.has_ended()
    assert waiter.piece is not None
    assert waiter.piece.start == 0


def test_a_take_that_waits_is_cancelled_when_it_is_woken() -> None:
    pool = new_pool(4)
    for _ in range(4):
        take(pool, PAGE)
    stop = threading.Event()
    waiter = Waiter(pool, PAGE, stop.is_set)
    pool.wake()
    assert waiter.is_waiting(), "woken, but not cancelled"
    stop.set()
    pool.wake()
    assert waiter.has_ended()
    assert waiter.piece is None


def test_a_cancelled_take_takes_nothing() -> None:
    pool = new_pool(4)
    assert pool.take(PAGE, always) is None
    assert pool.high_water_nbytes == 0


def test_pieces_given_back_by_many_threads_hold_what_was_put_into_them() -> None:
    """One thread takes, four give back after a while in any order, as capture and writers do."""
    pool = new_pool(13)
    chance = random.Random(3)
    handed: list[tuple[Piece, int]] = []
    changed = threading.Condition()
    faults: list[int] = []
    is_done = False

    def give_back(seed: int) -> None:
        own = random.Random(seed)
        while True:
            with changed:
                changed.wait_for(lambda: handed or is_done)
                if not handed:
                    return
                piece, mark = handed.pop(own.randrange(len(handed)))
            if own.random() < 0.1:
                time.sleep(0.0005)
            if not (piece.bytes == mark).all():
                faults.append(mark)
            pool.give_back(piece)

    threads = [threading.Thread(target=give_back, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for number in range(3000):
        piece = take(pool, chance.randrange(1, 5 * PAGE))
        piece.bytes[:] = number % 251
        with changed:
            handed.append((piece, number % 251))
            changed.notify()
    with changed:
        is_done = True
        changed.notify_all()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert faults == []
    assert 3 * PAGE <= pool.high_water_nbytes <= pool.nbytes
