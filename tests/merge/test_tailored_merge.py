"""Merges of our own checkpoints: real training resumes from them, and the sources stay as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmtailor
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import AlreadyExistsError, IncompatibleError, TailorError
from llmtailor.integrations.transformers import tailor
from llmtailor.manifest import digest_of
from llmtailor.verify import verify_checkpoint
from tiny_models import (
    KeepStates,
    assert_same,
    build_llama,
    build_trainer,
    losses,
    snapshot_model,
    snapshot_optimizer,
)

STOP = 10
"""Where trainings end that are resumed; their last checkpoint is of it."""


def train(directory: Path, *, tied: bool = False, stop: int | None = STOP, resume: Path | None = None) -> Any:
    torch.manual_seed(321)
    states = KeepStates()
    trainer = tailor(
        build_trainer(directory, model=build_llama(tied=tied), stop=stop, callbacks=[states], max_steps=15),
        strategy="full",
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.kept = states
    return trainer


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training of 10 steps with checkpoints at 5 and 10."""
    trainer = train(tmp_path_factory.mktemp("run") / "a", tied=request.param)
    trainer.tied = request.param
    return trainer


def checkpoint(run: Any, step: int) -> Path:
    return Path(run.args.output_dir) / f"checkpoint-{step}"


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): digest_of(path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def parity_recipe(run: Any, path: Path) -> Path:
    path.write_text(
        f'base: {checkpoint(run, 10)}\nlayers:\n  "layers.1, layers.3, embed_tokens": {checkpoint(run, 5)}\n'
    )
    return path


def outcome(trainer: Any) -> dict[str, Any]:
    return {
        **{f"model.{name}": value for name, value in snapshot_model(trainer.model).items()},
        **snapshot_optimizer(trainer.model, trainer.optimizer.optimizer),
        "losses": losses(trainer)[STOP:],
        "scheduler": trainer.lr_scheduler.state_dict(),
    }


def test_parity_merge_resumes_with_each_layer_as_it_was_saved(run: Any, tmp_path: Path) -> None:
    before = digests(Path(run.args.output_dir))
    merged = tmp_path / "merged" / "checkpoint-10"
    merged.parent.mkdir()
    plan = llmtailor.merge(parity_recipe(run, tmp_path / "recipe.yaml"), merged)
    assert verify_checkpoint(merged).is_good
    assert digests(Path(run.args.output_dir)) == before
    steps = {row.layer: row.step for row in plan.rows}
    assert {name for name, step in steps.items() if step == 5} == {"layers.1", "layers.3", "embed_tokens"}
    for record in open_checkpoint(merged).manifest.layers:
        assert (record.step, record.update_count) == (steps[record.name], steps[record.name])
        source = checkpoint(run, record.step)
        for file in record.files:
            assert os.path.samefile(merged / file.path, source / file.path)
    kept = run.kept
    held = {tensor.fqn: tensor for tensor in open_checkpoint(merged).manifest.tensors}
    for fqn, tensor in held.items():
        weights = load_file(merged / f"model-{_stem(merged, tensor.layer)}.safetensors")
        if tensor.tied_to is None:
            assert torch.equal(weights[fqn], kept.models[steps[tensor.layer]][fqn])
    resumed = train(tmp_path / "resumed", tied=run.tied, stop=None, resume=merged)
    assert resumed.state.global_step == 15
    own = {key.rpartition(".")[0]: float(value) for key, value in outcome(resumed).items() if key.endswith(".step")}
    assert own == {fqn: float(steps[held[fqn].layer] + 5) for fqn in own}
    assert len(own) == sum(tensor.tied_to is None for tensor in held.values())


def _stem(path: Path, layer: str) -> str:
    record = next(each for each in open_checkpoint(path).manifest.layers if each.name == layer)
    return record.weights.path.removeprefix("model-").removesuffix(".safetensors")


def test_merge_of_a_checkpoint_with_itself_trains_on_bit_for_bit(run: Any, tmp_path: Path) -> None:
    source = checkpoint(run, 10)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'layers: {{"*": {source}}}\n')
    merged = tmp_path / "checkpoint-10"
    llmtailor.merge(recipe, merged)
    expected = train(tmp_path / "plain", tied=run.tied, stop=None, resume=source)
    found = train(tmp_path / "merged", tied=run.tied, stop=None, resume=merged)
    assert_same(outcome(found), outcome(expected))


def test_state_comes_from_the_checkpoint_that_the_recipe_names(run: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'layers: {{"*": {checkpoint(run, 5)}}}\nstate_from: {checkpoint(run, 10)}\n')
    merged = tmp_path / "checkpoint-10"
    llmtailor.merge(recipe, merged)
    assert json.loads((merged / "trainer_state.json").read_text())["global_step"] == 10
    for name in ("scheduler.pt", "rng_state.pth", "trainer_state.json"):
        assert (merged / name).read_bytes() == (checkpoint(run, 10) / name).read_bytes()
    assert {layer.step for layer in open_checkpoint(merged).manifest.layers} == {5}


def test_layers_newer_than_the_state_are_refused(run: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'layers: {{"*": {checkpoint(run, 10)}}}\nstate_from: {checkpoint(run, 5)}\n')
    with pytest.raises(IncompatibleError) as caught:
        llmtailor.merge(recipe, tmp_path / "merged")
    assert caught.value.kind == "layer-newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_merge_never_writes_over_anything(run: Any, tmp_path: Path) -> None:
    recipe = parity_recipe(run, tmp_path / "recipe.yaml")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("mine")
    with pytest.raises(AlreadyExistsError):
        llmtailor.merge(recipe, tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["precious"]


@pytest.mark.parametrize("name", ["model-norm.safetensors", "optimizer/layers.002.safetensors", "trainer_state.json"])
def test_missing_source_file_is_named_and_nothing_is_written(run: Any, tmp_path: Path, name: str) -> None:
    damaged = tmp_path / "checkpoint-5"
    for file in sorted(checkpoint(run, 5).rglob("*")):
        relative = file.relative_to(checkpoint(run, 5))
        if file.is_file() and str(relative) != name:
            (damaged / relative).parent.mkdir(parents=True, exist_ok=True)
            (damaged / relative).write_bytes(file.read_bytes())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'layers: {{"*": {damaged}}}\n')
    with pytest.raises(TailorError) as caught:
        llmtailor.merge(recipe, tmp_path / "merged")
    assert name in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "recipe.yaml"]
