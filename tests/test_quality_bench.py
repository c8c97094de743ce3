"""The benchmark of quality, end to end, on a model of a few thousand parameters."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "quality"
NAMES = ["reference", "noise", "stale-2", "stale-4", "full-skip-every2", "parity-skip-every2"]
SEVERAL = "parity-skip-every2-failures2"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARK))
    names = ("configurations", "settings", "run", "summary", "training")
    return {name: importlib.import_module(name) for name in names}


def tiny_settings(settings: ModuleType) -> Any:
    shared = {"steps": 12, "failure_step": 8, "warmup": 2, "lr": 1e-2, "final_lr_share": 0.1, "betas": (0.9, 0.99)}
    regimes = [
        settings.Regime(name=name, title=name, corpus=corpus, from_base=from_base, weight_decay=0.1, **shared)
        for name, corpus, from_base in (("P", "prose", False), ("F", "code", True), ("base", "prose", False))
    ]
    return settings.Settings(
        model=settings.ModelSize(vocabulary=300, hidden=16, layers=4, intermediate=24, heads=2),
        regimes=tuple(regimes[:2]),
        base=regimes[2],
        seeds=(0,),
        sequence_length=16,
        batch_size=2,
        validation_sequences=4,
        corpus_chars=40_000,
        interval=2,
        stale_ages=(2, 4),
        failure_steps=(4, 10),
        last_losses=2,
    )


def read_result(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())["result"]
    return result


def test_the_benchmark_of_quality_runs_once_and_full_is_bit_identical(
    modules: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    settings = tiny_settings(modules["settings"])
    results, cache, names = tmp_path / "results" / "quality", tmp_path / "cache", [*NAMES, SEVERAL]

    assert modules["run"].run_all(settings, results, cache, names) == 2 * len(names)
    assert modules["run"].run_all(settings, results, cache, names) == 0

    for regime in ("P", "F"):
        full = read_result(results / f"{regime}-seed0-full-skip-every2.json")
        parity = read_result(results / f"{regime}-seed0-parity-skip-every2.json")
        assert full["is_identical"]
        assert not parity["is_identical"]
        assert parity["bytes_per_save"] < 0.7 * full["bytes_per_save"]

    rows = modules["summary"].publish(settings, results, cache)
    assert json.loads((results.parent / "quality.json").read_text())["rows"] == rows
    assert (results.parent / "quality.png").stat().st_size > 10_000
    assert "0, bit for bit" in capsys.readouterr().out


def test_results_are_kept_under_the_name_of_what_is_measured(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = modules["run"], modules["settings"]
    tiny = tiny_settings(settings)
    monkeypatch.setattr(settings, "LARGE", replace(tiny, base=replace(tiny.base, steps=2)))
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run.os, "nice", lambda by: by)
    monkeypatch.setattr(run.torch, "use_deterministic_algorithms", lambda wanted: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["run.py", "--large", "--regime", "F", "reference"])
    run.main()
    assert [path.name for path in (tmp_path / "results" / "quality-large").iterdir()] == ["F-seed0-reference.json"]


def test_steps_lost_are_read_between_the_references(modules: dict[str, ModuleType]) -> None:
    steps_lost = modules["summary"].steps_lost
    references = [(20, 0.1), (40, 0.4)]
    assert steps_lost(0.05, references) == pytest.approx(10)
    assert steps_lost(0.25, references) == pytest.approx(30)
    assert steps_lost(0.7, references) == pytest.approx(60)
    assert steps_lost(-0.01, references) == pytest.approx(-2)
    assert steps_lost(0.1, [(20, 0.1), (40, 0.05)]) is None


def test_references_that_do_not_ascend_are_those_of_no_seed(modules: dict[str, ModuleType]) -> None:
    settings = tiny_settings(modules["settings"])
    find = modules["summary"]._find_references

    def seeds(*differences: tuple[float, float]) -> dict[int, Any]:
        pairs = [
            {f"stale-{age}": {"difference_at_end": each} for age, each in zip((2, 4), pair, strict=True)}
            for pair in differences
        ]
        return dict(enumerate(pairs))

    assert find(settings, seeds((0.1, 0.2), (0.2, 0.4))) == ({0: [(2, 0.1), (4, 0.2)], 1: [(2, 0.2), (4, 0.4)]}, True)
    means, is_of_seed = find(settings, seeds((0.1, 0.2), (-0.05, 0.4)))
    assert not is_of_seed
    assert means[0] == means[1] == [(2, pytest.approx(0.025)), (4, pytest.approx(0.3))]


def test_what_is_compared_of_the_large_model_can_be_run(modules: dict[str, ModuleType]) -> None:
    """A name that no configuration has would be left out without a word."""
    large = modules["settings"].LARGE
    planned = [each.name for each in modules["configurations"].list_configurations(large)]
    assert sorted(planned) == sorted(large.compared)
    assert modules["training"].count_parameters(large.model, large.sequence_length) >= 100_000_000
