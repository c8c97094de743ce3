"""Accelerate: ``save_state`` and ``load_state`` of a training with an ``Accelerator``, in whole, verified checkpoints.

Not by the accelerator's own methods: their hooks run before a save, cannot replace it and do not see the optimizers.
Instead this reads what the accelerator knows of the training, and hands it to ``Run``.

    accelerator                                   here
    _models, _optimizers                          by layer, each rank what it holds
    _schedulers, scaler, _custom_objects, step    small files, rank 0's
    _dataloaders, random numbers                  small files of every rank

Source: accelerate 1.15, accelerator.py (save_state, load_state, prepare, register_for_checkpointing), checkpointing.py
(save_accelerator_state, load_accelerator_state).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self, Unpack

import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler, get_sampler
from accelerate.utils import DistributedType

from ..engine_options import refuse_interval
from ..errors import InvalidInputError, NotFoundError, UnsupportedError
from ..model_state import is_adapted
from ..resume import ResumeLimits
from ..retention import Keep
from ..storage import checkpoint_name
from ..strategies import SaveContext, Strategy
from ..writer import SaveHandle
from .batches import Batches
from .small_files import Stateful
from .torch_loop import Run, RunOptions

__all__ = ["TailorCheckpointer"]

# Of the others we have not seen that a resumed training goes on as it would have: their devices have random numbers of
# their own, or the model is nowhere as a module.
_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


class TailorCheckpointer:
    """Saves and resumes a training with an ``Accelerator``.

    ::

        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        checkpointer = TailorCheckpointer(accelerator, strategy="parity")
        batches = checkpointer.batches(loader)
        step = checkpointer.resume()                 # 0 when there is nothing to resume
        for epoch in range(batches.epoch, num_epochs):
            for batch in batches:                    # what is left of the epoch after a resume
                with accelerator.accumulate(model):
                    ...                              # forward, accelerator.backward, optimizer.step(), ...
                if accelerator.sync_gradients:
                    step += 1
                    if step % 100 == 0:
                        checkpointer.save_state(step=step)
        checkpointer.close()

    Make it when everything is prepared and registered for checkpointing, on every process. Call ``save_state`` on every
    process too, after an optimizer's step; it returns at once, and the next step of an optimizer waits until the
    state is captured. Several models are saved as one, under ``model``, ``model_1`` and so on.

    Where training is in its data is saved by ``batches``, and goes on exactly. Without it, the epoch of each loader and
    its sampler's seed are saved, and the state of a ``StatefulDataLoader``. Skip what was used of the epoch with
    ``accelerate.skip_first_batches`` then, with a seedable sampler (``DataLoaderConfiguration``), and call the loader's
    ``set_epoch`` at the start of every epoch: the data are right, and random numbers (dropout) differ from those of a
    run that was not interrupted, for a loader draws from them when it begins.

    Args:
        accelerator: Everything is prepared.
        directory: The run; checkpoints are ``checkpoint-<step>`` in it. By default ``checkpoints`` in the
            accelerator's ``project_dir``, as with automatic naming.
        strategy: Which layers a save writes: ``"full"``, ``"parity"``, ``"filter(first=2)"``, an object, a callable.
        keep: How many checkpoints to keep, or which (``llmtailor.Keep``); by default the project's ``total_limit``, and
            None keeps all.
        keep_consistent: Never remove the newest checkpoint whose layers are all of one step, exactly.
        split_experts: Every expert of a block is a layer of its own.
        layer_overrides: Layers of your own: name -> globs over parameter names.
        **options: As ``Run``'s; ``on_sigterm="save"`` is ``Run``'s alone.

    Raises:
        InvalidInputError: Nothing is prepared, no directory is given, or an option makes no sense.
        LockedError: Another process writes this run, or its mirror.
        UnsupportedError: A kind of training that is not supported, hooks that would not be called, or state that
            cannot be saved.
        WriteError: The directory cannot be written.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        directory: str | Path | None = None,
        *,
        strategy: str | Strategy | Callable[[SaveContext], Collection[str]] = "full",
        keep: Keep | int | str | None = None,
        keep_consistent: bool = True,
        split_experts: bool = False,
        layer_overrides: Mapping[str, Sequence[str]] | None = None,
        **options: Unpack[RunOptions],
    ) -> None:
        _check(accelerator, options.get("on_sigterm"))
        refuse_interval(options)
        self._accelerator = accelerator
        self.directory = _find_directory(accelerator) if directory is None else Path(directory)
        """The run."""
        self._prepared = _inventory(accelerator)
        self._loaders = _Loaders(accelerator._dataloaders)
        self.last_save: SaveHandle | None = None
        """The newest save of this process, failed or not."""
        self.num_steps = 0
        """Steps of the first optimizer; those that a gradient scaler left out are not counted."""
        schedulers = list(accelerator._schedulers)
        self._run = _Run(
            self.directory,
            _join_models(accelerator._models),
            [_unwrap_optimizer(optimizer) for optimizer in accelerator._optimizers],
            scheduler=schedulers[0] if schedulers else None,
            scaler=accelerator.scaler,
            strategy=strategy,
            save_steps=sys.maxsize,
            keep=accelerator.project_configuration.total_limit if keep is None else keep,
            keep_consistent=keep_consistent,
            state=_name_state(accelerator, schedulers),
            split_experts=split_experts,
            layer_overrides=layer_overrides,
            **options,
        )
        self._run.set_loaders(self._loaders)
        self._hook = _unwrap_optimizer(accelerator._optimizers[0]).register_step_post_hook(self._count)

    def _count(self, *_: object) -> None:
        self.num_steps += 1

    def batches(self, loader: Iterable[Any]) -> Batches[Any]:
        """Wrap a prepared loader so that its position is saved and resumed; call it before ``resume``, everywhere.

        Raises:
            InvalidInputError: The loader is not prepared.
        """
        return self._loaders.wrap(loader)

    def save_state(self, output_dir: str | Path | None = None, *, step: int | None = None) -> SaveHandle:
        """Save now; returns at once. Called by every process.

        Args:
            output_dir: ``checkpoint-<step>`` in this run's directory, as scripts for ``Accelerator.save_state`` name
                it; it says the step.
            step: Optimizer steps done; by default ``num_steps``.

        Returns:
            A handle: ``captured()`` and ``result()`` wait for the two moments; a save that failed says so there.

        Raises:
            InvalidInputError: Another directory, a step that goes backwards, or something was prepared or registered
                after this object was made.
            WriteError: Two saves in a row failed; training may go on.
        """
        self._check_inventory()
        if output_dir is not None:
            step = self._step_of(Path(output_dir), step)
        if step is not None:
            self.num_steps = step
        # As the accelerator counts: what is saved is the number of the save itself.
        self.last_save = self._run.save(self.num_steps)
        self._accelerator.project_configuration.iteration += 1
        return self.last_save

    def _step_of(self, path: Path, step: int | None) -> int:
        number = path.name.removeprefix("checkpoint-")
        found = int(number) if number.isdecimal() else None
        is_ours = found is not None and path.name == checkpoint_name(found) and step in (None, found)
        if found is None or not is_ours or path.resolve().parent != self.directory.resolve():
            raise InvalidInputError(
                "a checkpoint cannot have this name",
                kind="checkpoint-name",
                path=path,
                expected=f"{self.directory / checkpoint_name(step or found or 100)}: the run, and the step",
                found=str(path),
                hint="give TailorCheckpointer the directory, and save_state the step",
            )
        return found

    def load_state(
        self,
        input_dir: str | Path | None = None,
        *,
        random_state: bool = True,
        **limits: Unpack[ResumeLimits],
    ) -> int:
        """As ``resume``, where there has to be something to resume from."""
        step = self.resume(input_dir, random_state=random_state, **limits)
        if step == 0 and input_dir is None and not (self.directory / checkpoint_name(0)).is_dir():
            raise NotFoundError(
                "nothing to load: the run has no checkpoint of LLMTailor",
                kind="empty-run",
                path=self.directory,
                hint="resume() starts anew then; a checkpoint of Accelerator.save_state is loaded by its load_state",
            )
        return step

    def resume(
        self,
        checkpoint: str | Path | None = None,
        *,
        random_state: bool = True,
        **limits: Unpack[ResumeLimits],
    ) -> int:
        """Load the newest checkpoint that verifies, or the one given. Called by every process.

        Args:
            checkpoint: A checkpoint's directory; None takes the newest of this run.
            random_state: Restore random numbers; False accepts that the run differs from here on, and is needed where
                the number of processes changed.
            **limits: ``consistent``, ``max_rollback_steps``, ``max_staleness``: see ``ResumeLimits``.

        Returns:
            The number of steps done; 0 if there is nothing to resume.

        Raises:
            TailorError: As ``Run.resume``.
            InvalidInputError: Something was prepared or registered after this object was made.
        """
        self._check_inventory()
        self.num_steps = self._run.resume(checkpoint, random_state=random_state, **limits)
        return self.num_steps

    def _check_inventory(self) -> None:
        if list(map(id, _inventory(self._accelerator))) != list(map(id, self._prepared)):
            raise InvalidInputError(
                "the accelerator has more, or other, objects than when TailorCheckpointer was made",
                kind="inventory",
                hint="make it after the last prepare() and register_for_checkpointing()",
            )

    @property
    def metrics(self) -> dict[str, float]:
        """How layers moved, as of the newest save: ``accelerator.log(checkpointer.metrics, step=step)``.

        As ``Run.metrics``; empty if nothing was measured.
        """
        return self._run.metrics

    def wait_until_captured(self) -> None:
        """Wait until no save refers to the live state any more; before anything but ``optimizer.step()`` changes it."""
        self._run.wait_until_captured()

    def wait(self) -> None:
        """Wait until the newest save is published.

        Raises:
            TailorError: What stopped it.
        """
        if self.last_save is not None:
            self.last_save.result()

    def close(self) -> None:
        """Finish the saves that are under way; raises if the last one failed and nothing was saved since.

        Raises:
            WriteError: What stopped the last save.
        """
        self._hook.remove()
        self._run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        self._run.__exit__(kind, error, trace)


class _Run(Run):
    """A run whose position in its data is that of all of the accelerator's loaders."""

    def set_loaders(self, loaders: _Loaders) -> None:
        self._objects["data"] = loaders


def _check(accelerator: Accelerator, on_sigterm: str | None) -> None:
    """Refuse what cannot be saved, or not be resumed exactly, before anything is opened."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        raise _refuse("DeepSpeed", hint="use llmtailor.integrations.deepspeed with the engine that prepare() returned")
    if kind not in _SUPPORTED:
        raise _refuse(str(kind.value))
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise _refuse("FSDP1", hint="FullyShardedDataParallelPlugin(fsdp_version=2)")
    if accelerator.num_processes > 1 and accelerator.project_configuration.save_on_each_node:
        raise _refuse("save_on_each_node=True", hint="all processes write one directory, which all nodes have to share")
    if accelerator._save_model_state_pre_hook or accelerator._load_model_state_pre_hook:
        raise _refuse(
            "hooks of register_save_state_pre_hook or register_load_state_pre_hook",
            hint="they would not be called; what they save can be registered with register_for_checkpointing",
        )
    if on_sigterm == "save":
        raise UnsupportedError(
            'on_sigterm="save" needs to be told of every step',
            kind="option",
            expected='"finish" or "ignore"',
            found='"save"',
            hint="llmtailor.Run does it",
        )
    if not accelerator._models or not accelerator._optimizers:
        raise InvalidInputError(
            "nothing is prepared",
            kind="not-prepared",
            expected="a model and an optimizer",
            found=f"{len(accelerator._models)} models and {len(accelerator._optimizers)} optimizers",
            hint="make TailorCheckpointer after accelerator.prepare()",
        )


def _refuse(found: str, hint: str | None = None) -> UnsupportedError:
    return UnsupportedError(
        f"{found} cannot be saved by TailorCheckpointer",
        kind="accelerate",
        expected=", ".join(each.value for each in _SUPPORTED[:-1]) + " or FSDP2",
        found=found,
        hint=hint,
    )


def _find_directory(accelerator: Accelerator) -> Path:
    """Source: accelerate 1.15, accelerator.py (save_state): ``checkpoints`` in the project's directory."""
    if accelerator.project_dir is None:
        raise InvalidInputError(
            "no directory to save to",
            kind="no-directory",
            expected="directory, or a project_dir of the accelerator",
            found="neither",
        )
    return Path(accelerator.project_dir) / "checkpoints"


def _inventory(accelerator: Accelerator) -> list[object]:
    """All that is saved. Source: accelerate 1.15, accelerator.py (save_state)."""
    return [
        *accelerator._models,
        *accelerator._optimizers,
        *accelerator._schedulers,
        *accelerator._dataloaders,
        *accelerator._custom_objects,
    ]


def _join_models(models: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """One module for several; a single one as it is, so that its names are its own."""
    if len(models) == 1:
        return models[0]
    bare = [model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model for model in models]
    if any(map(is_adapted, bare)):
        raise _refuse("several models, one of them wrapped by PEFT")
    return torch.nn.ModuleDict({"model" if not i else f"model_{i}": model for i, model in enumerate(bare)})


def _unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Source: accelerate 1.15, optimizer.py (AcceleratedOptimizer.optimizer)."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _name_state(accelerator: Accelerator, schedulers: Sequence[Stateful]) -> dict[str, Stateful]:
    state: dict[str, Stateful] = {"accelerator": _Counters(accelerator)}
    state |= {f"scheduler_{i}": each for i, each in enumerate(schedulers) if i}
    return state | {f"custom_{i}": each for i, each in enumerate(accelerator._custom_objects)}


class _Counters:
    """How far into an accumulation of gradients the accelerator is, and how often it saved."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._accelerator.step, "iteration": self._accelerator.save_iteration + 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._accelerator.step = state_dict["step"]
        self._accelerator.project_configuration.iteration = state_dict["iteration"]


class _Loaders:
    """Where every prepared loader is, on this process: the epoch, the sampler's seed, and what ``Batches`` knows.

    Accelerate 1.15 saves the sampler only of an ``IterableDatasetShard``, and no loader's epoch.
    Source: accelerate 1.15, data_loader.py (DataLoaderShard.iteration, SeedableRandomSampler), checkpointing.py.
    """

    def __init__(self, loaders: Sequence[Any]) -> None:
        self._loaders = list(loaders)
        self._batches: dict[int, Batches[Any]] = {}

    def wrap(self, loader: Any) -> Batches[Any]:
        place = next((i for i, each in enumerate(self._loaders) if each is loader), None)
        if place is None:
            raise InvalidInputError(
                "this loader is not prepared",
                kind="loader",
                expected="one that accelerator.prepare() returned before TailorCheckpointer was made",
                found=type(loader).__qualname__,
            )
        if place not in self._batches:
            self._batches[place] = Batches(loader if _is_stateful(loader) else _Replayable(loader))
        return self._batches[place]

    def state_dict(self) -> dict[str, Any]:
        return {"loaders": [self._read(place, loader) for place, loader in enumerate(self._loaders)]}

    def _read(self, place: int, loader: Any) -> dict[str, Any]:
        state: dict[str, Any] = {"iteration": loader.iteration}
        sampler = get_sampler(loader)
        if isinstance(sampler, SeedableRandomSampler):
            state["sampler"] = {"seed": sampler.initial_seed, "epoch": sampler.epoch}
        if place in self._batches:
            state["batches"] = self._batches[place].state_dict()
        elif _is_stateful(loader):
            state["loader"] = loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = state_dict["loaders"]
        self._check(states)
        for place, (loader, state) in enumerate(zip(self._loaders, states, strict=True)):
            loader.iteration = state["iteration"]
            if "sampler" in state:
                sampler = get_sampler(loader)
                sampler.initial_seed, sampler.epoch = state["sampler"]["seed"], state["sampler"]["epoch"]
            if "batches" in state:
                self._batches[place].load_state_dict(state["batches"])
            elif "loader" in state:
                loader.load_state_dict(state["loader"])

    def _check(self, states: Sequence[Mapping[str, Any]]) -> None:
        saved = [self._describe(state.keys()) for state in states]
        live = [self._describe(self._read(place, loader).keys()) for place, loader in enumerate(self._loaders)]
        if saved != live:
            raise ValueError(  # who loads makes an IncompatibleError of it
                f"the checkpoint has {len(saved)} loaders ({'; '.join(saved)}), the accelerator {len(live)}: "
                f"{'; '.join(live)}; prepare the same ones, and call batches() for the same ones before resume()"
            )

    @staticmethod
    def _describe(keys: Iterable[str]) -> str:
        names = {"sampler": "seedable sampler", "batches": "batches()", "loader": "stateful"}
        return ", ".join(names[key] for key in keys if key in names) or "plain"


def _is_stateful(loader: Any) -> bool:
    """Every prepared loader has ``state_dict``; it works for a ``StatefulDataLoader``.

    Source: accelerate 1.15, data_loader.py (DataLoaderAdapter).
    """
    return bool(getattr(loader, "use_stateful_dataloader", False))


class _Replayable:
    """A prepared loader as ``Batches`` replays it: without ``state_dict``, and with the generators that matter.

    A seedable sampler makes its generator when it first iterates, and seeds it at every epoch: it has no state.
    Source: accelerate 1.15, data_loader.py (SeedableRandomSampler, DataLoaderShard.synchronized_generator).
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Any:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def generator(self) -> torch.Generator | None:
        """Of the loader itself: its workers' seeds."""
        return getattr(self._loader, "generator", None)

    @property
    def sampler(self) -> Any:
        sampler = get_sampler(self._loader)
        return None if isinstance(sampler, SeedableRandomSampler) else sampler

    @property
    def batch_sampler(self) -> Any:
        """Where ``Batches`` looks next: the generator that processes share, of a data set without a sampler."""
        return SimpleNamespace(generator=getattr(self._loader, "synchronized_generator", None))
