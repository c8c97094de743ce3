"""The demo as a whole, with the smallest model; and what stops it before it starts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmtailor.checkpoint import open_checkpoint
from llmtailor.demo import run as demo_run
from llmtailor.demo.options import DemoOptions
from llmtailor.demo.run import check_extras, choose_output, run_demo
from llmtailor.errors import AlreadyExistsError, UnsupportedError, WriteError
from llmtailor.storage import list_checkpoints

COMMAND = [sys.executable, "-c", "from llmtailor.cli.main import main; main()", "demo", "--size", "tiny"]


def test_parent_needs_neither_torch_nor_numpy_before_the_plot() -> None:
    script = "import sys, llmtailor.demo.run, llmtailor.demo.tables; print({'torch', 'numpy'} & sys.modules.keys())"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout == "set()\n"


def test_missing_extra_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError) as caught:
        check_extras()
    assert caught.value.kind == "missing-extra"
    assert "pip install 'llmtailor[demo]'" in str(caught.value)
    assert "transformers" in caught.value.what


def test_output_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(AlreadyExistsError):
        run_demo(DemoOptions(), tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_output_by_default_is_the_first_free_number(tmp_path: Path) -> None:
    (tmp_path / "llmtailor-demo-1").mkdir()
    (tmp_path / "llmtailor-demo-2").symlink_to("nowhere")
    assert choose_output(tmp_path) == tmp_path / "llmtailor-demo-3"


def test_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_run, "needed_nbytes", lambda options: 10**18)
    with pytest.raises(WriteError) as caught:
        run_demo(DemoOptions(), tmp_path)
    assert caught.value.kind == "no-space"


def test_output_that_cannot_be_made_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError):
        run_demo(DemoOptions(), tmp_path / "file" / "below")


def run_command(output: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    finished = subprocess.run(
        [*COMMAND, "--output", str(output), "--json", *arguments], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout), finished.stderr


@pytest.mark.slow
def test_demo_kills_a_save_resumes_and_compares(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    report, stderr = run_command(output, "--steps", "16", "--save-steps", "4")
    crash = report["crash"]

    # The kill hit a save in flight, and nothing of that save was ever a checkpoint.
    assert crash["save_step"] == 12 + 4 * len(crash["missed_steps"])
    assert re.search(rf"killed while saving step {crash['save_step']}\b", stderr)
    assert crash["debris_files"] > 0
    assert crash["debris_was_swept"]
    assert os.listdir(output / "recovered" / "_staging") == ["lock"]

    # It went on from the checkpoint before, a composite, and lost what came after it.
    assert crash["resumed_step"] == crash["save_step"] - 4
    assert crash["lost_steps"] == 4
    resumed = open_checkpoint(output / "recovered" / f"checkpoint-{crash['resumed_step']}").manifest
    assert [(each["layer"], each["step"]) for each in crash["stale_layers"]] == [
        (layer.name, layer.step) for layer in resumed.layers if layer.step < resumed.step
    ]
    assert crash["stale_layers"]

    # Both runs saved the same states, so the bytes can be compared.
    assert report["reference"]["full_save_nbytes"] == pytest.approx(report["recovered"]["full_save_nbytes"], rel=0.001)
    assert 0.3 < report["share"] < 0.7
    assert [entry.step for entry in list_checkpoints(output / "recovered")] == [4, 8, 12, 16]
    assert report["verified_checkpoints"] == 4 + 2
    assert 1.0 < report["recovered"]["validation_loss"] < 5.6
    assert Path(report["plot"]).read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "report.json").read_text()) == report


@pytest.mark.slow
def test_strategy_full_recovers_bit_for_bit_and_no_keep_removes_the_checkpoints(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    report, _ = run_command(output, "--steps", "16", "--save-steps", "4", "--strategy", "full", "--no-keep")
    assert report["validation_difference"] == 0.0
    assert report["crash"]["stale_layers"] == []
    reference = {point["step"]: point["loss"] for point in report["reference"]["losses"][0]}
    assert all(reference[point["step"]] == point["loss"] for point in report["recovered"]["losses"][-1])
    assert sorted(os.listdir(output)) == ["logs", "loss.png", "report.json"]


def processes_of(output: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().decode()
            except OSError:
                continue  # it ended meanwhile
            if "llmtailor.demo.child" in command and str(output) in command:
                found.append(command)
    return found


def test_interrupt_ends_the_children_and_says_one_line(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    command = subprocess.Popen([*COMMAND, "--output", str(output)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not processes_of(output):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    _, stderr = command.communicate(timeout=30)
    assert command.returncode == 130
    assert stderr.strip() == "interrupted"
    assert processes_of(output) == []
