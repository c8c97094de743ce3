"""``TailorCheckpointer``: a training with an ``Accelerator`` goes on bit for bit; one process, DDP and FSDP2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import nn
from torch.utils.data import DataLoader

from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import IncompatibleError, InvalidInputError, NotFoundError, TailorError, UnsupportedError
from llmtailor.integrations.accelerate import TailorCheckpointer
from llmtailor.verify import verify_checkpoint
from ranks.launch import run_ranks

PROGRAM = Path(__file__).parent / "accelerate_trainings.py"
CASES = ["ddp-full-batches", "ddp-full-skip", "ddp-parity-batches", "fsdp-full-batches", "fsdp-parity-skip"]
ALONE = ["single-full-batches", "single-parity-batches", "single-full-skip"]
ALL = [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in ALONE)]


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("accelerate"), 2, CASES)


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("accelerate"), 1, ALONE)


def launch(directory: Path, num_ranks: int, cases: list[str]) -> Path:
    run_ranks(PROGRAM, num_ranks, "begin", directory, *cases, expected=(-9,))
    run_ranks(PROGRAM, num_ranks, "resume", directory, *cases)
    return directory


@pytest.fixture
def trained(request: pytest.FixtureRequest, case: str) -> Path:
    """Where a case was trained, killed and resumed."""
    directory: Path = request.getfixturevalue("of_one_process" if case in ALONE else "of_two_ranks")
    return directory


def of_strategy(strategy: str) -> list[Any]:
    return [each for each in ALL if f"-{strategy}-" in (each if isinstance(each, str) else str(each.values[0]))]


def read(directory: Path, case: str, name: str) -> Any:
    return json.loads((directory / f"{case}.{name}.json").read_text())


@pytest.mark.parametrize("case", of_strategy("full"))
def test_full_goes_on_bit_for_bit(trained: Path, case: str) -> None:
    straight, found = read(trained, case, "straight"), read(trained, case, "resumed")
    assert 0 < len(found["losses"]) < len(straight["losses"])
    assert found["losses"] == straight["losses"][-len(found["losses"]) :]
    assert found["final"] == straight["final"]


@pytest.mark.parametrize("case", of_strategy("parity"))
def test_layers_of_parity_are_those_of_the_step_they_claim(trained: Path, case: str) -> None:
    truth = read(trained, case, "straight")["truth"]
    path = trained / case / "checkpoints" / "checkpoint-8"
    manifest = open_checkpoint(path).manifest
    steps = {layer.name: layer.step for layer in manifest.layers}
    assert set(steps.values()) == {4, 8}
    assert verify_checkpoint(path).problems == ()
    # What a resume made of it: the run was trained on, so compare the layers themselves as they were saved.
    loaded = read(trained, case, "resumed")["loaded"]
    for tensor in manifest.tensors:
        for name in [name for name in loaded if name == tensor.fqn or name.startswith(f"state.{tensor.fqn}.")]:
            assert loaded[name] == truth[str(steps[tensor.layer])][name], name
    assert loaded["lr"] == truth["8"]["lr"]
    assert loaded["counter"] == truth["8"]["counter"]


@pytest.mark.parametrize("case", ALL)
def test_saves_are_counted_and_the_total_limit_holds(trained: Path, case: str) -> None:
    directory = trained / case / "checkpoints"
    found = sorted(int(path.name.removeprefix("checkpoint-")) for path in directory.glob("checkpoint-*"))
    assert found == ([8, 12] if "-full-" in case else [4, 8, 12])
    assert read(trained, case, "resumed")["iteration"] == 3
    report = verify_checkpoint(directory / "checkpoint-12")
    assert report.problems == ()
    assert report.unlisted == ()


# ---- One process, here ----


@pytest.fixture
def accelerator(tmp_path: Path) -> Iterator[Accelerator]:
    yield Accelerator(cpu=True, project_config=ProjectConfiguration(project_dir=str(tmp_path), total_limit=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepare(accelerator: Accelerator, seed: int = 0) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prepared: tuple[nn.Module, Any] = accelerator.prepare(model, optimizer)
    return prepared


def train(model: nn.Module, optimizer: Any) -> None:
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_save_state_takes_the_path_that_scripts_give_it(accelerator: Accelerator, tmp_path: Path) -> None:
    model, optimizer = prepare(accelerator)
    with TailorCheckpointer(accelerator, tmp_path / "out") as checkpointer:
        train(model, optimizer)
        handle = checkpointer.save_state(tmp_path / "out" / "checkpoint-7")
        assert handle.result() == tmp_path / "out" / "checkpoint-7"
        assert checkpointer.num_steps == 7
        for path, step in (("elsewhere/checkpoint-8", None), ("out/step_8", None), ("out/checkpoint-8", 9)):
            with pytest.raises(InvalidInputError) as caught:
                checkpointer.save_state(tmp_path / path, step=step)
            assert caught.value.kind == "checkpoint-name"


def test_load_state_loads_a_named_checkpoint(accelerator: Accelerator, tmp_path: Path) -> None:
    model, optimizer = prepare(accelerator)
    with TailorCheckpointer(accelerator, keep=2) as checkpointer:
        train(model, optimizer)
        path = checkpointer.save_state().result()
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        train(model, optimizer)
        checkpointer.save_state()
        checkpointer.wait()
        assert checkpointer.load_state(path) == 1
    assert path == tmp_path / "checkpoints" / "checkpoint-1"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name


def test_metrics_say_how_layers_move(accelerator: Accelerator) -> None:
    model, optimizer = prepare(accelerator)
    with TailorCheckpointer(accelerator, strategy="parity", monitor=True) as checkpointer:
        assert checkpointer.metrics == {}
        assert checkpointer.resume() == 0
        for _ in range(2):
            train(model, optimizer)
            checkpointer.save_state()
        assert checkpointer.metrics["drift/0"] > 0
        assert checkpointer.metrics["age/0"] == 1


def test_load_state_refuses_an_empty_run_and_resume_starts_it(accelerator: Accelerator) -> None:
    prepare(accelerator)
    with TailorCheckpointer(accelerator) as checkpointer:
        assert checkpointer.resume() == 0
        with pytest.raises(NotFoundError):
            checkpointer.load_state()


def test_several_models_are_saved_as_one(accelerator: Accelerator) -> None:
    pairs = [prepare(accelerator), prepare(accelerator, seed=1)]
    with TailorCheckpointer(accelerator) as checkpointer:
        for model, optimizer in pairs:
            train(model, optimizer)
        assert checkpointer.num_steps == 1
        path = checkpointer.save_state().result()
        saved = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model, _ in pairs]
        for model, optimizer in pairs:
            train(model, optimizer)
        checkpointer.load_state()
    for (model, _), tensors in zip(pairs, saved, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, tensors[name]), name
    names = {tensor.fqn for tensor in open_checkpoint(path).manifest.tensors}
    assert {"model.0.weight", "model_1.0.weight"} <= names


def test_what_is_prepared_later_is_not_forgotten_in_silence(accelerator: Accelerator) -> None:
    prepare(accelerator)
    with TailorCheckpointer(accelerator) as checkpointer:
        prepare(accelerator)
        for call in (checkpointer.save_state, checkpointer.load_state):
            with pytest.raises(InvalidInputError) as caught:
                call()
            assert caught.value.kind == "inventory"


def test_batches_takes_prepared_loaders_alone(accelerator: Accelerator) -> None:
    loader = DataLoader(torch.arange(8))
    prepare(accelerator)
    with TailorCheckpointer(accelerator) as checkpointer, pytest.raises(InvalidInputError) as caught:
        checkpointer.batches(loader)
    assert caught.value.kind == "loader"


def test_other_loaders_than_saved_are_refused(accelerator: Accelerator) -> None:
    model, optimizer = prepare(accelerator)
    loader = accelerator.prepare(DataLoader(torch.arange(8)))
    with TailorCheckpointer(accelerator) as checkpointer:
        batches = checkpointer.batches(loader)
        next(iter(batches))
        train(model, optimizer)
        checkpointer.save_state().result()
    with TailorCheckpointer(accelerator) as checkpointer, pytest.raises(IncompatibleError, match="1: plain"):
        checkpointer.resume()


class Unsafe:
    def state_dict(self) -> dict[str, Any]:
        return {"path": Path("x")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


def test_custom_objects_that_could_not_be_read_back_are_refused_at_once(accelerator: Accelerator) -> None:
    prepare(accelerator)
    accelerator.register_for_checkpointing(Unsafe())
    with pytest.raises(UnsupportedError) as caught:
        TailorCheckpointer(accelerator)
    assert caught.value.kind == "object-state"


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (DistributedType.DEEPSPEED, "llmtailor.integrations.deepspeed"),
        (DistributedType.FSDP, "fsdp_version=2"),
        (DistributedType.MEGATRON_LM, "MEGATRON_LM"),
    ],
)
def test_other_kinds_of_training_are_refused(
    accelerator: Accelerator, kind: DistributedType, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(accelerator)
    monkeypatch.setattr(accelerator.state, "distributed_type", kind)
    monkeypatch.setattr(accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=1), raising=False)
    with pytest.raises(UnsupportedError, match=word):
        TailorCheckpointer(accelerator)


def test_hooks_that_would_not_be_called_are_refused(accelerator: Accelerator) -> None:
    prepare(accelerator)
    accelerator.register_save_state_pre_hook(lambda models, weights, directory: None)
    with pytest.raises(UnsupportedError, match="register_for_checkpointing"):
        TailorCheckpointer(accelerator)


def test_a_run_needs_a_directory_and_something_prepared(accelerator: Accelerator, tmp_path: Path) -> None:
    def kind_of(directory: Path | None) -> str:
        with pytest.raises(TailorError) as caught:
            TailorCheckpointer(accelerator, directory)
        return caught.value.kind

    assert kind_of(tmp_path) == "not-prepared"
    prepare(accelerator)
    accelerator.project_configuration.set_directories(None)
    assert kind_of(None) == "no-directory"
