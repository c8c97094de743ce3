"""The stock Trainer resumes from what is merged of its own checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel, Trainer, TrainerCallback

from formats.simple_writer import write_checkpoint
from llmtailor.catalog import Catalog
from llmtailor.formats.hf import open_hf, plan_hf
from merge import hf_stock
from merge.merges import merge_layers, merge_with_itself
from ranks.launch import run_ranks
from tiny_models import (
    assert_same,
    build_llama,
    build_qwen2,
    build_trainer,
    losses,
    snapshot_model,
    snapshot_optimizer,
)

TESTS = Path(__file__).parent.parent


def build_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=4, n_head=2, n_positions=16, n_inner=24)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model


MODELS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": build_llama,
    "llama-tied": lambda: build_llama(tied=True),
    "qwen2-tied": build_qwen2,
    "gpt2": build_gpt2,
}


class Loaded(TrainerCallback):
    """What a training starts from."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        self.step = state.global_step
        self.model = snapshot_model(model)
        self.optimizer = snapshot_optimizer(model, getattr(optimizer, "optimizer", optimizer))


def train(directory: Path, model: PreTrainedModel, *, stop: int, start: Path | None = None, **options: Any) -> Trainer:
    trainer = build_trainer(directory, model=model, stop=stop, **options)
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    return trainer


def final(trainer: Trainer) -> dict[str, Any]:
    """Weights, optimizer, and loss and learning rate of every step."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    steps = {f"step {number}": pair for number, pair in enumerate(losses(trainer))}
    return {**snapshot_model(trainer.model), **snapshot_optimizer(trainer.model, optimizer), **steps}


def parity(old: Catalog, new: Catalog) -> dict[str, Catalog]:
    """Every second layer from each, the rest of the newer one."""
    return {name: (old if number % 2 else new) for number, name in enumerate(new.layers.names)}


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_merged_with_itself_trains_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    build = MODELS[name]
    source = tmp_path / "run" / "checkpoint-10"
    train(tmp_path / "run", build(), stop=10)
    before = hf_stock.digests(source)

    written = merge_with_itself(source, tmp_path / "merged" / "checkpoint-10")
    resumed = train(tmp_path / "merged", build(), stop=15, start=written)

    straight = train(tmp_path / "straight", build(), stop=15, start=source)
    assert_same(final(resumed), final(straight))
    assert resumed.state.global_step == 15
    assert hf_stock.digests(source) == before


@pytest.mark.parametrize("name", MODELS)
def test_parity_merge_holds_the_sources_bytes_and_resumes(name: str, tmp_path: Path) -> None:
    build = MODELS[name]
    run = tmp_path / "run"
    straight = train(run, build(), stop=15)
    old, new = open_hf(run / "checkpoint-5"), open_hf(run / "checkpoint-10")
    before = hf_stock.digests(run)

    source_of = parity(old, new)
    stale = [name for name, source in source_of.items() if source is old]
    written = merge_layers(new.path, old.path, stale, tmp_path / "merged" / "checkpoint-10")

    found = hf_stock.everything(written)
    by_step = {catalog.step: hf_stock.everything(catalog.path) for catalog in (old, new)}
    assert found.keys() == by_step[10].keys()
    for layer in new.layers:
        of_layer = {key: found[key] for key in found if key.split(" ")[1] in layer.fqns}
        assert_same(of_layer, {key: by_step[source_of[layer.name].step][key] for key in of_layer})
    assert len({source.step for source in source_of.values()}) == 2
    for file in ("scheduler.pt", "rng_state.pth", "trainer_state.json"):
        assert (written / file).read_bytes() == (run / "checkpoint-10" / file).read_bytes()

    loaded = Loaded()
    resumed = train(tmp_path / "merged", build(), stop=15, start=written, callbacks=[loaded])

    assert loaded.step == 10
    assert_same({f"weight {key}": loaded.model[key] for key in hf_stock.read_weights(written)}, weights_of(found))
    states = {
        f"state {key.rpartition('.')[0]} {key.rpartition('.')[2]}": value for key, value in loaded.optimizer.items()
    }
    assert_same(states, {key: value for key, value in found.items() if key.startswith("state ")})
    assert resumed.state.global_step == 15
    assert [rate for _, rate in losses(resumed)] == [rate for _, rate in losses(straight)]
    assert all(torch.isfinite(torch.tensor(loss)) for loss, _ in losses(resumed))
    assert losses(resumed)[:10] == losses(straight)[:10]
    assert losses(resumed)[10:] != losses(straight)[10:]
    assert hf_stock.digests(run) == before


def weights_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if key.startswith("weight ")}


def test_state_of_the_random_generators_is_that_of_its_source(tmp_path: Path) -> None:
    source = tmp_path / "run" / "checkpoint-10"
    train(tmp_path / "run", build_llama(dropout=0.5), stop=10)
    written = merge_with_itself(source, tmp_path / "merged" / "checkpoint-10")
    straight = train(tmp_path / "straight", build_llama(dropout=0.5), stop=15, start=source)

    (written / "rng_state.pth").unlink()
    other = train(tmp_path / "other", build_llama(dropout=0.5), stop=15, start=written)

    # So the test above could not have passed without it.
    assert losses(other)[10:] != losses(straight)[10:]


def test_sharded_weights_are_resumed_from(tmp_path: Path) -> None:
    source = tmp_path / "run" / "checkpoint-10"
    train(tmp_path / "run", build_llama(), stop=10)
    written = write_checkpoint(plan_hf(open_hf(source), shard_nbytes=9000), tmp_path / "merged" / "checkpoint-10")
    assert not (written / "model.safetensors").exists()

    again = write_checkpoint(plan_hf(open_hf(written)), tmp_path / "again" / "checkpoint-10")
    resumed = train(tmp_path / "merged", build_llama(), stop=15, start=written)

    assert_same(hf_stock.everything(again), hf_stock.everything(source))
    assert_same(final(resumed), final(train(tmp_path / "straight", build_llama(), stop=15, start=source)))


def test_torch_file_of_weights_is_resumed_from(tmp_path: Path) -> None:
    source = tmp_path / "run" / "checkpoint-10"
    train(tmp_path / "run", build_llama(), stop=10)
    straight = train(tmp_path / "straight", build_llama(), stop=15, start=source)
    torch.save(hf_stock.read_weights(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()

    written = merge_with_itself(source, tmp_path / "merged" / "checkpoint-10")

    assert (written / "model.safetensors").exists()
    assert_same(final(train(tmp_path / "merged", build_llama(), stop=15, start=written)), final(straight))


def test_mixed_precision_training_is_resumed(tmp_path: Path) -> None:
    source = tmp_path / "run" / "checkpoint-10"
    train(tmp_path / "run", build_llama(), stop=10, bf16=True)

    written = merge_with_itself(source, tmp_path / "merged" / "checkpoint-10")
    resumed = train(tmp_path / "merged", build_llama(), stop=15, start=written, bf16=True)

    straight = train(tmp_path / "straight", build_llama(), stop=15, start=source, bf16=True)
    assert_same(final(resumed), final(straight))


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "adagrad"])
def test_other_optimizers_are_resumed(optim: str, tmp_path: Path) -> None:
    source = tmp_path / "run" / "checkpoint-10"
    train(tmp_path / "run", build_qwen2(), stop=10, optim=optim)

    written = merge_with_itself(source, tmp_path / "merged" / "checkpoint-10")
    resumed = train(tmp_path / "merged", build_qwen2(), stop=15, start=written, optim=optim)

    straight = train(tmp_path / "straight", build_qwen2(), stop=15, start=source, optim=optim)
    assert_same(final(resumed), final(straight))


class GroupByTensor(Trainer):
    """As some tools need it: a group for each parameter."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        stock = super().create_optimizer(model)
        decays = {id(each): group["weight_decay"] for group in stock.param_groups for each in group["params"]}
        groups = [{"params": [each], "weight_decay": decays[id(each)]} for each in self.model.parameters()]
        self.optimizer = type(stock)(groups, **{key: stock.defaults[key] for key in ("lr", "betas", "eps", "fused")})
        return self.optimizer


def test_groups_of_another_tool_are_resumed_by_the_stock_trainer(tmp_path: Path) -> None:
    source = tmp_path / "run" / "checkpoint-10"
    train(tmp_path / "run", build_llama(), stop=10, trainer_class=GroupByTensor)
    names = [name for name, _ in build_llama().named_parameters()]
    catalog = replace(open_hf(source, parameter_names=names), format="tailored")
    assert len(catalog.optimizers[0].groups) == len(names)

    written = write_checkpoint(plan_hf(catalog), tmp_path / "merged" / "checkpoint-10")
    resumed = train(tmp_path / "merged", build_llama(), stop=15, start=written)

    straight = train(tmp_path / "straight", build_llama(), stop=15)
    assert_same(final(resumed), final(straight))


@pytest.mark.slow
def test_checkpoint_of_two_ranks_is_resumed_by_two_ranks(tmp_path: Path) -> None:
    def launch(output: Path, stop: int, *start: Path) -> None:
        environment = {"PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "ignore"}
        run_ranks(Path(__file__).parent / "hf_ddp_training.py", 2, output, stop, *start, environment=environment)

    launch(tmp_path / "run", 6)
    source = tmp_path / "run" / "checkpoint-4"
    written = merge_with_itself(source, tmp_path / "merged" / "checkpoint-4")
    assert {file.name for file in written.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}

    launch(tmp_path / "merged", 6, written)

    resumed, straight = tmp_path / "merged" / "checkpoint-6", tmp_path / "run" / "checkpoint-6"
    assert_same(hf_stock.everything(resumed), hf_stock.everything(straight))
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (resumed, straight)]
    assert logs[0] == logs[1]
