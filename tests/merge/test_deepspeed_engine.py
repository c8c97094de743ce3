"""What DeepSpeed's engine holds after it loaded a written checkpoint: every variant there is a small real one of.

The HF Trainer's default (two groups, no frozen or tied parameters) is in ``test_deepspeed_resume``.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compat.make_deepspeed import FIXTURES
from formats.deepspeed_files import DIRECTORY, TAG, fixture_truth
from formats.simple_writer import write_checkpoint
from llmtailor.formats.deepspeed import open_deepspeed, plan_deepspeed
from merge.deepspeed_stock import read_consolidated
from merge.deepspeed_training import Training, digest, run_trainings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# An elastic checkpoint of torch's AdamW cannot be loaded by the version that wrote it: it asks for a step that it
# only writes for optimizers that count in their groups (stage_1_and_2.py, _restore_step_from_elastic_checkpoint).
ENGINES = {name: settings for name, (_, settings) in FIXTURES.items() if settings["engine"] and "elastic" not in name}
# What DeepSpeed has to compile first.
if not (shutil.which("g++") and shutil.which("ninja")):
    ENGINES = {name: settings for name, settings in ENGINES.items() if settings.get("optimizer") != "config"}
START, END = 3, 5
CASES = [(name, ranks) for name in ENGINES for ranks in (2, 3)]
EVERY_CASE = pytest.mark.parametrize(("name", "ranks"), CASES)


@dataclass(frozen=True)
class Loads:
    root: Path

    def checkpoint(self, name: str, ranks: int) -> Path:
        return self.root / f"{name}-on-{ranks}"

    def training(self, name: str, ranks: int) -> Training:
        out = str(self.root / f"{name}-on-{ranks}-resumed")
        where = str(self.checkpoint(name, ranks))
        settings: dict[str, Any] = {**ENGINES[name], "out": out, "resume": where}
        return Training(**settings, steps=END, save_steps=END, seed=7)

    def report(self, name: str, ranks: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.training(name, ranks).report.read_text())
        return found


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Loads:
    loads = Loads(tmp_path_factory.mktemp("loads"))
    for ranks in (2, 3):
        for name in ENGINES:
            write_checkpoint(
                plan_deepspeed(open_deepspeed(DIRECTORY / name), ranks=ranks), loads.checkpoint(name, ranks)
            )
        trainings = [loads.training(name, ranks) for name in ENGINES]
        run_trainings(trainings, ranks=ranks, scratch=loads.root, timeout_secs=400)
    return loads


@EVERY_CASE
def test_training_goes_on(loads: Loads, name: str, ranks: int) -> None:
    report = loads.report(name, ranks)
    assert (report["start"], report["steps"]) == (START, END)
    assert all(0 < loss < 10 for loss in report["losses"])
    assert len(report["losses"]) == END - START


@EVERY_CASE
def test_engine_holds_the_weights_it_held_when_it_saved(loads: Loads, name: str, ranks: int) -> None:
    assert report_of(loads, name, ranks)["weights"] == fixture_truth(name)["weights"]


@pytest.mark.parametrize(("name", "ranks"), [(name, ranks) for name, ranks in CASES if "round-robin" not in name])
def test_engine_holds_the_masters_and_moments_it_held_when_it_saved(loads: Loads, name: str, ranks: int) -> None:
    loaded, truth = report_of(loads, name, ranks), fixture_truth(name)
    assert loaded["master"] == truth["master"]
    assert loaded["state"] == truth["state"]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", [name for name in ENGINES if "round-robin" in name])
def test_deepspeed_reads_masters_and_moments_dealt_round_robin(loads: Loads, name: str, ranks: int) -> None:
    """Not from the live engine: with round_robin_gradients its own view of single parameters is wrong."""
    truth = fixture_truth(name)
    tag_dir = loads.checkpoint(name, ranks) / TAG
    assert {fqn: digest(each) for fqn, each in read_consolidated(tag_dir).items()} == truth["master"]
    for leaf in ("exp_avg", "exp_avg_sq"):
        for fqn, tensor in read_consolidated(tag_dir, leaf).items():
            assert digest(tensor) == truth["state"][fqn][leaf], (leaf, fqn)


def report_of(loads: Loads, name: str, ranks: int) -> dict[str, Any]:
    loaded: dict[str, Any] = loads.report(name, ranks)["loaded"]
    return loaded
