from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

Command: TypeAlias = Callable[..., Any]


def test_show_tells_all_about_a_checkpoint(run: Path, llmtailor: Command) -> None:
    text = llmtailor("show", run / "checkpoint-4").stdout
    for pattern in (
        rf"\A{run}/checkpoint-4$",
        r"^  step        4$",
        r"^  created     \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC$",
        r"^  run         [0-9a-f]{32}, save 4$",
        r"^  parent      step 3$",
        r"^  strategy    parity\(\)$",
        r"^  consistent  no, the oldest layer is 1 step behind$",
        r"^  contents    weights and optimizer$",
        r"^  parameters  1,392, 1,392 of them trainable$",
        r"^  tied        lm_head.weight is embed_tokens.weight$",
        r"^  cost        training held up \d+ ms, captured in [\d.]+ s, written in [\d.]+ s more, .* of host memory$",
        r"^  writer      llmtailor \S+, torch \S+, Python \S+$",
        r"^6 layers$",
        r"^  embed_tokens  embedding     4      0        4 +[\d.]+ kB +[\d.]+ kB  strategy$",
        r"^  layers.0      block         3      1        3 .* kept$",
        r"^  total +[\d.]+ kB +[\d.]+ kB$",
        r"^optimizer torch.optim.adamw.AdamW$",
        r"^  group 0  19 parameters; lr 0.002, betas \(0.9, 0.999\), eps 1e-08, weight_decay 0.01",
        r"^3 small files$",
        r"^  run_state.json +\d+ B$",
    ):
        assert re.search(pattern, text, re.M), pattern
    assert "layers.0.up.weight" not in text


def test_show_json_is_the_same_as_one_record(run: Path, llmtailor_json: Command) -> None:
    record = llmtailor_json("show", run / "checkpoint-4")
    assert {key: record[key] for key in ("step", "save_index", "strategy", "contents", "is_consistent")} == {
        "step": 4,
        "save_index": 3,
        "strategy": "parity()",
        "contents": "full",
        "is_consistent": False,
    }
    assert record["parent"]["step"] == 3
    assert record["num_parameters"] == 32 * 8 + 4 * (2 * 8 * 16 + 16 + 8) + 2 * 8
    assert record["tied"] == {"lm_head.weight": "embed_tokens.weight"}
    layers = {layer["name"]: layer for layer in record["layers"]}
    assert list(layers) == ["embed_tokens", "layers.0", "layers.1", "layers.2", "layers.3", "norm"]
    assert (layers["layers.0"]["step"], layers["layers.0"]["staleness"], layers["layers.0"]["update_count"]) == (
        3,
        1,
        3,
    )
    assert layers["norm"]["weights_bytes"] == (run / "checkpoint-4" / "model-norm.safetensors").stat().st_size
    assert record["weights_bytes"] == sum(layer["weights_bytes"] for layer in layers.values())
    assert record["optimizers"][0]["groups"][0]["options"]["betas"] == {"tuple": [0.9, 0.999]}
    assert [file["path"] for file in record["files"]] == [
        "model.safetensors.index.json",
        "rng_state.pth",
        "run_state.json",
    ]
    assert "tensors" not in record


def test_show_tensors_lists_them(run: Path, llmtailor: Command, llmtailor_json: Command) -> None:
    text = llmtailor("show", run / "checkpoint-1", "--tensors").stdout
    assert re.search(r"^20 tensors$", text, re.M)
    assert re.search(r"^  layers.3.down.weight +F32 +\[8, 16\] +layers.3$", text, re.M)
    assert re.search(r"^  lm_head.weight +F32 +\[32, 8\] +embed_tokens +tied to embed_tokens.weight$", text, re.M)
    tensors = llmtailor_json("show", run / "checkpoint-1", "--tensors")["tensors"]
    assert tensors[0] == {
        "fqn": "embed_tokens.weight",
        "kind": "parameter",
        "layer": "embed_tokens",
        "dtype": "F32",
        "shape": [32, 8],
        "trainable": True,
        "tied_to": None,
    }


def test_show_of_a_run_is_its_newest(run: Path, llmtailor: Command, llmtailor_json: Command) -> None:
    assert llmtailor_json("show", run)["step"] == 5
    assert llmtailor("show", run, "--quiet").stdout == f"{run / 'checkpoint-5'}\n"


def test_show_of_a_run_passes_half_a_checkpoint_over(run: Path, half_checkpoint: Path, llmtailor_json: Command) -> None:
    assert llmtailor_json("show", run)["step"] == 4


def test_show_tells_drift_where_it_is_known(run: Path, llmtailor: Command, rewrite_manifest: Command) -> None:
    assert "reason  drift" not in llmtailor("show", run).stdout
    rewrite_manifest(run / "checkpoint-5", lambda fields: fields["layers"][0].update(drift=0.0125))
    assert re.search(r"reason +drift\n  embed_tokens .* 0.0125\n", llmtailor("show", run).stdout)


def test_show_tells_where_layers_are_codes(coded_run: Path, llmtailor: Command) -> None:
    text = llmtailor("show", coded_run).stdout
    for pattern in (
        r"^  consistent  no, 3 layers are codes, nothing is stale$",
        r"^  embed_tokens  embedding     5      0        5 +[\d.]+ kB          -  coded$",
        r"^  layers.0      block         5      0        5 +[\d.]+ kB +[\d.]+ kB  strategy$",
        r"^  layers.1      block         5      0        5 +[\d.]+ kB +[\d.]+ kB  coded$",
    ):
        assert re.search(pattern, text, re.M), pattern
    assert (
        "\n\n"
        "3 layers as codes\n"
        "  layer         codes      size  exact of  err weights  err first  err second\n"
        "  embed_tokens  compact   900 B         -            0       0.25           0\n"
        "  layers.1      q8       1.2 kB         4      2.1e-05      0.006       0.023\n"
        "  layers.3      q8       1.3 kB         4      1.5e-05      0.006       0.023\n"
        "  total                  3.4 kB\n"
        "\n"
    ) in text


def test_show_says_nothing_of_codes_where_there_are_none(run: Path, llmtailor: Command) -> None:
    text = llmtailor("show", run).stdout
    assert "as codes" not in text
    assert "are codes" not in text


@pytest.mark.parametrize(
    ("coded", "stale", "answer"),
    [
        (["layers.1"], [], "no, 1 layer is codes, nothing is stale"),
        (["layers.1", "layers.3"], ["layers.3"], "no, 2 layers are codes, the oldest layer is 1 step behind"),
        (["layers.1"], ["layers.3"], "no, 1 layer is codes, the oldest layer is 1 step behind"),
        ([], ["layers.3"], "no, the oldest layer is 1 step behind"),
    ],
)
def test_show_tells_stale_from_coded(
    coded_run: Path, llmtailor: Command, rewrite_manifest: Command, coded: list[str], stale: list[str], answer: str
) -> None:
    def change(fields: dict[str, Any]) -> None:
        for layer in fields["layers"]:
            if layer["name"] == "embed_tokens":
                layer["encoding"] = None
            elif layer["name"] in ("layers.1", "layers.3") and layer["name"] not in coded:
                del layer["encoding"]
                if layer["name"] not in stale:
                    layer.update(step=5, save_index=4)
            elif layer["name"] in stale:
                layer["encoding"].update(step=4, save_index=3)

    rewrite_manifest(coded_run / "checkpoint-5", change)
    assert f"\n  consistent  {answer}\n" in llmtailor("show", coded_run).stdout


def test_show_json_has_the_state_beside_the_files_and_the_codes_in_full(
    coded_run: Path, llmtailor_json: Command
) -> None:
    record = llmtailor_json("show", coded_run)
    assert (record["is_consistent"], record["is_current"], record["codes_bytes"]) == (False, True, 3400)
    layers = {layer["name"]: layer for layer in record["layers"]}
    keys = ("step", "state_step", "staleness", "update_count", "state_update_count", "codes_bytes")
    assert {name: tuple(layer[key] for key in keys) for name, layer in layers.items()} == {
        "embed_tokens": (5, 5, 0, None, 5, 900),
        "layers.0": (5, 5, 0, 5, 5, None),
        "layers.1": (4, 5, 0, 4, 5, 1200),
        "layers.2": (5, 5, 0, 5, 5, None),
        "layers.3": (4, 5, 0, 4, 5, 1300),
        "norm": (5, 5, 0, 5, 5, None),
    }
    assert layers["layers.0"]["encoding"] is None
    encoding = layers["layers.1"]["encoding"]
    assert encoding["codes"]["path"] == "codes/layers.001.safetensors"
    assert (encoding["rest"], encoding["base"], encoding["step"]) == ("q8", "exact", 5)
    assert encoding["errors"] == {
        "weights": {"l2": 2.096e-05, "max": 3e-05},
        "first": {"l2": 0.00601, "max": 0.004},
        "second": {"l2": 0.0228, "max": 0.05},
    }


def test_show_json_of_layers_that_are_stale_is_not_current(run: Path, llmtailor_json: Command) -> None:
    assert [llmtailor_json("show", run / name)["is_current"] for name in ("checkpoint-1", "checkpoint-5")] == [
        True,
        False,
    ]


def test_show_of_the_first_checkpoint_has_no_parent(run: Path, llmtailor: Command) -> None:
    text = llmtailor("show", run / "checkpoint-1").stdout
    assert "parent      none, the first of its run" in text
    assert "consistent  yes" in text


def test_show_of_weights_says_that_training_cannot_resume(
    run: Path, llmtailor: Command, rewrite_manifest: Command
) -> None:
    def drop_optimizer(fields: dict[str, Any]) -> None:
        fields.update(contents="weights", optimizers=[])
        for layer in fields["layers"]:
            layer.update(optimizer=None, update_count=None)

    rewrite_manifest(run / "checkpoint-5", drop_optimizer)
    assert "weights only; not resumable" in llmtailor("show", run).stdout


@pytest.mark.parametrize("name", ["checkpoint-5", "checkpoint-7"])
def test_show_refuses_what_is_no_checkpoint(half_checkpoint: Path, llmtailor: Command, name: str) -> None:
    llmtailor("show", half_checkpoint.with_name(name), exit_code=3)
