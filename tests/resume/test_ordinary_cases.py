"""What people write in their loops, and what has to be refused before it costs them a run."""

from __future__ import annotations

import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import llmtailor
from faults import flip_bit
from llmtailor import Run
from llmtailor.errors import (
    IncompatibleError,
    IntegrityError,
    InvalidInputError,
    QuarantineWarning,
    TailorWarning,
    UnsupportedError,
)
from llmtailor.integrations import small_files


def build(width: int = 4) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 1) -> None:
    width = next(model.parameters()).shape[1]
    for _ in range(num_steps):
        model(torch.ones(2, width)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# Options


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"mirror_dir": "elsewhere"}, "did you mean mirror?"),
        ({"save_every": 1}, "did you mean save_steps?"),
        ({"keep_optimiser": 2}, "did you mean keep_optimizer?"),
        ({"zzz": 1}, None),
    ],
)
def test_unknown_option_is_refused(tmp_path: Path, options: dict[str, Any], hint: str | None) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Run(tmp_path / "run", *build(), **options)
    assert caught.value.kind == "option"
    assert caught.value.found == next(iter(options))
    assert caught.value.hint == hint
    assert not (tmp_path / "run").exists()


# Models


class Counting(nn.Linear):
    """Keeps a number beside its tensors, by torch's older way."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.count = 0

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "count"] = torch.tensor(self.count)


class Metric(nn.Module):
    """Keeps tensors that are no buffers, as torchmetrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(1)

    def state_dict(self, *args: Any, prefix: str = "", **how: Any) -> dict[str, Any]:
        return {**super().state_dict(*args, prefix=prefix, **how), prefix + "total": self.total}


class Renaming(nn.Linear):
    """Gives its own tensors other names, and adds none."""

    def state_dict(self, *args: Any, **how: Any) -> dict[str, Any]:
        return OrderedDict((f"other_{name}", value) for name, value in super().state_dict(*args, **how).items())


@pytest.mark.parametrize(("make", "found"), [(Counting, "count of Counting"), (Metric, "total of Metric")])
def test_state_that_a_module_adds_by_code_of_its_own_is_refused(
    tmp_path: Path, make: Callable[[], nn.Module], found: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make())
    with pytest.raises(UnsupportedError) as caught:
        Run(tmp_path, model, torch.optim.SGD(model.parameters()))
    assert caught.value.kind == "extra-state"
    assert (caught.value.fqn, caught.value.found) == ("1", found)


def test_module_that_only_renames_its_tensors_is_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Renaming(4, 4))
    Run(tmp_path, model, torch.optim.SGD(model.parameters())).close()


def test_layers_whose_files_would_differ_in_case_alone_are_refused_before_training(tmp_path: Path) -> None:
    model = nn.ModuleDict({"Wq": nn.Linear(4, 4), "wq": nn.Linear(4, 4)})
    with pytest.raises(UnsupportedError, match="differ in case alone") as caught:
        Run(tmp_path, model, torch.optim.SGD(model.parameters()))
    assert caught.value.layer == "wq"
    Run(tmp_path, model, torch.optim.SGD(model.parameters()), layer_overrides={"query": ["wq.*"]}).close()


# torch 2.13 imports torch.utils.mkldnn, which warns of itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_wrappers_around_wrappers_are_seen_through(tmp_path: Path) -> None:
    model, optimizer = build()
    compiled: Any = torch.compile(nn.DataParallel(model))
    with Run(tmp_path, compiled, optimizer) as run:
        manifest = llmtailor.open_checkpoint(run.save(1).result()).manifest
    assert {tensor.fqn for tensor in manifest.tensors} == {name for name, _ in model.named_parameters()}


@pytest.fixture
def _other_default_device() -> Iterator[None]:
    """As ``torch.set_default_device("cuda")``, on a machine that has none: a tensor that lands there has no bytes."""
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("_other_default_device")
@pytest.mark.parametrize("rest", ["skip", "q8", "compact"])
def test_default_device_is_not_where_our_memory_is(tmp_path: Path, rest: str) -> None:
    model, optimizer = build(width=64)
    train(model, optimizer)
    options: dict[str, Any] = {"strategy": "parity", "rest": rest}
    torch.set_default_device("meta")
    run = Run(tmp_path, model, optimizer, **options)
    run.save(1).result()
    torch.set_default_device(None)
    train(model, optimizer)
    torch.set_default_device("meta")
    run.save(2).result()
    run.close()
    torch.set_default_device(None)
    again, other = build(width=64)
    torch.set_default_device("meta")
    with Run(tmp_path, again, other, **options) as run:
        assert run.resume() == 2
    assert all(not tensor.is_meta for state in other.state.values() for tensor in state.values())


# Optimizers and schedules


class Adapted(nn.Module):
    """Wrapped as by PEFT: a base that does not train, and an adapter that does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.peft_config = {"default": None}
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.lora_A = nn.Linear(4, 4)

    def get_base_model(self) -> nn.Module:
        return self.base

    def save_pretrained(self, directory: Path) -> None: ...

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_A(x)


def test_optimizer_of_all_parameters_of_an_adapted_model(tmp_path: Path) -> None:
    """As PEFT's guides write it; the base's are in its groups and never change."""
    model = Adapted()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with Run(tmp_path, model, optimizer) as run:
        run.save(1)
    again = Adapted()
    other = torch.optim.AdamW(again.parameters())
    with Run(tmp_path, again, other) as run:
        assert run.resume() == 1
    for parameter, same in zip(again.lora_A.parameters(), model.lora_A.parameters(), strict=True):
        assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[same]["exp_avg"])


def test_what_a_base_keeps_that_is_not_saved_is_its_own(tmp_path: Path) -> None:
    """As quantized layers do, under an adapter; the adapter's own has to be saved, whether it trains or not."""
    model = Adapted()
    model.base = Counting().requires_grad_(False)
    Run(tmp_path, model, torch.optim.SGD(model.lora_A.parameters())).close()
    model.other_param_names = ("extra",)
    model.extra = Counting().requires_grad_(False)
    with pytest.raises(UnsupportedError, match="extra state") as caught:
        Run(tmp_path, model, torch.optim.SGD(model.lora_A.parameters()))
    assert caught.value.fqn == "extra"


def test_parameter_that_was_taken_out_of_the_model_and_not_of_the_optimizer_is_said(tmp_path: Path) -> None:
    model, optimizer = build()
    train(model, optimizer)
    del model[1]
    with Run(tmp_path, model, optimizer) as run, pytest.raises(IncompatibleError) as caught:
        run.save(1)
    assert "take out of its groups" in str(caught.value.hint)


class Growing(torch.optim.SGD):
    """Adds an option to its groups in its first step, as Prodigy does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["d_denom"] = group.get("d_denom", 0.0) + 1.0
        return super().step(closure)


def test_option_that_comes_with_the_first_step_comes_back(tmp_path: Path) -> None:
    model, _ = build()
    optimizer = Growing(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 3)
    with Run(tmp_path, model, optimizer) as run:
        run.save(3)
    model, _ = build()
    optimizer = Growing(model.parameters(), lr=0.1, momentum=0.9)
    with Run(tmp_path, model, optimizer) as run:
        assert run.resume() == 3
    assert optimizer.param_groups[0]["d_denom"] == 3.0


class Sharp(torch.optim.Optimizer):
    """Leaves the update to an optimizer of its own, as SAM and ZeroRedundancyOptimizer do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.base_optimizer = torch.optim.AdamW(self.param_groups)

    def step(self, closure: Any = None) -> Any:
        return self.base_optimizer.step(closure)


def test_optimizer_that_hides_another_is_refused_before_training(tmp_path: Path) -> None:
    model, _ = build()
    with pytest.raises(UnsupportedError, match=r"a wrapper around torch\.optim\.adamw\.AdamW") as caught:
        Run(tmp_path, model, Sharp(model.parameters())).save(1)
    assert caught.value.kind == "optimizer-type"


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + np.cos(np.pi * step / 100)))


def test_schedule_of_numpy_comes_back(tmp_path: Path) -> None:
    model, optimizer = build()
    scheduler = schedule(optimizer)
    for _ in range(3):
        train(model, optimizer)
        scheduler.step()
    with Run(tmp_path, model, optimizer, scheduler=scheduler) as run:
        run.save(3)
    model, optimizer = build()
    again = schedule(optimizer)
    with Run(tmp_path, model, optimizer, scheduler=again) as run:
        assert run.resume() == 3
    assert again.get_last_lr() == scheduler.get_last_lr()
    assert again.last_epoch == 3


class Averages:
    """An object of the user's whose state is what was given."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_value_that_cannot_be_read_back_is_named(tmp_path: Path) -> None:
    state = {"good": 1, "deep": [0, {"where": Path("x")}]}
    with pytest.raises(UnsupportedError) as caught:
        Run(tmp_path, *build(), state={"mine": Averages(state)})
    assert caught.value.found == "['deep'][1]['where']: pathlib.PosixPath"


def test_checking_an_object_does_not_serialize_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    save = torch.save

    def note(value: Any, file: Any, **how: Any) -> None:
        save(value, file, **how)
        sizes.append(file.tell())

    monkeypatch.setattr(small_files.torch, "save", note)
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(256, 256))
    Run(tmp_path, *build(), state={"average": average}).close()
    assert sizes
    assert max(sizes) < 16_000


def test_metrics_that_come_too_late_are_said_to_be_lost(tmp_path: Path) -> None:
    model, optimizer = build()
    with Run(tmp_path, model, optimizer, save_steps=1) as run:
        first = run.step(1)
        with pytest.warns(TailorWarning, match=r"checkpoint-1 was saved already.*eval_loss"):
            assert run.save(1, metrics={"eval_loss": 2.0}) is first
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            path = run.save(2, metrics={"eval_loss": 1.0}).result()
    assert (path / "metrics.json").is_file()


# Restarts


@pytest.mark.filterwarnings("ignore::llmtailor.errors.QuarantineWarning")
def test_second_restart_after_all_was_found_bad_does_not_begin_anew(tmp_path: Path) -> None:
    """Under a launcher that restarts, the first error is read by nobody."""
    with Run(tmp_path, *build()) as run:
        path = run.save(1).result()
    flip_bit(next(path.glob("model-*.safetensors")), -1)
    for _ in range(2):
        with Run(tmp_path, *build()) as run, pytest.raises(IntegrityError) as caught:
            run.resume()
        assert caught.value.kind == "none-verifies"
    assert "_checkpoint-1.bad" in str(caught.value.found)
    shutil.move(tmp_path / "_checkpoint-1.bad", tmp_path / "kept")
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuarantineWarning)
        with Run(tmp_path, *build()) as run:
            assert run.resume() == 0


def test_remains_without_a_manifest_are_not_offered_to_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "_checkpoint-3.superseded").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Run(tmp_path, *build()) as run:
            assert run.resume() == 0


def test_verify_takes_a_path_as_text(tmp_path: Path) -> None:
    with Run(tmp_path, *build()) as run:
        path = run.save(1).result()
    assert llmtailor.verify_checkpoint(str(path)).is_good


def test_blocks_of_a_sequential_are_named_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    optimizer = torch.optim.AdamW(model.parameters())
    with Run(tmp_path, model, optimizer) as run:
        run.save(1)
    with Run(tmp_path, model, optimizer) as run:
        run.resume()
    assert "): 0-3" in capsys.readouterr().err
