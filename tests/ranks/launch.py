"""Starts a program on several gloo ranks of this machine, as ``torchrun`` would, and waits for all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMEOUT_SECS = 240
# DeepSpeed's own Adam is compiled on first use, for minutes; so this is kept from one run to the next.
_EXTENSIONS = Path(tempfile.gettempdir()) / "llmtailor-torch-extensions"
_PROCESS = Path(__file__).with_name("rank_process.py")


class Launches:
    """Trainings that are begun, killed and resumed when one of them is first asked for, several in a launch.

    Args:
        program: Takes ``begin`` or ``resume``, a directory and cases; each rank kills itself at the end of ``begin``.
        directory: Where the cases are.
        launches: The cases of each launch.
    """

    def __init__(self, program: Path, directory: Path, launches: Sequence[Sequence[str]]) -> None:
        self._program = program
        self._directory = directory
        self._launches = launches
        self._done: set[str] = set()

    def of(self, case: str) -> Path:
        """The directory, when a case was trained."""
        if case not in self._done:
            assert not (self._directory / case).exists(), "the launch of this case has failed before"
            cases = next(launch for launch in self._launches if case in launch)
            for verb, status in (("begin", -9), ("resume", 0)):
                run_ranks(
                    self._program,
                    2,
                    verb,
                    self._directory,
                    *cases,
                    expected=(status,),
                )
                self.look(verb, self._directory, cases)
            self._done |= set(cases)
        return self._directory

    def look(self, verb: str, directory: Path, cases: Sequence[str]) -> None:
        """Called after each launch; for what can be seen only then."""


def start_ranks(
    program: Path, num_ranks: int, *arguments: object, environment: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """The processes, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",  # a rank that crashes says where
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(_EXTENSIONS),
        **(environment or {}),
    }
    return [
        subprocess.Popen(
            [sys.executable, str(_PROCESS), str(program), *map(str, arguments)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]


def run_ranks(
    program: Path,
    num_ranks: int,
    *arguments: object,
    expected: Sequence[int] = (0,),
    environment: Mapping[str, str] | None = None,
    timeout_secs: float = TIMEOUT_SECS,
) -> list[str]:
    """What each rank printed.

    Raises:
        AssertionError: A rank ended with an exit status that is not ``expected``, or not in time.
    """
    processes = start_ranks(program, num_ranks, *arguments, environment=environment)
    try:
        outputs = [process.communicate(timeout=timeout_secs)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    states = [process.returncode for process in processes]
    assert all(state in expected for state in states), f"exit {states}\n" + "\n----\n".join(
        output[-6000:] for output in outputs
    )
    return outputs
