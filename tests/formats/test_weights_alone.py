"""Weights alone of checkpoints whose optimizer has no form here: it need not be understood."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import llmtailor
from formats.dcp_files import LOOP
from formats.deepspeed_files import copy_fixture
from formats.simple_writer import load_ref
from llmtailor.catalog import Catalog
from llmtailor.errors import FormatError, UnsupportedError
from llmtailor.estimate.model import read_model_tensors
from llmtailor.formats import open_catalog
from tiny_models import build_llama


def weights_of(catalog: Catalog) -> dict[str, torch.Tensor]:
    return {name: load_ref(ref) for name, ref in catalog.weights.items()}


@pytest.fixture(params=["z2-bf16", "z3-bf16"])
def block_wise(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of DeepSpeed with state that belongs to blocks of a partition, as 8-bit optimizers have."""
    copy = copy_fixture(request.param, tmp_path / "deepspeed")
    for path in copy.rglob("*optim_states.pt"):
        tree = torch.load(path, weights_only=False)
        zero = tree["optimizer_state_dict"]
        base = zero["optimizer_state_dict"] if "optimizer_state_dict" in zero else zero["base_optimizer_state"]
        for state in base["state"].values():
            state["absmax1"] = torch.zeros(3)
        torch.save(tree, path)
    return copy


def test_weights_alone_of_deepspeed_need_no_state(block_wise: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError):
        open_catalog(block_wise)
    alone = open_catalog(block_wise, with_optimizer=False)
    assert not alone.has_optimizer
    plan = llmtailor.export(block_wise, tmp_path / "out", to="hf", weights_only=True)
    assert plan is not None
    written = weights_of(open_catalog(tmp_path / "out"))
    assert written.keys() == alone.weights.keys()
    assert all(written[name].equal(value) for name, value in weights_of(alone).items())
    assert llmtailor.diff_checkpoints(block_wise, block_wise, only="weights").is_identical


def test_state_is_still_estimated(tmp_path: Path) -> None:
    shutil.copytree(LOOP, tmp_path / "loop")
    assert read_model_tensors(str(tmp_path / "loop")).state


@pytest.fixture
def accelerated(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    """What Accelerate's save_state writes in one process, with the model's configuration; and the model."""
    accelerator = Accelerator(cpu=True)
    model = build_llama(seed=1)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    accelerator.save_state(str(tmp_path / "checkpoint-1"))
    model.config.save_pretrained(tmp_path / "checkpoint-1")
    return tmp_path / "checkpoint-1", model


def test_a_checkpoint_of_accelerate_is_refused_by_its_name(accelerated: tuple[Path, torch.nn.Module]) -> None:
    with pytest.raises(FormatError) as caught:
        open_catalog(accelerated[0])
    assert caught.value.kind == "other-format"
    assert "Accelerate" in str(caught.value.found)
    assert "--weights-only" in str(caught.value.hint)


def test_weights_alone_of_accelerate_are_read(accelerated: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    checkpoint, model = accelerated
    llmtailor.export(checkpoint, tmp_path / "out", weights_only=True)
    written = weights_of(open_catalog(tmp_path / "out"))
    assert written.keys() == dict(model.named_parameters()).keys()
    assert all(written[name].equal(value) for name, value in model.named_parameters())
    assert {path.name for path in (tmp_path / "out").iterdir()}.isdisjoint({"optimizer.bin", "random_states_0.pkl"})
