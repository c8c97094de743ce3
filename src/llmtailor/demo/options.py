"""What the demo is asked to do, checked before anything starts. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidInputError
from ..strategies import parse_strategy

__all__ = ["SIZES", "DemoOptions", "ModelSize", "needed_nbytes", "plan_kill_step"]

# fp32 weights and AdamW's two moments.
_STATE_NBYTES_PER_PARAMETER = 12
# The reference run keeps this many checkpoints; one more exists while the next is written.
REFERENCE_KEPT = 2
_SPARE_NBYTES = 64 * 2**20
# Before the killed save there are a full one and a selective one to resume from, and after it at least one more.
_FEWEST_SAVES = 4
_KILL_FRACTION = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """A Llama-type model over bytes, and what one training step of it sees."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    sequence: int
    """Bytes of text per sequence."""
    batch: int
    """Sequences per step."""
    validation_sequences: int
    learning_rate: float

    @property
    def num_parameters(self) -> int:
        """Exact for an untied head and 256 tokens."""
        block = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.blocks * block + 2 * 256 * self.hidden + self.hidden

    @property
    def state_nbytes(self) -> int:
        """Bytes of weights and optimizer state, about those of a full save."""
        return self.num_parameters * _STATE_NBYTES_PER_PARAMETER


SIZES = {
    "tiny": ModelSize(
        hidden=64,
        intermediate=192,
        blocks=4,
        heads=4,
        sequence=64,
        batch=4,
        validation_sequences=16,
        learning_rate=3e-3,
    ),
    "small": ModelSize(
        hidden=192,
        intermediate=768,
        blocks=8,
        heads=6,
        sequence=64,
        batch=8,
        validation_sequences=96,
        learning_rate=2e-3,
    ),
    "medium": ModelSize(
        hidden=384,
        intermediate=1152,
        blocks=12,
        heads=6,
        sequence=192,
        batch=8,
        validation_sequences=64,
        learning_rate=1e-3,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What to run.

    Raises:
        InvalidInputError: A number out of range, an unknown size or strategy, or too few saves to kill one of.
    """

    steps: int = 120
    size: str = "small"
    strategy: str = "parity"
    save_steps: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("save_steps", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise InvalidInputError(
                    f"{name.replace('_', '-')} is too small", kind="out-of-range", expected=f">= {least}", found=value
                )
        if self.size not in SIZES:
            raise InvalidInputError(
                f"there is no size {self.size!r}", kind="unknown-size", expected=", ".join(SIZES), found=self.size
            )
        parse_strategy(self.strategy)
        if self.steps < _FEWEST_SAVES * self.save_steps:
            raise InvalidInputError(
                "too few saves: one is to be killed, with two before it and one after it",
                kind="too-few-saves",
                expected=f"steps >= {_FEWEST_SAVES} * save-steps = {_FEWEST_SAVES * self.save_steps}",
                found=f"steps = {self.steps}",
                hint="more --steps, or a smaller --save-steps",
            )

    @property
    def model(self) -> ModelSize:
        return SIZES[self.size]


def plan_kill_step(steps: int, save_steps: int) -> int:
    """The save that is to be killed: at about 60 % of the run, with two saves before it and one after it.

    >>> plan_kill_step(120, 8)
    72
    """
    saves = steps // save_steps
    return save_steps * min(max(3, round(_KILL_FRACTION * saves)), saves - 1)


def needed_nbytes(options: DemoOptions) -> int:
    """Room the demo may take on disk, at most: both runs' checkpoints as if every save were full."""
    saves = -(-options.steps // options.save_steps)
    return options.model.state_nbytes * (saves + 1 + min(saves, REFERENCE_KEPT + 1)) + _SPARE_NBYTES
