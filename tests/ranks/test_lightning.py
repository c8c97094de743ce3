"""``TailorCallback``: Lightning's Trainer goes on bit for bit, from any step; one process, DDP and FSDP2."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import (
    IncompatibleError,
    IncompleteError,
    IntegrityError,
    InvalidInputError,
    NotFoundError,
    SaveFailedWarning,
    SupersededWarning,
    TailorError,
    TailorWarning,
    UnsupportedError,
    WriteError,
)
from llmtailor.integrations.lightning import TailorCallback
from llmtailor.integrations.torch_loop import Run
from llmtailor.verify import verify_checkpoint
from ranks.launch import run_ranks

# Lightning's advice about workers, logging, other callbacks and directories that are not empty; and its use of what
# torch 2.13 has deprecated (lightning 2.6, utilities/_pytree.py).
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]

PROGRAM = Path(__file__).parent / "lightning_trainings.py"
CASES = ["ddp-full", "ddp-parity", "fsdp-full", "fsdp-parity"]


# ---- Two ranks, killed ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lightning")
    run_ranks(PROGRAM, 2, "begin", directory, *CASES, expected=(-9,))
    run_ranks(PROGRAM, 2, "resume", directory, *CASES)
    return directory


def read(directory: Path, case: str, name: str) -> Any:
    return json.loads((directory / f"{case}.{name}.json").read_text())


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("full")])
def test_full_goes_on_bit_for_bit(trained: Path, case: str) -> None:
    straight, found = read(trained, case, "straight"), read(trained, case, "resumed")
    assert len(found["losses"]) == len(straight["losses"]) - 6
    assert found["losses"] == straight["losses"][6:]
    assert found["truth"]["final"] == straight["truth"]["final"]


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("parity")])
def test_layers_of_parity_are_those_of_the_step_they_claim(trained: Path, case: str) -> None:
    truth, loaded = read(trained, case, "straight")["truth"], read(trained, case, "resumed")["truth"]["6"]
    manifest = open_checkpoint(trained / case / "last.ckpt" / ".." / "checkpoint-6").manifest
    steps = {layer.name: layer.step for layer in manifest.layers}
    assert set(steps.values()) == {3, 6}
    layer_of = {tensor.fqn: tensor.layer for tensor in manifest.tensors}
    for name, digest in loaded.items():
        if name == "lr":
            assert digest == truth["6"]["lr"]
            continue
        fqn = name if name in layer_of else name.removeprefix("state.").rpartition(".")[0]
        assert digest == truth[str(steps[layer_of[fqn]])][name], name


@pytest.mark.parametrize("case", CASES)
def test_every_name_leads_to_a_checkpoint_that_verifies(trained: Path, case: str) -> None:
    names = sorted((trained / case).glob("*.ckpt"))
    assert [path.name for path in names][-1] == "last.ckpt"
    assert len(names) == 7
    for path in names:
        report = verify_checkpoint(path.resolve())
        assert report.problems == ()
        assert report.unlisted == ()
    assert (trained / case / "last.ckpt").resolve().name == "checkpoint-18"


# ---- One process ----


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index))


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.full((4,), float(index)) for index in torch.randperm(6).tolist())


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.save_hyperparameters({"width": 4})
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2)) for _ in range(3))
        self.seen: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append(float(batch[0, 0]))
        return self(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(batch).square().mean(), on_step=False, on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def make_trainer(directory: Path, *callbacks: Callback, **options: Any) -> Trainer:
    defaults = {"max_epochs": 3, "num_sanity_val_steps": 0, "logger": False}
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        default_root_dir=directory,
        **{**defaults, **options},
    )


def make_loader(kind: str = "") -> DataLoader[torch.Tensor]:
    if kind == "stream":
        return DataLoader(Stream(), batch_size=2)
    generator = torch.Generator().manual_seed(3) if kind in ("generator", "at_epochs") else None
    return DataLoader(Numbers(), batch_size=2, shuffle=True, generator=generator)


def every_step(directory: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(directory, every_n_train_steps=1, **{"save_top_k": -1, **options})


def state_of(module: Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Fill(Callback):
    """Moves random numbers on where a callback might, so that a resume from before shows."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.rand(1)


def loaders_of(kind: str) -> dict[str, Any]:
    loaders: dict[str, Any] = {"train_dataloaders": make_loader(kind)}
    if kind == "validated":
        loaders["val_dataloaders"] = DataLoader(Numbers(), batch_size=3)
    return loaders


def limits_of(kind: str) -> dict[str, Any]:
    return {"max_epochs": -1, "max_steps": 9} if kind == "steps" else {}


KINDS = [
    "epochs",
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in ("steps", "validated", "stream", "generator", "at_epochs")
    ),
]


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Module, Path]:
    """A kind of training, the model that the stock Trainer made, and a run with a checkpoint of every step."""
    kind, directory = request.param, tmp_path_factory.mktemp("whole")
    stock, module = Module(), Module()
    torch.manual_seed(5)
    make_trainer(directory, **limits_of(kind)).fit(stock, **loaders_of(kind))
    torch.manual_seed(5)
    saves = every_step(directory / "run")
    if kind == "at_epochs":
        saves = ModelCheckpoint(directory / "run", save_top_k=-1, save_on_train_epoch_end=True)
    make_trainer(directory, TailorCallback(), saves, **limits_of(kind)).fit(module, **loaders_of(kind))
    assert_same(state_of(module), state_of(stock))
    return kind, stock, directory / "run"


@pytest.mark.parametrize("step", range(1, 9))
def test_a_resume_from_any_step_goes_on_bit_for_bit(tmp_path: Path, whole: tuple[str, Module, Path], step: int) -> None:
    kind, stock, run = whole
    if kind == "at_epochs" and step % 3:
        pytest.skip("saved at the ends of epochs")
    resumed = Module()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    trainer = make_trainer(tmp_path, TailorCallback(tmp_path / "other"), Fill(), **limits_of(kind))
    trainer.fit(resumed, **loaders_of(kind), ckpt_path=next(run.glob(f"*-step={step}.ckpt")))
    assert trainer.global_step == 9
    assert resumed.seen == stock.seen[step:]
    assert_same(state_of(resumed), state_of(stock))


def test_top_k_keeps_the_checkpoints_that_have_a_name(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, save_last=True)
    tailor = TailorCallback()
    trainer = make_trainer(tmp_path, tailor, saves, max_epochs=6)
    trainer.fit(Module(), make_loader(), DataLoader(Numbers(), batch_size=3))
    names = {path.name: path.resolve().name for path in tmp_path.glob("*.ckpt")}
    assert set(names) == {Path(path).name for path in saves.best_k_models} | {"last.ckpt"}
    assert names["last.ckpt"] == "checkpoint-18"
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert set(names.values()) <= kept
    # What the last save made superfluous goes with the save after it.
    assert len(kept) <= len(set(names.values())) + 1
    metrics = trainer.validate(Module(), DataLoader(Numbers(), batch_size=3), ckpt_path="best", verbose=False)
    assert metrics[0]["val_loss"] == pytest.approx(float(saves.best_model_score))


class LoggingModule(Module):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def test_loggers_are_told_how_layers_move(tmp_path: Path) -> None:
    """Once for each step that is saved, beside the loss of its batch."""
    run = tmp_path / "run"
    saves = every_step(run, save_last=True)
    tracker = CSVLogger(tmp_path, name="logs", version="")
    tailor = TailorCallback(strategy="parity", monitor=True)
    options: dict[str, Any] = {"logger": tracker, "log_every_n_steps": 1, "accumulate_grad_batches": 2}
    make_trainer(tmp_path, tailor, saves, **options).fit(LoggingModule(), make_loader())
    with open(tracker.experiment.metrics_file_path, newline="") as file:
        rows = list(csv.DictReader(file))
    drifts = {int(row["step"]): row for row in rows if row.get("drift/blocks.0")}
    assert len(drifts) == sum(bool(row.get("drift/blocks.0")) for row in rows) == 6
    assert drifts.keys() == {int(row["step"]) for row in rows if row["loss"]}
    for row, step in zip(drifts.values(), range(1, 7), strict=True):
        told = {layer.name: layer.drift for layer in open_checkpoint(run / f"checkpoint-{step}").manifest.layers}
        assert {name: float(row[f"drift/{name}"]) for name in told} == pytest.approx(told, rel=1e-3)
        assert row["expected_loss_steps"]


def test_the_runs_directory_resumes_the_newest_that_verifies(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_trainer(tmp_path, TailorCallback(), every_step(run), max_epochs=1).fit(Module(), make_loader())
    victim = next((run / "checkpoint-3").glob("model-*.safetensors"))
    victim.chmod(0o644)
    with victim.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(IntegrityError):
        make_trainer(tmp_path, TailorCallback(), every_step(run)).fit(
            Module(), make_loader(), ckpt_path=run / "epoch=0-step=3.ckpt"
        )
    module = Module()
    with pytest.warns(TailorWarning, match="checkpoint-3 does not verify"):
        make_trainer(tmp_path, TailorCallback(), every_step(run), max_epochs=1).fit(
            module, make_loader(), ckpt_path=run
        )
    assert len(module.seen) == 1


def test_an_empty_run_cannot_be_resumed_and_last_starts_it(tmp_path: Path) -> None:
    saves = every_step(tmp_path / "run", save_last=True)
    with pytest.raises(NotFoundError):
        make_trainer(tmp_path, TailorCallback(), saves).fit(Module(), make_loader(), ckpt_path=tmp_path / "run")
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        make_trainer(tmp_path, TailorCallback(), saves, max_epochs=1).fit(Module(), make_loader(), ckpt_path="last")
    assert (tmp_path / "run" / "last.ckpt").resolve().name == "checkpoint-3"


def test_a_new_run_takes_the_names_of_the_one_before(tmp_path: Path) -> None:
    make_trainer(tmp_path, TailorCallback(), every_step(tmp_path)).fit(Module(), make_loader())
    with pytest.warns(SupersededWarning):
        make_trainer(tmp_path, TailorCallback(), every_step(tmp_path), max_epochs=1).fit(Module(), make_loader())
    # Lightning versions a name that is taken when it asks for the save.
    names = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.resolve().name)
    assert [path.resolve() for path in names] == [tmp_path / f"checkpoint-{step}" for step in (1, 2, 3)]
    assert all(f"step={step}" in path.name for step, path in enumerate(names, 1))
    assert len(list(tmp_path.glob("_checkpoint-*.superseded"))) == 9


def test_a_stock_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    whole = Module()
    torch.manual_seed(5)
    saves = ModelCheckpoint(tmp_path / "stock")
    make_trainer(tmp_path, saves, max_epochs=1).fit(whole, make_loader())
    path = tmp_path / "stock" / "epoch=0-step=3.ckpt"
    assert path.is_file()
    module = Module()
    make_trainer(tmp_path, TailorCallback(), every_step(tmp_path / "run"), max_epochs=1).fit(
        module, make_loader(), ckpt_path=path
    )
    assert_same(state_of(module), state_of(whole))
    make_trainer(tmp_path, TailorCallback(), every_step(tmp_path / "run"), max_epochs=2).fit(
        module, make_loader(), ckpt_path=path
    )
    assert verify_checkpoint(tmp_path / "run" / "checkpoint-6").problems == ()


class Break(Callback):
    """Takes the disk away at a step."""

    def __init__(self, tailor: TailorCallback, staging: Path, steps: set[int]) -> None:
        self.tailor, self.staging, self.steps = tailor, staging, steps

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.tailor.last_save is not None and self.tailor.last_save.error is None:
            self.tailor.last_save.result()
        if trainer.global_step + 1 in self.steps and not self.staging.is_file():
            self.staging.rename(self.staging.with_name("_gone"))
            self.staging.touch()


def test_a_failed_save_stops_nothing_and_removes_nothing(tmp_path: Path) -> None:
    tailor = TailorCallback()
    saves = every_step(tmp_path / "run", save_top_k=1, save_last=True)
    trainer = make_trainer(tmp_path, tailor, Break(tailor, tmp_path / "run" / "_staging", {8, 9}), saves)
    with pytest.warns(SaveFailedWarning), pytest.raises(WriteError):
        trainer.fit(Module(), make_loader())
    assert trainer.global_step == 9
    # The name that the failed save was to replace is still there, and leads to the newest that was published.
    assert (tmp_path / "run" / "last.ckpt").resolve() == tmp_path / "run" / "checkpoint-7"
    assert verify_checkpoint(tmp_path / "run" / "checkpoint-7").problems == ()


def error_of(trainer: Trainer, module: LightningModule | None = None, **options: Any) -> TailorError:
    with pytest.raises(TailorError) as caught:
        trainer.fit(module or Module(), make_loader(), **options)
    return caught.value


def test_unsupported_setups_are_refused(tmp_path: Path) -> None:
    tailor = TailorCallback()
    two = [every_step(tmp_path / "a"), ModelCheckpoint(tmp_path / "b", every_n_epochs=1)]
    found = error_of(make_trainer(tmp_path, tailor, *two))
    assert (type(found), found.kind) == (InvalidInputError, "two-directories")
    found = error_of(make_trainer(tmp_path, tailor, every_step(tmp_path / "a", save_last="link")))
    assert (type(found), found.kind) == (UnsupportedError, "save-last")
    found = error_of(make_trainer(tmp_path, TailorCallback(tmp_path / "a"), every_step(tmp_path / "b")))
    assert (type(found), found.kind) == (InvalidInputError, "checkpoint-name")
    trainer = make_trainer(tmp_path, tailor)
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(UnsupportedError, match="FSDPStrategy"):
        tailor.setup(trainer, Module(), "fit")
    for options in ({"strategy": "none-such"}, {"capture": "never"}, {"keep": 3}):
        with pytest.raises(InvalidInputError):
            TailorCallback(**options)


class Meddling(Module):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["more"] = torch.ones(1)


class Unsafe(Module):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["where"] = Path("x")


def test_state_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    found = error_of(make_trainer(tmp_path, TailorCallback(), every_step(tmp_path / "a")), Meddling())
    assert (type(found), found.kind) == (UnsupportedError, "changed-weights")
    found = error_of(make_trainer(tmp_path, TailorCallback(), every_step(tmp_path / "b")), Unsafe())
    assert (type(found), found.kind) == (UnsupportedError, "object-state")


def test_checkpoints_of_others_are_refused(tmp_path: Path) -> None:
    module = Module()
    with Run(tmp_path / "loop", module, module.configure_optimizers()) as run:
        module(torch.ones(1, 4)).sum().backward()
        run.save(1).result()
    found = error_of(make_trainer(tmp_path, TailorCallback(tmp_path / "a")), ckpt_path=tmp_path / "loop/checkpoint-1")
    assert (type(found), found.kind) == (IncompleteError, "other-trainer")


def test_weights_alone_cannot_be_resumed_and_can_be_validated(tmp_path: Path) -> None:
    saves = every_step(tmp_path / "run", save_weights_only=True)
    module = Module()
    make_trainer(tmp_path, TailorCallback(), saves, max_epochs=1).fit(module, make_loader())
    path = tmp_path / "run" / "epoch=0-step=3.ckpt"
    found = error_of(make_trainer(tmp_path, TailorCallback(tmp_path / "other")), ckpt_path=path)
    assert (type(found), found.kind) == (IncompleteError, "weights-only")
    fresh = Module()
    make_trainer(tmp_path, TailorCallback()).validate(fresh, DataLoader(Numbers()), ckpt_path=path, verbose=False)
    assert_same(state_of(fresh), state_of(module))


def test_another_number_of_ranks_needs_to_be_accepted(tmp_path: Path, trained: Path) -> None:
    path = trained / "fsdp-full" / "checkpoint-6"
    found = error_of(make_trainer(tmp_path, TailorCallback(tmp_path / "a")), ckpt_path=path)
    assert (type(found), found.kind) == (IncompatibleError, "world-size")


@pytest.mark.slow
def test_shards_are_loaded_into_one_process(trained: Path) -> None:
    run_ranks(PROGRAM, 1, "reshard", trained, "fsdp-full")
    truth, found = read(trained, "fsdp-full", "straight")["truth"], read(trained, "fsdp-full", "resharded")
    assert found["truth"]["6"] == truth["6"]
    assert len(found["losses"]) == 1


def test_after_fit_saves_are_lightnings_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, TailorCallback(), every_step(tmp_path / "run"), max_epochs=1)
    module = Module()
    trainer.fit(module, make_loader())
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    assert_same(torch.load(tmp_path / "final.ckpt", weights_only=True)["state_dict"], state_of(module))
