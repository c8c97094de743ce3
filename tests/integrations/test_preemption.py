"""SIGTERM: the save in flight is finished, one more is made if asked, and the process ends as it always did."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtailor import Run
from llmtailor.errors import InvalidInputError
from llmtailor.storage import list_checkpoints
from llmtailor.verify import verify_checkpoint


@contextlib.contextmanager
def training(kind: str, directory: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    script = Path(__file__).with_name("preempted.py")
    arguments = [kind, str(directory), json.dumps({"slow_step": 0.01, "save_steps": 5, **options})]
    paths = os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_save(process: subprocess.Popen[str], count: int) -> int:
    """The step of the ``count``-th save, which has just begun."""
    assert process.stdout is not None
    for _ in range(count):
        line = process.stdout.readline()
        while line and not line.startswith("saving "):
            line = process.stdout.readline()
        assert line, "the training ended by itself"
    return int(line.split()[1])


def steps(run: Path) -> list[int]:
    entries = list_checkpoints(run)
    assert all(verify_checkpoint(entry.path).is_good for entry in entries)
    return [entry.step for entry in entries]


KINDS = ["loop", pytest.param("trainer", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", KINDS)
def test_save_in_flight_is_finished(kind: str, tmp_path: Path) -> None:
    with training(kind, tmp_path) as process:
        saving = wait_for_save(process, 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    assert saving in steps(tmp_path)


@pytest.mark.slow
def test_without_it_the_save_in_flight_is_lost(tmp_path: Path) -> None:
    with training("loop", tmp_path, on_sigterm="ignore") as process:
        saving = wait_for_save(process, 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    assert saving not in steps(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_one_more_save_where_it_was_asked_for(kind: str, tmp_path: Path) -> None:
    with training(kind, tmp_path, save_steps=50, slow_step=0.02, on_sigterm="save", when_busy="skip") as process:
        saving = wait_for_save(process, 1)
        threading.Timer(0.12, lambda: process.send_signal(signal.SIGTERM)).start()
        assert process.wait(60) == -signal.SIGTERM
    saved = steps(tmp_path)
    assert saving in saved
    assert saved[-1] > saving
    assert saved[-1] % 50, "a step at which no save was due"


@pytest.mark.slow
def test_step_that_takes_too_long_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with training("loop", tmp_path, slow_step=60, on_sigterm="save", grace_secs=1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sleeping\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    assert steps(tmp_path) == []


@pytest.mark.slow
def test_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with training("loop", tmp_path, slow_step=60, on_sigterm="save", grace_secs=600) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sleeping\n"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM


@pytest.mark.slow
def test_stock_trainers_own_way_to_save_at_sigterm_works(tmp_path: Path) -> None:
    with training("trainer", tmp_path, jit=True) as process:
        saving = wait_for_save(process, 2)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert "train returned" in process.stdout.read()
        assert process.wait(60) == 0
    assert steps(tmp_path)[-1] > saving


def test_handler_is_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    model = torch.nn.Linear(2, 2)
    run = Run(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert signal.getsignal(signal.SIGTERM) != before
    run.close()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("options", [{"on_sigterm": "stop"}, {"grace_secs": 0}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(InvalidInputError):
        Run(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    Run(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1)).close()
