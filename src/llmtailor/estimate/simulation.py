"""The saves of a run, one after the other, by the strategy that would choose them. Pure.

What ``save_plan`` and retention do to files, done to their sizes: a layer that is not chosen keeps its files, so the
next checkpoint has them too, and a file is on the disk as long as any checkpoint has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import InvalidInputError
from ..retention import Keep, Kept, choose_removals
from ..strategies import LayerStatus, SaveContext, Strategy, choose_layers
from .assumed import DEFAULT_DRIFT_PER_STEP, assume_drift
from .sizes import LayerSize

__all__ = ["Schedule", "SimulatedSave", "simulate"]

_MAX_SAVES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When a run saves, and what stays."""

    steps: int
    """Optimizer steps of the run."""
    every: int
    """Steps between two saves, unless the strategy decides that."""
    is_resumed: bool = False
    """The run goes on from a full checkpoint of step 0, which is not written anew."""
    keep: Keep = Keep()  # noqa: RUF009

    def __post_init__(self) -> None:
        for name in ("steps", "every"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidInputError(
                    f"{name} makes no sense", kind=name, expected="a whole number, at least 1", found=repr(value)
                )

        self.save_steps()

    def save_steps(self, interval: int | None = None) -> range:
        """Steps at which there is a save.

        Args:
            interval: The strategy's own.

        Raises:
            InvalidInputError: There are too many.
        """
        every = interval or self.every
        if self.steps // every > _MAX_SAVES:
            raise InvalidInputError(
                "the run has more saves than can be looked at one by one",
                kind="steps",
                expected=f"at most {_MAX_SAVES:,}",
                found=f"{self.steps // every:,}: {self.steps:,} steps, a save every {every:,}",
                hint="estimate a part of the run",
            )
        return range(every, self.steps + 1, every)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSave:
    """One save of a run."""

    step: int
    written_nbytes: int
    """Of the layers' files that it writes."""
    num_exact: int
    """Layers that it writes exactly."""
    num_coded: int
    """Layers that it writes as codes."""
    max_staleness: int
    """Steps that the oldest layer of the checkpoint is behind it; codes are of the step they were made at."""
    max_exact_age: int
    """Steps since the oldest layer was last written exactly."""
    peak_disk_nbytes: int
    """Of all files, while it is published and nothing removed yet."""
    disk_nbytes: int
    """After that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    layer: str
    kind: str
    """``weights``, ``optimizer`` or ``codes``."""
    step: int
    """Of the save that wrote it."""
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A layer in a checkpoint."""

    files: tuple[_File, ...]
    saved_step: int
    """As the manifest's: of its plain files."""
    exact_step: int
    state_step: int
    """Of the state that a resume finds."""
    has_exact_weights: bool = True
    """Its weights are right without codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checkpoint:
    step: int
    layers: Mapping[str, _Held]
    has_optimizer: bool = True

    def files(self) -> Iterator[_File]:
        """Those that are on the disk."""
        all_files = (file for held in self.layers.values() for file in held.files)
        return (file for file in all_files if self.has_optimizer or file.kind == "weights")

    @property
    def written_nbytes(self) -> int:
        """Of the files that its own save wrote."""
        return sum(file.nbytes for file in self.files() if file.step == self.step)

    def as_kept(self) -> Kept:
        """As retention sees it."""
        held = self.layers.values()
        return Kept(
            step=self.step,
            is_consistent=all(each.exact_step == self.step for each in held),
            has_optimizer=self.has_optimizer,
            can_thin=all(each.has_exact_weights for each in held),
        )


def simulate(
    strategy: Strategy,
    layers: Sequence[LayerSize],
    schedule: Schedule,
    *,
    is_coded: bool = False,
    drift_per_step: float = DEFAULT_DRIFT_PER_STEP,
) -> tuple[SimulatedSave, ...]:
    """The saves of a run.

    Args:
        strategy: Chooses the layers; if it needs to know how they move, that is assumed.
        layers: What they take.
        schedule: When.
        is_coded: Layers that are not chosen are written as codes, those without ``coded`` exactly.
        drift_per_step: See ``assume_drift``.

    Returns:
        Oldest first; none if the run ends before the first.

    Raises:
        InvalidInputError: The strategy cannot choose among these layers, as a budget that is too small.
    """
    first = tuple(_status(layer, None, 0, strategy, drift_per_step) for layer in layers)
    kept = [_Checkpoint(step=0, layers={each.name: _save_exactly(each, 0) for each in layers})]
    kept = kept if schedule.is_resumed else []
    saves: list[SimulatedSave] = []
    disk_nbytes = _disk_nbytes(kept)
    for number, step in enumerate(schedule.save_steps(strategy.interval(first))):
        previous = kept[-1] if kept else None
        context = SaveContext(
            step=step,
            save_index=number + schedule.is_resumed,
            previous_step=None if previous is None else previous.step,
            layers=tuple(_status(layer, previous, step, strategy, drift_per_step) for layer in layers),
        )
        chosen = {choice.layer for choice in choose_layers(strategy, context) if choice.is_saved}
        held = {each.name: _save(each, previous, step, chosen, is_coded=is_coded) for each in layers}
        checkpoint = _Checkpoint(step=step, layers=held)
        peak_nbytes = disk_nbytes + checkpoint.written_nbytes
        if schedule.keep.is_idle:
            kept, disk_nbytes = [checkpoint], peak_nbytes
        else:
            kept = _retain([*kept, checkpoint], schedule.keep)
            disk_nbytes = _disk_nbytes(kept)
        saves.append(_tell(checkpoint, peak_nbytes=peak_nbytes, disk_nbytes=disk_nbytes))
    return tuple(saves)


def _status(
    layer: LayerSize, previous: _Checkpoint | None, step: int, strategy: Strategy, per_step: float
) -> LayerStatus:
    saved_step = None if previous is None else previous.layers[layer.name].saved_step
    drift = assume_drift(age=step - (saved_step or 0), numel=layer.numel, per_step=per_step)
    return LayerStatus(
        name=layer.name,
        kind=layer.kind,
        stack=layer.stack,
        index=layer.index,
        nbytes=layer.nbytes,
        saved_step=saved_step,
        drift=drift if strategy.needs_drift else None,
    )


def _save(layer: LayerSize, previous: _Checkpoint | None, step: int, chosen: set[str], *, is_coded: bool) -> _Held:
    coded = layer.coded
    if previous is None or layer.name in chosen or (is_coded and coded is None):
        return _save_exactly(layer, step)
    held = previous.layers[layer.name]
    if not is_coded or coded is None:
        return held
    codes = _File(layer=layer.name, kind="codes", step=step, nbytes=coded.codes_nbytes)
    if coded.weights_nbytes:
        weights = _File(layer=layer.name, kind="weights", step=step, nbytes=coded.weights_nbytes)
        return _Held(
            files=(weights, codes),
            saved_step=step,
            exact_step=held.exact_step,
            state_step=step,
            has_exact_weights=coded.has_exact_weights,
        )
    plain = tuple(file for file in held.files if file.kind != "codes")
    return replace(held, files=(*plain, codes), state_step=step, has_exact_weights=False)


def _save_exactly(layer: LayerSize, step: int) -> _Held:
    sizes = {"weights": layer.weights_nbytes, "optimizer": layer.optimizer_nbytes}
    files = (_File(layer=layer.name, kind=kind, step=step, nbytes=nbytes) for kind, nbytes in sizes.items() if nbytes)
    return _Held(files=tuple(files), saved_step=step, exact_step=step, state_step=step)


def _disk_nbytes(checkpoints: Iterable[_Checkpoint]) -> int:
    """Of all files; those that several have count once."""
    return sum(file.nbytes for file in {file for each in checkpoints for file in each.files()})


def _retain(checkpoints: Sequence[_Checkpoint], keep: Keep) -> list[_Checkpoint]:
    choice = choose_removals([each.as_kept() for each in checkpoints], keep)
    return [
        replace(each, has_optimizer=each.has_optimizer and each.step not in choice.thinned)
        for each in checkpoints
        if each.step not in choice.removed
    ]


def _tell(checkpoint: _Checkpoint, *, peak_nbytes: int, disk_nbytes: int) -> SimulatedSave:
    step, held = checkpoint.step, checkpoint.layers.values()
    return SimulatedSave(
        step=step,
        written_nbytes=checkpoint.written_nbytes,
        num_exact=sum(each.exact_step == step for each in held),
        num_coded=sum(each.state_step == step != each.exact_step for each in held),
        max_staleness=max((step - each.state_step for each in held), default=0),
        max_exact_age=max((step - each.exact_step for each in held), default=0),
        peak_disk_nbytes=peak_nbytes,
        disk_nbytes=disk_nbytes,
    )
