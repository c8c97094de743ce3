from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from llmtailor.checkpoint import open_checkpoint

Command: TypeAlias = Callable[..., Any]

CONFIGS = Path(__file__).parent.parent / "estimate" / "configs"


def test_a_configuration_is_estimated_with_the_real_transformers(llmtailor: Command, llmtailor_json: Command) -> None:
    path = CONFIGS / "llama-3.1-8b.json"
    record = llmtailor_json("estimate", path)
    assert record["num_parameters"] == 8_030_261_248
    assert record["bytes_per_parameter"] == pytest.approx(14, abs=0.01)
    assert (record["optimizer"], record["precision"]) == ("adamw", "bf16-mixed")
    assert [row["strategy"].partition("(")[0] for row in record["strategies"]][:3] == ["full", "parity", "filter"]
    assert {row["num_saves"] for row in record["strategies"][:7]} == {16}
    finished = llmtailor("estimate", path)
    text = finished.stdout
    assert finished.stderr == "transformers builds a llama model, without its weights ...\n"
    assert "112.4 GB, 14.00 bytes a parameter" in text
    assert "assumed, for top_k(4), drift(0.02)" in text


def newest(run: Path) -> Path:
    return run / "checkpoint-5"


def test_a_checkpoint_is_estimated_as_it_is(run: Path, llmtailor_json: Command) -> None:
    record = llmtailor_json("estimate", newest(run), "--steps", 5, "--every", 1, "--strategy", "parity")
    manifests = [open_checkpoint(run / f"checkpoint-{step}").manifest for step in range(1, 6)]
    (row,) = record["strategies"]
    real = [sum(layer.written_nbytes(each.step) for layer in each.layers) for each in manifests]
    assert [save["written_bytes"] for save in row["saves"]] == real
    assert row["run_bytes"] == sum(real)
    assert row["save_bytes"] == {"mean": sum(real) / 5, "min": min(real), "max": max(real)}
    assert row["max_staleness"] == 1
    assert (record["optimizer"], record["precision"]) == (None, None)


def test_time_and_money_follow_from_bytes(run: Path, llmtailor_json: Command) -> None:
    record = llmtailor_json(
        "estimate", newest(run), "--strategy", "full", "--bandwidth", "1kB/s", "--price", 1000, "--keep", 2
    )
    (row,) = record["strategies"]
    assert row["save_seconds"]["mean"] == pytest.approx(record["checkpoint_bytes"] / 1000)
    assert row["run_seconds"] == pytest.approx(16 * record["checkpoint_bytes"] / 1000)
    assert row["disk_bytes"] == 2 * record["checkpoint_bytes"]
    assert row["usd_per_month"] == pytest.approx(2 * record["checkpoint_bytes"] / 1e9 * 1000)
    assert row["peak_disk_bytes"] == 3 * record["checkpoint_bytes"]
    assert record["keep"] == "limit=2"


def test_what_is_said_of_the_training_changes_the_bytes(run: Path, llmtailor_json: Command) -> None:
    def size(*options: object) -> float:
        return float(llmtailor_json("estimate", newest(run), "--strategy", "full", *options)["checkpoint_bytes"])

    assert size("--optimizer", "sgd", "--precision", "fp32") < size() == size("--precision", "fp32")
    assert size("--precision", "fp32", "--trainable", "layers.0.*") < size()


def test_each_rank_has_its_share(run: Path, llmtailor: Command, llmtailor_json: Command) -> None:
    alone = llmtailor_json("estimate", newest(run), "--strategy", "full")
    record = llmtailor_json("estimate", newest(run), "--strategy", "full", "--ranks", 4)
    assert alone["rank_bytes"] == alone["checkpoint_bytes"]
    # Of so small a model most is headers, and every rank has those.
    assert record["rank_bytes"] == pytest.approx(record["checkpoint_bytes"] / 4, rel=0.01)
    assert "of 4 ranks" in llmtailor("estimate", newest(run), "--ranks", 4).stdout


def test_quiet_is_a_number_for_each_strategy(run: Path, llmtailor: Command) -> None:
    finished = llmtailor("estimate", newest(run), "-q", "--strategy", "full", "--strategy", "parity")
    full, parity = map(int, finished.stdout.split())
    assert parity < full
    assert finished.stderr == ""


def test_resumed_runs_and_codes_are_told(run: Path, llmtailor: Command) -> None:
    text = llmtailor("estimate", newest(run), "--resumed", "--rest", "q8", "--keep", "last=2,every=400").stdout
    assert "after a full checkpoint at step 0" in text
    assert "q8" in text
    assert "exact age" in text
    assert "last=2, every=400" in text


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_drawn(run: Path, tmp_path: Path, llmtailor: Command, suffix: str) -> None:
    picture = tmp_path / f"bytes.{suffix}"
    finished = llmtailor("estimate", newest(run), "--plot", picture)
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert picture.read_bytes().startswith(start)
    assert f"drew {picture}" in finished.stderr
    if suffix == "svg":
        again = tmp_path / "again.svg"
        llmtailor("estimate", newest(run), "--plot", again)
        assert len(again.read_bytes()) == len(picture.read_bytes())


@pytest.mark.parametrize(
    ("options", "exit_code", "kind"),
    [
        (("--strategy", "parrity"), 6, "unknown-strategy"),
        (("--optimizer", "adamX"), 6, "unknown-optimizer"),
        (("--precision", "fp8"), 6, "unknown-precision"),
        (("--rest", "q7"), 6, "rest"),
        (("--keep", "some"), 6, "keep"),
        (("--bandwidth", "fast"), 6, "bandwidth"),
        (("--price", "nan"), 6, "price"),
        (("--drift-per-step", "-1"), 6, "drift-per-step"),
        (("--trainable", "nothing.*"), 6, "trainable"),
        (("--rest", "q8", "--ranks", 2), 12, "sharded-codes"),
        (("--packed-masters", "--ranks", 2), 12, "sharded-codes"),
        (("--strategy", "budget(1)"), 6, "budget-too-small"),
        (("--steps", 1_000_000, "--every", 1), 6, "steps"),
        (("--plot", "bytes.txt"), 6, "picture-format"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run: Path, llmtailor_json: Command, options: tuple[object, ...], exit_code: int, kind: str
) -> None:
    error = llmtailor_json("estimate", newest(run), *options, exit_code=exit_code)["error"]
    assert (error["kind"], error["exit_code"]) == (kind, exit_code)


def test_wrong_words_are_told_before_a_model_is_built(tmp_path: Path, llmtailor_json: Command) -> None:
    error = llmtailor_json("estimate", tmp_path / "no-such-model", "--strategy", "parrity", exit_code=6)["error"]
    assert error["kind"] == "unknown-strategy"


def test_what_is_not_there_is_exit_3(tmp_path: Path, llmtailor_json: Command) -> None:
    assert llmtailor_json("estimate", tmp_path / "none", exit_code=3)["error"]["kind"] == "missing-model"
