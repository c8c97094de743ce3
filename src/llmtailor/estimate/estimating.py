"""What the checkpoints of a run take, for one strategy or several. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..codecs import Rest
from ..errors import InvalidInputError, UnsupportedError
from ..strategies import Strategy, parse_strategy
from .assumed import DEFAULT_DRIFT_PER_STEP
from .model import ModelTensors
from .simulation import Schedule, SimulatedSave, simulate
from .sizes import LayerSize, measure_layers
from .training import Training

__all__ = ["Estimate", "Refusal", "StrategyEstimate", "estimate_runs", "list_strategies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyEstimate:
    """A run with one strategy."""

    label: str
    """The strategy, as it was asked for."""
    strategy: str
    """Canonical text."""
    saves: tuple[SimulatedSave, ...]
    """Oldest first; empty if the run ends before the first."""
    is_drift_assumed: bool
    """The strategy looks at how layers move, which is not known."""
    has_own_steps: bool
    """Saves are not at the steps of the schedule, but at the strategy's own."""

    @property
    def run_nbytes(self) -> int:
        """Written by the whole run."""
        return sum(save.written_nbytes for save in self.saves)

    @property
    def mean_nbytes(self) -> float:
        """Written by a save; 0 without saves, as all below."""
        return self.run_nbytes / len(self.saves) if self.saves else 0.0

    @property
    def min_nbytes(self) -> int:
        return min((save.written_nbytes for save in self.saves), default=0)

    @property
    def max_nbytes(self) -> int:
        return max((save.written_nbytes for save in self.saves), default=0)

    @property
    def disk_nbytes(self) -> int:
        """On the disk at the end; a file that several checkpoints share counts once."""
        return self.saves[-1].disk_nbytes if self.saves else 0

    @property
    def peak_disk_nbytes(self) -> int:
        """The most there ever is on the disk."""
        return max((save.peak_disk_nbytes for save in self.saves), default=0)

    @property
    def max_staleness(self) -> int:
        return max((save.max_staleness for save in self.saves), default=0)

    @property
    def max_exact_age(self) -> int:
        return max((save.max_exact_age for save in self.saves), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A strategy that cannot choose among the layers of this model."""

    label: str
    what: str
    """Why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What the checkpoints of a run take."""

    model: ModelTensors
    training: Training | None
    """None if optimizer state and types are those of the checkpoint that the model was read from."""
    schedule: Schedule
    ranks: int
    rest: str
    drift_per_step: float
    layers: tuple[LayerSize, ...]
    full: StrategyEstimate
    """Every layer at every save, for comparison."""
    runs: tuple[StrategyEstimate, ...]
    refusals: tuple[Refusal, ...]

    @property
    def checkpoint_nbytes(self) -> int:
        """Of a full checkpoint: the files of its layers."""
        return sum(layer.exact_nbytes for layer in self.layers)

    @property
    def rank_nbytes(self) -> int:
        """Of it, what the rank writes that writes most."""
        return sum(layer.rank_nbytes for layer in self.layers)

    @property
    def bytes_per_parameter(self) -> float:
        return self.checkpoint_nbytes / max(1, self.model.num_parameters)

    def ratio(self, run: StrategyEstimate) -> float:
        """Bytes written, relative to those of full saves at the steps of the schedule."""
        return run.run_nbytes / self.full.run_nbytes if self.full.run_nbytes else 0.0


def list_strategies(layers: Sequence[LayerSize], schedule: Schedule) -> tuple[str, ...]:
    """One strategy of each kind that is built in, as text.

    Args:
        layers: What they take; budgets are half of that.
        schedule: How often is saved.
    """
    rate = max(1, sum(layer.nbytes for layer in layers) // (2 * schedule.every))
    return (
        "full",
        "parity",
        "filter",
        "round_robin",
        "top_k(4)",
        "drift(0.02)",
        "budget(0.5)",
        f"budget_per_step({rate})",
        "monitored(0.01)",
    )


def estimate_runs(
    model: ModelTensors,
    schedule: Schedule,
    *,
    training: Training | None = None,
    strategies: Sequence[str | Strategy] | None = None,
    rest: Rest | None = None,
    ranks: int = 1,
    packs_masters: bool = False,
    drift_per_step: float = DEFAULT_DRIFT_PER_STEP,
) -> Estimate:
    """Estimate what runs write and take.

    Counted are the files of layers, headers included. Not counted are small files (manifest, scheduler, tokenizer).

    Args:
        model: What is trained.
        schedule: When it is saved, and what stays.
        training: How it is trained; None for what the checkpoint holds that the model was read from, or else for the
            defaults of ``Training``.
        strategies: Which to look at; None for one of each kind that is built in, without those that cannot choose here.
        rest: How layers are written that a strategy does not choose; None leaves them as they are.
        ranks: See ``measure_layers``.
        packs_masters: See ``measure_layers``.
        drift_per_step: See ``assume_drift``.

    Raises:
        InvalidInputError: A strategy that was asked for is none, or cannot choose among these layers; a glob of
            ``Training.trainable`` is of no parameter; there are no ranks, or too many saves.
        UnsupportedError: Layers that are spread over ranks are to be coded, or their masters packed.
    """
    if training is None and model.state is None:
        training = Training()
    if ranks > 1 and (rest is not None or packs_masters):
        raise _refuse_ranks(ranks, rest)
    layers = measure_layers(model, training, rest=rest, ranks=ranks, packs_masters=packs_masters)
    runs: list[StrategyEstimate] = []
    refusals: list[Refusal] = []
    for strategy in list_strategies(layers, schedule) if strategies is None else strategies:
        try:
            runs.append(_run(strategy, layers, schedule, rest, drift_per_step))
        except InvalidInputError as err:
            if strategies is not None:
                raise
            refusals.append(Refusal(label=str(strategy), what=err.what))
    return Estimate(
        model=model,
        training=training,
        schedule=schedule,
        ranks=ranks,
        rest="skip" if rest is None else rest.text,
        drift_per_step=drift_per_step,
        layers=layers,
        full=_run("full", layers, schedule, None, drift_per_step),
        runs=tuple(runs),
        refusals=tuple(refusals),
    )


def _refuse_ranks(ranks: int, rest: Rest | None) -> UnsupportedError:
    """As a run refuses codes; and it packs no masters there."""
    what = "codes" if rest is not None else "packed masters"
    return UnsupportedError(
        f"{what} of layers that are spread over ranks are not supported yet",
        kind="sharded-codes",
        expected="one rank, or every layer exactly and in full",
        found=f"{what} with {ranks} ranks",
        hint="leave one of them out; where every rank holds the whole state (DDP), the ranks are not asked for",
    )


def _run(
    asked: str | Strategy, layers: Sequence[LayerSize], schedule: Schedule, rest: Rest | None, drift_per_step: float
) -> StrategyEstimate:
    strategy = parse_strategy(asked)
    saves = simulate(strategy, layers, schedule, is_coded=rest is not None, drift_per_step=drift_per_step)
    return StrategyEstimate(
        label=asked if isinstance(asked, str) else strategy.text,
        strategy=strategy.text,
        saves=saves,
        is_drift_assumed=strategy.needs_drift,
        has_own_steps=[save.step for save in saves] != [*schedule.save_steps()],
    )
