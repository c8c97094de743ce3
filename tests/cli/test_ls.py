from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

Command: TypeAlias = Callable[..., Any]


def test_ls_prints_one_line_a_checkpoint_oldest_first(run: Path, llmtailor: Command) -> None:
    lines = llmtailor("ls", run).stdout.splitlines()
    assert lines[0].split("  ")[0] == "step"
    rows = [line.split() for line in lines[1:6]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [row[3] for row in rows] == ["6/6", "4/6", "3/6", "4/6", "3/6"]
    assert [row[4] for row in rows] == ["0", "1", "1", "1", "1"]
    assert [row[5] for row in rows] == ["yes", "no", "no", "no", "no"]
    assert {row[-1] for row in rows} == {"parity()"}
    assert re.search(
        r"^on disk\n  [\d.]+ kB in 5 directories; without shared files it would be .* saved\)$", "\n".join(lines), re.M
    )


def test_ls_json_is_a_record_for_each_checkpoint(run: Path, llmtailor_json: Command) -> None:
    records = llmtailor_json("ls", run)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert {record["state"] for record in records} == {"whole"}
    assert records[1] | {"bytes": 0, "written_bytes": 0, "new_bytes": 0, "created": "", "run_id": ""} == {
        "path": str(run / "checkpoint-2"),
        "step": 2,
        "state": "whole",
        "detail": None,
        "created": "",
        "run_id": "",
        "contents": "full",
        "strategy": "parity()",
        "num_layers_written": 4,
        "num_layers_coded": 0,
        "num_layers": 6,
        "max_staleness": 1,
        "is_consistent": False,
        "is_current": False,
        "bytes": 0,
        "written_bytes": 0,
        "new_bytes": 0,
    }


def test_ls_counts_codes_apart_from_what_is_stale_and_what_is_exact(coded_run: Path, llmtailor: Command) -> None:
    lines = llmtailor("ls", coded_run).stdout.splitlines()
    assert re.match(r"step  created \(UTC\)     layers  coded  stale  consistent", lines[0])
    assert [line.split()[3:7] for line in lines[1:6]] == [
        ["6/6", "0", "0", "yes"],
        ["4/6", "0", "1", "no"],
        ["3/6", "0", "1", "no"],
        ["4/6", "0", "1", "no"],
        ["3/6", "3", "0", "no"],
    ]


def test_ls_has_no_column_for_codes_where_there_are_none(run: Path, llmtailor: Command) -> None:
    assert "coded" not in llmtailor("ls", run).stdout


def test_ls_keeps_its_columns_in_the_row_of_a_damaged_manifest(
    coded_run: Path, llmtailor: Command, damage_file: Command
) -> None:
    damage_file(coded_run / "checkpoint-3" / "tailor.json")
    lines = llmtailor("ls", coded_run).stdout.splitlines()
    assert re.fullmatch(r"   3  damaged +-      -      -  - +[\d.]+ kB", lines[3])
    assert lines[3].index(" kB") == lines[2].index(" kB")


def test_ls_json_tells_codes_from_exact_layers(coded_run: Path, llmtailor_json: Command) -> None:
    records = llmtailor_json("ls", coded_run)
    keys = ("num_layers_written", "num_layers_coded", "max_staleness", "is_consistent", "is_current", "state")
    assert [tuple(record[key] for key in keys) for record in records[-2:]] == [
        (4, 0, 1, False, False, "whole"),
        (3, 3, 0, False, True, "whole"),
    ]


def test_ls_notices_that_codes_are_missing(coded_run: Path, llmtailor_json: Command) -> None:
    (coded_run / "checkpoint-5" / "codes" / "layers.001.safetensors").unlink()
    assert llmtailor_json("ls", coded_run)[-1]["detail"] == "missing: codes/layers.001.safetensors"


def test_new_bytes_add_up_to_each_inode_once(run: Path, llmtailor_json: Command) -> None:
    files = [path for path in run.glob("checkpoint-*/**/*") if path.is_file()]
    inodes = {path.stat().st_ino: path.stat().st_size for path in files}
    records = llmtailor_json("ls", run)
    assert sum(record["new_bytes"] for record in records) == sum(inodes.values())
    assert sum(record["bytes"] for record in records) == sum(path.stat().st_size for path in files)
    assert len(inodes) < len(files)


def test_ls_quiet_prints_paths_of_whole_checkpoints(set_aside: Path, llmtailor: Command) -> None:
    paths = llmtailor("ls", set_aside, "--quiet").stdout.splitlines()
    assert paths == [str(set_aside / f"checkpoint-{step}") for step in (2, 3, 5)]


def test_ls_tells_what_was_set_aside_and_why(set_aside: Path, llmtailor: Command, llmtailor_json: Command) -> None:
    (set_aside / "checkpoint-9").mkdir()
    (set_aside / "_staging" / "10-abc").mkdir(parents=True)
    text = llmtailor("ls", set_aside).stdout
    assert re.search(r"_checkpoint-4\.bad +bad .*model-norm.safetensors: the file's bytes changed", text)
    assert re.search(r"_checkpoint-1\.superseded +superseded", text)
    assert re.search(r"checkpoint-9 +no manifest .*half a checkpoint", text)
    assert re.search(r"10-abc +in flight", text)
    states = {Path(record["path"]).name: record["state"] for record in llmtailor_json("ls", set_aside)}
    assert list(states) == [
        *("checkpoint-2", "checkpoint-3", "checkpoint-5"),
        *("_checkpoint-1.superseded", "_checkpoint-4.bad", "checkpoint-9", "10-abc"),
    ]
    assert states["checkpoint-9"] == "no manifest"


def test_ls_shows_a_damaged_manifest_as_a_row(
    run: Path, llmtailor: Command, llmtailor_json: Command, damage_file: Command
) -> None:
    damage_file(run / "checkpoint-3" / "tailor.json")
    text = llmtailor("ls", run).stdout
    assert re.search(r"^ +3  damaged ", text, re.M)
    assert re.search(r"^checkpoint-3 +damaged .*the manifest is cut off or changed", text, re.M)
    assert re.search(r"^ +4  2", text, re.M), "the others are listed all the same"
    record = llmtailor_json("ls", run)[2]
    assert (record["step"], record["state"], record["num_layers"]) == (3, "damaged", None)


@pytest.mark.parametrize("fault", ["missing", "of another size"])
def test_ls_notices_files_that_names_and_sizes_give_away(
    run: Path, llmtailor_json: Command, replace_file: Command, fault: str
) -> None:
    path = run / "checkpoint-3" / "optimizer" / "norm.safetensors"
    if fault == "missing":
        path.unlink()
    else:
        replace_file(path, b"short")
    record = llmtailor_json("ls", run)[2]
    assert record["state"] == "damaged"
    assert record["detail"] == f"{fault}: optimizer/norm.safetensors"
    assert record["num_layers"] == 6


def test_ls_notices_a_checkpoint_under_another_name(run: Path, llmtailor_json: Command) -> None:
    os.rename(run / "checkpoint-5", run / "checkpoint-50")
    assert llmtailor_json("ls", run)[-1]["detail"] == "its manifest is of step 5"


def test_ls_of_a_checkpoint_points_to_show(run: Path, llmtailor: Command) -> None:
    stderr = llmtailor("ls", run / "checkpoint-2", exit_code=3).stderr
    assert "this is a checkpoint, not a run" in stderr
    assert f"llmtailor show {run / 'checkpoint-2'}" in stderr
    assert f"llmtailor ls {run}" in stderr


def test_ls_of_a_directory_of_runs_names_one(run: Path, llmtailor: Command) -> None:
    assert f"next      llmtailor ls {run}" in llmtailor("ls", run.parent, exit_code=3).stderr


def test_ls_of_a_run_that_has_not_saved_is_no_error(
    tmp_path: Path, llmtailor: Command, llmtailor_json: Command
) -> None:
    (tmp_path / "_staging").mkdir()
    assert llmtailor("ls", tmp_path).stdout.startswith("no checkpoint\n")
    assert llmtailor_json("ls", tmp_path) == []


def test_ls_passes_a_checkpoint_of_another_tool_over(run: Path, tmp_path: Path, llmtailor_json: Command) -> None:
    other = tmp_path / "other"
    shutil.copytree(run / "checkpoint-1", other / "checkpoint-1", ignore=shutil.ignore_patterns("tailor.json"))
    assert [record["state"] for record in llmtailor_json("ls", other)] == ["no manifest"]


def test_ls_shows_escape_sequences_and_does_not_send_them(
    run: Path, llmtailor: Command, rewrite_manifest: Command
) -> None:
    rewrite_manifest(run / "checkpoint-5", lambda fields: fields.update(strategy="\x1b[2J[red]x[/red]"))
    text = llmtailor("ls", run).stdout
    assert "\\x1b[2J[red]x[/red]" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("options", "shown"), [([], b"odd\\udce9"), (["-q"], b"odd\xe9/"), (["--json"], b"odd\\udce9/")]
)
def test_ls_of_a_path_that_is_not_text(run: Path, script: list[str], options: list[str], shown: bytes) -> None:
    odd = os.fsencode(run.parent) + b"/odd\xe9"
    os.rename(run, odd)
    finished = subprocess.run(
        [*script, "show" if not options else "ls", odd, *options], capture_output=True, check=True
    )
    assert shown in finished.stdout
