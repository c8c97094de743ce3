"""How many blocks a merged model has, and what its configuration says of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import llmtailor
from llmtailor.errors import UnsupportedError
from merge import hf_stock
from tiny_models import assert_same

LLAMA = Path(__file__).parent.parent / "compat" / "data" / "transformers-5.23.0" / "llama" / "checkpoint-4"


def recipe_of(text: str, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def cut(source: Path, *ranges: tuple[int, int]) -> str:
    rows = [f"  - sources: [{{model: {source}, layer_range: [{first}, {end}]}}]\n" for first, end in ranges]
    return f"slices:\n{''.join(rows)}merge_method: passthrough\n"


def write_part(directory: Path, step: int, is_held: Callable[[str], bool]) -> Path:
    """Some layers of a model and all of its configuration, as a selective save leaves them."""
    directory.mkdir()
    shutil.copy(LLAMA / "config.json", directory)
    held = {name: tensor for name, tensor in load_file(LLAMA / "model.safetensors").items() if is_held(name)}
    save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return directory


@pytest.mark.parametrize("to", ["hf", "tailored", "dcp"])
def test_partial_checkpoints_add_up_in_every_format(to: str, tmp_path: Path) -> None:
    old = write_part(tmp_path / "checkpoint-10", 10, lambda name: ".layers.1." not in name and "lm_head" not in name)
    new = write_part(tmp_path / "checkpoint-20", 20, lambda name: ".layers.1." in name or "lm_head" in name)
    text = f'layers: {{"layers.0, layers.2, embed_tokens, norm": {old}, "layers.1, lm_head": {new}}}\n'

    llmtailor.merge(recipe_of(text, tmp_path), tmp_path / "merged", to=to)

    llmtailor.export(tmp_path / "merged", tmp_path / "whole", to="hf")
    assert_same(hf_stock.read_weights(tmp_path / "whole"), hf_stock.read_weights(LLAMA))


def test_model_of_another_depth_is_written_for_hugging_face_alone(tmp_path: Path) -> None:
    recipe = recipe_of(cut(LLAMA, (0, 2), (1, 3)), tmp_path)
    with pytest.raises(UnsupportedError) as caught:
        llmtailor.merge(recipe, tmp_path / "merged", to="tailored")
    assert (caught.value.expected, caught.value.found) == ("3 blocks, as in base, for --to tailored", "4 blocks")

    llmtailor.merge(recipe, tmp_path / "merged", weights_only=True)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["num_hidden_layers"] == 4


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of text and images whose vision tower is the longer stack."""
    path = tmp_path_factory.mktemp("llava")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(num_hidden_layers=4, image_size=8, patch_size=4, **sizes),
        text_config=transformers.LlamaConfig(num_hidden_layers=3, vocab_size=32, num_key_value_heads=2, **sizes),
        image_token_index=31,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("ranges", [[(0, 2), (1, 3)], [(0, 1), (2, 3)], [(0, 3)]])
def test_configuration_follows_the_depth_of_the_language_model(
    ranges: list[tuple[int, int]], llava: Path, tmp_path: Path
) -> None:
    llmtailor.merge(recipe_of(cut(llava, *ranges), tmp_path), tmp_path / "merged")

    model, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not report["missing_keys"] | report["unexpected_keys"]
    assert model.config.text_config.num_hidden_layers == sum(end - first for first, end in ranges)
    assert model.config.vision_config.num_hidden_layers == 4
    source = transformers.LlavaForConditionalGeneration.from_pretrained(llava)
    blocks, theirs = model.model.language_model.layers, source.model.language_model.layers
    assert torch.equal(blocks[-1].mlp.up_proj.weight, theirs[2].mlp.up_proj.weight)


def with_uncounted_block(directory: Path) -> Path:
    """As hub models hold a block that predicts further tokens: numbered on after the others."""
    directory.mkdir()
    shutil.copy(LLAMA / "config.json", directory)
    config = json.loads((LLAMA / "config.json").read_text())
    # A family that is not known here: of others nothing may be in the file that is not in the family.
    (directory / "config.json").write_text(
        json.dumps(config | {"model_type": "llama_mtp", "num_nextn_predict_layers": 1})
    )
    weights = load_file(LLAMA / "model.safetensors")
    more = {name.replace(".2.", ".3."): tensor + 1 for name, tensor in weights.items() if ".layers.2." in name}
    more["model.layers.3.enorm.weight"] = torch.ones(4)
    save_file(weights | more, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_export_leaves_the_count_of_blocks_as_it_is(tmp_path: Path) -> None:
    source = with_uncounted_block(tmp_path / "source")

    plan = llmtailor.export(source, tmp_path / "out", to="hf")

    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert plan.notes == ("config.json says 3 blocks, and 4 are here: both stay as they are",)


def test_average_of_models_has_the_uncounted_block(tmp_path: Path) -> None:
    source = with_uncounted_block(tmp_path / "source")
    text = f"models: [{{model: {source}, parameters: {{weight: 1}}}}]\nmerge_method: linear\n"

    llmtailor.merge(recipe_of(text, tmp_path), tmp_path / "merged")

    assert_same(hf_stock.read_weights(tmp_path / "merged"), hf_stock.read_weights(source))


def test_uncounted_block_that_slices_leave_out_is_said(tmp_path: Path) -> None:
    source = with_uncounted_block(tmp_path / "source")

    plan = llmtailor.merge(recipe_of(cut(source, (0, 3)), tmp_path), tmp_path / "merged")

    assert_same(hf_stock.read_weights(tmp_path / "merged"), hf_stock.read_weights(LLAMA))
    assert plan.notes == ("blocks that config.json does not count are left out, as no range means them: layers.3",)
