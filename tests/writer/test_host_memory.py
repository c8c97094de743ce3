"""Host memory is pinned where a device copies into it, and never stays pinned once it is let go of."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from llmtailor.writer import host_memory
from llmtailor.writer.host_memory import HostMemory
from llmtailor.writer.pool import HostPool
from llmtailor.writer.scratch import Scratch

PAGE = 4096


@dataclass
class Cudart:
    """CUDA's runtime, as far as it pins memory."""

    code: int = 0
    """What registering says; 0 is success."""
    pinned: dict[int, int] = field(default_factory=dict)
    """Address -> bytes."""
    num_calls: int = 0
    error: int = 0
    """What the next kernel of this thread would be said to have met."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 1, "for every device"
        self.num_calls += 1
        if self.code == 0:
            assert address not in self.pinned
            self.pinned[address] = nbytes
        self.error = self.code
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        self.error = self.code
        return self.code

    def forget_error(self) -> None:
        self.error = 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    runtime = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(host_memory, "_forget_error", runtime.forget_error)
    return runtime


def test_memory_is_one_stretch_of_pages_in_two_guises() -> None:
    memory = HostMemory(3 * PAGE)
    assert memory.nbytes == memory.tensor.numel() == 3 * PAGE
    assert memory.tensor.data_ptr() % PAGE == 0
    memory.bytes[5] = 9
    assert int(memory.tensor[5]) == 9
    view = memory.tensor[:8]
    memory.close()
    assert memory.nbytes == memory.tensor.numel() == 0
    assert int(view[5]) == 9, "a view keeps it"


def test_memory_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(OSError, match="Cannot allocate memory"):
        HostMemory(2**62)


def test_memory_is_pinned_once_and_let_go_of(cudart: Cudart) -> None:
    memory = HostMemory(2 * PAGE)
    memory.pin()
    memory.pin()
    assert cudart.pinned == {memory.tensor.data_ptr(): 2 * PAGE}
    memory.close()
    memory.close()
    assert not cudart.pinned


def test_a_forked_process_does_not_let_go_of_what_its_parent_pinned(
    cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = HostMemory(PAGE)
    memory.pin()
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    del memory
    assert cudart.pinned


def test_no_memory_is_not_pinned(cudart: Cudart) -> None:
    HostMemory().pin()
    assert cudart.num_calls == 0


def test_memory_that_cannot_be_pinned_is_used_all_the_same(cudart: Cudart, caplog: pytest.LogCaptureFixture) -> None:
    cudart.code = 2
    memory = HostMemory(PAGE)
    with caplog.at_level(logging.WARNING):
        memory.pin()
    assert "could not be pinned (CUDA error 2)" in caplog.text
    assert cudart.error == 0, "the training would end for it"
    memory.close()  # unregisters nothing: it would fail here


def test_memory_that_stays_pinned_is_said_and_ends_nothing(cudart: Cudart, caplog: pytest.LogCaptureFixture) -> None:
    memory = HostMemory(PAGE)
    memory.pin()
    cudart.code = 3
    with caplog.at_level(logging.WARNING):
        memory.close()
    assert "stays pinned (CUDA error 3)" in caplog.text
    assert cudart.error == 0


def test_memory_that_nobody_closed_is_let_go_of_before_it_is_unmapped(cudart: Cudart) -> None:
    """Else CUDA would take what is mapped there next for the pages that were."""
    memory = HostMemory(PAGE)
    memory.pin()
    view = memory.tensor[:8]
    del memory
    assert not cudart.pinned
    assert int(view.sum()) == 0


def reserve_pool() -> tuple[Callable[[int, bool], None], Callable[[], None]]:
    pool = HostPool(100 * PAGE)
    return lambda nbytes, is_pinned: pool.reserve(nbytes, is_pinned=is_pinned), pool.close


def reserve_scratch() -> tuple[Callable[[int, bool], None], Callable[[], None]]:
    scratch = Scratch()
    return lambda nbytes, is_pinned: scratch.reserve([nbytes], is_pinned=is_pinned), scratch.close


@pytest.mark.parametrize("make", [reserve_pool, reserve_scratch])
def test_what_is_kept_is_pinned_from_the_first_save_of_a_device_on_and_anew_when_it_grows(
    cudart: Cudart, make: Callable[[], tuple[Callable[[int, bool], None], Callable[[], None]]]
) -> None:
    reserve, close = make()
    reserve(8 * PAGE, False)
    assert not cudart.pinned
    reserve(8 * PAGE, True)
    assert len(cudart.pinned) == 1
    reserve(4 * PAGE, True)
    assert cudart.num_calls == 1
    reserve(50 * PAGE, True)
    (nbytes,) = cudart.pinned.values()
    assert nbytes >= 50 * PAGE
    close()
    assert not cudart.pinned
