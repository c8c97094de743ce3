"""What cannot be merged is refused with a typed error before a byte is written, and nothing is run or changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmtailor
from formats.hostile_files import EVIDENCE, hostile_files
from llmtailor.errors import IncompatibleError, InvalidInputError, TailorError
from llmtailor.manifest import digest_of
from tiny_models import build_llama

DATA = Path(__file__).parent.parent / "compat" / "data"
LLAMA = DATA / "transformers-5.23.0" / "llama"
SHARDED = DATA / "transformers-5.23.0" / "llama-sharded"
ZERO2 = DATA / "deepspeed-0.19.8" / "z2-bf16"
ZERO3 = DATA / "deepspeed-0.19.8" / "z3-bf16"
FSDP = DATA / "torch-2.13.0-dcp" / "trainer" / "checkpoint-2"


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): digest_of(path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def refuse(tmp_path: Path, base: Path, other: Path, layers: str = "layers.1") -> TailorError:
    """The error of a merge; checks that it left nothing, and the sources as they were."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'base: {base}\nlayers: {{"{layers}": {other}}}\n')
    before = {source: digests(source) for source in (base, other)}
    entries = sorted(tmp_path.iterdir())
    with pytest.raises(TailorError) as caught:
        llmtailor.merge(recipe, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == entries
    assert {source: digests(source) for source in (base, other)} == before
    return caught.value


def copy_of(source: Path, tmp_path: Path, name: str = "damaged") -> Path:
    return Path(shutil.copytree(source, tmp_path / name))


def rewrite_weights(checkpoint: Path, change: Callable[[dict[str, object]], None]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (SHARDED, "model-00002-of-00002.safetensors"),
        (ZERO2, "global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        (ZERO2, "global_step3/mp_rank_00_model_states.pt"),
        (ZERO3, "global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        (FSDP, "optimizer_0/__1_0.distcp"),
        (FSDP, "pytorch_model_fsdp_0/.metadata"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_missing_shard_is_named(source: Path, name: str, tmp_path: Path) -> None:
    damaged = copy_of(source, tmp_path)
    (damaged / name).unlink()
    error = refuse(tmp_path, source, damaged)
    assert Path(name).name in str(error)
    assert error.exit_code in (3, 4, 8)


def test_missing_layer_is_named_with_what_is_missing(tmp_path: Path) -> None:
    def drop(tensors: dict[str, object]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    base, damaged = LLAMA / "checkpoint-4", copy_of(LLAMA / "checkpoint-2", tmp_path)
    rewrite_weights(damaged, drop)
    error = refuse(tmp_path, base, damaged)
    assert str(damaged) in str(error)
    (damaged / "optimizer.pt").unlink()
    assert "layers.1" in str(refuse(tmp_path, base, damaged))


def test_missing_tensor_of_a_layer_is_named(tmp_path: Path) -> None:
    damaged = copy_of(LLAMA / "checkpoint-2", tmp_path)
    rewrite_weights(damaged, lambda tensors: tensors.__delitem__("model.layers.1.mlp.up_proj.weight"))
    error = refuse(tmp_path, LLAMA / "checkpoint-4", damaged)
    assert "model.layers.1.mlp.up_proj.weight" in str(error)


def test_other_shape_is_told_with_expected_and_found(tmp_path: Path) -> None:
    def shrink(tensors: dict[str, object]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = load_file(LLAMA / "checkpoint-2" / "model.safetensors")[name][:-1].clone()

    damaged = copy_of(LLAMA / "checkpoint-2", tmp_path)
    rewrite_weights(damaged, shrink)
    error = refuse(tmp_path, LLAMA / "checkpoint-4", damaged)
    assert "up_proj" in str(error)
    assert error.expected is not None
    assert error.found is not None


def test_other_element_type_is_refused_for_every_tensor_at_once(tmp_path: Path) -> None:
    other = tmp_path / "bf16"
    llmtailor.export(LLAMA / "checkpoint-2", other, dtype="BF16")
    error = refuse(tmp_path, LLAMA / "checkpoint-4", other, "layers.0, layers.1")
    assert isinstance(error, IncompatibleError)
    assert error.kind == "layers-differ"
    assert all(f"model.layers.{index}.mlp.up_proj.weight" in str(error) for index in (0, 1))
    assert "F32[" in str(error)
    assert "BF16[" in str(error)


def test_tied_and_untied_do_not_mix(tmp_path: Path) -> None:
    def untie(tensors: dict[str, object]) -> None:
        tensors["lm_head.weight"] = load_file(tied / "model.safetensors")["model.embed_tokens.weight"].clone()

    tied = DATA / "transformers-5.23.0" / "qwen2-tied" / "checkpoint-2"
    untied = copy_of(tied, tmp_path)
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    rewrite_weights(untied, untie)
    for file in (tied / "optimizer.pt", untied / "optimizer.pt"):
        assert file.exists()
    (untied / "optimizer.pt").unlink()
    error = refuse(tmp_path, tied, untied)
    assert error.kind == "tied-untied"


def test_rank_file_of_another_world_size_is_refused(tmp_path: Path) -> None:
    name = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    three = DATA / "deepspeed-0.19.8" / "z3-bf16-frozen-3ranks" / "global_step3"
    damaged = copy_of(ZERO3, tmp_path)
    shutil.copy(three / name.format(1), damaged / "global_step3" / name.format(1))
    error = refuse(tmp_path, ZERO3, damaged)
    assert "rank_1" in str(error)
    assert error.expected is not None
    assert error.found is not None


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (LLAMA / "checkpoint-2", "optimizer.pt"),
        (LLAMA / "checkpoint-2", "model.safetensors"),
        (ZERO2, "global_step3/mp_rank_00_model_states.pt"),
        (ZERO3, "global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        (FSDP, "optimizer_0/__1_0.distcp"),
        (FSDP, "optimizer_0/.metadata"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_torn_file_is_named(source: Path, name: str, share: float, tmp_path: Path) -> None:
    damaged = copy_of(source, tmp_path)
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: int(share * len(content))])
    error = refuse(tmp_path, source, damaged)
    assert Path(name).name in str(error)


def test_faults_of_several_sources_come_together(tmp_path: Path) -> None:
    torn, gone = copy_of(LLAMA / "checkpoint-2", tmp_path, "torn"), tmp_path / "gone"
    (torn / "optimizer.pt").write_bytes(b"PK")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {LLAMA / 'checkpoint-4'}\nlayers: {{layers.0: {torn}, layers.1: {gone}}}\n")
    with pytest.raises(TailorError) as caught:
        llmtailor.merge(recipe, tmp_path / "merged")
    assert str(torn / "optimizer.pt") in str(caught.value)
    assert str(gone) in str(caught.value)


def hostile_names() -> list[str]:
    return sorted(hostile_files(Path("nowhere")))


def test_there_are_enough_hostile_files() -> None:
    assert len(hostile_names()) >= 40


@pytest.mark.parametrize("name", hostile_names())
@pytest.mark.parametrize(
    ("source", "victim"),
    [
        (LLAMA / "checkpoint-2", "optimizer.pt"),
        (ZERO3, "global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ],
    ids=["hf", "deepspeed"],
)
def test_hostile_file_is_refused_and_never_obeyed(source: Path, victim: str, name: str, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    evidence.mkdir()
    damaged = copy_of(source, tmp_path)
    (damaged / victim).write_bytes(hostile_files(evidence)[name])
    error = refuse(tmp_path, source, damaged)
    assert Path(victim).name in str(error)
    assert not (evidence / EVIDENCE).exists()


@pytest.mark.parametrize(
    "text",
    [
        'a: &a ["x","x"]\nb: &b [*a,*a]\nc: [*b,*b]\n',
        "base: !!python/object/apply:os.system ['true']\n",
        "base: x\nbase: y\n",
        "[" * 5000,
        "<<: {base: x}\n",
        "base: x\n" + "#" * 300_000,
    ],
    ids=["aliases", "tag", "twice", "deep", "merge-key", "long"],
)
def test_yaml_that_is_a_bomb_is_refused(text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(InvalidInputError):
        llmtailor.merge(recipe, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def llmtailor_recipe(path: Path, embedding_weights: Path) -> Path:
    """As LLMTailor writes them: parity of three blocks, untied; auxiliary layers by ranges of no length."""
    a, b = LLAMA / "checkpoint-2", LLAMA / "checkpoint-4"
    path.write_text(
        f"""\
slices:
  - sources: [{{model: {b}, layer_range: [0, 0]}}]
  - sources: [{{model: {a}, layer_range: [0, 1]}}]
  - sources: [{{model: {b}, layer_range: [1, 2]}}]
  - sources: [{{model: {a}, layer_range: [2, 3]}}]
  - sources: [{{model: {b}, layer_range: [4, 4]}}]
  - sources: [{{model: {a}, layer_range: [5, 5]}}]
pre_weights:
  - {{name: model.embed_tokens.weight, model: {embedding_weights}}}
post_weights:
  - {{name: model.norm.weight, model: {b}}}
  - {{name: lm_head.weight, model: {b}}}
merge_method: passthrough
dtype: float32
"""
    )
    return path


def test_recipe_of_llmtailor_runs_as_it_is(tmp_path: Path) -> None:
    recipe = llmtailor_recipe(tmp_path / "recipe.yaml", LLAMA / "checkpoint-2")
    plan = llmtailor.merge(recipe, tmp_path / "merged")
    steps = {row.layer: row.step for row in plan.rows}
    assert steps == {"embed_tokens": 2, "layers.0": 2, "layers.1": 4, "layers.2": 2, "norm": 4, "lm_head": 4}
    assert json.loads((tmp_path / "merged" / "trainer_state.json").read_text())["global_step"] == 4


def test_weights_and_optimizer_of_one_layer_from_two_checkpoints_are_refused(tmp_path: Path) -> None:
    recipe = llmtailor_recipe(tmp_path / "recipe.yaml", LLAMA / "checkpoint-4")
    with pytest.raises(TailorError) as caught:
        llmtailor.merge(recipe, tmp_path / "merged")
    assert "$.slices[5]" in str(caught.value)
    assert "$.pre_weights[0]" in str(caught.value)
    assert not (tmp_path / "merged").exists()


def checkpoint_of(
    directory: Path, optimizer: type[torch.optim.Optimizer], *, steps: int = 1, **options: object
) -> Path:
    """The last checkpoint of a training with an optimizer."""
    model = build_llama(num_layers=2)
    live = optimizer(model.parameters(), lr=1e-3, **options)
    with llmtailor.Run(directory, model, live) as run:
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            live.step()
        run.save(max(steps, 1)).result()
    return directory / f"checkpoint-{max(steps, 1)}"


@pytest.mark.parametrize(
    ("optimizer", "options", "steps", "expected"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, 1, "torch.optim.sgd.SGD with momentum_buffer"),
        (torch.optim.SGD, {}, 1, "torch.optim.sgd.SGD"),
        (torch.optim.AdamW, {"amsgrad": True}, 1, "torch.optim.adamw.AdamW with exp_avg, exp_avg_sq, max_exp_avg_sq"),
        (torch.optim.Adagrad, {}, 0, "torch.optim.adagrad.Adagrad with sum"),
    ],
    ids=["momentum", "no-state", "other-leaves", "never-updated"],
)
def test_state_of_another_optimizer_than_that_of_state_from_is_refused(
    optimizer: type[torch.optim.Optimizer], options: dict[str, object], steps: int, expected: str, tmp_path: Path
) -> None:
    base = checkpoint_of(tmp_path / "base", torch.optim.AdamW)
    other = checkpoint_of(tmp_path / "other", optimizer, steps=steps, **options)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {base}\nstate_from: {other}\n")
    with pytest.raises(IncompatibleError) as caught:
        llmtailor.merge(recipe, tmp_path / "merged")
    assert caught.value.kind == "other-optimizer"
    assert expected in str(caught.value.expected)
    assert "AdamW with exp_avg, exp_avg_sq" in str(caught.value.found)
    assert not (tmp_path / "merged").exists()

    llmtailor.merge(recipe, tmp_path / "weights", weights_only=True)


def test_averages_of_adam_are_averages_of_adamw(tmp_path: Path) -> None:
    base = checkpoint_of(tmp_path / "base", torch.optim.AdamW)
    other = checkpoint_of(tmp_path / "other", torch.optim.Adam)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {base}\nstate_from: {other}\n")
    plan = llmtailor.merge(recipe, tmp_path / "merged")
    assert [each.name for each in plan.catalog.optimizers] == ["torch.optim.adam.Adam"]


def test_two_optimizers_are_each_held_against_their_own(tmp_path: Path) -> None:
    """Momentum of matrices, Adam's averages of the rest: parameter by parameter, not all against all."""
    directories = [tmp_path / "base", tmp_path / "other"]
    for directory in directories:
        model = build_llama(num_layers=2)
        matrices = [each for each in model.parameters() if each.ndim == 2]
        rest = [each for each in model.parameters() if each.ndim != 2]
        live = [torch.optim.SGD(matrices, lr=1e-3, momentum=0.9), torch.optim.AdamW(rest, lr=1e-3)]
        with llmtailor.Run(directory, model, live) as run:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            for each in live:
                each.step()
            run.save(1).result()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {directories[0]}/checkpoint-1\nstate_from: {directories[1]}/checkpoint-1\n")
    assert len(llmtailor.merge(recipe, tmp_path / "merged").catalog.optimizers) == 2
