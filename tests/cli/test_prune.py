from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from llmtailor.storage import add_pin, read_pins

Command: TypeAlias = Callable[..., Any]


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("*checkpoint-*"))


def held_bytes(run: Path) -> int:
    return sum(
        {path.stat().st_ino: path.stat().st_size for path in run.glob("checkpoint-*/**/*") if path.is_file()}.values()
    )


def test_prune_removes_the_oldest_but_the_newest_consistent(run: Path, llmtailor: Command) -> None:
    result = llmtailor("prune", run, "--keep", "2", "--yes")
    assert names_in(run) == ["checkpoint-1", "checkpoint-5"]
    assert [line.split()[0] for line in result.stdout.splitlines()[1:4]] == [f"checkpoint-{step}" for step in (2, 3, 4)]
    assert re.search(r"^frees [\d.]+ kB", result.stdout, re.M)
    assert re.search(r"^checkpoint-1 +stays +newest consistent$", result.stdout, re.M)
    assert re.search(r"^checkpoint-5 +stays +newest$", result.stdout, re.M)
    assert re.fullmatch(r"removed 3 directories, [\d.]+ kB freed; checkpoint-5 was verified first\n", result.stderr)
    llmtailor("verify", run)


def test_prune_tells_what_it_frees_to_the_byte(run: Path, llmtailor_json: Command) -> None:
    before = held_bytes(run)
    record = llmtailor_json("prune", run, "--keep", "1", "--no-keep-consistent", "--yes")
    assert names_in(run) == ["checkpoint-5"]
    assert record["removed"] is True
    assert record["freed_bytes"] == before - held_bytes(run)
    assert record["kept"] == [str(run / "checkpoint-5")]
    assert [Path(each["path"]).name for each in record["doomed"]] == [f"checkpoint-{step}" for step in range(1, 5)]


def test_a_file_that_has_a_name_elsewhere_is_not_freed(run: Path, tmp_path: Path, llmtailor_json: Command) -> None:
    arguments = ("prune", run, "--keep", "1", "--no-keep-consistent", "--dry-run")
    before = llmtailor_json(*arguments)["freed_bytes"]
    path = run / "checkpoint-1" / "rng_state.pth"
    os.link(path, tmp_path / "kept.pth")
    assert llmtailor_json(*arguments)["freed_bytes"] == before - path.stat().st_size


def test_prune_keeps_pinned_steps(run: Path, llmtailor: Command) -> None:
    llmtailor("prune", run, "--keep", "3", "--pin", "2", "--pin", "3", "--no-keep-consistent", "--yes")
    assert names_in(run) == ["checkpoint-2", "checkpoint-3", "checkpoint-5"]


def test_prune_refuses_a_pin_that_is_not_there(run: Path, llmtailor: Command) -> None:
    stderr = llmtailor("prune", run, "--keep", "1", "--pin", "7", "--yes", exit_code=6).stderr
    assert "expected  one of 1, 2, 3, 4, 5" in stderr
    assert "found     7" in stderr
    assert len(names_in(run)) == 5


def test_prune_dry_run_touches_nothing(locked_run: Path, llmtailor: Command, llmtailor_json: Command) -> None:
    text = llmtailor("prune", locked_run, "--keep", "2", "--dry-run").stdout
    assert "checkpoint-2  whole" in text
    assert llmtailor_json("prune", locked_run, "--keep", "2", "--dry-run")["removed"] is False
    assert len(names_in(locked_run)) == 5


def test_prune_quiet_prints_what_went(run: Path, llmtailor: Command) -> None:
    result = llmtailor("prune", run, "--keep", "4", "--yes", "--quiet")
    assert result.stdout == f"{run / 'checkpoint-2'}\n"
    assert result.stderr == ""


def test_prune_with_nothing_to_remove(run: Path, llmtailor: Command) -> None:
    assert llmtailor("prune", run, "--keep", "9").stdout.startswith("nothing to remove\n")


def test_prune_removes_what_was_set_aside_only_when_told(set_aside: Path, llmtailor: Command) -> None:
    llmtailor("prune", set_aside, "--keep", "3", "--yes")
    assert len(names_in(set_aside)) == 5
    llmtailor("prune", set_aside, "--bad", "--yes")
    assert "_checkpoint-4.bad" not in names_in(set_aside)
    llmtailor("prune", set_aside, "--superseded", "--yes")
    assert names_in(set_aside) == ["checkpoint-2", "checkpoint-3", "checkpoint-5"]


def test_prune_must_be_told_what_may_go(run: Path, llmtailor: Command) -> None:
    assert "--keep-optimizer N, --bad or --superseded" in llmtailor("prune", run, exit_code=6).stderr


def test_prune_refuses_to_keep_none(run: Path, llmtailor: Command) -> None:
    llmtailor("prune", run, "--keep", "0", "--yes", exit_code=2)


def test_prune_removes_nothing_before_the_newest_verified(run: Path, llmtailor: Command, damage_file: Command) -> None:
    damage_file(run / "checkpoint-5" / "model-norm.safetensors")
    stderr = llmtailor("prune", run, "--keep", "1", "--yes", exit_code=5).stderr
    assert stderr.startswith("error: nothing was removed: the checkpoint does not verify")
    assert "  next      resume the run first" in stderr
    assert len(names_in(run)) == 5


def test_a_damaged_checkpoint_is_neither_counted_nor_removed(
    run: Path, llmtailor: Command, damage_file: Command
) -> None:
    damage_file(run / "checkpoint-4" / "tailor.json")
    text = llmtailor("prune", run, "--keep", "2", "--no-keep-consistent", "--yes").stdout
    assert names_in(run) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    assert "left alone: checkpoint-4, the manifest is cut off or changed" in text


def test_prune_tells_what_it_leaves_alone_and_leaves_no_lock(run: Path, llmtailor: Command) -> None:
    """Nothing in the directory is ours to remove: two checkpoints of another tool, and what was set aside."""
    for step in (1, 2):
        (run / f"checkpoint-{step}" / "tailor.json").unlink()
    for step, name in ((3, "bad"), (4, "superseded")):
        os.rename(run / f"checkpoint-{step}", run / f"_checkpoint-{step}.{name}")
    for path in (run / "checkpoint-5", run / "_staging"):
        shutil.rmtree(path)
    before = sorted(os.listdir(run))
    assert llmtailor("prune", run, "--keep", "1", "--yes").stdout.splitlines() == [
        "nothing to remove",
        "there is no whole checkpoint of LLMTailor",
        "left alone: checkpoint-1, no tailor.json: another tool's, or half a checkpoint",
        "left alone: checkpoint-2, no tailor.json: another tool's, or half a checkpoint",
        "left alone: _checkpoint-3.bad, failed verification and was set aside; --bad removes it",
        "left alone: _checkpoint-4.superseded, of an abandoned branch; --superseded removes it",
    ]
    assert sorted(os.listdir(run)) == before


def test_prune_keeps_what_was_set_aside_if_nothing_else_is_left(set_aside: Path, llmtailor: Command) -> None:
    for step in (2, 3, 5):
        os.rename(set_aside / f"checkpoint-{step}", set_aside / f"_checkpoint-{step}.superseded")
    stderr = llmtailor("prune", set_aside, "--bad", "--superseded", "--yes", exit_code=8).stderr
    assert "may be all that is left" in stderr
    assert len(names_in(set_aside)) == 5


def test_prune_of_a_run_in_training_is_refused(locked_run: Path, llmtailor: Command, llmtailor_json: Command) -> None:
    stderr = llmtailor("prune", locked_run, "--keep", "1", "--yes", exit_code=13).stderr
    assert re.search(rf"found     held by process {os.getpid()} on host ", stderr)
    assert llmtailor_json("prune", locked_run, "--keep", "1", "--yes", exit_code=13)["error"]["kind"] == "locked"
    assert len(names_in(locked_run)) == 5


def test_prune_leaves_no_lock_where_there_is_no_run(tmp_path: Path, llmtailor: Command) -> None:
    (tmp_path / "photos").mkdir()
    llmtailor("prune", tmp_path, "--keep", "1", "--yes", exit_code=3)
    llmtailor("prune", tmp_path / "typo", "--keep", "1", "--yes", exit_code=3)
    assert os.listdir(tmp_path) == ["photos"]


def test_prune_does_not_remove_unasked(run: Path, llmtailor: Command) -> None:
    assert "add --yes" in llmtailor("prune", run, "--keep", "1", exit_code=6).stderr
    assert len(names_in(run)) == 5


@pytest.mark.parametrize(("answer", "exit_code", "num_left"), [("y", 0, 1), ("n", 1, 5), ("", 1, 5)])
def test_prune_asks_on_a_terminal(run: Path, script: list[str], answer: str, exit_code: int, num_left: int) -> None:
    keyboard, terminal = pty.openpty()
    os.write(keyboard, f"{answer}\n".encode())
    finished = subprocess.run(
        [*script, "prune", run, "--keep", "1", "--no-keep-consistent"],
        stdin=terminal,
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(keyboard)
    os.close(terminal)
    assert re.match(r"remove 4 directories, [\d.]+ kB\? \[y/N\] ", finished.stderr)
    assert finished.returncode == exit_code, finished.stderr
    assert len(names_in(run)) == num_left


# Rules


def measure(run: Path, values: dict[int, float], name: str = "eval_loss") -> None:
    for step, value in values.items():
        (run / f"checkpoint-{step}" / "metrics.json").write_text(json.dumps({name: value}))


def test_prune_keeps_what_any_rule_wants(run: Path, llmtailor: Command) -> None:
    measure(run, {1: 0.3, 2: 0.1, 3: 0.2, 4: 0.4})
    arguments = ("--keep", "1", "--every", "3", "--best", "1", "--no-keep-consistent")
    text = llmtailor("prune", run, *arguments, "--yes").stdout
    assert names_in(run) == ["checkpoint-2", "checkpoint-3", "checkpoint-5"]
    assert re.search(r"^stays +optimizer state +because$", text, re.M)
    assert re.search(r"^checkpoint-2 +stays +best 1, eval_loss 0\.1$", text, re.M)
    assert re.search(r"^checkpoint-3 +stays +every 3$", text, re.M)
    assert re.search(r"^checkpoint-5 +stays +newest; last 1$", text, re.M)


@pytest.mark.parametrize(
    ("name", "options", "best"), [("f1", (), 4), ("f1", ("--lower-is-better",), 2), ("x_loss", (), 2)]
)
def test_prune_knows_which_way_a_metric_goes(
    run: Path, llmtailor: Command, name: str, options: tuple[str, ...], best: int
) -> None:
    measure(run, {1: 0.3, 2: 0.1, 3: 0.2, 4: 0.4}, name)
    llmtailor("prune", run, "--best", "1", "--metric", name, *options, "--no-keep-consistent", "--yes")
    assert names_in(run) == [f"checkpoint-{best}", "checkpoint-5"]


def test_prune_refuses_a_metric_that_nobody_measured(run: Path, llmtailor_json: Command) -> None:
    measure(run, {1: 0.3}, "eval_f1")
    error = llmtailor_json("prune", run, "--best", "1", "--metric", "f1", "--yes", exit_code=6)["error"]
    assert (error["kind"], error["found"]) == ("no-metric", "eval_f1")
    assert len(names_in(run)) == 5


def test_prune_tells_why_each_stays(locked_run: Path, llmtailor_json: Command) -> None:
    measure(locked_run, {2: 0.1})
    arguments = ("--keep", "1", "--every", "4", "--best", "1", "--keep-optimizer", "1", "--dry-run")
    record = llmtailor_json("prune", locked_run, *arguments)
    assert {Path(path).name: why for path, why in record["reasons"].items()} == {
        "checkpoint-1": ["newest consistent"],
        "checkpoint-2": ["best 1, eval_loss 0.1"],
        "checkpoint-4": ["every 4"],
        "checkpoint-5": ["newest", "last 1"],
    }
    assert [record["optimizer"][path] for path in record["kept"]] == ["stays", "goes", "goes", "stays"]
    assert [Path(each["path"]).name for each in record["thinned"]] == ["checkpoint-2", "checkpoint-4"]
    assert [Path(each["path"]).name for each in record["doomed"]] == ["checkpoint-3"]
    assert len(names_in(locked_run)) == 5
    assert (locked_run / "checkpoint-4" / "optimizer").is_dir()


# Optimizer state


def test_prune_takes_optimizer_state_away(run: Path, llmtailor: Command, llmtailor_json: Command) -> None:
    result = llmtailor("prune", run, "--keep-optimizer", "2", "--yes")
    assert names_in(run) == [f"checkpoint-{step}" for step in range(1, 6)]
    assert [path.parent.name for path in sorted(run.glob("checkpoint-*/optimizer"))] == [
        f"checkpoint-{step}" for step in (1, 4, 5)
    ]
    assert result.stdout.startswith("keep weights alone  state  optimizer state\ncheckpoint-2")
    assert re.search(
        r"^removed optimizer state of 2 checkpoints, [\d.]+ kB freed; checkpoint-5 was verified first$",
        result.stderr,
        re.M,
    )
    assert len(llmtailor("verify", run).stdout.splitlines()) > 5
    assert llmtailor("prune", run, "--keep-optimizer", "2", "--yes").stdout.startswith("nothing to remove\n")
    assert [each["contents"] for each in llmtailor_json("ls", run)] == ["full", "weights", "weights", "full", "full"]
    assert "weights only; not resumable" in llmtailor("show", run / "checkpoint-3").stdout


@pytest.mark.parametrize("options", [("--keep-optimizer", "1"), ("--keep", "4", "--keep-optimizer", "1")])
def test_prune_tells_what_optimizer_state_frees_to_the_byte(
    run: Path, llmtailor_json: Command, options: tuple[str, ...]
) -> None:
    before = held_bytes(run)
    record = llmtailor_json("prune", run, *options, "--no-keep-consistent", "--yes")
    assert record["thinned"]
    assert record["freed_bytes"] == before - held_bytes(run)


def test_the_chain_to_a_thinned_parent_can_be_followed(run: Path, llmtailor: Command, llmtailor_json: Command) -> None:
    parent = llmtailor_json("show", run / "checkpoint-4")["parent"]
    was = llmtailor_json("show", run / "checkpoint-3")
    assert parent == {"step": 3, "digest": was["digest"]}
    llmtailor("prune", run, "--keep-optimizer", "1", "--yes")
    now = llmtailor_json("show", run / "checkpoint-3")
    assert now["digest"] != parent["digest"]
    assert [each["parent"] for each in (llmtailor_json("show", run / "checkpoint-4"), now)] == [parent, was["parent"]]
    llmtailor("verify", run)
    llmtailor("show", run / "checkpoint-4")
    llmtailor("plan", run)


def test_prune_verifies_what_is_left_to_resume_from(run: Path, llmtailor: Command, damage_file: Command) -> None:
    """The newest is of weights alone, so the one before it is what training goes on from."""
    from llmtailor.pruning import thin_checkpoint
    from llmtailor.storage import RunDirectory

    directory = RunDirectory(run)
    thin_checkpoint(directory, run / "checkpoint-5")
    directory.close()
    result = llmtailor("prune", run, "--keep", "4", "--yes")
    assert "checkpoint-4 and checkpoint-5 were verified first" in result.stderr
    damage_file(run / "checkpoint-4" / "optimizer" / "norm.safetensors")
    assert "the checkpoint does not verify" in llmtailor("prune", run, "--keep", "3", "--yes", exit_code=5).stderr
    assert names_in(run) == [f"checkpoint-{step}" for step in (1, 3, 4, 5)]


# Pins


def test_a_pin_holds_until_it_is_taken_away(run: Path, llmtailor: Command) -> None:
    assert llmtailor("prune", run, "--pin", "2").stderr == "checkpoint-2 is pinned\n"
    llmtailor("prune", run, "--keep", "1", "--keep-optimizer", "1", "--no-keep-consistent", "--yes")
    assert names_in(run) == ["checkpoint-2", "checkpoint-5"]
    assert (run / "checkpoint-2" / "optimizer").is_dir()
    text = llmtailor("prune", run, "--keep", "1", "--unpin", "2", "--no-keep-consistent", "--yes").stderr
    assert text.startswith("checkpoint-2 is not pinned any more\n")
    assert names_in(run) == ["checkpoint-5"]


def test_pinning_works_while_the_run_is_written(locked_run: Path, llmtailor: Command) -> None:
    text = llmtailor("prune", locked_run, "--pin", "1", "--pin", "2").stdout
    assert read_pins(locked_run) == {1, 2}
    assert text.startswith("nothing to remove\n")
    assert re.search(r"^checkpoint-2 +stays +pinned$", text, re.M)
    llmtailor("prune", locked_run, "--unpin", "1")
    assert read_pins(locked_run) == {2}


def test_dry_run_pins_nothing(run: Path, llmtailor: Command) -> None:
    add_pin(run, 1)
    llmtailor("prune", run, "--pin", "3", "--unpin", "1", "--keep", "1", "--dry-run")
    assert read_pins(run) == {1}


def test_a_step_that_is_not_pinned_cannot_be_unpinned(run: Path, llmtailor: Command) -> None:
    assert "step 3 is not pinned" in llmtailor("prune", run, "--unpin", "3", exit_code=3).stderr
