"""What is measured: the model, the two regimes, and all that has to be the same for a kept result to count."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """A Llama with an untied head, in fp32."""

    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 10
    intermediate: int = 512
    heads: int = 6
    initializer_range: float = 0.06
    """About 1 / sqrt(hidden); the usual 0.02 is made for wider models and learns slower here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """A training with AdamW: linear warmup, then a cosine."""

    name: str
    title: str
    corpus: str
    """``prose`` or ``code``."""
    from_base: bool
    """Continue the base model with a new optimizer, instead of starting from random weights."""
    steps: int
    failure_step: int
    """Where the runs with one failure are restored; every configuration saves there."""
    warmup: int
    lr: float
    final_lr_share: float
    betas: tuple[float, float]
    weight_decay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that is measured is a function of these, of the texts and of torch's version."""

    model: ModelSize = ModelSize()
    regimes: tuple[Regime, ...]
    base: Regime
    """The one longer pre-training that regimes continue; never fails."""
    seeds: tuple[int, ...] = (0, 1, 2)
    sequence_length: int = 64
    batch_size: int = 4
    validation_sequences: int = 64
    corpus_chars: int = 6_000_000
    """Of each text to train on, at most; an eighth of it to validate on."""
    interval: int = 20
    """Steps between two saves of ``full``, and of all that is compared at equal interval."""
    stale_ages: tuple[int, ...] = (20, 40, 80, 140)
    """Of the references whose layers are all so many steps stale."""
    failure_steps: tuple[int, ...] = (60, 80, 120, 140, 160)
    """Of the runs with five failures; after odd and after even saves, so that either half of ``parity`` is stale."""
    last_losses: int = 20
    """Steps over which the training losses at the end are averaged."""
    device: str = "cpu"
    """Where it trains: ``cpu``, on one thread, or ``cuda``, with matrix products in TF32."""
    compared: tuple[str, ...] = ()
    """Names of configurations; all if empty."""


PRETRAINING = Regime(
    name="P",
    title="pre-training from scratch, English",
    corpus="prose",
    from_base=False,
    steps=190,
    failure_step=150,
    warmup=20,
    lr=2e-3,
    final_lr_share=0.1,
    betas=(0.9, 0.95),
    weight_decay=0.1,
)
FINE_TUNING = Regime(
    name="F",
    title="fine-tuning of the base model, on code",
    corpus="code",
    from_base=True,
    steps=190,
    failure_step=150,
    warmup=15,
    lr=2e-4,
    final_lr_share=0.0,
    betas=(0.9, 0.999),
    weight_decay=0.0,
)
BASE = Regime(
    name="base",
    title="the base model, English",
    corpus="prose",
    from_base=False,
    steps=900,
    failure_step=900,
    warmup=30,
    lr=2e-3,
    final_lr_share=0.1,
    betas=(0.9, 0.95),
    weight_decay=0.1,
)
FULL = Settings(regimes=(PRETRAINING, FINE_TUNING), base=BASE)
LARGE = Settings(
    model=ModelSize(vocabulary=8192, hidden=768, layers=14, intermediate=2048, heads=12, initializer_range=0.02),
    regimes=(
        replace(PRETRAINING, steps=100, failure_step=80, warmup=10, lr=6e-4),
        replace(FINE_TUNING, steps=100, failure_step=80, warmup=8, lr=1e-4),
    ),
    base=replace(BASE, steps=500, failure_step=500, lr=6e-4),
    batch_size=2,
    validation_sequences=32,
    interval=10,
    stale_ages=(10, 20, 40, 70),
    failure_steps=(30, 40, 60, 70, 80),
    last_losses=10,
    compared=(
        "reference",
        "noise",
        *(f"stale-{age}" for age in (10, 20, 40, 70)),
        "full-skip-every10",
        *(f"round_robin-{rest}-every10" for rest in ("q8", "q4")),
        *(f"{name}-{rest}-every10" for name in ("parity", "filter", "top_drift") for rest in ("skip", "q8", "q4")),
        "parity-skip-every5",
        "filter-skip-every3",
        "top_drift-skip-every5",
        "round_robin-q8-every3",
        "round_robin-q4-every2",
        *(f"{name}-every10-failures5" for name in ("parity-skip", "parity-q4", "round_robin-q4")),
    ),
)
"""112 M parameters; half as long and half the batch of the other, for some three hours of one core."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that say which settings are meant, the same for measuring and for summing up."""
    parser.add_argument("--large", action="store_true", help="112 M parameters instead of 5 M, and fewer comparisons")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")


def choose_settings(options: argparse.Namespace) -> tuple[Settings, str]:
    """What the options mean, and the name of its results."""
    settings = replace(LARGE if options.large else FULL, device=options.device)
    return settings, "quality" + "-large" * options.large + "-cuda" * (options.device == "cuda")


def cache_directory() -> Path:
    """Where tokens and the base model are kept, outside the repository."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "llmtailor" / "quality"
