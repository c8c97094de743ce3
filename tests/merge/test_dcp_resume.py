"""Merged checkpoints of FSDP2 go on in torch's own loop and in the Trainer, on several ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtailor
from formats.dcp_files import differences, load
from merge.dcp_trainings import FIRST, LAST, SECOND, run
from merge.merges import merge_layers, merge_with_itself

# A dozen launches of two or three processes that import torch and transformers.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Of the older checkpoint; everything else, and what there is only once, is the newer one's.
OLDER_LAYERS = ("embed_tokens", "layers.1", "layers.3")


def expected_merge(newer: Mapping[str, Any], older: Mapping[str, Any], *, is_tied: bool) -> dict[str, Any]:
    """The same, of what torch loaded: model, and optimizer by name."""
    parts = ["embed_tokens.", "layers.1.", "layers.3.", *(["lm_head."] if is_tied else [])]

    def choose(name: str) -> Mapping[str, Any]:
        return older if any(part in name for part in parts) else newer

    return {
        "model": {name: choose(name)["model"][name] for name in newer["model"]},
        "optim": {
            "state": {name: choose(name)["optim"]["state"][name] for name in newer["optim"]["state"]},
            "param_groups": newer["optim"]["param_groups"],
        },
    }


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


@pytest.fixture(scope="module", params=["loop", "tied"])
def loop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A training, and checkpoints made of two of its own from which others went on."""
    name = request.param
    base = tmp_path_factory.mktemp("fsdp2")
    run(2, "loop", "save", base / name)
    before = digests(base / name)
    first, second = (base / name / f"step-{step}" for step in (FIRST, SECOND))
    merged = merge_layers(second, first, OLDER_LAYERS, base / f"{name}-merged")
    same = merge_with_itself(second, base / f"{name}-same")
    run(2, "loop", "resume", merged, same)
    run(3, "loop", "resume", merge_layers(second, first, OLDER_LAYERS, base / f"{name}-three", ranks=1))
    assert digests(base / name) == before
    return name, base


def test_torch_loads_each_tensor_of_a_merge_from_its_source(loop: tuple[str, Path]) -> None:
    name, base = loop
    first, second = (load(base / name / f"step-{step}") for step in (FIRST, SECOND))
    expected = expected_merge(second, first, is_tied=name == "tied")
    assert differences(first["model"], second["model"])  # else nothing would be shown
    assert differences(read(base / f"{name}-merged" / "loaded-2.pt"), expected) == []
    assert differences(read(base / f"{name}-three" / "loaded-3.pt"), expected) == []


def test_each_layer_keeps_its_own_update_count(loop: tuple[str, Path]) -> None:
    name, base = loop
    states = read(base / f"{name}-merged" / "final.pt")["optim"]["state"]
    steps = {fqn: int(state["step"]) for fqn, state in states.items()}
    done = LAST - SECOND
    assert steps["model.layers.1.mlp.up_proj.weight"] == FIRST + done
    assert steps["model.layers.2.mlp.up_proj.weight"] == SECOND + done


def test_a_merge_trains_on(loop: tuple[str, Path]) -> None:
    name, base = loop
    merged, straight = (read(base / directory / "final.pt") for directory in (f"{name}-merged", name))
    assert all(weight.isfinite().all() for weight in merged["model"].values())
    assert differences(merged["model"], straight["model"])


def test_a_checkpoint_merged_with_itself_trains_on_bit_for_bit(loop: tuple[str, Path]) -> None:
    name, base = loop
    assert differences(read(base / f"{name}-same" / "final.pt"), read(base / name / "final.pt")) == []


@pytest.fixture(scope="module", params=["trainer", "tied-trainer", "trainer-full"])
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The same with a Trainer."""
    name = request.param
    base = tmp_path_factory.mktemp("trainer")
    run(2, "trainer", "save", base / name)
    before = digests(base / name)
    first, second = (base / name / f"checkpoint-{step}" for step in (FIRST, SECOND))
    merged = merge_layers(second, first, OLDER_LAYERS, base / f"{name}-merged" / f"checkpoint-{SECOND}")
    same = merge_with_itself(second, base / f"{name}-same" / f"checkpoint-{SECOND}")
    run(2, "trainer", "resume", merged, same)
    assert digests(base / name) == before
    return name, base


def with_lists(value: Any) -> Any:
    """With lists for tuples, since a Trainer that resumes FULL_STATE_DICT makes lists of them.

    Source: torch 2.13, distributed/_state_dict_utils.py (_broadcast_state_dict).
    """
    if isinstance(value, dict):
        return {key: with_lists(child) for key, child in value.items()}
    return [*map(with_lists, value)] if isinstance(value, list | tuple) else value


def load_trainers(checkpoint: Path) -> dict[str, Any]:
    """Model and optimizer as torch reads them."""
    if (checkpoint / "optimizer.bin").exists():
        return {"model": read(checkpoint / "pytorch_model_fsdp.bin"), "optim": read(checkpoint / "optimizer.bin")}
    model, optimizer = (load(checkpoint / directory) for directory in ("pytorch_model_fsdp_0", "optimizer_0"))
    return {"model": model["model"], "optim": optimizer["optimizer"]}


def test_the_trainer_loads_each_tensor_of_a_merge_from_its_source(trainer: tuple[str, Path]) -> None:
    name, base = trainer
    first, second = (load_trainers(base / name / f"checkpoint-{step}") for step in (FIRST, SECOND))
    expected = expected_merge(second, first, is_tied=name.startswith("tied"))
    assert differences(first["model"], second["model"])
    assert differences(with_lists(read(base / f"{name}-merged" / "loaded.pt")), with_lists(expected)) == []


def test_the_trainer_goes_on_from_where_state_from_was(trainer: tuple[str, Path]) -> None:
    name, base = trainer
    written = base / f"{name}-merged" / f"checkpoint-{SECOND}"
    for file in ("scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"):
        assert (written / file).read_bytes() == (base / name / f"checkpoint-{SECOND}" / file).read_bytes()
    state = json.loads((base / f"{name}-merged" / f"checkpoint-{LAST}" / "trainer_state.json").read_text())
    assert state["global_step"] == LAST
    merged, straight = (base / directory / f"checkpoint-{LAST}" for directory in (f"{name}-merged", name))
    assert differences(read(merged / "scheduler.pt"), read(straight / "scheduler.pt")) == []


def test_a_checkpoint_of_the_trainer_merged_with_itself_trains_on_bit_for_bit(trainer: tuple[str, Path]) -> None:
    name, base = trainer
    same, straight = (base / directory / f"checkpoint-{LAST}" for directory in (f"{name}-same", name))
    assert differences(with_lists(load_trainers(same)), with_lists(load_trainers(straight))) == []
    for file in ("scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        assert (same / file).read_bytes() == (straight / file).read_bytes()
    final = (with_lists(read(base / directory / "final.pt")) for directory in (f"{name}-same", name))
    assert differences(*final) == []


@pytest.mark.parametrize("name", ["single", "tied-single"])
def test_a_checkpoint_of_a_single_process_goes_on_under_fsdp(name: str, tmp_path: Path) -> None:
    run(1, "trainer", "save", tmp_path / name)
    written = tmp_path / f"{name}-sharded" / f"checkpoint-{SECOND}"
    llmtailor.export(tmp_path / name / f"checkpoint-{SECOND}", written, to="dcp", ranks=2)
    run(2, "trainer", "resume", written)
    saved, loaded = read(tmp_path / name / f"saved-{SECOND}.pt"), read(written.parent / "loaded.pt")
    assert differences(loaded["model"], saved["model"]) == []
    assert differences(loaded["optim"]["state"], saved["optim"]["state"]) == []
    state = json.loads((written.parent / f"checkpoint-{LAST}" / "trainer_state.json").read_text())
    assert state["global_step"] == LAST
