"""What ``linear`` makes of weights, of masters that lie among the optimizer state, and of what has no average."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmtailor
from formats.simple_writer import load_ref
from llmtailor.catalog import Catalog
from llmtailor.checkpoint import open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.errors import IncompatibleError, UnsupportedError
from llmtailor.formats import open_catalog
from llmtailor.load import plan_load
from llmtailor.model_state import read_model
from llmtailor.verify import verify_checkpoint
from master_adamw import LEAF, MasterAdamW
from tiny_models import build_llama

DATA = Path(__file__).parent.parent / "compat" / "data"
LLAMA = DATA / "transformers-5.23.0" / "llama"
DEEPSPEED = DATA / "deepspeed-0.19.8"
NAME = "model.layers.1.mlp.up_proj.weight"
SHARES = {"older": 0.25, "newer": 0.75}


def linear(tmp_path: Path, shares: dict[Path, float], layers: str = "*", **options: Any) -> Path:
    """An average; layers that are not of it come from the last source."""
    *_, base = shares
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {base}\nlayers:\n  {layers!r}:\n"
        f"    from: [{', '.join(map(str, shares))}]\n    weights: [{', '.join(map(str, shares.values()))}]\n"
    )
    llmtailor.merge(recipe, tmp_path / "merged", **options)
    return tmp_path / "merged"


def mean(values: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    return torch.stack([value.double() * weight for value, weight in zip(values, weights, strict=True)]).sum(0)


# Weights


@pytest.mark.parametrize(
    ("weights", "expected"),
    [({2: 0.5}, 0.5), ({2: 0.5, 4: 0.0}, 0.5), ({2: 2.0, 4: 0.0}, 2.0), ({2: 1.0, 4: 0.0}, 1.0)],
    ids=["one of half", "none of the other", "twice", "as it is"],
)
def test_a_source_counts_as_much_as_the_recipe_says(tmp_path: Path, weights: dict[int, float], expected: float) -> None:
    entries = "".join(
        f"  - {{model: {LLAMA / f'checkpoint-{step}'}, parameters: {{weight: {weight}}}}}\n"
        for step, weight in weights.items()
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"models:\n{entries}merge_method: linear\nparameters: {{normalize: false}}\n")
    llmtailor.merge(recipe, tmp_path / "merged")
    source, made = (load_file(path / "model.safetensors") for path in (LLAMA / "checkpoint-2", tmp_path / "merged"))
    assert made.keys() == source.keys()
    assert all(torch.equal(made[fqn], expected * tensor) for fqn, tensor in source.items())


# What has no average


def with_tensors(path: Path, tensors: dict[str, torch.Tensor], source: int) -> Path:
    path.mkdir()
    (path / "config.json").write_bytes((LLAMA / f"checkpoint-{source}" / "config.json").read_bytes())
    weights = load_file(LLAMA / f"checkpoint-{source}" / "model.safetensors")
    save_file({**weights, **tensors}, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8, torch.int32, torch.complex64]
)
def test_codes_are_never_averaged_apart_from_their_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    codes = torch.arange(24 * 16).reshape(24, 16) % 7
    tensors = {NAME: codes.to(dtype), f"{NAME}_scale_inv": torch.ones(1, 1)}
    older, newer = (with_tensors(tmp_path / f"model-{step}", tensors, step) for step in (2, 4))
    with pytest.raises(UnsupportedError) as caught:
        linear(tmp_path, {older: 0.5, newer: 0.5})
    assert caught.value.kind == "no-average"
    assert NAME in str(caught.value.found)
    assert not (tmp_path / "merged").exists()
    # Layers without codes have an average, and those with codes can be taken as they are.
    made = load_file(linear(tmp_path, {older: 0.5, newer: 0.5}, "layers.0, norm") / "model.safetensors")
    assert torch.equal(made[NAME], codes.to(dtype))


def test_counts_masks_and_indices_are_those_of_the_newest(tmp_path: Path) -> None:
    def extra(value: int) -> dict[str, torch.Tensor]:
        return {
            "model.layers.1.count": torch.tensor(value, dtype=torch.int32),
            "model.layers.1.mask": torch.tensor([True, value == 2]),
            "model.layers.1.position_ids": torch.arange(8)[None],
        }

    older, newer = (with_tensors(tmp_path / f"model-{step}", extra(step), step) for step in (2, 4))
    made = load_file(linear(tmp_path, {newer: 0.75, older: 0.25}) / "model.safetensors")
    sources = [load_file(path / "model.safetensors") for path in (newer, older)]
    assert all(torch.equal(made[name], value) for name, value in extra(4).items())
    assert torch.equal(made[NAME], mean([each[NAME] for each in sources], [0.75, 0.25]).float())


# Masters


def save(directory: Path, seed: int, *, leaf: str = LEAF) -> Path:
    """A step of a 16-bit model whose optimizer keeps masters."""
    torch.manual_seed(seed)
    model = build_llama(seed=seed).to(torch.bfloat16)
    optimizer = MasterAdamW(model.parameters(), leaf=leaf)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    checkpointer = Checkpointer(directory)
    path = checkpointer.save(2, model, [optimizer], model.config.save_pretrained).result()
    checkpointer.close()
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("trained")
    return {name: save(root / name, seed) for seed, name in enumerate(SHARES)}


def masters_of(catalog: Catalog, leaf: str = LEAF) -> dict[str, torch.Tensor]:
    return {fqn: load_ref(state.tensors[leaf]) for fqn, state in catalog.states.items()}


def weights_of(catalog: Catalog) -> dict[str, torch.Tensor]:
    return {fqn: load_ref(ref) for fqn, ref in catalog.weights.items()}


def expected_masters(trained: dict[str, Path]) -> dict[str, torch.Tensor]:
    sources = [masters_of(open_catalog(path)) for path in trained.values()]
    return {fqn: mean([each[fqn] for each in sources], [*SHARES.values()]).float() for fqn in sources[0]}


def test_masters_are_averaged_and_weights_are_their_rounding(trained: dict[str, Path], tmp_path: Path) -> None:
    merged = linear(tmp_path, {trained[name]: share for name, share in SHARES.items()})
    assert verify_checkpoint(merged).is_good
    made, expected = open_catalog(merged), expected_masters(trained)
    masters, weights = masters_of(made), weights_of(made)
    assert masters.keys() == weights.keys() == expected.keys()
    for fqn, master in expected.items():
        assert torch.equal(masters[fqn], master)
        assert torch.equal(weights[fqn], master.bfloat16())
    model = build_llama(seed=7).to(torch.bfloat16)
    optimizer = MasterAdamW(model.parameters(), lr=0.0)
    plan_load(open_checkpoint(merged), read_model(model), [optimizer]).fill()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(parameter, expected[fqn].bfloat16()) for fqn, parameter in model.named_parameters())


def test_layers_of_one_source_stay_links(trained: dict[str, Path], tmp_path: Path) -> None:
    merged = linear(tmp_path, {trained[name]: share for name, share in SHARES.items()}, "layers.1")
    made, newer = open_catalog(merged), trained["newer"]
    links = {
        str(path.relative_to(merged))
        for path in merged.rglob("*.safetensors")
        if os.path.samefile(path, newer / path.relative_to(merged))
    }
    assert {name for name in links if "layers.001" in name} == set()
    assert {"model-layers.000.safetensors", "model-norm.safetensors"} <= links
    masters, theirs, expected = masters_of(made), masters_of(open_catalog(newer)), expected_masters(trained)
    assert all(torch.equal(masters[fqn], (expected if ".layers.1." in fqn else theirs)[fqn]) for fqn in theirs)


def test_masters_of_other_names_do_not_mix(trained: dict[str, Path], tmp_path: Path) -> None:
    other = save(tmp_path / "other", 3, leaf="master_weight")
    with pytest.raises(IncompatibleError) as caught:
        linear(tmp_path, {other: 0.5, trained["newer"]: 0.5})
    assert "the fp32 master master_weight, and the fp32 master master_param in base" in str(caught.value)


def test_weights_alone_are_the_average_of_the_weights(trained: dict[str, Path], tmp_path: Path) -> None:
    merged = linear(tmp_path, {trained[name]: share for name, share in SHARES.items()}, weights_only=True, to="hf")
    sources = [weights_of(open_catalog(path)) for path in trained.values()]
    made = weights_of(open_catalog(merged))
    assert all(
        torch.equal(made[fqn], mean([each[fqn] for each in sources], [*SHARES.values()]).bfloat16()) for fqn in made
    )


@pytest.mark.parametrize("to", ["hf", "dcp", "deepspeed"])
def test_an_average_in_another_format_goes_on_from_the_masters(
    trained: dict[str, Path], tmp_path: Path, to: str
) -> None:
    options = {"ranks": 2} if to == "deepspeed" else {}
    merged = linear(tmp_path, {trained[name]: share for name, share in SHARES.items()}, to=to, **options)
    made, expected = open_catalog(merged), expected_masters(trained)
    for fqn, master in expected.items():
        assert torch.equal(load_ref(made.masters.get(fqn, made.weights[fqn])), master)
        assert made.states[fqn].tensors.keys() == {"step", "exp_avg", "exp_avg_sq"}
        if to == "deepspeed":
            assert torch.equal(load_ref(made.weights[fqn]), master.bfloat16())


@pytest.mark.parametrize(("to", "dtype"), [("hf", None), ("hf", "float32"), ("dcp", None)])
def test_an_export_without_masters_has_them_as_weights(
    trained: dict[str, Path], tmp_path: Path, to: str, dtype: str | None
) -> None:
    plan = llmtailor.export(trained["older"], tmp_path / "made", to=to, dtype=dtype)
    assert any("are their fp32 masters" in note for note in plan.notes)
    made, masters = open_catalog(tmp_path / "made"), masters_of(open_catalog(trained["older"]))
    assert all(torch.equal(load_ref(made.weights[fqn]), master) for fqn, master in masters.items())
    assert all(LEAF not in state.tensors for state in made.states.values())


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_masters_in_the_state_stay_there_in_a_checkpoint_of_ours(
    trained: dict[str, Path], tmp_path: Path, dtype: str | None
) -> None:
    llmtailor.export(trained["older"], tmp_path / "made", to="tailored", dtype=dtype)
    made, source = open_catalog(tmp_path / "made"), open_catalog(trained["older"])
    masters = masters_of(source)
    assert all(torch.equal(master, masters[fqn]) for fqn, master in masters_of(made).items())
    expected = weights_of(source) if dtype is None else masters
    assert all(torch.equal(weight, expected[fqn]) for fqn, weight in weights_of(made).items())


def test_masters_that_do_not_become_weights_stay_in_the_state(trained: dict[str, Path], tmp_path: Path) -> None:
    """In ``optimizer.pt`` of 16-bit weights, and from there on."""
    llmtailor.export(trained["older"], tmp_path / "narrow", to="hf", dtype="bfloat16")
    llmtailor.export(tmp_path / "narrow", tmp_path / "again")
    source = open_catalog(trained["older"])
    weights, masters = weights_of(source), masters_of(source)
    for name in ("narrow", "again"):
        made = open_catalog(tmp_path / name)
        assert all(torch.equal(weight, weights[fqn]) for fqn, weight in weights_of(made).items())
        assert all(torch.equal(master, masters[fqn]) for fqn, master in masters_of(made).items())


def test_masters_beside_the_weights_are_averaged_with_them(tmp_path: Path) -> None:
    sources = {DEEPSPEED / "z2-bf16": 0.25, DEEPSPEED / "z3-bf16": 0.75}
    made = open_catalog(linear(tmp_path, sources))
    catalogs = [open_catalog(path) for path in sources]
    assert made.masters.keys() == catalogs[0].masters.keys()
    for fqn, master in made.masters.items():
        expected = mean([load_ref(each.masters[fqn]) for each in catalogs], [*sources.values()]).float()
        assert torch.equal(load_ref(master), expected)
        assert torch.equal(load_ref(made.weights[fqn]), expected.bfloat16())
