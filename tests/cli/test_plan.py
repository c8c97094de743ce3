from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from llmtailor.checkpoint import open_checkpoint

Command: TypeAlias = Callable[..., Any]


def test_recipe_of_a_run_takes_each_layer_where_it_was_saved(run: Path, tmp_path: Path, llmtailor: Command) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    llmtailor("plan", run, "--step", 4, "-o", recipe)
    rows = {row["layer"]: row for row in plan_of(recipe, llmtailor)["layers"]}
    expected = {layer.name: layer.step for layer in open_checkpoint(run / "checkpoint-4").manifest.layers}
    assert {name: row["step"] for name, row in rows.items()} == expected
    assert {name: row["source"] for name, row in rows.items()} == {
        name: str(run / f"checkpoint-{step}") for name, step in expected.items()
    }
    llmtailor("merge", recipe, out)
    for merged, source in zip(
        open_checkpoint(out).manifest.layers, open_checkpoint(run / "checkpoint-4").manifest.layers, strict=True
    ):
        assert (merged.step, merged.weights.digest) == (source.step, source.weights.digest)


def plan_of(recipe: Path, llmtailor: Command) -> Any:
    return json.loads(llmtailor("plan", recipe, "--json").stdout)


def test_layers_of_removed_checkpoints_come_from_where_they_still_are(
    run: Path, tmp_path: Path, llmtailor: Command
) -> None:
    expected = {layer.name: layer.step for layer in open_checkpoint(run / "checkpoint-5").manifest.layers}
    shutil.rmtree(run / "checkpoint-4")
    llmtailor("plan", run, "-o", tmp_path / "recipe.yaml")
    rows = plan_of(tmp_path / "recipe.yaml", llmtailor)["layers"]
    assert {row["layer"]: row["step"] for row in rows} == expected
    assert "checkpoint-4" not in {Path(row["source"]).name for row in rows}


def test_recipe_goes_to_stdout_without_a_file(run: Path, tmp_path: Path, llmtailor: Command) -> None:
    text = llmtailor("plan", run).stdout
    (tmp_path / "recipe.yaml").write_text(text)
    assert plan_of(tmp_path / "recipe.yaml", llmtailor)["step"] == 5


def test_recipe_is_never_written_over_a_file(run: Path, tmp_path: Path, llmtailor: Command) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    llmtailor("plan", run, "-o", tmp_path / "recipe.yaml", exit_code=9)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_run_without_a_checkpoint_so_early_is_refused(run: Path, llmtailor: Command) -> None:
    finished = llmtailor("plan", run, "--step", 0, exit_code=3)
    assert "1, 2, 3, 4, 5" in finished.stderr


IDLE = {
    "run": ["--to=hf", "--no-copy-tokenizer", "--own-steps", "--ranks=2", "--weights-only", "--out-shard-size=5GB"],
    "recipe": ["--step=0", "--flags=flags.jsonl", "--default=model", "--output=other.yaml"],
}


@pytest.mark.parametrize(("what", "option"), [(what, option) for what, options in IDLE.items() for option in options])
def test_an_option_that_would_do_nothing_is_refused(
    run: Path, tmp_path: Path, llmtailor_json: Command, what: str, option: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"base: {run / 'checkpoint-5'}\n")
    error = llmtailor_json("plan", run if what == "run" else tmp_path / "recipe.yaml", option, exit_code=6)["error"]
    assert (error["kind"], error["found"]) == ("idle-option", option.split("=")[0])
    assert error["what"].endswith(f" to a {what}")


def test_a_default_that_is_no_checkpoint_is_refused(run: Path, tmp_path: Path, llmtailor: Command) -> None:
    finished = llmtailor("plan", run, "--default", tmp_path / "nothere", "-o", tmp_path / "recipe.yaml", exit_code=3)
    assert str(tmp_path / "nothere") in finished.stderr
    assert not (tmp_path / "recipe.yaml").exists()
    llmtailor("plan", run, "--default", run / "checkpoint-1")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "hint"),
    [
        (["plan", "typo"], 6, "check the path"),
        (["plan", "run/checkpoint-3"], 3, "give the run: llmtailor plan "),
        (["plan", "run", "--step=0"], 3, "llmtailor ls run"),
        (["plan", "run", "-o", "typo/recipe.yaml"], 3, "make it, or choose another name"),
        (["plan", "run", "-o", "run"], 9, "choose another name"),
        (["merge", "typo.yaml", "out"], 6, "check the path"),
        (["merge", "run", "out"], 6, "llmtailor plan run -o recipe.yaml"),
        (["plan", "run", "--flags", "typo"], 6, "--flags"),
        (["export", "run/checkpoint-1", "out", "--parameter-names", "typo"], 6, "--parameter-names"),
        (["export", "run/checkpoint-1", "out", "--out-shard-size", "5"], 6, "--out-shard-size"),
        (["estimate", "run/checkpoint-1", "--bandwidth", "2"], 6, "--bandwidth"),
        (["diff", "run/checkpoint-1", "run/checkpoint-2", "--plot", "x.jpg"], 6, "--plot x.png"),
        (["diff", "run/checkpoint-1", "run/checkpoint-2", "--plot", "typo/x.png"], 6, "--plot"),
    ],
)
def test_a_slip_is_told_with_the_next_step(
    run: Path, llmtailor: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], exit_code: int, hint: str
) -> None:
    monkeypatch.chdir(run.parent)
    next_step = llmtailor(*arguments, exit_code=exit_code).stderr.splitlines()[-1]
    assert next_step.startswith("  next ")
    assert hint in next_step


def partial_run(run: Path, directory: Path, llmtailor: Command) -> Path:
    """Model directories of which each has the layers that its step saved, as a selective save without links leaves."""
    from safetensors.torch import load_file, save_file

    for step in range(1, 6):
        source, target = run / f"checkpoint-{step}", directory / f"checkpoint-{step}"
        saved = [layer for layer in open_checkpoint(source).manifest.layers if layer.step == step]
        target.mkdir(parents=True)
        tensors = {key: value for layer in saved for key, value in load_file(source / layer.weights.path).items()}
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return directory


def test_partial_checkpoints_are_put_together(run: Path, tmp_path: Path, llmtailor: Command) -> None:
    parts = partial_run(run, tmp_path / "parts", llmtailor)
    recipe = tmp_path / "recipe.yaml"
    llmtailor("plan", parts, "--step", 4, "-o", recipe)
    llmtailor("merge", recipe, tmp_path / "out")
    llmtailor("export", run / "checkpoint-4", tmp_path / "whole", "--weights-only", "--to", "hf")
    ours, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert ours == expected


def test_log_of_saved_layers_gives_the_recipe(run: Path, tmp_path: Path, llmtailor: Command) -> None:
    log = tmp_path / "flags.jsonl"
    # Four blocks, tied: unit 0 is norm, 1 to 4 are the blocks, 5 is the embedding.
    log.write_text('{"step": 2, "flag": [0, 1, 3]}\n{"step": 3, "flag": [3, 5]}\n{"step": 5, "flag": [1]}\n')
    recipe = tmp_path / "recipe.yaml"
    llmtailor("plan", run, "--step", 4, "--flags", log, "-o", recipe)
    sources = {row["layer"]: Path(row["source"]).name for row in plan_of(recipe, llmtailor)["layers"]}
    assert sources == {
        "embed_tokens": "checkpoint-3",
        "layers.0": "checkpoint-2",
        "layers.1": "checkpoint-1",
        "layers.2": "checkpoint-3",
        "layers.3": "checkpoint-1",
        "norm": "checkpoint-2",
    }


def test_log_that_names_a_missing_checkpoint_is_refused(run: Path, tmp_path: Path, llmtailor: Command) -> None:
    log = tmp_path / "flags.jsonl"
    log.write_text('{"step": 2, "flag": [0]}\n{"step": 4, "flag": [1]}\n')
    shutil.rmtree(run / "checkpoint-4")
    finished = llmtailor("plan", run, "--flags", log, exit_code=3)
    assert "checkpoint-4" in finished.stderr


def test_planning_reads_no_tensor(run: Path, tmp_path: Path, llmtailor: Command) -> None:
    """Every tensor's bytes are replaced by a hole, which a reader of them would find."""
    recipe = tmp_path / "recipe.yaml"
    llmtailor("plan", run, "-o", recipe)
    before = plan_of(recipe, llmtailor)
    for file in run.glob("checkpoint-*/**/*.safetensors"):
        header = file.read_bytes()[:4096]
        nbytes = file.stat().st_size
        file.unlink()
        file.write_bytes(header)
        os.truncate(file, nbytes)
    assert plan_of(recipe, llmtailor) == before


@pytest.mark.parametrize("name", ["plan", "merge", "export"])
def test_command_starts_without_torch(name: str, run: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "recipe.yaml").write_text(f"base: {run / 'checkpoint-5'}\n")
    source = run / "checkpoint-5" if name == "export" else tmp_path / "recipe.yaml"
    arguments = [name, str(source), *([] if name == "plan" else [str(tmp_path / "out")])]
    script = (
        "import sys\nfrom llmtailor.cli.main import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "print('heavy:', *sorted({'torch', 'transformers', 'deepspeed'} & sys.modules.keys()))"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "heavy:"
