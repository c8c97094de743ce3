"""Whatever is wrong is said in one clear message: what, where, expected, found, next step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtailor import Run, TailorError
from llmtailor.errors import (
    IncompatibleError,
    IncompleteError,
    IntegrityError,
    InvalidInputError,
    NotFoundError,
    UnsupportedError,
)
from llmtailor.integrations.transformers import tailor
from tiny_models import (
    assert_same,
    build_llama,
    build_qwen2,
    build_trainer,
    snapshot_model,
    snapshot_optimizer,
)


def adamw(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **({"lr": 1e-3} | options))


def trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run of a plain loop with one checkpoint, of step 5."""
    model = build_llama()
    with Run(tmp_path / "run", model, trained(model, adamw(model))) as run:
        run.save(5)
    return tmp_path / "run"


def assert_complete(error: TailorError, *parts: str) -> None:
    assert error.kind
    for field in (error.expected, error.found, error.hint):
        assert field, f"incomplete: {error}"
    for part in parts:
        assert part in str(error), str(error)


# ---- Options ----


@pytest.mark.parametrize("make", ["run", "trainer"])
def test_unknown_strategy(make: str, tmp_path: Path) -> None:
    model = build_llama(num_layers=1)
    trainer = build_trainer(tmp_path, model=model)
    with pytest.raises(InvalidInputError) as caught:
        Run(tmp_path, model, adamw(model), strategy="party") if make == "run" else tailor(trainer, strategy="party")
    assert_complete(caught.value, "party", "did you mean parity?")


def test_unknown_option(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        tailor(build_trainer(tmp_path), stratgy="parity")
    assert "stratgy" in str(caught.value)
    assert "strategy" in str(caught.value.expected)


def test_tailor_of_no_trainer() -> None:
    with pytest.raises(InvalidInputError) as caught:
        tailor(build_llama(num_layers=1))
    assert caught.value.kind == "not-a-trainer"
    assert "LlamaForCausalLM" in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"save_steps": 0}, {"state": {"scheduler": object()}}, {"state": {"a/b": object()}}]
)
def test_run_with_bad_options(options: dict[str, Any], tmp_path: Path) -> None:
    model = build_llama(num_layers=1)
    with pytest.raises(InvalidInputError):
        Run(tmp_path, model, adamw(model), **options)
    Run(tmp_path, model, adamw(model)).close()


# ---- Wrong directories ----


def resume_loop(path: Path, model: torch.nn.Module, directory: Path) -> None:
    with Run(directory, model, adamw(model)) as run:
        run.resume(path)


def resume_trainer(path: Path, model: torch.nn.Module, directory: Path) -> None:
    tailor(build_trainer(directory, model=model)).train(resume_from_checkpoint=str(path))


@pytest.mark.parametrize("resume", [resume_loop, resume_trainer])
def test_wrong_directory(resume: Any, saved: Path, tmp_path: Path) -> None:
    model = build_llama()
    for wrong in (tmp_path / "nowhere", saved):
        with pytest.raises(NotFoundError) as caught:
            resume(wrong, model, tmp_path / "other")
        assert_complete(caught.value, str(wrong))


@pytest.mark.parametrize("resume", [resume_loop, resume_trainer])
@pytest.mark.parametrize("lost", ["tailor.json", "model-norm.safetensors", "optimizer/layers.001.safetensors"])
def test_half_a_checkpoint(resume: Any, lost: str, tmp_path: Path) -> None:
    tailor(build_trainer(tmp_path / "run", max_steps=5)).train()
    half = tmp_path / "copy/checkpoint-5"
    shutil.copytree(tmp_path / "run/checkpoint-5", half)
    (half / lost).unlink()
    model = build_llama(seed=4)
    before = snapshot_model(model)
    with pytest.raises((NotFoundError, IntegrityError)) as caught:
        resume(half, model, tmp_path / "other")
    assert lost in str(caught.value)
    assert str(half) in str(caught.value)
    assert caught.value.hint
    assert_same(snapshot_model(model), before)


def test_checkpoint_of_a_trainer_in_a_plain_loop(tmp_path: Path) -> None:
    tailor(build_trainer(tmp_path / "run", max_steps=5)).train()
    model = build_llama(seed=4)
    before = snapshot_model(model)
    with pytest.raises(IncompleteError) as caught:
        resume_loop(tmp_path / "run/checkpoint-5", model, tmp_path / "other")
    assert_complete(caught.value, "Trainer")
    assert_same(snapshot_model(model), before)


@pytest.mark.parametrize("how", ["path", "newest"])
def test_checkpoint_of_a_plain_loop_in_a_trainer(how: str, saved: Path) -> None:
    model = build_llama(seed=4)
    before = snapshot_model(model)
    wanted = True if how == "newest" else str(saved / "checkpoint-5")
    with pytest.raises(IncompleteError) as caught:
        tailor(build_trainer(saved, model=model)).train(resume_from_checkpoint=wanted)
    assert_complete(caught.value, "trainer_state.json")
    assert_same(snapshot_model(model), before)


# ---- Another model, another optimizer ----


@pytest.mark.parametrize(
    ("build", "part"),
    [
        (lambda: build_llama(width=32), "F32[64, 32]"),
        (lambda: build_llama(num_layers=6), "layers.4"),
        (lambda: build_llama(num_layers=3), "layers.3"),
        (build_qwen2, "q_proj.bias"),
        (lambda: build_llama(dtype=torch.bfloat16), "BF16"),
        (lambda: build_llama(tied=True), "tied to"),
    ],
    ids=["width", "deeper", "shallower", "architecture", "dtype", "tied"],
)
def test_another_model(build: Callable[[], torch.nn.Module], part: str, saved: Path) -> None:
    model = build()
    optimizer = trained(model, adamw(model))
    before = snapshot_model(model), snapshot_optimizer(model, optimizer)
    with Run(saved, model, optimizer) as run, pytest.raises(IncompatibleError) as caught:
        run.resume()
    assert_complete(caught.value, part, str(saved / "checkpoint-5"))
    assert caught.value.kind == "other-model"
    assert_same(snapshot_model(model), before[0])
    assert_same(snapshot_optimizer(model, optimizer), before[1])


def two_groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    norms = [each for name, each in model.named_parameters() if "norm" in name]
    chosen = {id(each) for each in norms}
    rest = [each for each in model.parameters() if id(each) not in chosen]
    return torch.optim.AdamW([{"params": norms, "weight_decay": 0.0}, {"params": rest}], lr=1e-3)


@pytest.mark.parametrize(
    ("first", "second", "part"),
    [
        (adamw, lambda model: torch.optim.SGD(model.parameters(), lr=0.1), "SGD"),
        (two_groups, adamw, "weight_decay"),
        (adamw, lambda model: [adamw(model), torch.optim.SGD(model.parameters(), lr=0.1)], "1, as saved"),
        (adamw, lambda model: torch.optim.AdamW(list(model.parameters())[1:], lr=0.1), "embed_tokens"),
    ],
    ids=["class", "grouping", "number", "parameters"],
)
def test_another_optimizer_changes_nothing(first: Any, second: Any, part: str, tmp_path: Path) -> None:
    model = build_llama()
    with Run(tmp_path, model, trained(model, first(model))) as run:
        run.save(5)
    other = build_llama(seed=8)
    before = snapshot_model(other)
    with Run(tmp_path, other, second(other)) as run, pytest.raises(IncompatibleError) as caught:
        run.resume()
    assert caught.value.kind == "optimizer-mismatch"
    assert part in str(caught.value)
    assert str(tmp_path / "checkpoint-5") in str(caught.value)
    assert_same(snapshot_model(other), before)


def test_another_grouping_without_conflict_is_taken(tmp_path: Path) -> None:
    model = build_llama()
    optimizer = trained(model, two_groups(model))
    with Run(tmp_path, model, optimizer) as run:
        run.save(5)
    other = build_llama(seed=8)
    per_parameter = torch.optim.AdamW([{"params": [each]} for each in other.parameters()], lr=0.5)
    with Run(tmp_path, other, per_parameter) as run:
        assert run.resume() == 5
    assert_same(snapshot_optimizer(other, per_parameter), snapshot_optimizer(model, optimizer))
    decays = {group["weight_decay"] for group in per_parameter.param_groups}
    assert decays == {0.0, 0.01}


@pytest.mark.parametrize(
    ("model", "options"), [(build_qwen2, {}), (build_llama, {"optim": "sgd"})], ids=["model", "optimizer"]
)
def test_another_model_or_optimizer_in_a_trainer(model: Any, options: dict[str, Any], tmp_path: Path) -> None:
    tailor(build_trainer(tmp_path, max_steps=5)).train()
    with pytest.raises(IncompatibleError) as caught:
        tailor(build_trainer(tmp_path, model=model(), **options)).train(resume_from_checkpoint=True)
    assert str(tmp_path / "checkpoint-5") in str(caught.value)
    assert caught.value.hint


# ---- What is not done yet, and what makes no sense ----


def test_first_version_of_fsdp(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    with pytest.raises(UnsupportedError) as caught:
        tailor(trainer)
    assert caught.value.found == "FSDP version 1"


def test_step_that_goes_backwards(saved: Path) -> None:
    model = build_llama()
    with Run(saved, model, adamw(model)) as run:
        assert run.resume() == 5
        with pytest.raises(InvalidInputError) as caught:
            run.save(4)
        assert_complete(caught.value)
        assert caught.value.kind == "step-order"
        run.save(6)
