"""Merged DeepSpeed checkpoints, resumed by the real HF Trainer under the real DeepSpeed, on 2 and 3 ranks.

Each launch does many trainings, so the cases are made together, once for all tests. What a checkpoint must hold comes
from DeepSpeed alone: digests of its live values, and its own consolidation of the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtailor
from llmtailor.assembly import execute
from llmtailor.catalog import Catalog
from llmtailor.formats.deepspeed import open_deepspeed, plan_deepspeed
from merge.deepspeed_stock import read_consolidated
from merge.deepspeed_training import Training, digest, run_trainings
from merge.merges import merge_layers, merge_with_itself

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STAGES, RANKS, DTYPES = (1, 2, 3), (2, 3), ("bf16", "fp32")
OLD, NEW, END = 5, 10, 15
CASES = [(stage, ranks, dtype) for stage in STAGES for ranks in RANKS for dtype in DTYPES]
EVERY_CASE = pytest.mark.parametrize(("stage", "ranks", "dtype"), CASES)
LEAVES = ("exp_avg", "exp_avg_sq")
BETAS = {"exp_avg": 0.9, "exp_avg_sq": 0.999}

Case = tuple[int, int, str]
Make = Callable[[Path, Path, Path, int], object]


@dataclass(frozen=True)
class Runs:
    """All trainings and merges."""

    root: Path
    digests: dict[Path, str]
    """Of every file of every source, before the first merge."""

    def source(self, case: Case) -> Training:
        stage, ranks, dtype = case
        return Training(
            out=str(self.root / f"source-z{stage}-{ranks}-{dtype}"), stage=stage, dtype=dtype, steps=END, save_steps=5
        )

    def checkpoint(self, case: Case, step: int) -> Path:
        return Path(self.source(case).out) / f"checkpoint-{step}"

    def merged(self, case: Case, kind: str) -> Path:
        stage, ranks, dtype = case
        return self.root / f"{kind}-z{stage}-{ranks}-{dtype}"

    def resumption(self, case: Case, kind: str) -> Training:
        """Of a merge; case and kind say what it was made from."""
        stage = {"to-stage-2": 2, "to-stage-3": 3, "from-nothing": 2}.get(kind, case[0])
        out = f"{self.merged(case, kind)}-resumed"
        # Another seed: what is not taken from the checkpoint differs.
        return replace(
            self.source(case), out=out, stage=stage, resume=str(self.merged(case, kind)), seed=7, save_steps=100
        )

    def report(self, case: Case, kind: str | None = None) -> dict[str, Any]:
        training = self.source(case) if kind is None else self.resumption(case, kind)
        return json.loads(training.report.read_text())

    def truth(self, case: Case, step: int) -> dict[str, Any]:
        return json.loads(self.source(case).truth(step).read_text())


def stale_parameters(catalog: Catalog) -> list[str]:
    return [fqn for index, layer in enumerate(catalog.layers) if index % 2 == 0 for fqn in layer.fqns]


def stale_layers(path: Path) -> list[str]:
    """Every other layer, which a merge takes from the older checkpoint."""
    return [layer.name for index, layer in enumerate(open_deepspeed(path).layers) if index % 2 == 0]


def make_identity(old: Path, new: Path, output: Path, ranks: int) -> None:
    merge_with_itself(new, output)


def make_parity(old: Path, new: Path, output: Path, ranks: int) -> None:
    merge_layers(new, old, stale_layers(new), output, ranks=ranks)


def make_stage(stage: int) -> Make:
    return lambda old, new, output, ranks: llmtailor.export(new, output, ranks=ranks, zero_stage=stage)


def make_from_nothing(old: Path, new: Path, output: Path, ranks: int) -> None:
    """As of a source of another format, of which DeepSpeed's own files cannot be made again."""
    execute(plan_deepspeed(replace(open_deepspeed(new), native=None), ranks=ranks, stage=2), output)


# Kind of merge -> how it is made of the two checkpoints, and whether for another number of ranks.
MERGES: dict[str, tuple[Make, bool]] = {
    "identity": (make_identity, False),
    "parity": (make_parity, False),
    "other-ranks": (make_parity, True),
}
# Only of the cases they are there for.
FURTHER: dict[tuple[Case, str], tuple[Make, bool]] = {
    ((2, 2, "bf16"), "to-stage-3"): (make_stage(3), False),
    ((3, 2, "bf16"), "to-stage-2"): (make_stage(2), False),
    ((3, 2, "bf16"), "from-nothing"): (make_from_nothing, False),
}


def merges_of(case: Case) -> dict[str, tuple[Make, bool]]:
    return MERGES | {kind: how for (of, kind), how in FURTHER.items() if of == case}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("deepspeed")
    runs = Runs(root, {})
    for ranks in RANKS:
        sources = [runs.source(case) for case in CASES if case[1] == ranks]
        run_trainings(sources, ranks=ranks, scratch=root, timeout_secs=700)
    runs.digests.update(digest_files(runs))
    resumptions: dict[int, list[Training]] = {2: [], 3: []}
    for case in CASES:
        for kind, (make, has_other_ranks) in merges_of(case).items():
            ranks = 5 - case[1] if has_other_ranks else case[1]
            make(runs.checkpoint(case, OLD), runs.checkpoint(case, NEW), runs.merged(case, kind), ranks)
            resumptions[ranks].append(runs.resumption(case, kind))
    for ranks, trainings in resumptions.items():
        run_trainings(trainings, ranks=ranks, scratch=root, timeout_secs=700)
    return runs


def digest_files(runs: Runs) -> dict[Path, str]:
    roots = [runs.checkpoint(case, step) for case in CASES for step in (OLD, NEW)]
    files = [path for root in roots for path in sorted(root.rglob("*")) if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("case", "kind"), [(case, kind) for case in CASES for kind in merges_of(case)])
def test_every_merge_resumes_for_5_steps_where_state_from_stopped(runs: Runs, case: Case, kind: str) -> None:
    report = runs.report(case, kind)
    assert (report["start"], report["steps"]) == (NEW, END)
    assert len(report["losses"]) == END  # the Trainer keeps those of the steps before
    assert all(0 < loss < 10 for loss in report["losses"])


@EVERY_CASE
def test_merge_of_one_checkpoint_with_itself_trains_on_bit_for_bit(
    runs: Runs, stage: int, ranks: int, dtype: str
) -> None:
    case = (stage, ranks, dtype)
    straight, resumed = runs.report(case), runs.report(case, "identity")
    assert resumed["losses"] == straight["losses"]
    assert resumed["end"] == straight["end"]
    assert resumed["loaded"] == runs.truth(case, NEW)


@EVERY_CASE
def test_engine_holds_what_each_layer_had_when_it_was_saved(runs: Runs, stage: int, ranks: int, dtype: str) -> None:
    case = (stage, ranks, dtype)
    old, new = runs.truth(case, OLD), runs.truth(case, NEW)
    stale = set(stale_parameters(open_deepspeed(runs.checkpoint(case, NEW))))
    assert 0 < len(stale) < len(new["weights"])
    for kind in ("parity", "other-ranks"):
        loaded = runs.report(case, kind)["loaded"]
        for content in ("master", "weights"):
            for fqn, found in loaded[content].items():
                assert found == (old if fqn in stale else new)[content][fqn], (kind, content, fqn)
        for fqn, found in loaded["state"].items():
            if fqn not in stale:
                assert found == new["state"][fqn], (kind, fqn)


@EVERY_CASE
def test_deepspeed_consolidates_the_tensors_of_the_sources(runs: Runs, stage: int, ranks: int, dtype: str) -> None:
    case = (stage, ranks, dtype)
    stale = set(stale_parameters(open_deepspeed(runs.checkpoint(case, NEW))))
    for leaf in (None, *LEAVES):
        old, new, merged, spread = (
            read_consolidated(path, leaf)
            for path in (
                runs.checkpoint(case, OLD) / f"global_step{OLD}",
                runs.checkpoint(case, NEW) / f"global_step{NEW}",
                runs.merged(case, "parity") / f"global_step{NEW}",
                runs.merged(case, "other-ranks") / f"global_step{NEW}",
            )
        )
        assert merged.keys() == spread.keys() == new.keys()
        for fqn, found in merged.items():
            expected = new[fqn]
            if fqn in stale:
                expected = old[fqn]
                if leaf is not None:
                    factor = (1 - BETAS[leaf] ** NEW) / (1 - BETAS[leaf] ** OLD)
                    expected = (expected.double() * factor).float()
            assert digest(found) == digest(spread[fqn]) == digest(expected), (leaf, fqn)


@EVERY_CASE
def test_schedule_random_state_and_step_are_those_of_state_from(runs: Runs, stage: int, ranks: int, dtype: str) -> None:
    case = (stage, ranks, dtype)
    merged, new = runs.merged(case, "parity"), runs.checkpoint(case, NEW)
    for name in ("scheduler.pt", "trainer_state.json", *(f"rng_state_{rank}.pth" for rank in range(ranks))):
        assert (merged / name).read_bytes() == (new / name).read_bytes(), name
    parity, identity = runs.report(case, "parity"), runs.report(case, "identity")
    for key in ("start", "start_lr", "start_rng"):
        assert parity[key] == identity[key], key
    assert parity["losses"] != identity["losses"]


@pytest.mark.parametrize("case_and_kind", [*FURTHER], ids=lambda each: each[1])
def test_other_stages_and_new_files_hold_the_same_tensors(runs: Runs, case_and_kind: tuple[Case, str]) -> None:
    case, kind = case_and_kind
    loaded, truth = runs.report(case, kind)["loaded"], runs.truth(case, NEW)
    assert loaded == truth


def test_sources_are_unchanged(runs: Runs) -> None:
    assert digest_files(runs) == runs.digests


def test_new_files_load_with_stock_torch(runs: Runs) -> None:
    file = next(iter((runs.merged((3, 2, "bf16"), "parity") / f"global_step{NEW}").glob("*rank_1*optim_states.pt")))
    for mmap in (False, True):
        content = torch.load(file, weights_only=False, mmap=mmap)  # DeepSpeed's own classes are in it
        assert content["optimizer_state_dict"]["partition_count"] == 2
