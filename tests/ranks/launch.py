"""Starts a program on several gloo ranks of this machine, as ``torchrun`` would, and waits for all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMEOUT_SECS = 240


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
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
        **(environment or {}),
    }
    return [
        subprocess.Popen(
            [sys.executable, str(program), *map(str, arguments)],
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
