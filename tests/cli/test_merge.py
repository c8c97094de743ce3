from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from safetensors.torch import load_file

Command: TypeAlias = Callable[..., Any]


@pytest.fixture
def recipe(run: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f'base: {run / "checkpoint-5"}\nlayers:\n  "layers.0-1, norm": {run / "checkpoint-1"}\n')
    return path


def test_merge_shows_where_each_layer_comes_from(recipe: Path, run: Path, tmp_path: Path, llmtailor: Command) -> None:
    lines = llmtailor("merge", recipe, tmp_path / "out").stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:4] for line in lines[1:7]}
    assert rows["layers.0"] == [str(run / "checkpoint-1"), "1", "4"]
    assert rows["layers.2"][0] == str(run / "checkpoint-5")
    assert any(line.split() == ["format", "tailored,", "weights", "and", "optimizer"] for line in lines)
    assert (tmp_path / "out" / "tailor.json").is_file()


def test_dry_run_writes_nothing(recipe: Path, tmp_path: Path, llmtailor_json: Command) -> None:
    record = llmtailor_json("merge", recipe, tmp_path / "out", "--dry-run")
    assert record["output"] is None
    assert {row["layer"]: row["staleness"] for row in record["layers"]}["norm"] == 4
    assert record["bytes"] > 0
    assert [path.name for path in tmp_path.iterdir() if path.name != "run"] == ["recipe.yaml"]


def test_merge_json_counts_the_bytes_on_disk(recipe: Path, tmp_path: Path, llmtailor_json: Command) -> None:
    record = llmtailor_json("merge", recipe, tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert record["num_files"] == len(files)
    sizes = sum(path.stat().st_size for path in files if path.name != "tailor.json")
    assert record["bytes"] == sizes
    assert record["linked_bytes"] == sum(path.stat().st_size for path in files if path.stat().st_nlink > 1)
    written = json.loads((tmp_path / "out" / "llmtailor_merge.json").read_text())
    assert [row["source"] for row in written["layers"]] == [row["source"] for row in record["layers"]]


def test_quiet_merge_prints_the_new_directory(recipe: Path, tmp_path: Path, llmtailor: Command) -> None:
    assert llmtailor("merge", "-q", recipe, tmp_path / "out").stdout == f"{tmp_path / 'out'}\n"


@pytest.mark.parametrize("command", ["merge", "export"])
def test_files_that_cannot_be_linked_are_one_note(
    recipe: Path, run: Path, tmp_path: Path, llmtailor: Command, llmtailor_json: Command, command: str
) -> None:
    for file in run.glob("checkpoint-*/**/*.safetensors"):
        file.chmod(0o644)
    source = recipe if command == "merge" else run / "checkpoint-5"
    quiet = llmtailor(command, source, tmp_path / "quiet", "-q")
    assert (quiet.stdout, quiet.stderr) == (f"{tmp_path / 'quiet'}\n", "")
    text = llmtailor(command, source, tmp_path / "out")
    notes = [line for line in text.stdout.splitlines() if "no hard link" in line]
    assert len(notes) == 1
    assert re.search(r"to \d+ files, such as \S+: it can be changed in place.* they are copied", notes[0])
    assert text.stderr == ""
    assert notes[0].strip() in llmtailor_json(command, source, tmp_path / "json")["notes"]


def test_merge_of_weights_in_another_type(recipe: Path, tmp_path: Path, llmtailor: Command) -> None:
    llmtailor("merge", recipe, tmp_path / "out", "--weights-only", "--to", "hf", "--dtype", "bfloat16")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "llmtailor_merge.json"} <= names
    assert not names & {"optimizer.pt", "scheduler.pt", "rng_state.pth", "run_state.json"}
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        "torch.bfloat16"
    }


def test_out_shard_size_counts_bytes_or_parameters(recipe: Path, tmp_path: Path, llmtailor: Command) -> None:
    # The largest tensor has 256 elements of 4 bytes: of 2 kB, or of 1,000 parameters of 16 bits, several fit.
    for number, size in enumerate(("2KB", "1K")):
        out = tmp_path / f"out{number}"
        llmtailor("merge", recipe, out, "--weights-only", "--to", "hf", "--out-shard-size", size)
        shards = sorted(out.glob("model-*.safetensors"))
        assert len(shards) > 1
        assert all(sum(t.nbytes for t in load_file(shard).values()) <= 2000 for shard in shards)


@pytest.mark.parametrize("size", ["5", "-1GB", "0MB", "5 parsecs", "1e3GB"])
def test_size_that_is_none_is_refused(recipe: Path, tmp_path: Path, llmtailor: Command, size: str) -> None:
    finished = llmtailor("merge", recipe, tmp_path / "out", f"--out-shard-size={size}", exit_code=6)
    assert "5GB" in finished.stderr


def test_missing_recipe_is_one_sentence(tmp_path: Path, llmtailor: Command) -> None:
    finished = llmtailor("merge", tmp_path / "none.yaml", tmp_path / "out", exit_code=6)
    assert "cannot read the recipe" in finished.stderr


def test_all_unusable_sources_are_named_together(run: Path, tmp_path: Path, llmtailor: Command) -> None:
    (tmp_path / "empty").mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {run / 'checkpoint-5'}\nlayers:\n  norm: {tmp_path / 'gone'}\n  layers.0: {tmp_path / 'empty'}\n"
    )
    finished = llmtailor("merge", recipe, tmp_path / "out", exit_code=3)
    assert "2 faults" in finished.stderr
    assert str(tmp_path / "gone") in finished.stderr
    assert str(tmp_path / "empty") in finished.stderr
    assert not (tmp_path / "out").exists()


def test_method_of_mergekit_needs_mergekit(
    run: Path, tmp_path: Path, llmtailor: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    recipe = slerp_recipe(run, tmp_path)
    finished = llmtailor("merge", recipe, tmp_path / "out", exit_code=12)
    assert "slerp" in finished.stderr
    assert "pip install mergekit" in finished.stderr


def test_installed_mergekit_makes_the_weights(
    run: Path, tmp_path: Path, llmtailor: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = tmp_path / "exported"
    llmtailor("export", run / "checkpoint-5", exported, "--weights-only", "--to", "hf")
    install_mergekit(tmp_path, monkeypatch, f'mkdir "$2" && cp {exported}/* "$2"')
    llmtailor("merge", slerp_recipe(run, tmp_path), tmp_path / "out")
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", exported))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_installed_mergekit_makes_the_weights_of_a_model_in_a_new_directory(
    run: Path, tmp_path: Path, llmtailor: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = tmp_path / "exported"
    llmtailor("export", run / "checkpoint-5", exported, "--weights-only", "--to", "hf")
    install_mergekit(tmp_path, monkeypatch, f'mkdir "$2" && cp {exported}/* "$2"')
    llmtailor("merge", slerp_recipe(run, tmp_path), tmp_path / "new" / "deep" / "out")
    assert (tmp_path / "new" / "deep" / "out" / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["out"]


def test_what_a_killed_process_left_of_mergekits_output_is_swept(
    run: Path, tmp_path: Path, llmtailor: Command, script: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Kills what started it, as the kernel does when memory is short.
    install_mergekit(tmp_path, monkeypatch, 'mkdir "$2"; echo 1 > "$2/model.safetensors"; kill -9 $PPID')
    arguments = ["merge", slerp_recipe(run, tmp_path), tmp_path / "out"]
    assert subprocess.run([*script, *map(str, arguments)], check=False).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.")]
    llmtailor("export", run / "checkpoint-5", tmp_path / "out", "--weights-only", "--to", "hf")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("command", [("plan",), ("merge", "--dry-run")], ids=["plan", "dry-run"])
def test_plan_says_who_will_do_what_mergekit_alone_can(
    run: Path, tmp_path: Path, llmtailor: Command, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    install_mergekit(tmp_path, monkeypatch, "exit 1")
    output = [tmp_path / "out"] if command[0] == "merge" else []
    finished = llmtailor(command[0], slerp_recipe(run, tmp_path), *output, *command[1:], exit_code=12)
    assert "llmtailor merge has mergekit do it" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_failing_mergekit_leaves_nothing(
    run: Path, tmp_path: Path, llmtailor: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_mergekit(tmp_path, monkeypatch, 'mkdir "$2"; echo "no such tensor" >&2; exit 3')
    finished = llmtailor("merge", slerp_recipe(run, tmp_path), tmp_path / "out", exit_code=10)
    assert "no such tensor" in finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("run", "bin")) == ["slerp.yaml"]


def slerp_recipe(run: Path, tmp_path: Path) -> Path:
    path = tmp_path / "slerp.yaml"
    sources = "".join(f"  - model: {run / name}\n" for name in ("checkpoint-4", "checkpoint-5"))
    path.write_text(
        f"merge_method: slerp\nbase_model: {run / 'checkpoint-4'}\nmodels:\n{sources}"
        "parameters: {t: 0.5}\ndtype: float32\n"
    )
    return path


def install_mergekit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A command of that name, which does what a test says."""
    directory = tmp_path / "bin"
    directory.mkdir()
    command = directory / "mergekit-yaml"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    "options",
    [["--ranks", "2", "--to", "hf"], ["--zero-stage", "3"], ["--own-steps"], ["--to", "dcp", "--dtype", "float32"]],
)
def test_option_that_would_do_nothing_is_refused(
    recipe: Path, tmp_path: Path, llmtailor: Command, options: list[str]
) -> None:
    finished = llmtailor("merge", recipe, tmp_path / "out", *options, exit_code=6)
    assert "do not apply" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_tokenizer_comes_from_where_the_recipe_says(run: Path, tmp_path: Path, llmtailor: Command) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "evil.py").write_text("raise SystemExit")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: passthrough\nslices:\n- sources: [{{model: {run / 'checkpoint-5'}, layer_range: [0, 4]}}]\n"
        f"tokenizer_source: {tokenizer}\n"
    )
    llmtailor("merge", recipe, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not list((tmp_path / "out").glob("*.py"))
    llmtailor("merge", recipe, tmp_path / "without", "--no-copy-tokenizer")
    assert not (tmp_path / "without" / "tokenizer.json").exists()


def test_deeper_model_is_written_for_hugging_face(tmp_path: Path, llmtailor: Command, llmtailor_json: Command) -> None:
    from transformers import AutoModelForCausalLM

    model = Path(__file__).parent.parent / "compat/data/transformers-5.23.0/llama/checkpoint-4"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: passthrough\ndtype: float32\nslices:\n- sources: [{{model: {model}, layer_range: [0, 2]}}]\n"
        f"- sources: [{{model: {model}, layer_range: [1, 3]}}]\n"
    )
    record = llmtailor_json("merge", recipe, tmp_path / "out")
    blocks = [row["source_layer"] for row in record["layers"] if row["layer"].startswith("layers.")]
    assert blocks == ["layers.0", "layers.1", "layers.1", "layers.2"]
    deeper, source = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", model))
    assert deeper.config.num_hidden_layers == 4
    tensors = source.state_dict()
    for name, value in deeper.state_dict().items():
        index = name.split(".")[2] if ".layers." in name else None
        theirs = name if index is None else name.replace(f".{index}.", f".{[0, 1, 1, 2][int(index)]}.", 1)
        assert value.equal(tensors[theirs])
    finished = llmtailor("merge", recipe, tmp_path / "other", "--to", "tailored", exit_code=12)
    assert "--to hf" in finished.stderr


def test_linear_averages_weights_and_takes_the_newest_moments(
    run: Path, tmp_path: Path, llmtailor_json: Command
) -> None:
    import torch

    recipe = tmp_path / "recipe.yaml"
    a, b = run / "checkpoint-1", run / "checkpoint-5"
    recipe.write_text(f'base: {b}\nlayers: {{"*": {{from: [{a}, {b}], weights: [1, 3]}}}}\n')
    record = llmtailor_json("merge", recipe, tmp_path / "out")
    assert "weights are averages" in record["notes"][0]
    name = "model-layers.002.safetensors"
    ours, first, last = (load_file(path / name) for path in (tmp_path / "out", a, b))
    for key, value in ours.items():
        expected = (0.25 * first[key].double() + 0.75 * last[key].double()).float()
        assert torch.equal(value, expected)
    moments = [(path / "optimizer" / "layers.002.safetensors").read_bytes() for path in (tmp_path / "out", b)]
    assert moments[0] == moments[1]
