from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from llmtailor.storage import FileReader

Command: TypeAlias = Callable[..., Any]


def test_verify_tells_that_a_checkpoint_is_good(run: Path, llmtailor: Command, llmtailor_json: Command) -> None:
    text = llmtailor("verify", run / "checkpoint-2").stdout
    assert re.fullmatch(rf"OK   {run}/checkpoint-2  16 files, [\d.]+ kB\n", text)
    (record,) = llmtailor_json("verify", run / "checkpoint-2")
    assert (record["is_good"], record["step"], record["num_files"], record["problems"]) == (True, 2, 16, [])


def test_verify_of_a_run_is_of_all_its_checkpoints(run: Path, llmtailor: Command) -> None:
    lines = llmtailor("verify", run, run / "checkpoint-2").stdout.splitlines()
    assert [line.split()[1] for line in lines[:5]] == [f"{run}/checkpoint-{step}" for step in range(1, 6)]
    assert lines[-1] == "5 checkpoints: 5 good, 0 bad"


def test_verify_reads_a_shared_file_once(run: Path, llmtailor: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    num_read = 0
    read = FileReader.digest

    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal num_read
        num_read += 1
        return read(*arguments, **options)

    monkeypatch.setattr(FileReader, "digest", count)
    llmtailor("verify", run)
    files = [path for path in run.glob("checkpoint-*/**/*") if path.is_file() and path.name != "tailor.json"]
    assert num_read == len({path.stat().st_ino for path in files}) < len(files)


def test_verify_reports_every_problem_of_every_checkpoint(
    run: Path, llmtailor: Command, llmtailor_json: Command, damage_file: Command, replace_file: Command
) -> None:
    damage_file(run / "checkpoint-2" / "model-norm.safetensors")
    replace_file(run / "checkpoint-2" / "rng_state.pth", b"short")
    (run / "checkpoint-4" / "optimizer" / "layers.001.safetensors").unlink()
    text = llmtailor("verify", run, exit_code=5).stdout
    assert f"BAD  {run}/checkpoint-2  2 problems\n" in text
    assert re.search(
        r"  model-norm.safetensors: the file's bytes changed\n"
        r"    layer     norm\n    expected  xxh3_128:[0-9a-f]{32}\n    found     xxh3_128:[0-9a-f]{32}\n",
        text,
    )
    assert re.search(r"  rng_state.pth: the file has another size\n    expected  \d+\n    found     5\n", text)
    assert "  optimizer/layers.001.safetensors: the file is missing\n" in text
    assert "  next: copy the files again" in text
    assert text.endswith("5 checkpoints: 3 good, 2 bad\n")
    kinds = [[problem["kind"] for problem in each["problems"]] for each in llmtailor_json("verify", run, exit_code=5)]
    assert kinds == [[], ["digest", "file-size"], [], ["missing-file"], []]


def test_a_damaged_shared_file_is_a_problem_of_each_that_shares_it(run: Path, llmtailor: Command) -> None:
    path = run / "checkpoint-4" / "model-layers.001.safetensors"
    assert path.samefile(run / "checkpoint-5" / path.name)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert llmtailor("verify", run, "--quiet", exit_code=5).stdout.splitlines() == [
        str(run / "checkpoint-4"),
        str(run / "checkpoint-5"),
    ]


@pytest.mark.parametrize("name", ["model-norm.safetensors", "rng_state.pth"])
@pytest.mark.parametrize("thing", ["directory", "link", "pipe"])
def test_what_is_no_file_is_a_problem_and_does_not_hang(
    run: Path, llmtailor_json: Command, thing: str, name: str
) -> None:
    path = run / "checkpoint-2" / name
    path.unlink()
    match thing:
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to(run / "checkpoint-1" / name)
        case "pipe":
            os.mkfifo(path)
    (record,) = llmtailor_json("verify", run / "checkpoint-2", exit_code=5)
    assert [(each["path"], each["kind"]) for each in record["problems"]] == [(name, "not-regular")]


def test_verify_notes_files_the_manifest_does_not_name(run: Path, llmtailor: Command) -> None:
    (run / "checkpoint-2" / "notes.txt").write_text("mine")
    assert "note: notes.txt is not in the manifest" in llmtailor("verify", run / "checkpoint-2").stdout


def test_verify_of_a_damaged_manifest(run: Path, llmtailor: Command, replace_file: Command) -> None:
    path = run / "checkpoint-3" / "tailor.json"
    replace_file(path, path.read_bytes()[:-30])
    text = llmtailor("verify", run / "checkpoint-3", exit_code=5).stdout
    assert "tailor.json: the manifest is cut off or changed" in text
    assert "expected  a last line" in text
    assert "found" in text


def test_verify_of_a_newer_format_says_to_upgrade(run: Path, llmtailor: Command, rewrite_manifest: Command) -> None:
    rewrite_manifest(run / "checkpoint-3", lambda fields: fields.update(format_version=2))
    text = llmtailor("verify", run / "checkpoint-3", exit_code=5).stdout
    assert "next: upgrade llmtailor" in text


def test_verify_reads_nothing_if_one_path_is_wrong(run: Path, llmtailor: Command) -> None:
    result = llmtailor("verify", run, run / "checkpoint-9", exit_code=3)
    assert result.stdout == ""
    assert "no such checkpoint or run" in result.stderr


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_verify_of_a_run_tells_what_it_passes_over(
    half_checkpoint: Path, llmtailor: Command, options: list[str]
) -> None:
    run = half_checkpoint.parent
    result = llmtailor("verify", run, run / "checkpoint-2", run, *options)
    expected = f"passed over: {half_checkpoint}, no tailor.json: another tool's, or half a checkpoint\n"
    assert result.stderr == expected
    assert str(half_checkpoint) not in result.stdout


def test_verify_of_a_whole_run_passes_over_nothing(run: Path, llmtailor: Command) -> None:
    assert llmtailor("verify", run).stderr == ""


def test_verify_of_half_a_checkpoint(half_checkpoint: Path, llmtailor: Command) -> None:
    assert "no tailor.json" in llmtailor("verify", half_checkpoint, exit_code=3).stderr


def test_a_failing_device_is_not_evidence_against_a_checkpoint(
    run: Path, llmtailor: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> str:
        raise OSError(5, "Input/output error", "disk")

    monkeypatch.setattr(FileReader, "digest", fail)
    result = llmtailor("verify", run, exit_code=74)
    assert "Input/output error" in result.stderr
    assert "BAD" not in result.stdout
