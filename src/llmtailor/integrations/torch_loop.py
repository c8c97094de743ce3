"""A training loop of one's own: save when due, resume in one call."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import torch

from ..checkpoint import Checkpoint, describe_layers
from ..checkpointer import Checkpointer
from ..drift import LayerDrift
from ..engine_options import EngineOptions, engine_options, refuse_unknown
from ..errors import IncompatibleError, InvalidInputError, TailorError, TailorWarning
from ..load import plan_load
from ..meeting import Outcome
from ..model_state import is_adapted
from ..ranks import join_ranks
from ..resume import Fill, ResumeLimits, load_named
from ..retention import METRICS_NAME, Keep, encode_metrics
from ..step_rules import check_step
from ..strategies import SaveContext, Strategy
from ..writer import SaveHandle
from .batches import Batches
from .preemption import Preemption, PreemptionOptions, check_on_ranks, preemption_options
from .small_files import (
    Stateful,
    check_objects,
    load_objects,
    load_rng,
    read_objects,
    read_progress,
    restore_rng,
    save_objects,
    save_rng,
    write_progress,
)

__all__ = ["Run"]

logger = logging.getLogger(__name__)

BatchT = TypeVar("BatchT")


class RunOptions(EngineOptions, PreemptionOptions, total=False):
    """Options of ``Run`` that are the same for every integration."""


class Run:
    """Whole, verified, resumable checkpoints for a plain PyTorch loop.

    ::

        run = llmtailor.Run("runs/a", model, optimizer, scheduler=scheduler, strategy="parity", save_steps=100)
        start = run.resume()                      # 0 when there is nothing to resume
        for step in range(start, steps):
            ...                                   # forward, backward, optimizer.step(), scheduler.step()
            run.step(step + 1)                    # saves when due
        run.close()

    Saved in full every time: scheduler, gradient scaler, random numbers, data position (``batches``) and ``state``.
    On several processes (``torchrun``) every one makes its ``Run`` after ``init_process_group``, for the same
    directory, and calls the same methods at the same steps: under DistributedDataParallel, FSDP2 (``fully_shard``) and
    tensor parallelism. Each rank saves what it holds; random numbers and data position are kept for each, and of
    ``state`` what rank 0 has.

    Call it after the optimizer's step. A save returns at once and goes on in the background; the
    optimizer's next step waits until the state is captured. Whatever else changes parameters in place between two
    steps (an average swapped in, ``load_state_dict``) has to call ``wait_until_captured`` first.

    Args:
        directory: The run; checkpoints are ``checkpoint-<step>`` in it.
        model: The module; DistributedDataParallel and ``torch.compile`` wrappers are seen through.
        optimizer: One optimizer, or several that share the model's parameters out among them.
        scheduler: Learning-rate scheduler.
        scaler: ``torch.amp.GradScaler``.
        strategy: Which layers a save writes: ``"full"``, ``"parity"``, ``"filter(first=2)"``, an object, a callable.
        save_steps: ``step`` saves at multiples of this, unless the strategy (``budget_per_step``) or ``interval``
            decides.
        keep: How many checkpoints to keep, or which: ``llmtailor.Keep``, or its text (``"last=3, every=1000"``); None
            keeps all.
        keep_consistent: Never remove the newest checkpoint whose layers are all of one step, exactly.
        state: More objects with ``state_dict``, by name.
        split_experts: Every expert of a block is a layer of its own.
        layer_overrides: Layers of your own: name -> globs over parameter names.
        **options: ``rest``, ``capture``, ``pool_nbytes``, ``max_in_flight``, ``when_busy``, ``mirror``,
            ``mirror_keep``, ``keep_optimizer``, ``durable``, ``spread_layers``, ``commit_timeout_secs``, ``monitor``,
            ``interval``: see ``EngineOptions``; ``on_sigterm``, ``grace_secs``: see ``PreemptionOptions``.

    Raises:
        InvalidInputError: An unknown strategy, an option that makes no sense, or a name in ``state`` that is taken.
        LockedError: Another process writes this run, or its mirror.
        UnsupportedError: State that cannot be saved, or options that several ranks cannot agree on.
        WriteError: The directory cannot be written.
    """

    def __init__(
        self,
        directory: str | Path,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
        strategy: str | Strategy | Callable[[SaveContext], Collection[str]] = "full",
        save_steps: int = 500,
        keep: Keep | int | str | None = None,
        keep_consistent: bool = True,
        state: Mapping[str, Stateful] | None = None,
        split_experts: bool = False,
        layer_overrides: Mapping[str, Sequence[str]] | None = None,
        **options: Unpack[RunOptions],
    ) -> None:
        own = inspect.signature(Run).parameters.keys() - {"options"}
        refuse_unknown(options, RunOptions.__annotations__, others=own)
        if save_steps < 1:
            raise InvalidInputError(
                "save_steps makes no sense", kind="save-steps", expected="a number >= 1", found=save_steps
            )
        self._model = _unwrap(model)
        self._optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self._save_steps = save_steps
        self._objects = _name_objects(scheduler, scaler, state or {})
        ranks = join_ranks()
        check_on_ranks(preemption_options(options), ranks)
        self._rank = None if ranks is None else ranks.rank
        self._num_ranks = 1 if ranks is None else ranks.size
        self._checkpointer = Checkpointer(
            directory,
            ranks=ranks,
            strategy=strategy,
            keep=keep,
            keep_consistent=keep_consistent,
            split_experts=split_experts,
            layer_overrides=layer_overrides,
            **engine_options(options),
        )
        # What cannot be saved is said before the first step, not at the first save.
        try:
            self._preemption = Preemption(self._checkpointer.unfinished, preemption_options(options))
            self._checkpointer.read_model(self._model)
            check_objects(self._objects)
        except BaseException:
            self._checkpointer.close()
            raise
        self._preemption.install()

    def batches(self, loader: Iterable[BatchT]) -> Batches[BatchT]:
        """Wrap the training loader so that its position is saved and resumed; call it before ``resume``."""
        if "data" in self._objects:
            raise InvalidInputError(
                "a run has one training loader", kind="two-loaders", hint="wrap one, pass others as state"
            )
        batches = Batches(loader)
        self._objects["data"] = batches
        return batches

    def resume(
        self,
        checkpoint: str | Path | None = None,
        *,
        consistent: bool = False,
        max_rollback_steps: int | None = None,
        max_staleness: int | None = None,
        random_state: bool = True,
    ) -> int:
        """Load the newest checkpoint that verifies, or the one given, and say which step each layer is of.

        Args:
            checkpoint: A checkpoint's directory; None takes the newest of this run.
            consistent: Take only a checkpoint whose layers are all of one step, exactly.
            max_rollback_steps: Refuse to fall back further than this.
            max_staleness: Take only a checkpoint none of whose layers is more steps old than this.
            random_state: Restore random numbers; False accepts that the run differs from here on.

        Returns:
            The number of steps done; 0 if there is nothing to resume.

        Raises:
            IntegrityError: No checkpoint verifies, or the given one does not. Bytes are checked while they are loaded:
                where that overwrote values of the model or its optimizers, the hint says so.
            IncompleteError: None is resumable as asked, or it lacks the state of an object of this run.
            IncompatibleError: It is of another model, optimizer or machine, or has state of an object that this run
                lacks; nothing was changed. Or an object refused its state, after model and optimizer were loaded.
        """
        small: dict[Path, tuple[int, dict[str, dict[str, Any]], dict[str, Any] | None]] = {}

        def plan(candidate: Checkpoint) -> Fill:
            path = candidate.path
            rank = self._own_files(candidate, is_exact=random_state)
            step = read_progress(path, self._objects)
            states = read_objects(path, self._shared_objects) | read_objects(path, self._own_objects, rank=rank)
            small[path] = step, states, load_rng(path, rank=rank) if random_state else None
            return plan_load(candidate, self._checkpointer.read_model(self._model), self._optimizers).fill

        if checkpoint is None:
            limits = ResumeLimits(
                consistent=consistent, max_rollback_steps=max_rollback_steps, max_staleness=max_staleness
            )
            found = self._checkpointer.load(plan, **limits)
        else:
            found = load_named(Path(checkpoint), plan, self._checkpointer.meeting, max_staleness=max_staleness)
        if found is None:
            self._checkpointer.begin(None, self._model, self._optimizers)
            return 0
        step, states, rng = small[found.path]
        try:
            load_objects(self._objects, states, path=found.path)
            if rng is not None:
                restore_rng(rng)
        except BaseException as err:
            self._checkpointer.meeting.agree(Outcome(error=err))
            raise
        self._checkpointer.meeting.agree(Outcome())
        self._checkpointer.begin(found, self._model, self._optimizers)
        if not self._rank:
            sys.stderr.write(describe_layers(found) + "\n")
        return step

    @property
    def _own_objects(self) -> dict[str, Stateful]:
        """Those of which every rank has its own: where it is in its data."""
        return {name: each for name, each in self._objects.items() if name == "data"}

    @property
    def _shared_objects(self) -> dict[str, Stateful]:
        return {name: each for name, each in self._objects.items() if name not in self._own_objects}

    def _own_files(self, found: Checkpoint, *, is_exact: bool) -> int | None:
        """Whose random state and data position to take: this rank's, or where their number changed rank 0's."""
        saved = found.manifest.world.size
        if saved != self._num_ranks and is_exact:
            raise IncompatibleError(
                "the number of ranks differs from when the checkpoint was saved, so random numbers cannot go on",
                kind="world-size",
                path=found.path,
                expected=saved,
                found=self._num_ranks,
                hint="resume on as many, or with random_state=False: weights and optimizer state are resharded, and "
                "random numbers and the order of the data differ from here on",
            )
        if saved == self._num_ranks:
            return self._rank
        return None if saved == 1 else 0

    def step(self, step: int, *, metrics: Mapping[str, float] | None = None) -> SaveHandle | None:
        """Tell the run that ``step`` optimizer steps are done; saves if that is due.

        Args:
            step: Optimizer steps done.
            metrics: As for ``save``.

        Returns:
            The save's handle, if there was one.

        Raises:
            WriteError: Two saves in a row failed; training may go on.
        """
        if self._preemption.wants_save:
            self._checkpointer.drain(self._preemption.left_secs)
            handle = self.save(step, metrics=metrics)
            self._preemption.end()
            return handle
        is_due = self._checkpointer.pace.is_due(step)
        if step % self._save_steps == 0 if is_due is None else is_due:
            return self.save(step, metrics=metrics)
        self._checkpointer.collect()
        self._checkpointer.prepare(self._model, self._optimizers)
        return None

    def save(self, step: int, *, metrics: Mapping[str, float] | None = None) -> SaveHandle:
        """Save now; returns at once.

        Args:
            step: Optimizer steps done.
            metrics: What was measured at this step (``{"eval_loss": 2.1}``); ``keep`` may keep the best by one of them.
                A step that was saved already does not get any, with a warning.

        Returns:
            A handle: ``captured()`` and ``result()`` wait for the two moments; a save that failed says so there.

        Raises:
            InvalidInputError: The step is no whole number.
            WriteError: Two saves in a row failed; training may go on.
        """
        plain_step, is_new = check_step(step), False

        def write_small_files(directory: Path) -> None:
            nonlocal is_new
            is_new = True
            if not self._rank:
                write_progress(directory, plain_step, self._objects)
                save_objects(directory, self._shared_objects)
                _save_config(self._model, directory)
                if metrics is not None:
                    (directory / METRICS_NAME).write_text(encode_metrics(metrics), encoding="utf-8")
            save_objects(directory, self._own_objects, rank=self._rank)
            save_rng(directory, rank=self._rank)

        handle = self._checkpointer.save(plain_step, self._model, self._optimizers, write_small_files)
        if metrics is not None and not is_new and handle.error is None and handle.state != "skipped":
            warnings.warn(
                f"checkpoint-{plain_step} was saved already, and does not get these metrics: {', '.join(metrics)}. "
                "Give them to step(), or to save() before step()",
                TailorWarning,
                stacklevel=2,
            )
        return handle

    def measure(self, step: int) -> Mapping[str, LayerDrift]:
        """How each layer moved since its last save, now; with ``monitor=True`` or a strategy that asks for it.

        On several ranks all call it at the same steps.

        Args:
            step: Optimizer steps done.

        Returns:
            By layer; estimated from some thousand of its entries.

        Raises:
            InvalidInputError: This run measures nothing.
        """
        return self._checkpointer.measure(step, self._model, self._optimizers)

    @property
    def metrics(self) -> dict[str, float]:
        """The newest measurement, at the last save or by ``measure``, as trackers take it.

        ``drift/<layer>``, ``importance/<layer>``, ``update/<layer>``, ``momentum/<layer>``, ``age/<layer>`` and
        ``expected_loss_steps``; empty if nothing was measured.
        """
        return self._checkpointer.metrics

    def wait_until_captured(self) -> None:
        """Wait until no save refers to the live state any more; before anything but ``optimizer.step()`` changes it."""
        self._checkpointer.wait_until_captured()

    def close(self) -> None:
        """Finish the saves that are under way; raises if the last one failed and nothing was saved since.

        Raises:
            WriteError: What stopped the last save.
        """
        self._preemption.remove()
        self._checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except TailorError:
            # What stopped the loop matters more than the save that had failed before.
            if error is None:
                raise
            logger.exception("the last save had failed, too")


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    while True:
        # What torch.compile makes has the module as a child of that name; naming its class would import the compiler.
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner


def _name_objects(
    scheduler: Stateful | None, scaler: Stateful | None, state: Mapping[str, Stateful]
) -> dict[str, Stateful]:
    objects: dict[str, Stateful] = {}
    for name, each in (("scheduler", scheduler), ("scaler", scaler)):
        if each is not None:
            objects[name] = each
    for name, each in state.items():
        if name in {"scheduler", "scaler", "data"} or not name.isidentifier():
            raise InvalidInputError(
                "a name in state cannot be used",
                kind="state-name",
                expected="an identifier other than scheduler, scaler, data",
                found=repr(name),
            )
        objects[name] = each
    return objects


def _save_config(model: Any, directory: Path) -> None:
    """A transformers model brings its configuration along, so that ``from_pretrained`` reads every checkpoint.

    A model wrapped by PEFT brings its adapter, as it is now, so that ``PeftModel.from_pretrained`` does.
    """
    if is_adapted(model):
        model.save_pretrained(directory)
        return
    for name in ("config", "generation_config"):
        config: Any = getattr(model, name, None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(directory)
