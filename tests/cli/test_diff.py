from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from safetensors.torch import load_file, save_file

from llmtailor import diff_checkpoints
from llmtailor.reports.difference import DifferencePage

Command: TypeAlias = Callable[..., Any]

LAYERS = ["embed_tokens", "layers.0", "layers.1", "layers.2", "layers.3", "norm"]
CHANGED = ["embed_tokens", "layers.1", "layers.3", "norm"]
"""What ``parity`` wrote at step 4; the rest is of step 3."""


@pytest.fixture
def pair(run: Path) -> tuple[Path, Path]:
    """A checkpoint, and the one after it, which took half of its layers over."""
    return run / "checkpoint-3", run / "checkpoint-4"


@pytest.fixture
def model(pair: tuple[Path, Path], llmtailor: Command, tmp_path: Path) -> Path:
    """The weights of the second checkpoint alone, in a file that may be changed."""
    llmtailor("export", pair[1], tmp_path / "model", "--to", "hf", "--weights-only")
    return tmp_path / "model"


def change_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = model / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def rows_of(text: str) -> dict[str, list[str]]:
    """First word -> the others, of the indented lines."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  ")}


def test_diff_shows_layers_and_totals(pair: tuple[Path, Path], llmtailor: Command) -> None:
    text = llmtailor("diff", *pair, exit_code=1).stdout
    assert f"  A  {pair[0]}  tailored, step 3\n  B  {pair[1]}  tailored, step 4\n" in text
    rows = rows_of(text)
    columns = ["step", "A", "step", "B", "weights", "exp_avg", "exp_avg_sq", "step", "max", "cosine", "unchanged"]
    assert rows["layer"] == columns
    assert [name for name in rows if name in LAYERS] == LAYERS
    for name in LAYERS:
        if name in CHANGED:
            assert all(re.fullmatch(r"[\d.e-]+", cell) for cell in rows[name][:8]), rows[name]
        else:
            assert rows[name] == ["3", "3", "=", "=", "=", "=", "=", "=", "100", "%"]
    assert rows["norm"][:2] == ["3", "4"]
    assert float(rows["norm"][5]) == pytest.approx(1 / 3, abs=1e-3)  # the step
    assert len(rows["total"]) == 8
    assert "note: of 2 of 6 layers something lies in the same files in A and B" in text
    assert text.endswith("A and B differ in 4 of 6 layers\n")


def test_numbers_have_three_digits(pair: tuple[Path, Path], llmtailor: Command, llmtailor_json: Command) -> None:
    shown = rows_of(llmtailor("diff", *pair, exit_code=1).stdout)
    record = llmtailor_json("diff", *pair, exit_code=1)
    for layer in record["layers"]:
        for index, name in enumerate(("weights", "exp_avg", "exp_avg_sq", "step")):
            if layer["name"] in CHANGED:
                assert shown[layer["name"]][2 + index] == f"{layer['components'][name]['relative_l2']:.3g}"


def test_the_worst_of_each_column_stands_out(pair: tuple[Path, Path]) -> None:
    difference = diff_checkpoints(*pair)
    console = Console(width=200, force_terminal=True, color_system="standard", no_color=False, highlight=False)
    with console.capture() as captured:
        console.print(*DifferencePage(difference=difference).tables())
    for name in difference.components:
        worst = max(layer.distances[name].relative for layer in difference.layers if name in layer.distances)
        assert re.search(rf"\x1b\[1;33m *{worst:.3g}\x1b\[0m", captured.get()), name


def test_a_checkpoint_is_identical_to_itself(pair: tuple[Path, Path], llmtailor: Command) -> None:
    text = llmtailor("diff", pair[0], pair[0]).stdout
    assert rows_of(text)["layer"][4:6] == ["weights", "optimizer"]
    assert text.endswith("A and B are identical\n")
    assert llmtailor("diff", pair[0], pair[0], "-q").stdout == ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), CHANGED),
        (("--layers", "layers.*"), ["layers.1", "layers.3"]),
        (("--layers", "norm", "--layers", "layers.0-1"), ["layers.1", "norm"]),
        (("--tensors", "--layers", "norm", "--only", "weights"), ["norm.weight", "norm.bias"]),
        (
            ("--tensors", "--layers", "norm", "--only", "optimizer"),
            [f"state.norm.{name}.{leaf}" for name in ("weight", "bias") for leaf in ("exp_avg", "exp_avg_sq", "step")],
        ),
    ],
)
def test_quiet_gives_the_names_of_what_differs(
    pair: tuple[Path, Path], llmtailor: Command, options: tuple[str, ...], expected: list[str]
) -> None:
    assert llmtailor("diff", *pair, "-q", *options, exit_code=1).stdout.splitlines() == expected


def test_the_json_has_everything(pair: tuple[Path, Path], llmtailor_json: Command) -> None:
    record = llmtailor_json("diff", *pair, "--tensors", exit_code=1)
    assert list(record) == ["is_identical", "a", "b", "layers", "totals", "unmatched", "tensors"]
    assert record["a"] == {"path": str(pair[0]), "format": "tailored", "step": 3, "has_optimizer": True}
    assert (record["is_identical"], record["unmatched"]) == (False, [])
    assert [layer["name"] for layer in record["layers"]] == LAYERS
    layer = record["layers"][2]
    assert list(layer) == ["name", "step_a", "step_b", "is_identical", "same_files", "components"]
    assert record["layers"][1]["same_files"] == ["weights", "optimizer"]
    measures = ["relative_l2", "l2", "max_abs", "cosine", "unchanged", "numel", "num_equal", "num_unread"]
    others = ["norm_a", "norm_b", "nan_a", "nan_b", "inf_a", "inf_b"]
    assert list(layer["components"]["exp_avg"]) == measures + others
    assert list(record["totals"]) == ["weights", "exp_avg", "exp_avg_sq", "step"]
    tensors = record["tensors"]
    place = ["layer", "component", "fqn", "shape", "dtype_a", "dtype_b"]
    assert all(list(tensor) == place + measures + others for tensor in tensors)
    of_layer = [each for each in tensors if (each["layer"], each["component"]) == ("layers.1", "weights")]
    assert [each["fqn"] for each in of_layer] == [
        f"layers.1.{name}" for name in ("up.weight", "up.bias", "down.weight", "down.bias")
    ]
    squares = sum(each["l2"] ** 2 for each in of_layer)
    assert layer["components"]["weights"]["l2"] == pytest.approx(math.sqrt(squares))
    assert "tensors" not in llmtailor_json("diff", *pair, exit_code=1)


def test_tensors_are_listed(pair: tuple[Path, Path], llmtailor: Command) -> None:
    text = llmtailor("diff", *pair, "--tensors", "--layers", "norm", "--only", "weights", exit_code=1).stdout
    assert re.search(r"^  tensor +component +type +shape +relative +l2 +max +cosine +unchanged$", text, re.M)
    assert re.search(
        r"^  norm.weight  weights +F32   \[8\] +[\d.e-]+ +[\d.e-]+ +[\d.e-]+  [01].\d{6} +\d+ %$", text, re.M
    )


def test_a_model_of_the_same_weights(pair: tuple[Path, Path], model: Path, llmtailor: Command) -> None:
    assert llmtailor("diff", pair[1], model, "--only", "weights").stdout.endswith("A and B are identical\n")
    text = llmtailor("diff", pair[1], model, exit_code=1).stdout
    assert "note: B has no optimizer state, so all layers differ; --only weights compares the weights alone\n" in text
    assert "only in A" not in text


def test_faults_and_infinities_are_shown(
    pair: tuple[Path, Path], model: Path, llmtailor: Command, llmtailor_json: Command
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.up.weight"][:2, 0] = math.nan
        tensors["layers.2.up.weight"][0, 0] = math.inf
        tensors["layers.1.up.bias"] = tensors["layers.1.up.bias"].bfloat16()

    change_tensors(model, change)
    text = llmtailor("diff", pair[1], model, "--only", "weights", exit_code=1).stdout
    rows = rows_of(text)
    assert rows["layer"][-4:] == ["not", "finite", "A,", "B"]
    assert rows["layers.0"][-2:] == ["0,", "2"]
    assert rows["layers.0"][-4:-2] == ["99.3", "%"]
    assert rows["norm"][-1] == "-"
    assert rows["total"][-2:] == ["0,", "3"]
    assert "note: 1 tensor of another type in A than in B: compared by value\n" in text
    record = llmtailor_json("diff", pair[1], model, "--only", "weights", exit_code=1)
    assert (record["totals"]["weights"]["nan_b"], record["totals"]["weights"]["inf_b"]) == (2, 1)


def test_infinitely_much_is_null_in_json(model: Path, llmtailor: Command, llmtailor_json: Command) -> None:
    shutil.copytree(model, model.parent / "zero")
    change_tensors(model.parent / "zero", lambda tensors: tensors["norm.weight"].zero_())
    arguments = ("diff", model.parent / "zero", model, "--tensors", "--layers", "norm")
    (tensor,) = (each for each in llmtailor_json(*arguments, exit_code=1)["tensors"] if each["fqn"] == "norm.weight")
    assert (tensor["relative_l2"], tensor["cosine"]) == (None, None)
    assert tensor["l2"] > 0
    assert re.search(r"^  norm.weight .* inf ", llmtailor(*arguments, exit_code=1).stdout, re.M)


def test_what_is_missing_is_listed(
    pair: tuple[Path, Path], model: Path, llmtailor: Command, llmtailor_json: Command
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["layers.0.up.bias"]
        tensors["norm.weight"] = torch.ones(9)
        tensors["layers.1.gate.weight"] = torch.ones(2)

    change_tensors(model, change)
    arguments = ("diff", pair[1], model, "--only", "weights")
    text = llmtailor(*arguments, exit_code=1).stdout
    for heading, row in (
        ("1 tensor only in A", r"layers.0.up.bias +weights +F32\[16\] +-"),
        ("1 tensor only in B", r"layers.1.gate.weight +weights +- +F32\[2\]"),
        ("1 tensor of another shape", r"norm.weight +weights +F32\[8\] +F32\[9\]"),
    ):
        assert re.search(rf"^{heading}\n  tensor +component +A +B\n  {row}$", text, re.M), heading
    assert text.endswith("A and B differ in 3 of 6 layers\n")
    record = llmtailor_json(*arguments, exit_code=1)
    assert [layer["is_identical"] for layer in record["layers"]] == [True, False, False, True, True, False]
    assert record["unmatched"][0] == {
        "layer": "layers.0",
        "component": "weights",
        "fqn": "layers.0.up.bias",
        "shape_a": [16],
        "shape_b": None,
        "dtype_a": "F32",
        "dtype_b": None,
    }


def test_never_100_percent_of_what_is_not(tmp_path: Path, llmtailor: Command) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        weight = torch.ones(10_000)
        weight[0] += name == "b"
        save_file({"head.weight": weight}, tmp_path / name / "model.safetensors")
    assert rows_of(llmtailor("diff", tmp_path / "a", tmp_path / "b", exit_code=1).stdout)["head"][-2:] == [">99.9", "%"]


def colors_of(path: Path) -> set[tuple[int, int, int]]:
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    return {tuple(map(int, pixel)) for pixel in pixels.reshape(-1, 3)}


GREY, RED, DARKEST = (0xE8, 0xE8, 0xE8), (0xB3, 0x26, 0x1E), (68, 1, 84)


def test_the_heat_map_is_a_picture(pair: tuple[Path, Path], llmtailor: Command, tmp_path: Path) -> None:
    result = llmtailor("diff", *pair, "--plot", tmp_path / "map.png", exit_code=1)
    assert result.stderr.endswith(f"drew {tmp_path}/map.png\n")
    assert {GREY, DARKEST} <= colors_of(tmp_path / "map.png")
    assert RED not in colors_of(tmp_path / "map.png")
    llmtailor("diff", *pair, "--plot", tmp_path / "map.svg", "-q", exit_code=1)
    assert ElementTree.parse(tmp_path / "map.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_heat_map_of_nothing_and_of_faults(
    pair: tuple[Path, Path], model: Path, llmtailor: Command, tmp_path: Path
) -> None:
    llmtailor("diff", pair[0], pair[0], "--plot", tmp_path / "same.png")
    assert GREY in colors_of(tmp_path / "same.png")
    assert DARKEST not in colors_of(tmp_path / "same.png")
    change_tensors(model, lambda tensors: tensors["norm.weight"].fill_(math.nan))
    llmtailor("diff", pair[1], model, "--only", "weights", "--plot", tmp_path / "faults.png", exit_code=1)
    assert {GREY, RED} <= colors_of(tmp_path / "faults.png")


@pytest.mark.parametrize(
    ("name", "kind"), [("map.pdf", "picture-format"), ("map", "picture-format"), ("no/map.png", "picture-directory")]
)
def test_a_picture_that_cannot_be_drawn_is_told_first(
    pair: tuple[Path, Path], llmtailor_json: Command, tmp_path: Path, name: str, kind: str
) -> None:
    record = llmtailor_json("diff", *pair, "--plot", tmp_path / name, exit_code=6)
    assert record["error"]["kind"] == kind


def test_without_matplotlib_the_picture_is_refused(
    pair: tuple[Path, Path], llmtailor: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = llmtailor("diff", *pair, "--plot", tmp_path / "map.png", exit_code=12)
    assert "pip install 'llmtailor[plot]'" in result.stderr


def test_a_picture_on_a_full_disk_is_an_error(pair: tuple[Path, Path], llmtailor: Command, tmp_path: Path) -> None:
    (tmp_path / "map.png").mkdir()
    assert "cannot write the picture" in llmtailor("diff", *pair, "--plot", tmp_path / "map.png", exit_code=10).stderr


def test_trouble_is_more_than_1(pair: tuple[Path, Path], llmtailor: Command, llmtailor_json: Command) -> None:
    assert llmtailor_json("diff", pair[0], "nowhere", exit_code=3)["error"]["kind"] == "missing-checkpoint"
    assert llmtailor_json("diff", *pair, "--layers", "layer.9", exit_code=3)["error"]["kind"] == "unknown-layer"
    llmtailor("diff", pair[0], exit_code=2)
    llmtailor("diff", *pair, "--only", "moments", exit_code=2)
    os.truncate(_writable(pair[1] / "model-norm.safetensors"), 20)
    result = llmtailor("diff", *pair, exit_code=4)
    assert "model-norm.safetensors" in result.stderr


def _writable(path: Path) -> Path:
    path.chmod(0o644)
    return path


def test_names_of_parameters_come_from_a_file(pair: tuple[Path, Path], llmtailor: Command, tmp_path: Path) -> None:
    missing = llmtailor("diff", *pair, "--parameter-names", tmp_path / "names", exit_code=6)
    assert "cannot read the list of parameter names" in missing.stderr


def test_diff_starts_without_torch(pair: tuple[Path, Path]) -> None:
    text = (
        "import sys\nfrom llmtailor.cli.main import main\ntry:\n    main()\nexcept SystemExit as end:\n"
        "    print('torch' in sys.modules, end.code, file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", text, "diff", *map(str, pair), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == "False 1\n"
    assert not json.loads(done.stdout)["is_identical"]
