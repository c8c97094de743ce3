"""Opening Hugging Face directories: real ones of every kind, and ones that lie."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.simple_writer import write_checkpoint
from llmtailor.catalog import Catalog
from llmtailor.errors import (
    FormatError,
    IncompatibleError,
    IncompleteError,
    NotFoundError,
    TailorError,
    UnsupportedError,
)
from llmtailor.formats.hf import open_hf, plan_hf
from llmtailor.formats.hf.config import ModelConfig
from merge import hf_stock
from tiny_models import assert_same

DATA = Path(__file__).parent.parent / "compat" / "data" / "transformers-5.23.0"
TRAINED = ["llama/checkpoint-2", "llama/checkpoint-4", "qwen2-tied/checkpoint-2", "gpt2/checkpoint-2"]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(DATA / "llama" / "checkpoint-4", tmp_path / "checkpoint-4"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "llama-sharded", tmp_path / "model"))


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewritten(catalog: Catalog, directory: Path) -> dict[str, torch.Tensor]:
    return hf_stock.everything(write_checkpoint(plan_hf(catalog), directory))


@pytest.mark.parametrize("name", TRAINED)
def test_every_tensor_of_a_real_checkpoint_is_found_under_its_name(name: str, tmp_path: Path) -> None:
    catalog = open_hf(DATA / name)

    assert catalog.step == int(name.rpartition("-")[2])
    assert_same(rewritten(catalog, tmp_path / "out"), hf_stock.everything(DATA / name))


@pytest.mark.parametrize("name", TRAINED)
def test_groups_of_a_real_checkpoint_keep_their_options(name: str) -> None:
    groups = open_hf(DATA / name).optimizers[0].groups

    assert [group.options["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0].options["betas"] == {"tuple": [0.9, 0.999]}
    assert groups[0].options["initial_lr"] == 0.01
    assert not {"params", "param_names"} & {*groups[0].options}


def test_tied_head_is_a_further_name() -> None:
    assert open_hf(DATA / "qwen2-tied" / "checkpoint-2").ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert open_hf(DATA / "gpt2" / "checkpoint-2").ties == {"lm_head.weight": "transformer.wte.weight"}
    assert open_hf(DATA / "llama" / "checkpoint-2").ties == {}


def test_layers_of_tied_and_untied_models_are_told_apart() -> None:
    assert open_hf(DATA / "llama" / "checkpoint-2").layers.names == (
        "lm_head", "embed_tokens", "layers.0", "layers.1", "layers.2", "norm",
    )  # fmt: skip
    assert "lm_head" not in open_hf(DATA / "qwen2-tied" / "checkpoint-2").layers.names


def test_bare_model_directory_has_weights_alone(sharded: Path, tmp_path: Path) -> None:
    catalog = open_hf(sharded)

    assert (catalog.step, catalog.optimizers, catalog.states) == (None, (), {})
    written = write_checkpoint(plan_hf(catalog), tmp_path / "out")
    assert_same(hf_stock.read_weights(written), hf_stock.read_weights(sharded))


def test_torch_file_of_weights_is_read_as_the_safetensors(tmp_path: Path) -> None:
    old, new = DATA / "llama-bin" / "checkpoint-4", DATA / "llama" / "checkpoint-4"

    assert_same(rewritten(open_hf(old), tmp_path / "out"), hf_stock.everything(new))


def test_shards_of_torch_files_are_read(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in files.items():
        torch.save({name: weights[name] for name in part}, llama / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    assert set(open_hf(llama).weights) == set(names)
    assert len(open_hf(llama).states) == 30


def test_tie_in_a_torch_file_is_told_by_its_storage(tmp_path: Path) -> None:
    embedding = torch.randn(8, 4)
    torch.save({"embed_tokens.weight": embedding, "lm_head.weight": embedding}, tmp_path / "pytorch_model.bin")

    catalog = open_hf(tmp_path)

    assert (list(catalog.weights), catalog.ties) == (["embed_tokens.weight"], {"lm_head.weight": "embed_tokens.weight"})


def test_names_that_torch_compile_wraps_are_plain(tmp_path: Path) -> None:
    save_file({"_orig_mod.layers.0.weight": torch.zeros(2)}, tmp_path / "model.safetensors")

    assert list(open_hf(tmp_path).weights) == ["layers.0.weight"]


def test_snapshot_of_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((DATA / "llama-sharded").iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")

    assert len(open_hf(snapshot).weights) == 30
    assert {file.name for file in open_hf(snapshot).files} == {"config.json", "generation_config.json"}


def test_loss_that_is_not_a_number_does_not_stop_anybody(llama: Path) -> None:
    change_json(llama / "trainer_state.json", lambda state: state["log_history"].append({"grad_norm": float("nan")}))

    assert open_hf(llama).step == 4


def test_adafactors_state_is_taken_whole(llama: Path, tmp_path: Path) -> None:
    replace_optimizer(llama, lambda parameters: torch.optim.Adafactor(parameters, lr=0.1))

    assert_same(rewritten(open_hf(llama), tmp_path / "out"), hf_stock.everything(llama))


def test_state_of_sgd_and_its_none_are_taken_whole(llama: Path, tmp_path: Path) -> None:
    replace_optimizer(llama, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    stored = hf_stock.read_optimizer(llama)
    stored["state"][3]["momentum_buffer"] = None
    torch.save(stored, llama / "optimizer.pt")

    written = write_checkpoint(plan_hf(open_hf(llama)), tmp_path / "out")

    assert_same(hf_stock.everything(written), hf_stock.everything(llama))


def replace_optimizer(directory: Path, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> None:
    """State of another optimizer over the Trainer's two groups, with a step done."""
    model = hf_stock.stock_model(directory)
    decayed = set(hf_stock.Trainer.get_decay_parameter_names(None, model))
    named = list(model.named_parameters())
    groups = [
        {"params": [each for name, each in named if name in decayed]},
        {"params": [each for name, each in named if name not in decayed]},
    ]
    optimizer = make(groups)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")


def test_optimizer_of_named_parameters_needs_no_order(llama: Path) -> None:
    model = hf_stock.stock_model(llama)
    named = list(model.named_parameters())[::-1]
    optimizer = torch.optim.SGD([{"params": [each]} for each in named], lr=0.1)
    torch.save(optimizer.state_dict(), llama / "optimizer.pt")

    names = [group.parameters for group in open_hf(llama).optimizers[0].groups]

    assert names == [(name,) for name, _ in named]


def test_list_of_names_is_taken_where_the_order_is_not_the_trainers(llama: Path, tmp_path: Path) -> None:
    stored = hf_stock.read_optimizer(llama)
    states = hf_stock.read_states(llama)
    order = sorted(states)
    mixed = [{**stored["param_groups"][0], "params": [i]} for i in range(len(order))]
    torch.save(
        {"state": {i: states[name] for i, name in enumerate(order)}, "param_groups": mixed}, llama / "optimizer.pt"
    )

    with pytest.raises(IncompatibleError, match="groups are not the Trainer's"):
        open_hf(llama)
    catalog = open_hf(llama, parameter_names=order)

    assert [group.parameters for group in catalog.optimizers[0].groups] == [(name,) for name in order]
    written = write_checkpoint(plan_hf(catalog), tmp_path / "out")
    assert_same(hf_stock.read_optimizer(written)["state"][7], states[order[7]])


def test_list_may_name_a_tied_parameter_by_either_name() -> None:
    path = DATA / "qwen2-tied" / "checkpoint-2"
    names = [name for name, _ in hf_stock.stock_model(path).named_parameters()]

    catalog = open_hf(path, parameter_names=["lm_head.weight", *names[1:]])

    assert catalog.optimizers == open_hf(path).optimizers


def test_frozen_layers_are_refused_unless_they_are_named(llama: Path) -> None:
    stored = hf_stock.read_optimizer(llama)
    states = hf_stock.read_states(llama)
    names = [name for group in open_hf(llama).optimizers[0].groups for name in group.parameters]
    trained = [name for name in names if ".layers.0." not in name]
    sizes = [
        sum(".layers.0." not in name for name in group.parameters) for group in open_hf(llama).optimizers[0].groups
    ]
    groups = [
        {**stored["param_groups"][0], "params": list(range(sizes[0]))},
        {**stored["param_groups"][1], "params": list(range(sizes[0], sum(sizes)))},
    ]
    torch.save({"state": {i: states[n] for i, n in enumerate(trained)}, "param_groups": groups}, llama / "optimizer.pt")

    with pytest.raises(IncompatibleError) as caught:
        open_hf(llama)
    assert caught.value.kind == "ambiguous-names"

    assert set(open_hf(llama, parameter_names=trained).states) == set(trained)


# What does not hold together.


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(IncompleteError) as caught:
        open_hf(sharded)

    assert caught.value.kind == "missing-shard"
    assert str(caught.value.path).endswith("model-00002-of-00002.safetensors")


def test_shard_without_one_of_its_tensors_is_refused(sharded: Path) -> None:
    path = sharded / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    save_file({name: tensors[name] for name in tensors if name != gone}, path)

    with pytest.raises(IncompleteError) as caught:
        open_hf(sharded)

    assert (caught.value.kind, caught.value.fqn) == ("missing-tensor", gone)


def test_shard_with_a_tensor_too_many_is_refused(sharded: Path) -> None:
    path = sharded / "model-00002-of-00002.safetensors"
    save_file({**load_file(path), "more": torch.zeros(1)}, path)

    with pytest.raises(FormatError) as caught:
        open_hf(sharded)

    assert (caught.value.kind, caught.value.fqn) == ("index-mismatch", "more")


def test_missing_layer_is_named(llama: Path) -> None:
    path = llama / "model.safetensors"
    save_file({name: each for name, each in load_file(path).items() if ".layers.1." not in name}, path)

    with pytest.raises(IncompleteError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight"):
        open_hf(llama)


def test_partial_model_is_opened_where_that_is_asked_for(llama: Path) -> None:
    path = llama / "model.safetensors"
    save_file({name: each for name, each in load_file(path).items() if ".layers.1." in name}, path)
    (llama / "optimizer.pt").unlink()

    with pytest.raises(IncompleteError):
        open_hf(llama)
    catalog = open_hf(llama, allow_partial=True)

    assert isinstance(catalog.native, ModelConfig)
    assert (len(catalog.weights), catalog.native.num_blocks) == (9, 3)


def test_optimizer_nobody_can_read_does_not_stop_who_wants_weights_alone(llama: Path) -> None:
    torch.save({"muon": {}, "adam": {}}, llama / "optimizer.pt")

    assert len(open_hf(llama, with_optimizer=False).weights) == 30


def test_missing_head_of_an_untied_model_is_named(llama: Path) -> None:
    path = llama / "model.safetensors"
    save_file({name: each for name, each in load_file(path).items() if name != "lm_head.weight"}, path)

    with pytest.raises(IncompleteError, match=r"lm_head\.weight"):
        open_hf(llama)


def test_weights_of_other_shapes_than_the_state_are_refused(llama: Path) -> None:
    path = llama / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "model.norm.weight": torch.zeros(17)}, path)

    with pytest.raises(IncompatibleError) as caught:
        open_hf(llama)

    assert (caught.value.kind, caught.value.fqn) == ("optimizer-order", "model.norm.weight")


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/hostname.safetensors",
        "sub/model.safetensors",
        "..",
        "",
        ".hidden.safetensors",
        "a\\b.safetensors",
        "a\n.safetensors",
        "model.bin",
        "ä.safetensors",
        "x" * 300 + ".safetensors",
        7,
        None,
        ["model-00001-of-00002.safetensors"],
    ],
)
def test_index_that_names_another_place_is_refused(sharded: Path, file: object) -> None:
    save_file({"lm_head.weight": torch.zeros(1)}, sharded.parent / "outside.safetensors")
    change_json(sharded / "model.safetensors.index.json", lambda index: index["weight_map"].update({"x": file}))

    with pytest.raises(FormatError) as caught:
        open_hf(sharded)

    assert caught.value.kind == "bad-index"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}',
        '{"weight_map": ' + "[" * 200_000,
    ],
)
def test_malformed_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)

    with pytest.raises(FormatError):
        open_hf(sharded)


def test_shard_that_is_a_pipe_a_directory_or_leads_out_is_refused(sharded: Path) -> None:
    path = sharded / "model-00002-of-00002.safetensors"
    outside = path.rename(sharded.parent / "outside.safetensors")
    path.symlink_to(outside)
    with pytest.raises(FormatError, match="not a file to read"):
        open_hf(sharded)
    path.unlink()
    path.mkdir()
    with pytest.raises(FormatError):
        open_hf(sharded)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(FormatError):
        open_hf(sharded)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "config.json", "trainer_state.json", "scheduler.pt"]
)
@pytest.mark.parametrize("spoil", ["pipe", "link", "directory", "dangling"])
def test_file_that_is_none_is_refused(llama: Path, name: str, spoil: str) -> None:
    path = llama / name
    outside = path.rename(llama.parent / "outside")
    match spoil:
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(outside)
        case "directory":
            path.mkdir()
        case "dangling":
            path.symlink_to("nowhere")
    if name == "scheduler.pt" and spoil != "link":
        # Nothing opens it; what is no file is not carried along.
        assert name not in {file.name for file in open_hf(llama).files}
        return

    with pytest.raises((FormatError, NotFoundError)):
        open_hf(llama)


@pytest.mark.parametrize("step", [None, -1, 1.5, True, "4", 2**70])
def test_step_that_is_none_is_refused(llama: Path, step: object) -> None:
    change_json(llama / "trainer_state.json", lambda state: state.update(global_step=step))

    with pytest.raises(FormatError, match="does not say the step"):
        open_hf(llama)


def edit_groups(change: Callable[[list[Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda stored: change(stored["param_groups"])


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored.update(state=[]),
        lambda stored: stored.update(param_groups={}),
        lambda stored: stored.update(param_groups=[]),
        lambda stored: stored["state"].update({99: {}}),
        lambda stored: stored["state"].update({"0": {}}),
        lambda stored: stored["state"].update({0: []}),
        edit_groups(lambda groups: groups.append(7)),
        edit_groups(lambda groups: groups[0].pop("params")),
        edit_groups(lambda groups: groups[0].update(params=["0"])),
        edit_groups(lambda groups: groups[0]["params"].append(0)),
        edit_groups(lambda groups: groups[1]["params"].append(0)),
    ],
)
def test_malformed_optimizer_is_refused(llama: Path, change: Callable[[dict[str, Any]], object]) -> None:
    stored = hf_stock.read_optimizer(llama)
    change(stored)
    torch.save(stored, llama / "optimizer.pt")

    with pytest.raises(FormatError) as caught:
        open_hf(llama)

    assert caught.value.kind == "bad-optimizer"


def test_optimizer_of_another_kind_is_unsupported(llama: Path) -> None:
    torch.save({"muon": {}, "adam": {}}, llama / "optimizer.pt")

    with pytest.raises(UnsupportedError, match="not that of one torch optimizer"):
        open_hf(llama)


@pytest.mark.parametrize(
    "other",
    [
        "tailor.json",
        ".metadata",
        "optimizer.bin",
        "pytorch_model_fsdp.bin",
        "pytorch_model_fsdp_0/.metadata",
        "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ],
)
def test_checkpoint_of_another_format_is_refused_by_name(llama: Path, other: str) -> None:
    (llama / other).parent.mkdir(exist_ok=True)
    (llama / other).touch()

    with pytest.raises(FormatError) as caught:
        open_hf(llama)

    assert caught.value.kind == "other-format"


def test_adapter_without_its_model_is_unsupported(tmp_path: Path) -> None:
    save_file({"lora_A.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")

    with pytest.raises(UnsupportedError, match="adapter"):
        open_hf(tmp_path)


def test_nothing_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_hf(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="no weights"):
        open_hf(tmp_path)


def test_programs_and_other_peoples_files_are_not_carried_along(llama: Path) -> None:
    for name in ("modeling_x.py", "README.md", ".git", "latest", "events.out", "pytorch_model.bin", "tokenizer.json"):
        (llama / name).touch()

    assert {file.name for file in open_hf(llama).files} == {
        "config.json", "generation_config.json", "rng_state.pth", "scheduler.pt", "tokenizer.json",
        "trainer_state.json",
    }  # fmt: skip


def test_torn_files_are_refused_in_words(llama: Path) -> None:
    for name in ("model.safetensors", "optimizer.pt", "config.json", "trainer_state.json"):
        whole = (llama / name).read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 2):
            (llama / name).write_bytes(whole[:length])
            with pytest.raises(TailorError):
                open_hf(llama)
        (llama / name).write_bytes(whole)
    assert open_hf(llama).step == 4


def test_sources_are_not_touched(tmp_path: Path, llama: Path) -> None:
    before = hf_stock.digests(llama)

    write_checkpoint(plan_hf(open_hf(llama)), tmp_path / "out")

    assert hf_stock.digests(llama) == before
