from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.deepspeed_files import (
    DIRECTORY,
    NAMES,
    TAG,
    copy_fixture,
    edit,
    fixture_truth,
    model_file,
    optim_file,
)
from formats.simple_writer import load_ref, tensor_bytes
from llmtailor.errors import (
    FormatError,
    IncompatibleError,
    IncompleteError,
    NotFoundError,
    TailorError,
    UnsupportedError,
)
from llmtailor.formats.deepspeed import open_deepspeed, plan_deepspeed, rank_trees
from llmtailor.formats.torch_files import TorchTensor, open_torch_file
from llmtailor.tensor_refs import CastTensor, FileTensor, InlineTensor, TensorRef
from llmtailor.tensors import TensorMeta


def digest(ref: TensorRef) -> str:
    return hashlib.sha256(tensor_bytes(ref)).hexdigest()[:32]


# What real checkpoints hold.


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_what_the_live_engine_held(name: str) -> None:
    catalog, truth = open_deepspeed(DIRECTORY / name), fixture_truth(name)
    assert catalog.weights.keys() == truth["weights"].keys()
    assert catalog.masters.keys() == truth["master"].keys()
    for fqn, expected in truth["weights"].items():
        assert digest(catalog.weights[fqn]) == expected, fqn
    for fqn, expected in truth["master"].items():
        assert digest(catalog.masters[fqn]) == expected, fqn
        for leaf, state in truth["state"][fqn].items():
            assert digest(catalog.states[fqn].tensors[leaf]) == state, (leaf, fqn)
    assert catalog.step == 3


@pytest.mark.parametrize("name", [name for name in NAMES if "muon" not in name])
def test_groups_have_the_parameters_in_the_order_the_optimizer_was_given(name: str) -> None:
    catalog = open_deepspeed(DIRECTORY / name)
    (optimizer,) = catalog.optimizers
    for group in optimizer.groups:
        # Of these fixtures the groups were made by walking through the model; for Muon DeepSpeed makes its own.
        places = [list(catalog.weights).index(fqn) for fqn in group.parameters]
        assert places == sorted(places)
    grouped = [fqn for group in optimizer.groups for fqn in group.parameters]
    assert sorted(grouped) == sorted(catalog.masters)


def test_options_of_the_groups_are_read() -> None:
    decay, rest = open_deepspeed(DIRECTORY / "z2-bf16").optimizers[0].groups
    assert decay.options["weight_decay"] == 0.1
    assert rest.options["weight_decay"] == 0.0
    assert decay.options["betas"] == {"tuple": [0.9, 0.999]}
    assert decay.options["decoupled_weight_decay"] is True
    assert "params" not in decay.options


def test_tied_parameter_is_there_once() -> None:
    for name in ("z2-fp16-tied", "z3-fp32-tied-subgroups"):
        catalog = open_deepspeed(DIRECTORY / name)
        assert catalog.ties == {"lm_head.weight": "model.embed_tokens.weight"}
        assert "lm_head.weight" not in catalog.weights
        assert len(catalog.layers.layer_of("lm_head.weight").fqns) == 1


def test_frozen_parameter_has_weights_and_nothing_else() -> None:
    for name in ("z2-bf16-round-robin-frozen-3ranks", "z3-bf16-frozen-3ranks"):
        catalog = open_deepspeed(DIRECTORY / name)
        fqn = "model.embed_tokens.weight"
        assert catalog.weights[fqn].meta == TensorMeta(dtype="BF16", shape=(67, 16))
        assert fqn not in catalog.masters
        assert fqn not in catalog.states


def test_stage_3_without_safetensors_rounds_the_masters() -> None:
    catalog = open_deepspeed(DIRECTORY / "z3-bf16-frozen-3ranks")
    weights = catalog.weights["lm_head.weight"]
    assert isinstance(weights, CastTensor)
    assert weights.source is catalog.masters["lm_head.weight"]
    assert weights.meta.dtype == "BF16"


def test_stage_3_with_safetensors_has_their_bytes() -> None:
    catalog = open_deepspeed(DIRECTORY / "z3-bf16")
    stock = load_file(DIRECTORY / "z3-bf16" / "model.safetensors")
    assert stock.keys() == catalog.weights.keys()
    for fqn, ref in catalog.weights.items():
        assert isinstance(ref, FileTensor)
        assert torch.equal(load_ref(ref), stock[fqn])


def test_step_is_known_without_reading_again() -> None:
    state = open_deepspeed(DIRECTORY / "z1-fp32").states["lm_head.weight"]
    assert isinstance(state.tensors["step"], InlineTensor)
    assert load_ref(state.tensors["step"]) == 3.0
    assert state.notes == {}


def test_python_step_has_a_note_and_momentum_has_no_step() -> None:
    muon = open_deepspeed(DIRECTORY / "z2-bf16-muon").states
    assert muon["model.norm.weight"].notes == {"step": "int"}
    assert list(muon["model.layers.0.mlp.up_proj.weight"].tensors) == ["momentum_buffer"]
    assert list(open_deepspeed(DIRECTORY / "z2-bf16-sgd").states["lm_head.weight"].tensors) == ["momentum_buffer"]


def test_muon_momentum_is_the_same_on_both_ranks_that_share_a_parameter() -> None:
    """DeepSpeed keeps whole parameters there, so the one at the border lies on two ranks."""
    checkpoint = DIRECTORY / "z2-bf16-muon"
    catalog = open_deepspeed(checkpoint)
    group = catalog.native.flats[0]  # type: ignore[attr-defined]
    on_ranks = []
    for rank in (0, 1):
        stock = torch.load(optim_file(checkpoint, rank), weights_only=False)["optimizer_state_dict"]
        on_ranks.append(stock["base_optimizer_state"]["state"][0]["momentum_buffer"])
    half = sum(numel for _, numel in group.parameters) // 2
    position = 0
    for fqn, numel in group.parameters:
        if position < half < position + numel:
            border, border_numel, start = fqn, numel, position
        position += numel
    expected = load_ref(catalog.states[border].tensors["momentum_buffer"]).flatten()
    assert torch.equal(on_ranks[0][start : start + border_numel], expected)
    assert torch.equal(on_ranks[1][:border_numel], expected)


def test_small_files_are_those_of_the_trainer() -> None:
    catalog = open_deepspeed(DIRECTORY / "z2-bf16")
    assert [file.name for file in catalog.files] == [
        "config.json",
        "rng_state_0.pth",
        "rng_state_1.pth",
        "scheduler.pt",
        "trainer_state.json",
    ]


def test_code_is_never_taken_along(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    (checkpoint / "zero_to_fp32.py").write_text("raise SystemExit")
    assert not [file.name for file in open_deepspeed(checkpoint).files if file.name.endswith(".py")]


def test_opening_leaves_torch_out() -> None:
    import subprocess
    import sys

    script = (
        "import sys\nfrom pathlib import Path\nfrom llmtailor.formats.deepspeed import open_deepspeed, plan_deepspeed\n"
        "plan_deepspeed(open_deepspeed(Path(sys.argv[1])), ranks=3)\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(DIRECTORY / "z3-bf16")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# Where a checkpoint may be.


@pytest.mark.parametrize("change", [lambda root: None, lambda root: (root / "latest").unlink()], ids=["latest", "none"])
def test_directory_is_found_by_latest_or_as_the_only_one(tmp_path: Path, change: Callable[[Path], None]) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    change(checkpoint)
    assert open_deepspeed(checkpoint).step == 3


def test_tag_directory_itself_is_opened_alone() -> None:
    catalog = open_deepspeed(DIRECTORY / "z3-bf16" / TAG)
    assert catalog.files == ()
    assert isinstance(catalog.weights["lm_head.weight"], CastTensor)


def test_several_tags_without_latest_are_refused(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    (checkpoint / "latest").unlink()
    (checkpoint / "global_step9").mkdir()
    refused(checkpoint, IncompatibleError, "several-tags", "global_step3, global_step9")


def test_old_names_of_files_are_read(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    for rank in (0, 1):
        optim_file(checkpoint, rank).rename(checkpoint / TAG / f"zero_pp_rank_{rank}_mp_rank_00optim_states.pt")
    assert (
        digest(open_deepspeed(checkpoint).masters["lm_head.weight"])
        == fixture_truth("z2-bf16")["master"]["lm_head.weight"]
    )


def refused(checkpoint: Path, error: type[TailorError], kind: str, *words: str) -> TailorError:
    with pytest.raises(error) as caught:
        open_deepspeed(checkpoint)
    assert type(caught.value) is error
    assert caught.value.kind == kind, str(caught.value)
    for word in words:
        assert word in str(caught.value)
    return caught.value


@pytest.mark.parametrize("latest", ["../z2-bf16", "/etc", "a/b", "..", "", "a\nb", "-x"])
def test_latest_cannot_lead_out(tmp_path: Path, latest: str) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    (checkpoint / "latest").write_text(latest)
    refused(checkpoint, FormatError, "latest")


def test_tag_that_is_not_there_is_named(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    (checkpoint / "latest").write_text("global_step4")
    refused(checkpoint, IncompleteError, "missing-tag", "global_step4", "global_step3")


def test_missing_checkpoint_and_empty_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", NotFoundError, "missing-checkpoint")
    refused(tmp_path, NotFoundError, "missing-tag")


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    path = optim_file(checkpoint, 1)
    elsewhere = tmp_path / "elsewhere.pt"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    refused(checkpoint, FormatError, "not-regular")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(TailorError):
        open_deepspeed(checkpoint)


# What is missing or left over.


def test_every_missing_rank_is_named(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z3-bf16-frozen-3ranks", tmp_path)
    for rank in (1, 2):
        optim_file(checkpoint, rank).unlink()
    model_file(checkpoint, 2).unlink()
    error = refused(checkpoint, IncompleteError, "missing-rank", "3 ranks")
    assert str(error.found).count("_rank_2_") == 2
    assert "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt" in str(error.found)


def test_missing_first_rank_is_named(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    optim_file(checkpoint, 0).unlink()
    refused(checkpoint, IncompleteError, "missing-rank", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")


def test_missing_model_states_are_named(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z1-fp32", tmp_path)
    model_file(checkpoint).unlink()
    refused(checkpoint, IncompleteError, "missing-rank", "mp_rank_00_model_states.pt")


def test_files_of_a_larger_world_are_refused(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    extra = optim_file(checkpoint, 0).name.replace("rank_0_mp", "rank_2_mp")
    (checkpoint / TAG / extra).write_bytes(optim_file(checkpoint, 0).read_bytes())
    refused(checkpoint, IncompatibleError, "extra-rank", extra)


def test_rank_with_two_files_is_refused(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    path = optim_file(checkpoint, 0)
    path.with_name(path.name.removeprefix("bf16_")).write_bytes(path.read_bytes())
    refused(checkpoint, FormatError, "rank-twice")


def test_missing_shard_of_the_safetensors_is_named(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    index = {"weight_map": dict.fromkeys(load_file(checkpoint / "model.safetensors"), "model-1.safetensors")}
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(checkpoint, IncompleteError, "missing-shard", "model-1.safetensors")


def test_sharded_safetensors_are_read(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z3-bf16", tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, checkpoint / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = open_deepspeed(checkpoint).weights
    assert all(torch.equal(load_ref(weights[name]), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["z2-bf16", "z3-bf16"])
def test_safetensors_of_another_model_are_refused(tmp_path: Path, name: str) -> None:
    checkpoint = copy_fixture(name, tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(17)
    tensors["extra"] = tensors.pop("lm_head.weight")
    save_file(tensors, checkpoint / "model.safetensors")
    refused(
        checkpoint, IncompatibleError, "weights-beside", "model.norm.weight: [16]", "extra: absent", "lm_head.weight"
    )


# What is not done.


def test_tensor_and_expert_parallelism_are_refused(tmp_path: Path) -> None:
    for extra in ("mp_rank_01_model_states.pt", "layer_0_expert_3_mp_rank_00_model_states.pt"):
        checkpoint = copy_fixture("z2-bf16", tmp_path / extra)
        (checkpoint / TAG / extra).write_bytes(b"x")
        refused(checkpoint, UnsupportedError, "model-parallel", extra)


def test_universal_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latest_universal").write_text("x")
    refused(tmp_path, UnsupportedError, "universal")
    (tmp_path / "latest").write_text("x")
    (tmp_path / "x" / "zero").mkdir(parents=True)
    refused(tmp_path, UnsupportedError, "universal")


def test_checkpoint_without_zero_is_refused(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    for rank in (0, 1):
        optim_file(checkpoint, rank).unlink()
    refused(checkpoint, IncompleteError, "missing-rank", "ZeRO stage")


def zero_of(tree: Any) -> Any:
    return tree["optimizer_state_dict"]


CHANGES: dict[str, tuple[str, str, Callable[[Any], None], type[TailorError], str]] = {
    "hpz": (
        "z3-bf16",
        "optim",
        lambda tree: tree["ds_config"]["zero_optimization"].update(zero_hpz_partition_size=2),
        UnsupportedError,
        "partition-groups",
    ),
    "mp-world-size": (
        "z2-bf16",
        "model",
        lambda tree: tree.update(mp_world_size=2),
        UnsupportedError,
        "model-parallel",
    ),
    "unequal-partition-counts": (
        "z2-bf16",
        "optim",
        lambda tree: zero_of(tree).update(partition_count=[2, 1]),
        UnsupportedError,
        "model-parallel",
    ),
    "offloaded": (
        "z3-bf16",
        "optim",
        lambda tree: zero_of(tree)["fp32_flat_groups"].__setitem__(0, empty_tensor()),
        UnsupportedError,
        "offloaded",
    ),
    "block-wise-state": (
        "z2-bf16",
        "optim",
        lambda tree: zero_of(tree)["base_optimizer_state"]["state"][0].update(exp_avg=empty_tensor()),
        UnsupportedError,
        "flat-state",
    ),
    "other-shapes": (
        "z2-bf16",
        "model",
        lambda tree: tree["param_shapes"][0].update({"lm_head.weight": (67, 17)}),
        FormatError,
        "deepspeed-file",
    ),
    "a-group-too-few": (
        "z2-bf16",
        "model",
        lambda tree: tree["param_shapes"].pop(),
        FormatError,
        "deepspeed-file",
    ),
}


def empty_tensor() -> TorchTensor:
    return TorchTensor(ref=FileTensor(meta=TensorMeta(dtype="F32", shape=(0,)), extents=()))


@pytest.mark.parametrize("change", CHANGES)
def test_file_that_is_not_as_expected_is_refused(tmp_path: Path, change: str) -> None:
    name, kind, make, error, expected = CHANGES[change]
    checkpoint = copy_fixture(name, tmp_path)
    files = [optim_file(checkpoint, 0), optim_file(checkpoint, 1)] if kind == "optim" else [model_file(checkpoint)]
    for file in files:
        edit(file, make)
    refused(checkpoint, error, expected)


def test_ranks_of_different_checkpoints_are_refused(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)

    def advance(tree: Any) -> None:
        state = zero_of(tree)["base_optimizer_state"]["state"][0]
        data = torch.tensor(4.0).numpy().tobytes()
        state["step"] = TorchTensor(ref=InlineTensor(meta=TensorMeta(dtype="F32", shape=()), data=data))

    edit(optim_file(checkpoint, 1), advance)
    refused(checkpoint, FormatError, "deepspeed-file", "rank 1", "expected  3.0", "found     4.0")


def test_rank_of_another_world_is_refused(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    edit(optim_file(checkpoint, 1), lambda tree: zero_of(tree).update(partition_count=[3, 3]))
    refused(checkpoint, FormatError, "deepspeed-file", "the ranks differ", "stage 2, 3 ranks")


def test_parameter_in_two_groups_is_refused(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    edit(model_file(checkpoint), lambda tree: tree["param_shapes"][1].update({"lm_head.weight": (67, 16)}))
    error = refused(checkpoint, FormatError, "deepspeed-file", "two groups")
    assert error.fqn == "lm_head.weight"


def test_torn_file_is_refused(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    path = optim_file(checkpoint, 1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError) as caught:
        open_deepspeed(checkpoint)
    assert path.name in str(caught.value)


# Nothing a file may hold ends in another exception than ours.


def places(tree: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """Every container in a tree with every key in it, down to a depth."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in items:
        yield tree, key
        if depth:
            yield from places(value, depth - 1)


GARBAGE: tuple[Any, ...] = (None, True, -1, 2**70, 0.5, "x", b"x", (), [], [[]], [None], {}, {3: None}, empty_tensor())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z2-bf16", "z3-fp32-tied-subgroups", "z2-bf16-elastic", "z3-bf16-frozen-3ranks"])
def test_garbage_anywhere_in_a_file_is_a_typed_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = DIRECTORY / name
    originals = {path: open_torch_file(path) for path in sorted((checkpoint / TAG).iterdir()) if path.suffix == ".pt"}
    trees = dict(originals)
    monkeypatch.setattr(rank_trees, "open_torch_file", lambda path: trees[path])
    refusals = 0
    for victim in [next(iter(originals)), list(originals)[1], list(originals)[-1]]:
        count = len(list(places(originals[victim], 4)))
        for number in range(count):
            tree = copy.deepcopy(originals[victim])
            container, key = list(places(tree, 4))[number]
            trees[victim] = tree
            for garbage in [GARBAGE[number % len(GARBAGE)], GARBAGE[(number * 5 + 3) % len(GARBAGE)]]:
                container[key] = garbage
                try:
                    plan_deepspeed(open_deepspeed(checkpoint), ranks=2)
                except TailorError:
                    refusals += 1
        trees[victim] = originals[victim]
    assert refusals > 100
