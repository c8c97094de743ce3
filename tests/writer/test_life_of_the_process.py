"""However a process ends: what was in flight is published, or its exit status says that it was not."""

from __future__ import annotations

import ast
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtailor.errors import LockedError, SaveFailedWarning, WriteError
from llmtailor.storage import list_checkpoints
from llmtailor.verify import verify_checkpoint
from llmtailor.writer.pool import MIN_POOL_NBYTES
from writer.test_slow_and_failing_disks import SlowFileSystem
from writer.trainings import Training

TESTS = Path(__file__).parent.parent


class Forker:
    """The process that forks lives."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked_lives.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": str(TESTS) + os.pathsep + os.environ.get("PYTHONPATH", ""),
                "OMP_NUM_THREADS": "1",
            },
        )

    def play(self, life: str, directory: Path, *, timeout_secs: float = 60) -> tuple[int, str]:
        """Exit status, and what it wrote."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{life} {directory}\n".encode())
        self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            assert selector.select(timeout_secs), f"{life} never ended: {(directory / 'output').read_text()}"
        said = self._process.stdout.readline().decode()
        return int(said.removeprefix("ended ")), (directory / "output").read_text()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    forker = Forker()
    yield forker
    forker.close()


def published_steps(directory: Path) -> list[int]:
    entries = list_checkpoints(directory / "run")
    assert all(verify_checkpoint(entry.path).is_good for entry in entries)
    assert os.listdir(directory / "run" / "_staging") == ["lock"]
    return [entry.step for entry in entries]


@pytest.mark.parametrize(
    ("life", "status"),
    [
        ("returns", 0),
        ("returns_from_a_function", 0),
        ("raises", 1),
        ("raises_in_a_function", 1),
        ("exits", 3),
        ("interrupted", -signal.SIGINT),
        ("forgotten_in_a_cycle", 0),
        ("forgotten_and_found_by_a_thread_of_the_engine", 0),
        ("forks_in_the_middle", 0),
    ],
)
def test_the_save_in_flight_is_published_when_its_process_ends(
    fast_directory: Path, forker: Forker, life: str, status: int
) -> None:
    found, output = forker.play(life, fast_directory)
    assert found == status, output
    assert published_steps(fast_directory) == [1, 2]


@pytest.mark.parametrize(
    "life",
    [
        "save_fails",
        "save_fails_in_a_function",
        "save_fails_for_a_fault_of_ours",
        "save_fails_after_two_were_told",
    ],
)
def test_no_process_ends_well_whose_last_save_failed(fast_directory: Path, forker: Forker, life: str) -> None:
    status, output = forker.play(life, fast_directory)
    assert status > 0, output
    assert "checkpoint-2" in output or "the last save of" in output
    assert published_steps(fast_directory) == [1]
    if "ours" not in life:
        assert status == WriteError.exit_code


def test_processes_that_load_data_neither_hang_nor_harm_saves(fast_directory: Path, forker: Forker) -> None:
    status, output = forker.play("loads_data_in_other_processes", fast_directory, timeout_secs=90)
    assert status == 0, output
    assert published_steps(fast_directory) == list(range(1, 11))


@pytest.mark.slow
def test_many_saves_cost_no_memory_no_descriptor_and_no_thread(fast_directory: Path, forker: Forker) -> None:
    status, output = forker.play("collects_memory", fast_directory, timeout_secs=200)
    assert status == 0, output
    said = dict(line.split(" ", 1) for line in output.splitlines())
    memory, descriptors, threads = zip(*ast.literal_eval(said["seen"]), strict=True)
    assert memory[-1] - memory[0] < 8 * 2**20, "RSS in steps of 50 saves"
    assert len(set(descriptors)) == 1
    assert set(threads) == {5}, "four of ours and the one that trains"
    assert said["after"] == f"{descriptors[0] - 1} 1", "the lock is closed, too"


@pytest.mark.slow
def test_a_save_takes_no_more_host_memory_than_its_pool(tmp_path: Path, forker: Forker) -> None:
    status, output = forker.play("saves_much_with_little", tmp_path, timeout_secs=200)
    assert status == 0, output
    _, grown, nbytes = output.split()
    assert int(nbytes) > 500_000_000
    # The constant: stacks of twelve threads, the plan, the manifest, numpy's and the allocator's own.
    assert 40 * 2**20 < int(grown) < 1.05 * 64 * 2**20 + 8 * 2**20


# In one process


def test_an_interrupt_in_the_hook_is_no_step_and_no_lost_save(fast_directory: Path) -> None:
    disk = SlowFileSystem("write_at")
    options = {"filesystem": disk, "pool_nbytes": MIN_POOL_NBYTES}
    training = Training(directory=fast_directory / "run", options=options)
    training.train()
    training.backward()
    handle = training.save()
    disk.wait_until_reached()
    before = training.state()
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        training.optimizer.step()
    timer.join()
    assert all((before[name] == tensor).all() for name, tensor in training.state().items())
    assert handle.state == "capturing"
    disk.let_through()
    training.optimizer.step()
    training.check(handle.result())
    training.close()


def test_closing_finishes_what_is_in_flight_and_may_be_done_twice(fast_directory: Path) -> None:
    disk = SlowFileSystem("fsync")
    training = Training(directory=fast_directory / "run", options={"filesystem": disk})
    training.train()
    handle = training.save()
    disk.wait_until_reached()
    threading.Timer(0.05, disk.let_through).start()
    threads = threading.active_count()
    training.close()
    assert handle.state == "published"
    assert threading.active_count() <= threads - 4
    training.close()
    training.train()
    with pytest.warns(SaveFailedWarning, match="not open for writing"):
        handle = training.save()
    assert isinstance(handle.error, WriteError)
    assert handle.error.kind == "closed"


def test_finding_waits_for_what_is_in_flight(fast_directory: Path) -> None:
    disk = SlowFileSystem("fsync")
    training = Training(directory=fast_directory / "run", options={"filesystem": disk})
    training.train()
    handle = training.save()
    disk.wait_until_reached()
    threading.Timer(0.05, disk.let_through).start()
    found = training.checkpointer.find()
    assert found is not None
    assert found.path == handle.path
    disk.block_again()
    training.train()
    handle = training.save()
    disk.wait_until_reached()
    threading.Timer(0.05, disk.let_through).start()
    training.checkpointer.begin(found)
    assert handle.state == "published"
    training.close()


def test_a_run_nobody_closed_is_let_go_of(fast_directory: Path) -> None:
    training = Training(directory=fast_directory / "run")
    training.train()
    handle = training.save()
    with pytest.raises(LockedError):
        Training(directory=fast_directory / "run")
    training.checkpointer = Training(directory=fast_directory / "other").checkpointer
    assert handle.state == "published", "waited for, and published"
    Training(directory=fast_directory / "run").close()
    training.close()
