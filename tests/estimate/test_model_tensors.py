"""Names and shapes from a configuration or a checkpoint, and what is said where there is neither."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from estimate.real_runs import MODELS, build, tensors_of, train
from llmtailor.errors import FormatError, NotFoundError, TailorError, UnsupportedError
from llmtailor.estimate import model, read_model_tensors
from llmtailor.layers import map_module
from llmtailor.model_state import read_model


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_tells_the_parameters_and_layers_of_the_model(name: str, tmp_path: Path) -> None:
    found, real = tensors_of(name, tmp_path), build(name)
    assert {fqn: meta.shape for fqn, meta in found.tensors.items()} == {
        fqn: tuple(parameter.shape) for fqn, parameter in real.named_parameters()
    }
    assert found.num_parameters == sum(parameter.numel() for parameter in real.parameters())
    assert found.layers.names == map_module(real).names
    assert found.layers.ties == map_module(real).ties
    assert found.state is None


def test_a_file_and_its_directory_are_the_same(tmp_path: Path) -> None:
    found = tensors_of("llama", tmp_path)
    assert read_model_tensors(str(tmp_path / "config" / "config.json")).tensors == found.tensors


def test_a_checkpoint_of_ours_says_more_than_its_configuration(tmp_path: Path) -> None:
    real = build("tied llama")
    train(tmp_path / "run", real, num_saves=1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert (checkpoint / "config.json").exists()
    found = read_model_tensors(str(checkpoint))
    assert found.origin == "a checkpoint of format tailored"
    assert list(found.tensors) == [fqn for fqn, _ in read_model(real).parameters()]
    assert found.state is not None
    assert {*found.state["model.norm.weight"]} == {"step", "exp_avg", "exp_avg_sq"}


def test_a_model_directory_is_read_from_its_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = build("tied llama")
    real.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(model, "ask_transformers", None)
    found = read_model_tensors(str(tmp_path / "model"))
    assert found.origin == "a checkpoint of format hf"
    assert found.num_parameters == sum(parameter.numel() for parameter in real.parameters())
    assert found.state is None


def test_checkpoints_are_estimated_without_torch(tmp_path: Path) -> None:
    train(tmp_path / "run", build("llama"), num_saves=1)
    build("llama").save_pretrained(tmp_path / "model")
    script = """
import sys
from llmtailor.cli.main import app
for path in sys.argv[1:]:
    app(["estimate", path, "-q"], standalone_mode=False)
print(*sorted({"torch", "transformers"} & sys.modules.keys()))
"""
    paths = [str(tmp_path / "run" / "checkpoint-1"), str(tmp_path / "model")]
    finished = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    *numbers, heavy = finished.stdout.split("\n")[:-1]
    assert heavy == ""
    assert len(numbers) >= 2
    assert all(number.isdecimal() for number in numbers)


def refusal_of(name: str | Path) -> TailorError:
    with pytest.raises(TailorError) as caught:
        read_model_tensors(str(name))
    return caught.value


def write_config(directory: Path, **fields: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(fields))
    return path


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    error = refusal_of(tmp_path / "config.json")
    assert isinstance(error, NotFoundError)
    assert error.kind == "missing-model"


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    error = refusal_of(tmp_path)
    assert isinstance(error, FormatError)
    assert error.kind == "unknown-format"


def test_a_configuration_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert refusal_of(tmp_path).kind == "bad-json"


@pytest.mark.parametrize(
    "answer", [{"kind": "cannot-build", "error": "KeyError: 'x'"}, {"kind": "timeout", "error": ""}]
)
def test_a_model_that_cannot_be_built_is_refused(
    answer: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "ask_transformers", lambda text: answer)
    error = refusal_of(write_config(tmp_path, model_type="novel"))
    assert isinstance(error, UnsupportedError)
    assert error.kind == "cannot-build"
    assert error.found == answer["error"]


def test_a_configuration_without_a_type_is_refused(tmp_path: Path) -> None:
    assert refusal_of(write_config(tmp_path, hidden_size=8)).kind == "cannot-build"


def test_without_transformers_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "ask_transformers", lambda text: {"kind": "no-transformers", "error": "none"})
    error = refusal_of(write_config(tmp_path, model_type="llama"))
    assert error.kind == "missing-extra"
    assert "llmtailor[hf]" in str(error.hint)


def test_nothing_is_downloaded() -> None:
    error = refusal_of(f"org/model@{'0' * 40}")
    assert isinstance(error, UnsupportedError)
    assert error.kind == "estimate-download"
