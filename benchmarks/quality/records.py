"""One JSON file per finished piece of work; work whose file is there, with the same settings, is not done again."""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from configurations import Configuration, plan_saves, strategy_text
from corpus import Corpus
from settings import Regime, Settings


def describe_machine() -> dict[str, Any]:
    """As every other benchmark does."""
    environment = runpy.run_path(str(Path(__file__).parents[1] / "environment.py"))
    description: dict[str, Any] = environment["describe"]()
    return description


def describe_work(
    settings: Settings, regime: Regime, seed: int, configuration: Configuration, corpus: Corpus
) -> dict[str, Any]:
    """All that a result depends on; plain JSON."""
    shared = asdict(settings)
    for name in ("regimes", "seeds", "base", "compared"):
        del shared[name]
    if settings.device == "cpu":
        del shared["device"]  # as in results from before there was another
    if configuration.failures < 2:
        del shared["failure_steps"]
    work = {
        **shared,
        "regime": asdict(regime),
        "base": asdict(settings.base) if regime.from_base else None,
        "seed": seed,
        "configuration": asdict(configuration),
        "strategy_text": strategy_text(configuration.strategy, regime),
        "first_save": plan_saves(configuration, regime, seed)[0] if configuration.is_saved else None,
        "corpus_digest": corpus.digest,
        "torch": torch.__version__,
    }
    plain: dict[str, Any] = json.loads(json.dumps(work))
    return plain


def result_path(directory: Path, regime: Regime, seed: int, configuration: Configuration) -> Path:
    return directory / f"{regime.name}-seed{seed}-{configuration.name}.json"


def find_result(path: Path, work: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result, if it is of the same work."""
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["result"] if record["work"] == work else None


def keep_result(path: Path, work: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    record = {"result": result, "work": work, "environment": describe_machine()}
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
