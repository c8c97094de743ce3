"""A plain loop: what comes after a resume is what would have come without it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from llmtailor import Run
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import IncompatibleError, UnsupportedError
from resume.composites import expected_composite
from tiny_models import Snapshot, assert_same, build_llama, snapshot_model, snapshot_optimizer, token_rows

Optimizers = list[torch.optim.Optimizer]

STEPS = 30
EPOCH = 10  # batches
MID_EPOCH = 7
SECOND_EPOCH = 13


def adamw(model: torch.nn.Module) -> Optimizers:
    return [torch.optim.AdamW(model.parameters(), lr=1e-3)]


def sgd(model: torch.nn.Module) -> Optimizers:
    return [torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True)]


def adafactor(model: torch.nn.Module) -> Optimizers:
    return [torch.optim.Adafactor(model.parameters(), lr=1e-2)]


def muon_and_adamw(model: torch.nn.Module) -> Optimizers:
    hidden = [each for name, each in model.named_parameters() if each.ndim == 2 and ".layers." in name]
    chosen = {id(each) for each in hidden}
    rest = [each for each in model.parameters() if id(each) not in chosen]
    return [torch.optim.Muon(hidden, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)]


def cosine(optimizers: Optimizers) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[0], T_max=STEPS)


def warmup_then_steps(optimizers: Optimizers) -> Any:
    warmup = torch.optim.lr_scheduler.LinearLR(optimizers[0], total_iters=5)
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizers[0], milestones=[4, 15])
    return torch.optim.lr_scheduler.SequentialLR(optimizers[0], [warmup, steps], milestones=[5])


def shuffled() -> Iterable[torch.Tensor]:
    return DataLoader(token_rows(40), batch_size=4, shuffle=True)


def shuffled_by_workers() -> Iterable[torch.Tensor]:
    return DataLoader(token_rows(40), batch_size=4, shuffle=True, num_workers=2, collate_fn=_noisy)


def shuffled_by_own_generator() -> Iterable[torch.Tensor]:
    return DataLoader(token_rows(40), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(11))


def augmented() -> Iterable[torch.Tensor]:
    return DataLoader(token_rows(40), batch_size=4, shuffle=True, collate_fn=_noisy)


def _noisy(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Changes tokens by every generator that a data set might use."""
    batch = torch.stack(list(rows)).clone()
    batch[0, 0] = random.randrange(64)
    batch[1, 0] = int(np.random.randint(64))
    batch[2, 0] = torch.randint(64, ()).item()
    return batch


class OwnStateLoader:
    """As torchdata's StatefulDataLoader: knows where it is, and goes on from there after ``load_state_dict``."""

    def __init__(self) -> None:
        self.rows = token_rows(40)
        self.order: list[int] = []
        self.next = 0
        self.is_resumed = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        # Draws in any case, as the real one does for its workers' seeds.
        order = torch.randperm(len(self.rows)).tolist()
        if not self.is_resumed:
            self.order, self.next = order, 0
        self.is_resumed = False
        return self._batches()

    def _batches(self) -> Iterator[torch.Tensor]:
        while self.next < len(self.order):
            self.next += 4
            yield self.rows[self.order[self.next - 4 : self.next]]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.next, self.is_resumed = state["order"], state["next"], True


@dataclass(frozen=True, kw_only=True)
class Setting:
    optimizers: Callable[[torch.nn.Module], Optimizers] = adamw
    scheduler: Callable[[Optimizers], Any] = cosine
    loader: Callable[[], Iterable[torch.Tensor]] = shuffled
    has_scaler: bool = False
    is_compiled: bool = False
    strategy: str = "full"
    dtype: torch.dtype = torch.float32


@dataclass(kw_only=True)
class Record:
    losses: list[float] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    batches: list[list[list[int]]] = field(default_factory=list)
    models: dict[int, Snapshot] = field(default_factory=dict)
    optimizers: dict[int, dict[str, Any]] = field(default_factory=dict)


class Loop:
    """A training script, from the first line on."""

    def __init__(self, directory: Path, setting: Setting, *, save_steps: int, seed: int = 0) -> None:
        model = build_llama(num_layers=4, dtype=setting.dtype, seed=seed)
        self.bare = model
        self.model: Any = torch.compile(model, backend="eager") if setting.is_compiled else model
        self.optimizers = setting.optimizers(self.bare)
        self.scheduler = setting.scheduler(self.optimizers)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4) if setting.has_scaler else None
        self.run = Run(
            directory,
            self.model,
            self.optimizers,
            scheduler=self.scheduler,
            scaler=self.scaler,
            strategy=setting.strategy,
            save_steps=save_steps,
        )
        self.batches = self.run.batches(setting.loader())
        self.record = Record()
        self.step = self.run.resume()

    def train(self, until: int) -> Record:
        self.model.train()
        while self.step < until:
            for batch in self.batches:
                self._train_one(batch)
                if self.step >= until:
                    break
        return self.record

    def _train_one(self, batch: torch.Tensor) -> None:
        loss = self.model(input_ids=batch, labels=batch).loss
        if self.scaler is None:
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.record.rates.append([group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups])
        self.scheduler.step()
        self.step += 1
        self.record.losses.append(loss.item())
        self.record.batches.append(batch.tolist())
        if self.run.step(self.step) is not None:
            self.record.models[self.step] = snapshot_model(self.bare)
            self.record.optimizers[self.step] = snapshot_optimizer(self.bare, *self.optimizers)

    def final_state(self) -> dict[str, Any]:
        states: dict[str, Any] = {
            **snapshot_model(self.bare),
            **snapshot_optimizer(self.bare, *self.optimizers),
            "scheduler": self.scheduler.state_dict(),
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),
            "torch": torch.get_rng_state(),
        }
        return states if self.scaler is None else {**states, "scaler": self.scaler.state_dict()}


def run_whole(directory: Path, setting: Setting, cut: int) -> Loop:
    random.seed(1)
    np.random.seed(1)
    loop = Loop(directory, setting, save_steps=cut)
    loop.train(STEPS)
    loop.run.close()
    return loop


def run_in_two(directory: Path, setting: Setting, cut: int, second: Setting | None = None) -> Loop:
    random.seed(1)
    np.random.seed(1)
    first = Loop(directory, setting, save_steps=cut)
    first.train(cut)
    first.run.close()
    random.seed(2)
    np.random.seed(2)
    resumed = Loop(directory, second or setting, save_steps=cut, seed=5)
    assert resumed.step == cut
    resumed.train(STEPS)
    resumed.run.close()
    return resumed


def assert_resumes_exactly(tmp_path: Path, setting: Setting, cut: int, second: Setting | None = None) -> None:
    whole = run_whole(tmp_path / "whole", setting, cut)
    resumed = run_in_two(tmp_path / "halves", setting, cut, second)
    assert resumed.record.batches == whole.record.batches[cut:]
    assert resumed.record.rates == whole.record.rates[cut:]
    assert resumed.record.losses == whole.record.losses[cut:]
    assert_same(resumed.final_state(), whole.final_state())


SETTINGS = {
    "adamw": Setting(),
    "sgd": Setting(optimizers=sgd),
    "adafactor": Setting(optimizers=adafactor),
    "muon-and-adamw": Setting(optimizers=muon_and_adamw),
    "scaler": Setting(has_scaler=True),
    "sequential-scheduler": Setting(scheduler=warmup_then_steps),
    "bf16": Setting(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_loop_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, SETTINGS[name], MID_EPOCH)


@pytest.mark.parametrize("cut", [MID_EPOCH, EPOCH, SECOND_EPOCH])
@pytest.mark.parametrize("loader", [shuffled, shuffled_by_own_generator, augmented, OwnStateLoader])
def test_loop_sees_the_batches_it_would_have_seen(loader: Any, cut: int, tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, Setting(loader=loader), cut)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [MID_EPOCH, SECOND_EPOCH])
def test_loop_with_workers_sees_the_batches_it_would_have_seen(cut: int, tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, Setting(loader=shuffled_by_workers), cut)


@pytest.mark.parametrize("loader", [shuffled, shuffled_by_own_generator, OwnStateLoader])
def test_a_save_between_two_epochs_resumes_with_the_next(loader: Any, tmp_path: Path) -> None:
    def run_epochs(directory: Path, *, stops: bool) -> tuple[list[Any], list[int]]:
        loop = Loop(directory, Setting(loader=loader), save_steps=1000, seed=0)
        epochs = []
        for epoch in range(loop.batches.epoch, 3):
            epochs.append(epoch)
            for batch in loop.batches:
                loop._train_one(batch)
            loop.run.save(loop.step)
            if stops:
                break
        loop.run.close()
        return loop.record.batches, epochs

    whole, _ = run_epochs(tmp_path / "whole", stops=False)
    first, _ = run_epochs(tmp_path / "halves", stops=True)
    torch.manual_seed(31)
    second, epochs = run_epochs(tmp_path / "halves", stops=False)

    assert epochs == [1, 2]
    assert first + second == whole


def test_compiled_model_has_the_names_of_the_bare_one(tmp_path: Path) -> None:
    compiled, bare = Setting(is_compiled=True), Setting()
    assert_resumes_exactly(tmp_path, compiled, MID_EPOCH)
    names = {tensor.fqn for tensor in open_checkpoint(tmp_path / "halves/checkpoint-7").manifest.tensors}
    assert names == {name for name, _ in build_llama().named_parameters()}

    assert_resumes_exactly(tmp_path / "compiled-then-bare", compiled, MID_EPOCH, second=bare)


@pytest.mark.parametrize("optimizers", [adamw, muon_and_adamw])
def test_composite_loads_each_layer_as_it_was_at_its_step(optimizers: Any, tmp_path: Path) -> None:
    setting = Setting(optimizers=optimizers, strategy="parity")
    first = Loop(tmp_path, setting, save_steps=3)
    record = first.train(15)
    first.run.close()
    manifest = open_checkpoint(tmp_path / "checkpoint-15").manifest
    assert {layer.step for layer in manifest.layers} == {12, 15}

    resumed = Loop(tmp_path, setting, save_steps=3, seed=5)
    weights, moments = expected_composite(manifest, record.models, record.optimizers)
    assert_same(snapshot_model(resumed.bare), weights)
    assert_same(snapshot_optimizer(resumed.bare, *resumed.optimizers), moments)
    resumed.train(18)
    resumed.run.close()
    assert {layer.step for layer in open_checkpoint(tmp_path / "checkpoint-18").manifest.layers} == {15, 18}


class Average:
    """An object of the user: an average of the weights."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = torch.tensor(value)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_objects_of_the_user_come_back(tmp_path: Path) -> None:
    model = build_llama(num_layers=1)
    with Run(tmp_path, model, adamw(model), state={"average": Average(2.5)}) as run:
        run.save(1)
    average = Average()
    with Run(tmp_path, model, adamw(model), state={"average": average}) as run:
        assert run.resume() == 1
    assert average.value == 2.5


def test_state_that_would_be_lost_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    model = build_llama(num_layers=1)
    with Run(tmp_path, model, adamw(model), state={"average": Average(2.5)}) as run:
        run.save(1)

    other = build_llama(num_layers=1, seed=9)
    before = snapshot_model(other)
    with Run(tmp_path, other, adamw(other)) as run, pytest.raises(IncompatibleError) as caught:
        run.resume()
    assert caught.value.kind == "surplus-object"
    assert "average" in str(caught.value)
    assert_same(snapshot_model(other), before)


def test_state_that_is_missing_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    model = build_llama(num_layers=1)
    with Run(tmp_path, model, adamw(model)) as run:
        run.save(1)

    other = build_llama(num_layers=1, seed=9)
    before = snapshot_model(other)
    with (
        Run(tmp_path, other, adamw(other), state={"average": Average()}) as run,
        pytest.raises(IncompatibleError) as caught,
    ):
        run.resume()
    assert caught.value.kind == "missing-object"
    assert_same(snapshot_model(other), before)


def test_state_that_could_not_be_read_back_is_refused_before_training(tmp_path: Path) -> None:
    class Opaque(Average):
        def state_dict(self) -> dict[str, Any]:
            return {"path": Path("/etc")}

    model = build_llama(num_layers=1)
    with pytest.raises(UnsupportedError) as caught:
        Run(tmp_path, model, adamw(model), state={"opaque": Opaque()})
    assert caught.value.kind == "object-state"
    assert "opaque" in str(caught.value)


def test_loader_wrapped_after_the_resume_is_refused(tmp_path: Path) -> None:
    first = Loop(tmp_path, Setting(), save_steps=5)
    first.train(5)
    first.run.close()

    model = build_llama()
    optimizers = adamw(model)
    with (
        Run(tmp_path, model, optimizers, scheduler=cosine(optimizers)) as run,
        pytest.raises(IncompatibleError) as caught,
    ):
        run.resume()
    assert "batches()" in str(caught.value)
