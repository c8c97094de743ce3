from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.dcp_files import (
    APP,
    LOOP,
    OLD,
    TIED,
    TIED_FULL,
    TITAN,
    TRAINER,
    WEIGHTS,
    differences,
    load,
    save,
    tampered,
)
from formats.simple_writer import load_ref
from llmtailor.catalog import Catalog
from llmtailor.errors import FormatError, IncompleteError, NotFoundError, TailorError, UnsupportedError
from llmtailor.formats import open_catalog
from llmtailor.formats.dcp import open_dcp
from llmtailor.formats.torch_files import TorchTensor, write_option, write_state


def weights_of(catalog: Catalog) -> dict[str, torch.Tensor]:
    held = {name: load_ref(ref) for name, ref in catalog.weights.items()}
    return held | {name: held[first] for name, first in catalog.ties.items()}


def states_of(catalog: Catalog) -> dict[str, Any]:
    return {name: loaded(write_state(state)) for name, state in catalog.states.items()}


def groups_of(catalog: Catalog) -> list[dict[str, Any]]:
    (optimizer,) = catalog.optimizers
    return [
        {"params": [*group.parameters], **{name: loaded(write_option(value)) for name, value in group.options.items()}}
        for group in optimizer.groups
    ]


def loaded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: loaded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(loaded, tree))
    return load_ref(tree.ref) if isinstance(tree, TorchTensor) else tree


@pytest.mark.parametrize(
    ("path", "model", "optimizer"),
    [
        (LOOP, ["model"], ["optim"]),
        (TIED, ["model"], ["optim"]),
        (APP, ["app", "model"], ["app", "optim"]),
        (OLD, ["model"], ["optim"]),
    ],
    ids=["loop", "tied", "app", "old"],
)
def test_open_dcp_finds_what_torch_loads(path: Path, model: list[str], optimizer: list[str]) -> None:
    catalog = open_dcp(path)
    weights = states = load(path)
    for name in model:
        weights = weights[name]
    for name in optimizer:
        states = states[name]
    assert differences(weights_of(catalog), weights) == []
    assert differences(states_of(catalog), states["state"]) == []
    assert differences(groups_of(catalog), states["param_groups"]) == []


def test_open_dcp_reads_torchtitans_flat_state() -> None:
    catalog = open_dcp(TITAN)
    stored = load(TITAN)
    flat = stored.pop("optimizer")
    assert differences(weights_of(catalog), {name: stored[name] for name in catalog.weights}) == []
    assert {*stored} - {*catalog.weights} == {"lr_scheduler", "train_state"}
    found = {f"state.{fqn}.{leaf}": value for fqn, state in states_of(catalog).items() for leaf, value in state.items()}
    (group,) = groups_of(catalog)
    names = group.pop("params")
    found |= {f"param_groups.{name}.{option}": value for name in names for option, value in group.items()}
    assert differences(found, flat) == []


def test_open_dcp_reads_the_trainers_two_directories() -> None:
    catalog = open_dcp(TRAINER)
    assert differences(weights_of(catalog), load(TRAINER / "pytorch_model_fsdp_0")["model"]) == []
    optimizer = load(TRAINER / "optimizer_0")["optimizer"]
    assert differences(states_of(catalog), optimizer["state"]) == []
    assert differences(groups_of(catalog), optimizer["param_groups"]) == []
    names = [file.name for file in catalog.files]
    assert names == ["rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", "trainer_state.json"]


def test_open_dcp_reads_the_trainers_full_state_dict() -> None:
    catalog = open_dcp(TIED_FULL)
    weights = torch.load(TIED_FULL / "pytorch_model_fsdp.bin", weights_only=True)
    optimizer = torch.load(TIED_FULL / "optimizer.bin", weights_only=True)
    assert differences(weights_of(catalog), weights) == []
    assert differences(states_of(catalog), optimizer["state"]) == []
    assert differences(groups_of(catalog), optimizer["param_groups"]) == []
    assert not [file.name for file in catalog.files if file.name.endswith((".bin", ".safetensors"))]


def test_open_dcp_reads_weights_alone() -> None:
    catalog = open_dcp(WEIGHTS)
    assert differences(weights_of(catalog), load(WEIGHTS)) == []
    assert not catalog.has_optimizer


def test_a_model_directory_of_the_trainer_opens_by_itself() -> None:
    catalog = open_dcp(TRAINER / "pytorch_model_fsdp_0")
    assert catalog.weights.keys() == open_dcp(TRAINER).weights.keys()
    assert not catalog.has_optimizer


@pytest.mark.parametrize(
    ("path", "step"), [(TRAINER, 2), (TIED_FULL, 2), (TITAN, 3), (LOOP, None)], ids=["trainer", "full", "titan", "loop"]
)
def test_the_step_is_the_trainers_or_the_directorys(path: Path, step: int | None) -> None:
    assert open_dcp(path).step == step


@pytest.mark.parametrize("path", [TIED, TIED_FULL], ids=["sharded", "full"])
def test_tied_weights_are_one_tensor(path: Path) -> None:
    catalog = open_dcp(path)
    assert dict(catalog.ties) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in catalog.weights
    assert [layer.name for layer in catalog.layers] == ["embed_tokens", "layers.0", "norm"]


@pytest.mark.parametrize("path", [LOOP, TRAINER], ids=["loop", "trainer"])
def test_untied_heads_stay_apart(path: Path) -> None:
    assert not open_dcp(path).ties


def test_tied_weights_are_found_without_an_optimizer(tmp_path: Path) -> None:
    shutil.copytree(TIED_FULL, tmp_path / "model")
    (tmp_path / "model" / "optimizer.bin").unlink()
    assert dict(open_dcp(tmp_path / "model").ties) == {"lm_head.weight": "model.embed_tokens.weight"}


def save_embeddings(path: Path, head: torch.Tensor, trained: list[str]) -> Path:
    weights = {"lm_head.weight": head, "embed_tokens.weight": torch.arange(600.0).view(30, 20)}
    optimizer = {"state": {}, "param_groups": [{"params": trained, "lr": 0.1}]}
    return save(path, {"model": weights, "optim": optimizer})


def test_the_name_that_is_trained_holds_tied_weights(tmp_path: Path) -> None:
    path = save_embeddings(tmp_path / "tied", torch.arange(600.0).view(30, 20), ["embed_tokens.weight"])
    assert dict(open_dcp(path).ties) == {"lm_head.weight": "embed_tokens.weight"}


def test_equal_weights_that_are_trained_apart_are_not_tied(tmp_path: Path) -> None:
    trained = ["embed_tokens.weight", "lm_head.weight"]
    assert not open_dcp(save_embeddings(tmp_path / "equal", torch.arange(600.0).view(30, 20), trained)).ties


@pytest.mark.parametrize("changed", [0, 299, 599])
def test_a_frozen_head_of_its_own_is_not_tied(changed: int, tmp_path: Path) -> None:
    head = torch.arange(600.0)
    head[changed] = -1
    assert not open_dcp(save_embeddings(tmp_path / "frozen", head.view(30, 20), ["embed_tokens.weight"])).ties


def test_tensors_that_are_not_contiguous_are_read_in_order(tmp_path: Path) -> None:
    weights = {"a": torch.arange(24.0).view(2, 3, 4).transpose(1, 2), "b": torch.arange(12).view(3, 4).t()}
    assert differences(weights_of(open_dcp(save(tmp_path / "strided", weights))), weights) == []


@pytest.mark.parametrize("path", [LOOP, TITAN, TRAINER, TIED_FULL], ids=["loop", "titan", "trainer", "full"])
def test_formats_are_told_by_their_names(path: Path) -> None:
    assert open_catalog(path).format == "dcp"


def test_opening_and_planning_leave_torch_out() -> None:
    script = (
        "import sys; from pathlib import Path; from llmtailor.formats.dcp import open_dcp, plan_dcp\n"
        f"for path in {[str(LOOP), str(TITAN), str(TRAINER), str(TIED_FULL)]!r}: plan_dcp(open_dcp(Path(path)))\n"
        "print(*sorted({'torch', 'numpy'} & sys.modules.keys()))"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == []


def test_opening_reads_no_tensor_but_samples_of_embeddings(tmp_path: Path) -> None:
    """Of blocks not even the torch file around a tensor is opened before somebody asks for it."""
    shutil.copytree(LOOP, tmp_path / "loop")
    catalog = open_dcp(tmp_path / "loop")
    for shard in (tmp_path / "loop").glob("*.distcp"):
        shard.unlink()
    assert catalog.layers.names == open_dcp(LOOP).layers.names
    with pytest.raises(NotFoundError):
        _ = catalog.weights["model.norm.weight"].extents  # type: ignore[union-attr]


# Weights alone


@pytest.mark.parametrize(
    "path", [LOOP, TIED, TITAN, TRAINER, TIED_FULL], ids=["loop", "tied", "titan", "trainer", "full"]
)
def test_weights_alone_are_those_of_the_whole(path: Path) -> None:
    alone, whole = open_catalog(path, with_optimizer=False), open_dcp(path)
    assert not alone.has_optimizer
    assert not alone.states
    assert alone.ties == whole.ties
    assert alone.weights.keys() == whole.weights.keys()
    assert differences(weights_of(alone), weights_of(whole)) == []


def test_weights_alone_need_no_names_in_the_optimizer(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    path = save(tmp_path / "numbered", {"model": model.state_dict(), "optim": optimizer.state_dict()})
    assert differences(weights_of(open_dcp(path, with_optimizer=False)), {**model.state_dict()}) == []


def test_weights_alone_are_those_that_are_trained(tmp_path: Path) -> None:
    weights = {"weight": torch.ones(2, 2)}
    optimizer = {"state": {"weight": {"step": 1j}}, "param_groups": [{"params": ["weight"], "bounds": {1, 2}}]}
    state = {"average": {"other": torch.zeros(2, 2)}, "net": weights, "optim": optimizer}
    assert [*open_dcp(save(tmp_path / "two", state), with_optimizer=False).weights] == ["weight"]


def test_equal_weights_that_are_trained_apart_are_not_tied_in_weights_alone(tmp_path: Path) -> None:
    trained = ["embed_tokens.weight", "lm_head.weight"]
    path = save_embeddings(tmp_path / "equal", torch.arange(600.0).view(30, 20), trained)
    assert not open_dcp(path, with_optimizer=False).ties


# What is missing


def test_reader_names_a_missing_shard(tmp_path: Path) -> None:
    shutil.copytree(LOOP, tmp_path / "loop")
    (tmp_path / "loop" / "__1_0.distcp").unlink()
    with pytest.raises(IncompleteError) as caught:
        open_dcp(tmp_path / "loop")
    assert caught.value.kind == "missing-shard"
    assert str(caught.value.path).endswith("__1_0.distcp")


def test_reader_refuses_a_shard_that_was_cut_off(tmp_path: Path) -> None:
    shutil.copytree(LOOP, tmp_path / "loop")
    shard = tmp_path / "loop" / "__1_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(IncompleteError) as caught:
        open_dcp(tmp_path / "loop")
    assert caught.value.kind == "dcp-truncated"


def test_reader_refuses_a_shard_of_another_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(LOOP, tmp_path / "loop")
    shard = tmp_path / "loop" / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data[7:] + data[:7])
    with pytest.raises(FormatError):
        weights_of(open_dcp(tmp_path / "loop"))


def test_reader_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(NotFoundError) as caught:
        open_dcp(tmp_path)
    assert caught.value.found == "notes.txt"
    with pytest.raises(NotFoundError):
        open_dcp(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["__0.metadata", "pytorch_model_fsdp_rank0.bin", "optimizer_1"])
def test_reader_says_what_it_cannot_read_yet(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UnsupportedError) as caught:
        open_dcp(tmp_path)
    assert name in str(caught.value.found)


def test_reader_refuses_numbered_parameters(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    with pytest.raises(UnsupportedError) as caught:
        open_dcp(save(tmp_path / "numbered", state))
    assert caught.value.kind == "dcp-numbered"


def test_reader_asks_which_of_two_models_is_meant(tmp_path: Path) -> None:
    weights = torch.nn.Linear(2, 2).state_dict()
    with pytest.raises(UnsupportedError) as caught:
        open_dcp(save(tmp_path / "two", {"teacher": weights, "student": weights}))
    assert caught.value.kind == "dcp-model"
    assert open_dcp(save(tmp_path / "ema", {"ema": weights, "model": weights})).native.model.path == ("model",)


def test_reader_refuses_two_optimizers(tmp_path: Path) -> None:
    weights = torch.nn.Linear(2, 2).state_dict()
    optimizer = {"state": {}, "param_groups": [{"params": ["weight", "bias"], "lr": 0.1}]}
    with pytest.raises(UnsupportedError) as caught:
        open_dcp(save(tmp_path / "two", {"model": weights, "a": optimizer, "b": optimizer}))
    assert caught.value.kind == "dcp-optimizers"


def test_reader_names_a_parameter_without_weights(tmp_path: Path) -> None:
    weights = torch.nn.Linear(2, 2).state_dict()
    optimizer = {"state": {}, "param_groups": [{"params": ["weight", "scale"], "lr": 0.1}]}
    with pytest.raises(IncompleteError) as caught:
        open_dcp(save(tmp_path / "lacking", {"model": weights, "optim": optimizer}))
    assert caught.value.fqn == "scale"


def test_reader_refuses_state_without_groups(tmp_path: Path) -> None:
    weights = torch.nn.Linear(2, 2).state_dict()
    state = {"state": {"weight": {"exp_avg": torch.zeros(2, 2)}}}
    with pytest.raises(IncompleteError) as caught:
        open_dcp(save(tmp_path / "groupless", {"model": weights, "optim": state}))
    assert caught.value.kind == "dcp-groups"


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"state": {}, "param_groups": [{"params": ["weight", "weight"]}]}, FormatError),
        ({"state": {}, "param_groups": [{"params": ["weight"]}, {"params": ["weight"]}]}, FormatError),
        ({"state": {"bias": {"step": 1}}, "param_groups": [{"params": ["weight"]}]}, IncompleteError),
        ({"state": {"weight": 1}, "param_groups": [{"params": ["weight"]}]}, FormatError),
        ({"state": {}, "param_groups": [{"params": "weight"}]}, FormatError),
        ({"state": {}, "param_groups": [{"lr": 0.1}]}, FormatError),
        ({"state": {}, "param_groups": {"params": ["weight"]}}, FormatError),
        ({"state": {"weight": {"step": 1j}}, "param_groups": [{"params": ["weight"]}]}, UnsupportedError),
    ],
)
def test_reader_refuses_an_optimizer_that_contradicts_itself(
    optimizer: dict[str, Any], expected: type[TailorError], tmp_path: Path
) -> None:
    weights = torch.nn.Linear(2, 2).state_dict()
    with pytest.raises(TailorError) as caught:
        open_dcp(save(tmp_path / "checkpoint", {"model": weights, "optim": optimizer}))
    assert type(caught.value) is expected


def test_reader_refuses_a_gap_among_the_groups(tmp_path: Path) -> None:
    def move_group(fields: dict[str, Any]) -> None:
        for index in fields["storage_data"]:
            index.state["fqn"] = index.state["fqn"].replace("param_groups.1.", "param_groups.3.")
        for name in ("state_dict_metadata", "planner_data"):
            fields[name] = {key.replace("groups.1.", "groups.3."): value for key, value in fields[name].items()}
        for key, path in fields["planner_data"].items():
            fields["planner_data"][key] = tuple(3 if part == 1 else part for part in path)

    with pytest.raises(FormatError) as caught:
        open_dcp(tampered(LOOP, tmp_path, move_group))
    assert "gaps" in str(caught.value.expected)


def test_nested_state_and_unusual_values_are_kept(tmp_path: Path) -> None:
    weights = torch.nn.Linear(2, 2, bias=False).state_dict()
    state = {
        "step": 3,
        "rows": [torch.ones(2), torch.zeros(2)],
        "pair": (torch.ones(1), None),
        "inner": {"q": torch.arange(4), "mode": "fast", "empty": []},
    }
    groups = [{"params": ["weight"], "lr": torch.tensor(0.5), "betas": (0.9, 0.95), "extra": {"a": [1, 2]}}]
    optimizer = {"state": {"weight": state}, "param_groups": groups}
    catalog = open_dcp(save(tmp_path / "nested", {"model": weights, "optim": optimizer}))
    assert differences(groups_of(catalog), groups) == []
    assert differences(states_of(catalog)["weight"], state) == []


def test_names_of_compiled_models_are_canonical(tmp_path: Path) -> None:
    weights = {"_orig_mod.weight": torch.ones(2, 2)}
    optimizer = {"state": {}, "param_groups": [{"params": ["_orig_mod.weight"], "lr": 0.1}]}
    catalog = open_dcp(save(tmp_path / "compiled", {"model": weights, "optim": optimizer}))
    assert [*catalog.weights] == ["weight"]
    assert catalog.optimizers[0].groups[0].parameters == ("weight",)


def test_a_nan_in_the_trainers_log_is_let_through(tmp_path: Path) -> None:
    shutil.copytree(TRAINER, tmp_path / "checkpoint")
    state = json.loads((TRAINER / "trainer_state.json").read_text())
    state["log_history"] = [{"loss": float("nan")}]
    (tmp_path / "checkpoint" / "trainer_state.json").write_text(json.dumps(state))
    assert open_dcp(tmp_path / "checkpoint").step == 2


@pytest.mark.parametrize("text", ["{", '{"global_step": "2"}', "[" * 100_000, "[]", '{"global_step": -1}'])
def test_reader_refuses_a_damaged_trainer_state(tmp_path: Path, text: str) -> None:
    shutil.copytree(TRAINER, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "trainer_state.json").write_text(text)
    with pytest.raises(FormatError):
        open_dcp(tmp_path / "checkpoint")
