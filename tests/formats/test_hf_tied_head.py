"""A tied head that stands in the file beside its embedding, as older writers left it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import llmtailor
from formats.simple_writer import write_checkpoint
from llmtailor.formats.hf import open_hf, plan_hf
from merge import hf_stock
from tiny_models import assert_same

TIED = Path(__file__).parent.parent / "compat" / "data" / "transformers-5.23.0" / "qwen2-tied" / "checkpoint-2"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def doubled(tmp_path: Path) -> Path:
    """A checkpoint of a tied model with both of them in the file."""
    return write_head(Path(shutil.copytree(TIED, tmp_path / "doubled")))


def write_head(root: Path, change: float = 0.0) -> Path:
    weights = load_file(root / "model.safetensors")
    head = weights[EMBEDDING].clone()
    head[-1, -1] += change
    save_file({**weights, HEAD: head}, root / "model.safetensors", metadata={"format": "pt"})
    return root


def test_head_that_is_its_embedding_is_a_further_name(doubled: Path, tmp_path: Path) -> None:
    catalog = open_hf(doubled)

    assert catalog.ties == {HEAD: EMBEDDING}
    assert "lm_head" not in catalog.layers.names
    assert_same(hf_stock.everything(write_checkpoint(plan_hf(catalog), tmp_path / "out")), hf_stock.everything(TIED))


def test_head_that_is_its_embedding_is_found_across_shards(doubled: Path) -> None:
    weights = load_file(doubled / "model.safetensors")
    (doubled / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": [EMBEDDING], "model-00002-of-00002.safetensors": [*weights]}
    files["model-00002-of-00002.safetensors"].remove(EMBEDDING)
    for file, names in files.items():
        save_file({name: weights[name] for name in names}, doubled / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    (doubled / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    assert open_hf(doubled).ties == {HEAD: EMBEDDING}


def test_head_that_differs_at_its_last_number_stays(doubled: Path) -> None:
    catalog = open_hf(write_head(doubled, 0.5))

    assert catalog.ties == {}
    assert HEAD in catalog.weights


@pytest.mark.parametrize(("said", "is_tied"), [(True, True), (None, False), (False, False)])
def test_equal_tensors_are_tied_only_if_the_configuration_or_its_family_says_so(
    doubled: Path, said: bool | None, is_tied: bool
) -> None:
    config = json.loads((doubled / "config.json").read_text())
    del config["tie_word_embeddings"]
    (doubled / "config.json").write_text(
        json.dumps(config if said is None else {**config, "tie_word_embeddings": said})
    )

    assert (HEAD in open_hf(doubled, with_optimizer=False).ties) is is_tied


@pytest.mark.parametrize("base_is_doubled", [False, True])
def test_embedding_of_another_checkpoint_brings_its_head(doubled: Path, tmp_path: Path, base_is_doubled: bool) -> None:
    other = Path(shutil.copytree(TIED, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", metadata={"format": "pt"}
    )
    base, giver = (doubled, other) if base_is_doubled else (other, doubled)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {base}\nlayers: {{embed_tokens: {giver}}}\n")

    llmtailor.merge(recipe, tmp_path / "out")

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, load_file(giver / "model.safetensors")[EMBEDDING])


def test_average_of_a_model_with_and_one_without_the_second_copy(doubled: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"models:\n  - {{model: {doubled}, parameters: {{weight: 0.5}}}}\n"
        f"  - {{model: {TIED}, parameters: {{weight: 0.5}}}}\nmerge_method: linear\n"
    )

    llmtailor.merge(recipe, tmp_path / "out")

    assert_same(hf_stock.read_weights(tmp_path / "out"), hf_stock.read_weights(TIED))
