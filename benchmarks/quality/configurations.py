"""What is compared: how a run saves, how often, how often it fails; and the references that failures are read by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from settings import Regime, Settings

from llmtailor.engine_options import EngineOptions

SKIP = "skip"

STRATEGIES = {
    "full": "full",
    "parity": "parity",
    "filter": "filter(first=1, last=1, every=5)",
    "top_drift": "",
    "top_adam": "",
    "round_robin": "round_robin(20)",
    "round_robin_10": "round_robin(10)",
    "top_k": "top_k(2)",
    "budget": "budget(0.5)",
    "budget_per_step": "budget_per_step(3128486)",
    "budget_per_step_free": "budget_per_step(3128500, first=0, last=0, auxiliary=False)",
    "drift": "",
    "monitored": "",
}
"""Name -> text for ``Run``; empty for those of ``selection``, and for those that are set for each regime."""

_OF_REGIME = {
    ("drift", "P"): "drift(0.048, first=0, last=0, auxiliary=False)",
    ("drift", "F"): "drift(0.0075, first=0, last=0, auxiliary=False)",
    ("monitored", "P"): "monitored(0.02, end=0.0024, decay=30, first=0, last=0, auxiliary=False)",
    ("monitored", "F"): "monitored(0.002, end=0.00042, decay=30, first=0, last=0, auxiliary=False)",
}
"""Thresholds with which seed 0 writes about as many bytes as ``full`` every 20 steps. They were found by trying, with
the whole run known: no user can."""

_CYCLES = {"parity": 2, "filter": 5, "round_robin": 20, "round_robin_10": 10}
"""Saves after which a strategy writes the same share again."""
_SHORTER = {
    ("parity", SKIP): 0.5,
    ("top_drift", SKIP): 0.5,
    ("top_adam", SKIP): 0.5,
    ("filter", SKIP): 0.25,
    ("round_robin", "q8"): 0.3,
    ("round_robin", "q4"): 0.2,
    ("round_robin_10", SKIP): 0.1,
    ("top_k", SKIP): 0.5,
    ("budget", SKIP): 0.5,
    ("budget_per_step", SKIP): 0.45,
    ("budget_per_step_free", SKIP): 0.1,
    ("drift", SKIP): 0.25,
    ("monitored", SKIP): 0.25,
}
"""Share of the interval of ``full`` at which these write as many bytes per step, or a little less; what they wrote is
measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One way to save, and how many failures."""

    strategy: str
    """A key of ``STRATEGIES``; ``stale`` and ``noise`` are restored from no checkpoint."""
    rest: str = SKIP
    interval: int
    """Steps between saves; of ``stale``, how many steps old all layers are."""
    failures: int = 1

    @property
    def name(self) -> str:
        if self.strategy in {"reference", "noise"}:
            return self.strategy
        if self.strategy == "stale":
            return f"stale-{self.interval}"
        text = f"{self.strategy}-{self.rest}-every{self.interval}"
        return text if self.failures == 1 else f"{text}-failures{self.failures}"

    @property
    def is_saved(self) -> bool:
        """True if it has checkpoints."""
        return self.strategy in STRATEGIES

    @property
    def cycle(self) -> int:
        """Bytes are averaged over a multiple of so many saves."""
        return _CYCLES.get(self.strategy, 1)


def strategy_text(strategy: str, regime: Regime) -> str:
    """What ``Run`` is told; empty for strategies of ``selection``, and for references."""
    return _OF_REGIME.get((strategy, regime.name)) or STRATEGIES.get(strategy, "")


REFERENCE = Configuration(strategy="reference", interval=0, failures=0)
NOISE = Configuration(strategy="noise", interval=0)


def plan_saves(configuration: Configuration, regime: Regime, seed: int) -> range:
    """Steps at which a run with one failure saves; the last is where it fails.

    What a strategy leaves stale depends on which save is the last. ``parity`` ends on an odd save for odd seeds and on
    an even one for even seeds; ``filter`` ends two saves after a half of the middle was written, which is the mean.
    ``round_robin`` is once round.
    """
    interval, last = configuration.interval, (regime.failure_step - 1) // configuration.interval
    if configuration.strategy == "parity":
        last -= (last - seed) % 2
    if configuration.strategy == "filter" and last >= 2:
        last -= (last - 2) % 5
    if configuration.strategy == "round_robin":
        last = min(last, configuration.cycle)
    return range(regime.failure_step - last * interval, regime.failure_step + 1, interval)


def list_configurations(settings: Settings) -> list[Configuration]:
    """All, the most telling first; those that this version of LLMTailor cannot do are left out."""
    possible = [configuration for configuration in _list_all(settings) if is_possible(configuration)]
    return [each for each in possible if not settings.compared or each.name in settings.compared]


def is_possible(configuration: Configuration) -> bool:
    return configuration.rest == SKIP or "rest" in EngineOptions.__annotations__


def _list_all(settings: Settings) -> Iterator[Configuration]:
    interval = settings.interval
    yield REFERENCE
    yield NOISE
    for age in settings.stale_ages:
        yield Configuration(strategy="stale", interval=age)
    yield Configuration(strategy="full", interval=interval)
    for rest in ("q8", "q4", "compact", "compact4"):
        yield Configuration(strategy="round_robin", rest=rest, interval=interval)
    for rest in (SKIP, "q8", "q4"):
        for strategy in ("parity", "filter", "top_drift", "top_adam"):
            yield Configuration(strategy=strategy, rest=rest, interval=interval)
    for (strategy, rest), share in _SHORTER.items():
        yield Configuration(strategy=strategy, rest=rest, interval=math.ceil(share * interval))
    for strategy, rest in (
        ("parity", SKIP), ("filter", SKIP), ("top_drift", SKIP),
        ("round_robin", "q8"), ("round_robin", "q4"), ("parity", "q8"), ("parity", "q4"),
    ):  # fmt: skip
        failures = len(settings.failure_steps)
        yield Configuration(strategy=strategy, rest=rest, interval=interval, failures=failures)
