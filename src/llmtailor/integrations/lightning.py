"""Lightning's Trainer: whole, verified, selectively saved checkpoints by its own ``ModelCheckpoint``, on any ranks.

The Trainer still decides when to save, under which name, and what to remove; it still collects loops, callbacks,
schedulers and hyper-parameters, and restores them. Of its strategy only those methods are replaced that move weights
and optimizer state.

    stock                                          here
    lightning_module_state_dict, optimizer_state   nothing is gathered: the live objects are read, by name
    save_checkpoint                                every rank saves what it holds, in the background; the rest of the
                                                   dictionary is a small file
    load_checkpoint, after the strategy is set up  verified, and loaded into the live objects, while it is read
    remove_checkpoint                              the name goes; the checkpoint does once nothing needs it
    process_dataloader                             the training loader knows its position

Not by a ``CheckpointIO``: it is called on rank 0 alone and is blind to the names of what is in an optimizer, which
comes by position, and FSDP2's strategy does not call it.

Source: lightning 2.6, pytorch/trainer/trainer.py (_run), pytorch/trainer/connectors/checkpoint_connector.py
(dump_checkpoint, _restore_modules_and_callbacks, restore_training_state), pytorch/strategies/strategy.py,
pytorch/strategies/model_parallel.py, pytorch/callbacks/model_checkpoint.py.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from .. import strategies
from ..checkpointer import Checkpointer
from ..engine_options import EngineOptions, check_options, engine_options, refuse_interval
from ..errors import InvalidInputError, TailorWarning, UnsupportedError
from ..manifest import MANIFEST_NAME
from ..ranks import join_ranks
from ..writer import SaveHandle
from .lightning_session import LightningSession, SessionOptions, load_weights

__all__ = ["TailorCallback"]


class TailorCallback(Callback):
    """Gives a Trainer our checkpoints; put it among the Trainer's ``callbacks``.

    ::

        trainer = Trainer(
            callbacks=[
                TailorCallback(strategy="parity"),
                ModelCheckpoint("runs/a", every_n_train_steps=100, save_top_k=-1, save_last=True),
            ],
        )
        trainer.fit(model, ckpt_path="last")      # or a name, "best", or the run's directory: the newest that verifies

    On one device, and with the strategies ``ddp`` and ``ModelParallelStrategy`` (FSDP2, tensor parallelism). What
    ``ModelCheckpoint`` names is a link to ``checkpoint-<global_step>`` beside it, made when that is published; until
    then ``last.ckpt`` leads to the one before. What no name leads to any more is removed after the next publish. A
    step is saved once: asked again at the same step, by another ``ModelCheckpoint`` say, the checkpoint gets one more
    name. ``Trainer.validate`` and ``test`` load these names, too; ``load_from_checkpoint`` does not.

    Saved and restored beside what Lightning saves: random numbers, and the position of training loaders that do not
    keep it themselves, for every rank. So a resumed training goes on bit for bit, also in the middle of an epoch.

    A save returns at once, and the optimizer's next step waits until the state is captured. Callbacks that put other
    weights into the model between steps, but for validation, need ``capture="blocking"``; Lightning's own
    ``WeightAveraging`` is refused. The hooks ``on_save_checkpoint`` and ``on_load_checkpoint`` are called, and see
    neither weights nor optimizer state. A save that fails never stops training: it warns, and ``fit`` raises at the
    end if nothing was saved since. Hyper-parameters that are no plain values are left out, with a warning.

    ``Trainer.save_checkpoint`` to a place outside of the run's directory is Lightning's own, and so is all it does
    after ``fit``: what SLURM's requeue and ``OnExceptionCheckpoint`` save are files as ever, and can be gone on from.
    A second ``fit`` of the same Trainer and module goes on with the run.

    Args:
        directory: The run; by default the ``dirpath`` of the ``ModelCheckpoint`` callbacks, which have to agree.
        strategy: Which layers a save writes: ``"full"``, ``"parity"``, ``"filter(first=2)"``, an object, a callable.
        keep_consistent: Never remove the newest checkpoint whose layers are all of one step, exactly.
        consistent: Where ``ckpt_path`` is the run's directory, take only a checkpoint of which this is true.
        max_rollback_steps: Where ``ckpt_path`` is the run's directory, refuse to fall back further than this.
        max_staleness: Take only a checkpoint none of whose layers is more steps old than this.
        random_state: Restore random numbers and the position in the data; False accepts that the run differs from
            there on, and is needed where the number of processes changed.
        split_experts: Every expert of a block is a layer of its own.
        layer_overrides: Layers of your own: name -> globs over parameter names.
        **options: See ``EngineOptions``.

    Raises:
        InvalidInputError: An unknown strategy, or an option that makes no sense.
        UnsupportedError: ``directory`` is remote storage.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        strategy: str | strategies.Strategy | Callable[[strategies.SaveContext], Collection[str]] = "full",
        keep_consistent: bool = True,
        consistent: bool = False,
        max_rollback_steps: int | None = None,
        max_staleness: int | None = None,
        random_state: bool = True,
        split_experts: bool = False,
        layer_overrides: Mapping[str, Sequence[str]] | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_options(options)
        refuse_interval(options)
        self._directory = None if directory is None else Path(_require_local(str(directory)))
        self._session_options = SessionOptions(
            is_one_at_a_time=options.get("max_in_flight", 1) == 1 and options.get("when_busy", "wait") == "wait",
            consistent=consistent,
            max_rollback_steps=max_rollback_steps,
            max_staleness=max_staleness,
            random_state=random_state,
        )
        self._session: LightningSession | None = None
        """The newest ``fit``."""
        # Parsed here so that a misspelt strategy is said before the model trains.
        self._strategy = strategies.parse_strategy(strategy)
        self._keep_consistent = keep_consistent
        self._split_experts = split_experts
        self._layer_overrides = layer_overrides
        self._options = engine_options(options)

    @property
    def last_save(self) -> SaveHandle | None:
        """The newest save of this process, failed or not."""
        return None if self._session is None else self._session.last_save

    def _open(self, directory: Path) -> Checkpointer:
        return Checkpointer(
            directory,
            ranks=join_ranks(),
            strategy=self._strategy,
            keep=1,  # and all that have a name
            keep_consistent=self._keep_consistent,
            split_experts=self._split_experts,
            layer_overrides=self._layer_overrides,
            **self._options,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before anything is loaded.

        Raises:
            UnsupportedError: The Trainer's strategy is none of those that are supported.
        """
        strategy = trainer.strategy
        stock = type(strategy)
        if isinstance(strategy, _TailorStrategy):
            return
        is_known = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy))
        if not is_known or isinstance(strategy, DeepSpeedStrategy) or "XLA" in stock.__name__:
            raise UnsupportedError(
                "this strategy of the Trainer is not supported",
                kind="lightning-strategy",
                expected="a single device, ddp, or ModelParallelStrategy for FSDP2",
                found=stock.__name__,
            )
        # A subclass made on the spot, so that super() still reaches whatever the strategy's own class does.
        strategy.__class__ = type(stock.__name__, (_TailorStrategy, stock), {"__module__": stock.__module__})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the run. The model is where it will train, wrapped or sharded, and nothing is loaded yet.

        Raises:
            InvalidInputError: ``ModelCheckpoint`` callbacks do not agree on a directory, or with ``directory``.
            LockedError: Another process writes this run, or its mirror.
            UnsupportedError: State that cannot be saved, callbacks that cannot be served, a directory that is not of
                this file system, or options that several ranks cannot agree on.
        """
        _check_callbacks(trainer)
        directory = _find_directory(trainer) if self._directory is None else self._directory
        _warn_of_uploads(trainer)
        strategy: Any = trainer.strategy  # its class was changed in ``setup``
        strategy._tailor_session = self._session = LightningSession(
            trainer, self._open(directory), self._session_options, self._session
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        session = _session_of(trainer)
        if session is not None:
            session.look_after()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where averages of weights are swapped in.
        session = _session_of(trainer)
        if session is not None:
            session.checkpointer.wait_until_captured()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        session = _session_of(trainer)
        if session is not None:
            session.is_interrupted = True


class _TailorStrategy(Strategy):
    """Put before the class of a Trainer's strategy by ``TailorCallback``. Stock while no ``fit`` is under way."""

    _tailor_session: LightningSession | None = None
    _tailor_is_stock: bool = False
    """Whether what is being restored is a checkpoint of Lightning's own."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        # The optimizers have to be there: everything is loaded at once, while it is verified.
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return super().lightning_module_state_dict() if self._tailor_session is None else {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return super().optimizer_state(optimizer) if self._tailor_session is None else {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        session = self._tailor_session
        if session is None or not session.names.covers(filepath):
            if session is not None:
                self._fill(checkpoint, session)
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise UnsupportedError("storage_options are not supported", kind="option", found=storage_options)
        session.save(checkpoint, Path(filepath))

    def _fill(self, checkpoint: dict[str, Any], session: LightningSession) -> None:
        """Make of the Trainer's dictionary what it is without us, for a file that is none of the run's checkpoints.

        SLURM's requeue saves so, and ``OnExceptionCheckpoint``.
        """
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = super().lightning_module_state_dict() | checkpoint["state_dict"]
        if "optimizer_states" in checkpoint:
            stock_state = super().optimizer_state
            checkpoint["optimizer_states"] = [stock_state(each) for each in self.optimizers]
        session.note_in(checkpoint)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        path, session = Path(filepath), self._tailor_session
        if session is None or not session.names.covers(filepath) or (path.exists() and not path.is_symlink()):
            super().remove_checkpoint(filepath)
        else:
            session.names.remove(path)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        session = self._tailor_session
        self._tailor_is_stock = False
        if session is not None and path.resolve() == session.checkpointer.directory.resolve():
            return session.load_newest()
        if not (path / MANIFEST_NAME).is_file():
            self._tailor_is_stock = True
            loaded = super().load_checkpoint(checkpoint_path, weights_only)
            if session is not None:
                session.go_on_from(loaded)
            return loaded
        if session is not None:
            return session.load_named(path.resolve())
        assert self.lightning_module is not None
        return load_weights(path.resolve(), self.lightning_module)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._tailor_is_stock:
            super().load_model_state_dict(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self._tailor_is_stock:
            super().load_optimizer_state_dict(checkpoint)

    def process_dataloader(self, dataloader: object) -> object:
        dataloader = super().process_dataloader(dataloader)
        session = self._tailor_session
        if session is None or not session.trainer.training:
            return dataloader
        watched: object = session.watch(dataloader)
        return watched

    def on_train_start(self) -> None:
        super().on_train_start()
        # The last thing before the first batch: callbacks may have drawn random numbers that the first time did not.
        if self._tailor_session is not None:
            self._tailor_session.start()

    def teardown(self) -> None:
        session, self._tailor_session = self._tailor_session, None
        try:
            if session is not None:
                session.close()
        finally:
            super().teardown()


def _session_of(trainer: Trainer) -> LightningSession | None:
    """The ``fit`` that is under way, if one is."""
    strategy = trainer.strategy
    return strategy._tailor_session if isinstance(strategy, _TailorStrategy) else None


def _check_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks that cannot be served."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # its connector sets it
        if isinstance(callback, WeightAveraging):
            raise UnsupportedError(
                "Lightning's weight averaging is not supported: its hooks put other weights into the checkpoint",
                kind="weight-averaging",
                expected="no WeightAveraging among the callbacks",
                found=type(callback).__name__,
                hint="keep the average in the module, as a submodule or buffers, or train without TailorCallback",
            )
        if isinstance(callback, ModelCheckpoint) and callback.save_last == "link":
            raise UnsupportedError(
                'ModelCheckpoint(save_last="link") is not supported',
                kind="save-last",
                expected="True",
                found='"link"',
                hint="a link to a save that is under way leads nowhere; save_last=True costs nothing more",
            )


def _warn_of_uploads(trainer: Trainer) -> None:
    """Loggers that upload checkpoints look for files, and when the save is asked for.

    Source: lightning 2.6, pytorch/loggers/utilities.py (_scan_checkpoints), wandb.py, mlflow.py, litlogger.py.
    """
    names = [type(each).__name__ for each in trainer.loggers if getattr(each, "_log_model", False)]
    if names and trainer.is_global_zero:
        warnings.warn(
            f"{', '.join(names)} with log_model will find no checkpoints to upload: they are directories, and there "
            "when they are durable. Upload what `llmtailor export` makes of one",
            TailorWarning,
            stacklevel=2,
        )


def _find_directory(trainer: Trainer) -> Path:
    """Of the ModelCheckpoints' own."""
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    found = sorted({str(each.dirpath) for each in callbacks if each.dirpath is not None})
    if len(found) > 1:
        raise InvalidInputError(
            "the ModelCheckpoint callbacks do not agree on a directory",
            kind="two-directories",
            expected="the same dirpath for all: they share checkpoints",
            found=", ".join(found),
        )
    return Path(_require_local(found[0] if found else os.path.join(trainer.default_root_dir, "checkpoints")))


def _require_local(directory: str) -> str:
    if "://" in directory:
        raise UnsupportedError(
            "checkpoints cannot be saved to remote storage",
            kind="remote-directory",
            expected="a directory of this file system",
            found=directory,
            hint="save to a local or shared disk and copy from there; TailorCallback(mirror=...) keeps a second copy",
        )
    return directory
