"""What is written from a checkpoint in parts is what is written from the whole one; and what commands say of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import llmtailor
from coded_checkpoints import code_layers
from formats.simple_writer import load_ref
from llmtailor.checkpoint import Checkpoint, open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.cli.main import app
from llmtailor.errors import FormatError
from llmtailor.formats import open_catalog
from llmtailor.load import plan_load, plan_targets, read_saved_states
from llmtailor.manifest import INDEX_NAME, MANIFEST_NAME, digest_of
from llmtailor.model_state import read_model
from llmtailor.verify import verify_checkpoint
from master_adamw import LEAF, MasterAdamW
from merge.merges import merge_layers
from merge.test_conversions import content
from ranks.part_files import CUTS, Cut, boxes, columns, cut_checkpoint, runs
from ranks.test_part_files import assert_filled, make_targets
from tiny_models import build_llama, snapshot_optimizer

SOME_CUTS = ("rows of 4", "columns of 3", "grid of 3 x 2", "runs of 5")


def save_llama(run: Path, *, steps: int = 1, has_masters: bool = False, width: int = 16) -> Checkpoint:
    torch.manual_seed(3)
    model = build_llama(width=width).to(torch.bfloat16 if has_masters else torch.float32)
    make = MasterAdamW if has_masters else torch.optim.AdamW
    optimizer: torch.optim.Optimizer = make(model.parameters(), lr=1e-3)  # type: ignore[operator]
    checkpointer = Checkpointer(run)
    for step in range(1, steps + 1):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        path = checkpointer.save(step, model, [optimizer], model.config.save_pretrained).result()
    checkpointer.close()
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_llama(tmp_path_factory.mktemp("whole"))


TOLD = {MANIFEST_NAME, INDEX_NAME, "llmtailor_merge.json", ".metadata"}
"""Where times, sources, or the path of the output stand."""


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in TOLD]
    return {str(path.relative_to(directory)): digest_of(path.read_bytes()) for path in files}


@pytest.mark.parametrize("to", ["tailored", "hf", "dcp", "deepspeed"])
@pytest.mark.parametrize("cut", [CUTS[name] for name in SOME_CUTS], ids=SOME_CUTS)
def test_an_export_from_parts_is_that_from_the_whole(whole: Checkpoint, tmp_path: Path, cut: Cut, to: str) -> None:
    parts = cut_checkpoint(whole, tmp_path / "checkpoint-1", cut)
    options: dict[str, Any] = {"to": to, "ranks": 2} if to == "deepspeed" else {"to": to}
    for source, output in ((whole.path, "from-whole"), (parts.path, "from-parts")):
        llmtailor.export(source, tmp_path / output, **options)
    found = digests(tmp_path / "from-parts")
    assert len(found) >= 2
    assert found == digests(tmp_path / "from-whole")
    assert content(open_catalog(tmp_path / "from-parts")) == content(open_catalog(tmp_path / "from-whole"))
    if to == "tailored":
        assert verify_checkpoint(tmp_path / "from-parts").problems == ()
        assert not any(layer.parts for layer in open_checkpoint(tmp_path / "from-parts").manifest.layers)


def test_a_merge_takes_layers_in_parts_and_links_whole_ones(whole: Checkpoint, tmp_path: Path) -> None:
    parts = cut_checkpoint(whole, tmp_path / "parts" / "checkpoint-1", runs(5))
    output = merge_layers(whole.path, parts.path, ["layers.1", "norm"], tmp_path / "merged")
    assert verify_checkpoint(output).problems == ()
    assert digests(output) == digests(whole.path)
    linked = {path.name for path in output.glob("model-*") if path.stat().st_nlink > 1}
    assert linked == {path.name for path in whole.path.glob("model-*")} - {
        "model-layers.001.safetensors",
        "model-norm.safetensors",
    }


def test_layers_with_weights_whole_and_state_in_parts_are_exported(whole: Checkpoint, tmp_path: Path) -> None:
    parts = cut_checkpoint(whole, tmp_path / "parts" / "checkpoint-1", runs(5), kinds=("optimizer",))
    llmtailor.export(parts.path, tmp_path / "checkpoint-1", to="tailored")
    assert digests(tmp_path / "checkpoint-1") == digests(whole.path)


@pytest.mark.parametrize("cut", [None, boxes(3), runs(5)], ids=["whole", "rows", "runs"])
def test_masters_among_the_state_become_those_of_deepspeed(tmp_path: Path, cut: Cut | None) -> None:
    whole = save_llama(tmp_path / "run", has_masters=True)
    source = whole if cut is None else cut_checkpoint(whole, tmp_path / "checkpoint-1", cut)
    llmtailor.export(source.path, tmp_path / "deepspeed", to="deepspeed", ranks=2)
    made, expected = open_catalog(tmp_path / "deepspeed"), open_catalog(whole.path)
    assert made.masters.keys() == expected.states.keys()
    for fqn, master in made.masters.items():
        assert made.weights[fqn].meta.dtype == "BF16"
        assert torch.equal(load_ref(master), load_ref(expected.states[fqn].tensors[LEAF]))
        assert LEAF not in made.states[fqn].tensors
        assert made.states[fqn].tensors.keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_masters_in_pieces_need_weights_that_are_whole(tmp_path: Path) -> None:
    whole = save_llama(tmp_path / "run", has_masters=True, width=128)
    parts = cut_checkpoint(whole, tmp_path / "checkpoint-1", boxes(3), kinds=("weights",))
    assert {(each.kind, each.layer) for each in verify_checkpoint(parts.path).problems} >= {("schema", "layers.0")}
    with pytest.raises(FormatError, match="does not hold what it says"):
        read_saved_states(parts)
    with pytest.raises(FormatError, match="does not hold what it says"):
        open_catalog(parts.path).states["model.layers.0.mlp.up_proj.weight"]


# Codes, into memory that is cut


@pytest.mark.parametrize("policy", ["q8", "compact", "moments"])
@pytest.mark.parametrize("cut", [boxes(3), columns(2), runs(5)], ids=["rows", "columns", "runs"])
def test_codes_are_loaded_in_any_cut(tmp_path: Path, policy: str, cut: Cut) -> None:
    newer = save_llama(tmp_path / "run", steps=2)
    older = newer.path.with_name("checkpoint-1")
    code_layers(newer.path, older, tmp_path / "checkpoint-2", {"layers.0": policy, "layers.2": policy, "norm": policy})
    checkpoint = open_checkpoint(tmp_path / "checkpoint-2")
    assert any(layer.encoding is not None for layer in checkpoint.manifest.layers)
    model = build_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    plan_load(checkpoint, read_model(model), [optimizer]).fill()
    state = {f"state.{key}": value for key, value in snapshot_optimizer(model, optimizer).items()}
    tensors = {**{fqn: tensor.detach() for fqn, tensor in read_model(model).tensors.items()}, **state}
    targets = make_targets(tensors, cut)
    plan_targets(checkpoint, targets).fill()
    assert_filled(targets, tensors)
    some = {name: copy.deepcopy(each) for name, each in targets.items() if "layers.0" in name and "exp_avg" in name}
    plan_targets(checkpoint, some).fill()
    assert_filled(some, tensors)


# Commands


def test_show_tells_of_parts(whole: Checkpoint, tmp_path: Path) -> None:
    parts = cut_checkpoint(whole, tmp_path / "checkpoint-1", boxes(3))
    text = CliRunner().invoke(app, ["show", str(parts.path)]).stdout
    assert "3 ranks, 7 layers in parts of several" in text
    assert "ranks" in next(line for line in text.splitlines() if line.startswith("  layer "))
    record = json.loads(CliRunner().invoke(app, ["show", str(parts.path), "--json"]).stdout)
    assert record["world"]["size"] == 3
    assert record["world"]["sharding"] == "sharded"
    assert record["weights_bytes"] == sum(path.stat().st_size for path in parts.path.glob("model-*.safetensors"))
    layer = next(each for each in record["layers"] if each["name"] == "layers.0")
    assert (layer["num_ranks"], layer["weights_path"], layer["optimizer_path"]) == (3, None, None)
    assert [part["rank"] for part in layer["parts"]] == [0, 1, 2]
    assert layer["weights_bytes"] == sum(part["weights_bytes"] for part in layer["parts"])
    assert layer["optimizer_bytes"] == sum(part["optimizer_bytes"] for part in layer["parts"])


def test_show_tells_of_a_single_rank(whole: Checkpoint) -> None:
    text = CliRunner().invoke(app, ["show", str(whole.path)]).stdout
    assert "world       1 rank" in text
