"""Bytes that changed on the disk are not made sound by a merge: what is copied from is compared first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmtailor
from faults import flip_bit
from llmtailor.errors import IntegrityError
from llmtailor.merging import MergeOptions, plan_export, write_merge
from llmtailor.verify import verify_checkpoint
from tiny_models import build_llama


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 1 and 2."""
    directory = tmp_path_factory.mktemp("damaged") / "run"
    model = build_llama(num_layers=2)
    optimizer = torch.optim.AdamW(model.parameters())
    with llmtailor.Run(directory, model, optimizer) as run:
        for step in (1, 2):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            run.save(step).result()
    return directory


@pytest.fixture(params=["model-layers.001.safetensors", "optimizer/layers.001.safetensors"])
def damaged(run: Path, request: pytest.FixtureRequest) -> Any:
    path = run / "checkpoint-1" / request.param
    flip_bit(path, -1)
    yield path
    flip_bit(path, -1)


@pytest.mark.parametrize(
    "options",
    [
        {"to": "hf"},
        {"to": "dcp"},
        {"to": "deepspeed", "ranks": 2, "zero_stage": 2},
        {"to": "tailored", "dtype": "bfloat16"},
    ],
    ids=lambda options: options["to"],
)
def test_export_of_a_damaged_checkpoint_is_refused(
    run: Path, damaged: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    if options["to"] == "tailored" and damaged.parent.name == "optimizer":
        pytest.skip("its optimizer files are linked")
    with pytest.raises(IntegrityError) as caught:
        llmtailor.export(run / "checkpoint-1", tmp_path / "out", **options)
    assert caught.value.kind == "digest-mismatch"
    assert str(damaged) in str(caught.value.found)
    assert not list(tmp_path.iterdir())


def test_average_with_a_damaged_checkpoint_is_refused(run: Path, damaged: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n  - {{model: {run}/checkpoint-1, parameters: {{weight: 1}}}}\n"
        f"  - {{model: {run}/checkpoint-2, parameters: {{weight: 1}}}}\n"
    )
    if damaged.parent.name == "optimizer":
        llmtailor.merge(recipe, tmp_path / "out")  # its state is that of the newer one
        assert verify_checkpoint(tmp_path / "out").is_good
        return
    with pytest.raises(IntegrityError, match="1 of its files"):
        llmtailor.merge(recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_damaged_file_that_is_linked_keeps_its_digest(run: Path, damaged: Path, tmp_path: Path) -> None:
    llmtailor.export(run / "checkpoint-1", tmp_path / "out", to="tailored")
    report = verify_checkpoint(tmp_path / "out")
    assert [problem.kind for problem in report.problems] == ["digest"]


def test_progress_counts_what_is_read_for_the_check(run: Path, tmp_path: Path) -> None:
    plan = plan_export(run / "checkpoint-1", MergeOptions(to="hf"))
    assert plan.checked
    done: list[int] = []
    write_merge(plan, tmp_path / "out", on_bytes=done.append)
    assert sum(done) == plan.work_nbytes > plan.nbytes
