"""What works with Lightning's own checkpoints works with ``TailorCallback``, or is refused before the first step."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import nn
from torch.utils.data import DataLoader

from llmtailor.errors import InvalidInputError, SupersededWarning, TailorWarning, UnsupportedError
from llmtailor.integrations.lightning import TailorCallback
from llmtailor.verify import verify_checkpoint
from ranks.launch import run_ranks
from ranks.test_lightning import PROGRAM, Module, assert_same, error_of, every_step, make_loader, make_trainer, state_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


def links_of(directory: Path) -> dict[str, str]:
    """Names, and where they lead to."""
    return {path.name: os.readlink(path) for path in sorted(directory.iterdir()) if path.is_symlink()}


class At(Callback):
    """Does something before the first step that follows this one."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.act(trainer)


class Killed(Exception):  # noqa: N818
    """In the middle."""


def kill(trainer: Trainer) -> None:
    for callback in trainer.callbacks:
        if isinstance(callback, TailorCallback) and callback.last_save is not None:
            callback.last_save.result(60)
            callback.on_train_batch_end(trainer, trainer.lightning_module, None, None, 0)  # names it
    raise Killed


# ---- Saves to other places ----


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Saved at step 4, in the middle of an epoch, by the stock Trainer and by ours; the run is in ``run``."""
    for name, callbacks in {"stock": [], "ours": [TailorCallback(), every_step(tmp_path / "run")]}.items():
        torch.manual_seed(5)
        save = At(4, lambda trainer, name=name: trainer.save_checkpoint(tmp_path / f"{name}.ckpt"))
        make_trainer(tmp_path, *callbacks, save, max_epochs=2).fit(Module(), make_loader())
    return tmp_path


def test_a_save_elsewhere_is_lightnings_own(elsewhere: Path) -> None:
    stock, ours = (torch.load(elsewhere / f"{name}.ckpt", weights_only=False) for name in ("stock", "ours"))
    assert ours.keys() - stock.keys() == {"llmtailor_run_id"}
    assert stock.keys() <= ours.keys()
    assert_same(ours["state_dict"], stock["state_dict"])
    assert ours["loops"]["fit_loop"]["state_dict"] == stock["loops"]["fit_loop"]["state_dict"]
    one, other = stock["optimizer_states"][0]["state"], ours["optimizer_states"][0]["state"]
    assert one.keys() == other.keys()
    for index in one:
        assert_same(other[index], one[index])


def test_what_was_saved_elsewhere_is_gone_on_from(elsewhere: Path) -> None:
    """By the stock Trainer, and by ours: then with the checkpoints of the run that it was saved beside."""

    def go_on(*callbacks: Callback) -> Module:
        torch.manual_seed(6)
        module = Module()
        make_trainer(elsewhere, *callbacks).fit(module, make_loader(), ckpt_path=elsewhere / "ours.ckpt")
        return module

    stock = go_on()
    with pytest.warns(SupersededWarning):
        ours = go_on(TailorCallback(), every_step(elsewhere / "run"))
    assert len(ours.seen) == 5
    assert_same(state_of(ours), state_of(stock))
    kept = {int(path.name.removeprefix("checkpoint-")) for path in (elsewhere / "run").glob("checkpoint-*")}
    assert kept == set(range(1, 10))
    set_aside = {path.name for path in (elsewhere / "run").glob("_checkpoint-*")}
    assert set_aside == {"_checkpoint-5.superseded", "_checkpoint-6.superseded"}
    assert all(verify_checkpoint(path).problems == () for path in (elsewhere / "run").glob("checkpoint-*"))


def test_an_exceptions_checkpoint_does_not_hide_the_exception(tmp_path: Path) -> None:
    callbacks = [TailorCallback(), At(3, kill), OnExceptionCheckpoint(tmp_path / "other"), every_step(tmp_path / "run")]
    with pytest.raises(Killed), pytest.warns(UserWarning, match="no last checkpoint available|without a model"):
        make_trainer(tmp_path, *callbacks).fit(Module(), make_loader())
    saved = torch.load(tmp_path / "other" / "on_exception.ckpt", weights_only=False)
    assert saved["global_step"] == 3
    assert saved["optimizer_states"][0]["state"]


@pytest.mark.parametrize("step", [4, 5])
def test_the_batch_of_an_exception_is_not_lost(tmp_path: Path, step: int) -> None:
    """Saved in the run's directory, in the middle of an epoch and of a batch; of its last one, too."""
    whole = Module()
    torch.manual_seed(5)
    make_trainer(tmp_path).fit(whole, make_loader())
    modules = [Module(), Module()]
    run = tmp_path / "run"
    callbacks = [TailorCallback(), OnExceptionCheckpoint(run), ModelCheckpoint(run, every_n_train_steps=2)]
    torch.manual_seed(5)
    with pytest.raises(Killed), pytest.warns(UserWarning, match="no last checkpoint available|without a model"):
        make_trainer(tmp_path, *callbacks, At(step, kill)).fit(modules[0], make_loader())
    with pytest.warns(UserWarning, match="without a model"):
        make_trainer(tmp_path, *callbacks).fit(modules[1], make_loader())
    assert modules[0].seen + modules[1].seen == whole.seen
    assert_same(state_of(modules[1]), state_of(whole))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster that notes what is asked of it in the file that is returned."""
    names = {"JOB_ID": "77", "NTASKS": "1", "JOB_NAME": "job", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in {**names, "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path / "asked"


def test_slurm_requeues_and_the_run_goes_on(tmp_path: Path, slurm: Path) -> None:
    def fit(*callbacks: Callback) -> Module:
        module, tailor = Module(), TailorCallback()
        saves = ModelCheckpoint(tmp_path / "run", every_n_train_steps=2, save_top_k=-1)
        plugins = [SLURMEnvironment(auto_requeue=True)]
        make_trainer(tmp_path, tailor, *callbacks, saves, plugins=plugins).fit(module, make_loader())
        return module

    def end(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        kill(trainer)

    with pytest.raises(Killed):
        fit(At(5, end))
    assert slurm.read_text() == "requeue 77\n"
    assert len(fit().seen) == 4  # Lightning finds the file by itself
    assert list(links_of(tmp_path / "run").values()) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]


def test_a_model_checkpoint_elsewhere_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, TailorCallback(tmp_path / "a"), every_step(tmp_path / "b"))
    found = error_of(trainer)
    assert (type(found), found.kind, trainer.global_step) == (InvalidInputError, "checkpoint-name", 0)


@pytest.mark.slow
def test_shards_are_saved_elsewhere_by_their_own_strategy(tmp_path: Path) -> None:
    run_ranks(PROGRAM, 2, "elsewhere", tmp_path, "ddp-full", "fsdp-parity")
    for case in ("ddp-full", "fsdp-parity"):
        saved, loaded = (json.loads((tmp_path / f"{case}.{name}.json").read_text()) for name in ("saved", "loaded"))
        assert loaded == saved
        assert {path.name for path in (tmp_path / case).glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
        assert verify_checkpoint(tmp_path / case / "checkpoint-6").problems == ()


# ---- State that is not plain ----


@dataclass
class Config:
    width: int = 4


@pytest.mark.filterwarnings("ignore:Attribute 'odd' is an instance of `nn.Module`:UserWarning")
@pytest.mark.parametrize("value", [Path("x"), {"deep": [Config()]}, nn.MSELoss()], ids=["path", "deep", "module"])
def test_hyper_parameters_that_are_no_plain_values_are_left_out(tmp_path: Path, value: Any) -> None:
    module = Module()
    module.save_hyperparameters({"odd": value, "rate": np.float64(0.5)}, logger=False)
    with pytest.warns(TailorWarning, match=r"hyper_parameters\['odd'\]"):
        make_trainer(tmp_path, TailorCallback(), every_step(tmp_path / "run"), max_epochs=1).fit(module, make_loader())
    saved = torch.load(tmp_path / "run" / "checkpoint-3" / "lightning.pt", weights_only=True)
    assert saved["hyper_parameters"] == {"width": 4, "rate": 0.5}
    resumed = Module()
    make_trainer(tmp_path, TailorCallback(), every_step(tmp_path / "run"), max_epochs=2).fit(
        resumed, make_loader(), ckpt_path=tmp_path / "run"
    )
    assert len(resumed.seen) == 3


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    def __init__(self, optimizer: torch.optim.Optimizer, extra: Any) -> None:
        self.extra = extra
        super().__init__(optimizer, lambda step: 0.5 * (1 + np.cos(step / 100)))


class Scheduled(Module):
    def __init__(self, extra: Any = None) -> None:
        super().__init__()
        self.extra = extra

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": Schedule(optimizer, self.extra), "interval": "step", "name": "cosine"}]


class Keeping(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"where": Path("x")}


class Late(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.count = 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}


def test_a_schedule_of_numpys_and_a_callback_that_begins_late_are_saved(tmp_path: Path) -> None:
    make_trainer(tmp_path, TailorCallback(), Late(), every_step(tmp_path / "run"), max_epochs=1).fit(
        Scheduled(), make_loader()
    )
    saved = torch.load(tmp_path / "run" / "checkpoint-3" / "lightning.pt", weights_only=True)
    assert saved["callbacks"]["Late"] == {"count": 1}


@pytest.mark.parametrize(("extra", "name"), [([Path("x")], "cosine"), (None, "Keeping")])
def test_state_that_cannot_be_read_back_is_refused_before_the_first_step(tmp_path: Path, extra: Any, name: str) -> None:
    callbacks = [Keeping()] if name == "Keeping" else []
    trainer = make_trainer(tmp_path, TailorCallback(), *callbacks, every_step(tmp_path / "run"))
    found = error_of(trainer, Scheduled(extra))
    assert (type(found), found.kind, trainer.global_step) == (UnsupportedError, "object-state", 0)
    assert name in found.what
    assert "pathlib" in str(found.found)


# ---- Names ----


def test_last_goes_on_after_a_resume_from_the_first_save(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def callbacks() -> list[Callback]:
        """The second takes ``last-v1.ckpt``."""
        saves = [every_step(run, save_last=True), every_step(run, save_last=True, monitor="loss", save_top_k=1)]
        return [TailorCallback(), *saves]

    def fit(*more: Callback, **options: Any) -> None:
        make_trainer(tmp_path, *more, *callbacks(), max_epochs=1).fit(Logging(), make_loader(), **options)

    with pytest.raises(Killed):
        fit(At(1, kill))
    lasts = {"last.ckpt": "checkpoint-1", "last-v1.ckpt": "checkpoint-1"}
    assert {name: target for name, target in links_of(run).items() if name.startswith("last")} == lasts
    fit(ckpt_path="last")
    lasts = {"last.ckpt": "checkpoint-3", "last-v1.ckpt": "checkpoint-3"}
    assert {name: target for name, target in links_of(run).items() if name.startswith("last")} == lasts


class Logging(Module):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        self.log("score", float(self.trainer.global_step))
        return loss


def test_two_saves_close_together_get_two_names(tmp_path: Path) -> None:
    found = {}
    for kind, callbacks in {"stock": [], "ours": [TailorCallback(max_in_flight=3)]}.items():
        saves = every_step(tmp_path / kind, filename="best", monitor="score", save_top_k=2)
        make_trainer(tmp_path, *callbacks, saves, max_epochs=1).fit(Logging(), make_loader())
        found[kind] = {Path(path).name: float(score) for path, score in saves.best_k_models.items()}
        assert "file_exists" not in vars(saves)
    assert found["ours"] == found["stock"]
    assert links_of(tmp_path / "ours") == {"best.ckpt": "checkpoint-1", "best-v1.ckpt": "checkpoint-2"}


@pytest.mark.parametrize("strategy", ["full", "parity"])
def test_a_second_fit_goes_on_with_the_run(tmp_path: Path, strategy: str) -> None:
    saves = ModelCheckpoint(tmp_path / "run", save_top_k=-1, monitor="val_loss")
    trainer = make_trainer(tmp_path, TailorCallback(strategy=strategy), saves, max_epochs=2)
    module, held_out = Module(), make_loader()
    trainer.fit(module, make_loader(), held_out)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, make_loader(), held_out)
    assert trainer.global_step == 9
    assert links_of(tmp_path / "run").keys() == {Path(path).name for path in saves.best_k_models}
    assert not list((tmp_path / "run").glob("_checkpoint-*"))
    assert verify_checkpoint(tmp_path / "run" / "checkpoint-9").problems == ()
    trainer.fit_loop.max_epochs = 4
    with pytest.warns(SupersededWarning):
        trainer.fit(Module(), make_loader(), held_out)  # another model is another run


# ---- What is refused, or warned of ----


def test_weight_averaging_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, TailorCallback(capture="blocking"), EMAWeightAveraging(), every_step(tmp_path))
    found = error_of(trainer)
    assert (type(found), found.kind, found.found) == (UnsupportedError, "weight-averaging", "EMAWeightAveraging")
    assert trainer.global_step == 0


def test_remote_directories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for trainer in (
        make_trainer(tmp_path, TailorCallback(), ModelCheckpoint("memory://bucket/run")),
        make_trainer("memory://bucket", TailorCallback(), ModelCheckpoint()),  # type: ignore[arg-type]
    ):
        found = error_of(trainer)
        assert (type(found), found.kind, trainer.global_step) == (UnsupportedError, "remote-directory", 0)
        assert str(found.found).startswith("memory://bucket/")
    with pytest.raises(UnsupportedError, match="remote"):
        TailorCallback("s3://bucket/run")
    assert not list(tmp_path.iterdir())


class Uploading(CSVLogger):
    _log_model = "all"


def test_loggers_that_upload_checkpoints_are_warned_of(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, TailorCallback(), every_step(tmp_path / "run"), logger=Uploading(tmp_path), max_epochs=1
    )
    with pytest.warns(TailorWarning, match="Uploading with log_model"):
        trainer.fit(Module(), DataLoader(torch.ones(2, 4)))
